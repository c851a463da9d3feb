"""A run's metrics next to its base's, for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tools.evaluate.intervals import Estimate, verdict
from tools.evaluate.record import Evaluation, accuracy_apart, likely, load_judged, loss_apart, of_json, score_apart

NOTHING = "-"
MARKS = {"better": "▲", "worse": "▼", "no difference": "="}
"""Of a verdict, in front of a difference."""
Form = Callable[[Estimate | None, int, str], str]
"""How a metric with an interval is written: with so many digits, and `+` for a difference."""
NAMES = {"held_out": "held-out loss", "general": "loss on general text"}


def table_of(folder: Path, ours: Evaluation, theirs: Evaluation | None) -> Table:
    """Return a run's metrics next to its base's."""
    caption = "losses in nats a token; ± of 95 %; ▲ better, ▼ worse, = no difference beyond the noise"
    caption += "" if ours.pairs is None else "; longer, shorter: pairs whose preferred answer is that"
    title = str(folder.parent) if ours.about.get("name") != "model" else str(ours.about.get("model"))
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column()
    for name in ("base", "run", "run - base"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in [
        *_losses(ours, theirs),
        *_pairs(ours, theirs),
        *_scores(ours, theirs),
        *_benchmarks(ours, theirs),
        *_judged(folder, ours, theirs),
    ]:
        table.add_row(*line)
    return table


def _losses(ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    lines = []
    for part, title in NAMES.items():
        if (loss := ours.loss(part)) is not None:
            apart = loss_apart(ours, theirs, part) if theirs else None
            lines.append([title, plus_minus(theirs.loss(part) if theirs else None, 3, ""), plus_minus(loss, 3, ""), _told(apart, 3, True)])
    return lines


BUCKET_WORDS = {"all": "", "longer": ", longer", "shorter": ", shorter"}
"""Of a bucket of pairs, by whether the preferred answer is the longer one."""


def _pairs(ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    """Return how well preferred answers are told from the others, by rewards where the run has some, and by log-probabilities."""
    if ours.pairs is None:
        return []
    lines = [_accuracy(ours, theirs, bucket) for bucket in BUCKET_WORDS]
    margins = [None if one is None or _kind(one) != _kind(ours) else one.margin() for one in (theirs, ours)]
    lines.append([f"{_kind(ours)} margin", *(plus_minus(value, 3, "") for value in margins), ""])
    if ours.pairs.rewards is None or ours.pairs.logps is None:
        return lines
    return [*lines, _accuracy(likely(ours), theirs and likely(theirs), "all")]


def _accuracy(ours: Evaluation, theirs: Evaluation | None, bucket: str) -> list[str]:
    base = None if theirs is None or _kind(theirs) != _kind(ours) else theirs.accuracy(bucket)
    apart = accuracy_apart(ours, theirs, bucket) if theirs else None
    title = f"{_kind(ours)} accuracy{BUCKET_WORDS[bucket]}"
    return [title, plus_minus(base, 3, ""), plus_minus(ours.accuracy(bucket), 3, ""), _told(apart, 3, False)]


def _kind(evaluation: Evaluation) -> str:
    """Say what pairs are ordered by."""
    return "likelihood" if evaluation.pairs is None or evaluation.pairs.rewards is None else "reward"


def _scores(ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    lines = []
    for metric in dict.fromkeys(metric for row in ours.answers for metric in row["scores"]):
        apart = score_apart(ours, theirs, metric) if theirs else None
        base = theirs.score(metric) if theirs else None
        lines.append([metric, plus_minus(base, 3, ""), plus_minus(ours.score(metric), 3, ""), _told(apart, 3, False)])
    for name, title in (("finished", "answers that end"), ("refused", "refusals")):
        if ours.answers:
            lines.append([title, plus_minus(theirs.share(name) if theirs else None, 3, ""), plus_minus(ours.share(name), 3, ""), ""])
    for name, title in (("tokens", "tokens an answer"), ("repetition", "repeated 4-grams")):
        if ours.answers:
            values = [None if theirs is None else theirs.mean(name), ours.mean(name)]
            lines.append([title, *(NOTHING if value is None else f"{value:.3g}" for value in values), ""])
    return lines


def _benchmarks(ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    lines = []
    for task, found in ours.about.get("lm_eval", {}).items():
        for metric, figure in found.items():
            other = theirs.about.get("lm_eval", {}).get(task, {}).get(metric) if theirs else None
            lines.append([f"{task}, {metric}", plus_minus(of_json(other), 3, ""), plus_minus(of_json(figure), 3, ""), ""])
    return lines


def _judged(folder: Path, ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    judged = None if theirs is None else load_judged(folder, ours, theirs)
    if judged is None:
        return []
    lines = [["judge: wins, ties as half", NOTHING, plus_minus(judged.win_rate(), 3, ""), ""]]
    for criterion in judged.run:
        base = f"{judged.base[criterion].mean():.2f}" if len(judged.base[criterion]) else NOTHING
        lines.append([f"judge: {criterion}", base, plus_minus(judged.score(criterion), 2, ""), _told(judged.apart(criterion), 2, False)])
    return lines


def _told(apart: Estimate | None, digits: int, lower_is_better: bool) -> str:
    return marked(apart, verdict(apart, lower_is_better), digits, plus_minus)


def marked(apart: Estimate | None, told: str, digits: int, form: Form) -> str:
    """Return a difference with its interval and the mark of what it tells."""
    return NOTHING if apart is None else f"{MARKS.get(told, '')} {form(apart, digits, '+')}".strip()


def plus_minus(estimate: Estimate | None, digits: int, sign: str) -> str:
    """Return a metric with half the width of its interval."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return interval(estimate, digits, sign)
    return f"{estimate.value:{sign}.{digits}f} ±{(estimate.high - estimate.low) / 2:.{digits}f}"


def interval(estimate: Estimate | None, digits: int, sign: str) -> str:
    """Return a metric with the ends of its interval."""
    if estimate is None:
        return NOTHING
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{sign}.{digits}f}"
    return f"{estimate.value:{sign}.{digits}f} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"
