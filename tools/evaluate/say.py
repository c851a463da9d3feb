"""A run's figures beside its base's, for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from trainers.evaluate.intervals import Estimate, verdict
from trainers.evaluate.record import Evaluation, load_judged, loss_apart, score_apart

NAMES = {"held_out": "held-out loss", "general": "loss on general text"}


def table_of(folder: Path, ours: Evaluation, theirs: Evaluation | None) -> Table:
    """Return a run's figures beside its base's."""
    table = Table(
        title=escape(str(folder.parent)), title_justify="left", caption="losses in nats a token; ± of 95 %", caption_justify="left"
    )
    for name in ("", "base", "run", "run - base", ""):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for part, title in NAMES.items():
        if (loss := ours.loss(part)) is not None:
            base = theirs.loss(part) if theirs else None
            apart = loss_apart(ours, theirs, part) if theirs else None
            table.add_row(title, shown(base, 4), shown(loss, 4), shown(apart, 4, True), verdict(apart, True))
    for metric in dict.fromkeys(metric for row in ours.answers for metric in row["scores"]):
        base = theirs.score(metric) if theirs else None
        apart = score_apart(ours, theirs, metric) if theirs else None
        table.add_row(metric, shown(base, 3), shown(ours.score(metric), 3), shown(apart, 3, True), verdict(apart, False))
    for name, title in (("finished", "answers that end"), ("refused", "refusals")):
        if ours.answers:
            table.add_row(title, shown(theirs.share(name) if theirs else None, 3), shown(ours.share(name), 3), "", "")
    for name, title in (("tokens", "tokens an answer"), ("repetition", "repeated 4-grams")):
        if ours.answers:
            values = [None if theirs is None else theirs.mean(name), ours.mean(name)]
            table.add_row(title, *("" if value is None else f"{value:.3g}" for value in values), "", "")
    if theirs is not None and (judged := load_judged(folder, ours, theirs)) is not None:
        for criterion in judged.run:
            apart = judged.apart(criterion)
            base = float(judged.base[criterion].mean()) if apart is not None else None
            words = "" if base is None else f"{base:.2f}"
            table.add_row(f"judge: {criterion}", words, shown(judged.score(criterion), 2), shown(apart, 2, True), verdict(apart, False))
    return table


def shown(estimate: Estimate | None, digits: int, signed: bool = False) -> str:
    """Return a figure with half the width of its interval."""
    if estimate is None:
        return ""
    ends = "" if estimate.low is None or estimate.high is None else f" ±{(estimate.high - estimate.low) / 2:.{digits}f}"
    return f"{estimate.value:{'+' if signed else ''}.{digits}f}{ends}"
