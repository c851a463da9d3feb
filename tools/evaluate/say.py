"""A run's metrics next to its base's, for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tools.evaluate.intervals import Estimate, verdict
from tools.evaluate.record import (
    Evaluation,
    accuracy_apart,
    likely,
    load_judged,
    loss_apart,
    of_json,
    rightness_apart,
    score_apart,
    task_metric,
)
from tools.evaluate.unpaired import KINDS

NOTHING = "-"
MOST_CLASSES = 20
"""Of which F1 is printed; run.json has all."""
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
        *_told_apart(ours, theirs),
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
    lines += [_length(number, ours, theirs) for number in range(len(ours.by_length()))]
    longer = [None if one is None or _kind(one) != _kind(ours) else one.longer_wins() for one in (theirs, ours)]
    preferred = plus_minus(ours.longer_preferred(), 3, "")
    lines.append([f"longer answer scores higher (preferred: {preferred})", *(plus_minus(value, 3, "") for value in longer), ""])
    if ours.pairs.rewards is None or ours.pairs.logps is None:
        return lines
    return [*lines, _accuracy(likely(ours), theirs and likely(theirs), "all")]


def _accuracy(ours: Evaluation, theirs: Evaluation | None, bucket: str) -> list[str]:
    base = None if theirs is None or _kind(theirs) != _kind(ours) else theirs.accuracy(bucket)
    apart = accuracy_apart(ours, theirs, bucket) if theirs else None
    title = f"{_kind(ours)} accuracy{BUCKET_WORDS[bucket]}"
    return [title, plus_minus(base, 3, ""), plus_minus(ours.accuracy(bucket), 3, ""), _told(apart, 3, False)]


def _length(number: int, ours: Evaluation, theirs: Evaluation | None) -> list[str]:
    """Return the accuracy of a third of the pairs by length; the base's where it was measured on the same ones."""
    (low, high), own = ours.by_length()[number]
    is_same = theirs is not None and _kind(theirs) == _kind(ours) and accuracy_apart(ours, theirs) is not None
    base = theirs.by_length()[number][1] if theirs is not None and is_same else None
    return [f"{_kind(ours)} accuracy, {low:g} to {high:g} tokens an answer", plus_minus(base, 3, ""), plus_minus(own, 3, ""), ""]


def _told_apart(ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    """Return how often a classifier finds the class, or how often a reward tells answers that are wanted from the others."""
    if ours.right is None:
        return []
    apart = rightness_apart(ours, theirs) if theirs else None
    base = theirs.rightness() if theirs else None
    lines = [["accuracy", plus_minus(base, 3, ""), plus_minus(ours.rightness(), 3, ""), _told(apart, 3, False)]]
    if ours.unpaired is not None:
        lines += [[f"accuracy of {kind} answers", NOTHING, plus_minus(ours.unpaired.accuracy(kind), 3, ""), ""] for kind in KINDS]
        lines += [[f"reward of {kind} answers", NOTHING, plus_minus(ours.unpaired.reward(kind), 3, ""), ""] for kind in KINDS]
    if ours.classes is not None:
        named = {"macro F1": ours.classes.macro_f1(), "calibration error": ours.classes.calibration_error()}
        named |= {"confidence - accuracy": ours.classes.overconfidence()}
        named |= {f"F1 of {name}": ours.classes.f1(name) for name in ours.classes.names[:MOST_CLASSES]}
        lines += [[escape(name), NOTHING, plus_minus(value, 3, ""), ""] for name, value in named.items()]
    return lines


def _kind(evaluation: Evaluation) -> str:
    """Say what pairs are ordered by."""
    return "likelihood" if evaluation.pairs is None or evaluation.pairs.rewards is None else "reward"


def _scores(ours: Evaluation, theirs: Evaluation | None) -> list[list[str]]:
    lines = []
    for metric in dict.fromkeys(metric for row in ours.answers for metric in row["scores"]):
        apart = score_apart(ours, theirs, metric) if theirs else None
        base = theirs.score(metric) if theirs else None
        lines.append([metric, plus_minus(base, 3, ""), plus_minus(ours.score(metric), 3, ""), _told(apart, 3, False)])
    metric = str(task_metric(ours))
    of_base = theirs.score_by_count(metric) if theirs else {}
    for count, value in ours.score_by_count(metric).items():
        lines.append([f"{metric}, {count} in the prompt", plus_minus(of_base.get(count), 3, ""), plus_minus(value, 3, ""), ""])
    for name, title in (("finished", "answers that end"), ("refused", "refusals")):
        if ours.answers:
            lines.append([title, plus_minus(theirs.share(name) if theirs else None, 3, ""), plus_minus(ours.share(name), 3, ""), ""])
    if ours.answers:
        title = f"answers with the same opening (references: {plus_minus(ours.same_opening('reference'), 3, '')})"
        lines.append([title, plus_minus(theirs.same_opening() if theirs else None, 3, ""), plus_minus(ours.same_opening(), 3, ""), ""])
    titles = {"tokens": "tokens an answer", "reasoning": "of these reasoning", "repetition": "repeated 4-grams"}
    for name, title in titles.items():
        values = [None if theirs is None else theirs.mean(name), ours.mean(name)]
        if ours.answers and (name != "reasoning" or any(values)):
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
