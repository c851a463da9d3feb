"""What RUN_DIR/metrics.jsonl holds: a JSON object a line, each with a `kind`. The one reader of it; no torch.

A non-finite number is null in the file and nan here. Rows of earlier versions have no kind; their keys tell it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from trainers.rundir.files import try_row
from trainers.rundir.paths import METRICS

Row = dict[str, Any]


class Kind(StrEnum):
    """What a row of metrics.jsonl is about."""

    step = "step"
    """An optimizer step: loss, learning rate, gradient norm, speed."""
    evaluation = "evaluation"
    """The held-out loss after a step."""
    rollback = "rollback"
    """The run went back to a checkpoint: `step` is the checkpoint's, `rollback_from` the step that was not taken."""


KEYS = {"eval_loss": Kind.evaluation, "rollback_from": Kind.rollback, "loss": Kind.step}
"""By which of its keys a row without a kind is told."""

NUMBERS: dict[str, tuple[str, ...]] = {
    Kind.step: ("loss", "grad_norm", "skipped"),
    Kind.evaluation: ("eval_loss",),
    Kind.rollback: ("rollback_from",),
}
"""What a row of a kind has, null where it is not finite."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run must know of its own past to continue from a checkpoint."""

    eval_losses: list[float] = field(default_factory=list)
    """The objective's held-out losses, nan where one was not finite; the one before the first step first."""
    train_loss: float | None = None
    """Loss of the last step, nan where it was not finite; None before the first."""
    evaluated_at: int = -1
    """Step of the newest evaluation; -1 before the first."""
    taken: list[tuple[float, float]] = field(default_factory=list)
    """(loss, gradient norm) of the steps that updated the weights."""


def history(rows: list[Row]) -> History:
    """Return what rows say of a run's past."""
    losses = [number(row["loss"]) for row in steps(rows)]
    return History(
        eval_losses=eval_losses(rows),
        train_loss=losses[-1] if losses else None,
        evaluated_at=last_step(evaluations(rows), default=-1),
        taken=taken_steps(rows),
    )


def read_rows(run_dir: Path, last_bytes: int | None = None) -> list[Row]:
    """Return the rows of a run's metrics.jsonl, or those in its last bytes; empty where there is no such file.

    Half lines are left out: the last one of a run that writes or was killed, and the first one of `last_bytes`. So is what no run
    writes: a line without a step, or with something else where its kind has a number.
    """
    try:
        with (run_dir / METRICS).open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [row for line in text.splitlines() if (row := try_row(line)) is not None and is_whole(row)]


def is_whole(row: Row) -> bool:
    """Tell whether a row has a step, and numbers where others look for them."""
    needed = NUMBERS.get(kind_of(row), ())
    return type(row.get("step")) is int and all(name in row for name in needed[:1]) and all(_is_number(row.get(name)) for name in needed)


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def kind_of(row: Row) -> str:
    """Return what a row is about, a Kind; empty where neither its kind nor its keys tell."""
    return str(row.get("kind") or next((kind for key, kind in KEYS.items() if key in row), ""))


def steps(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of optimizer steps."""
    return [row for row in rows if kind_of(row) == Kind.step]


def evaluations(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of evaluations."""
    return [row for row in rows if kind_of(row) == Kind.evaluation]


def rollbacks(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of rollbacks."""
    return [row for row in rows if kind_of(row) == Kind.rollback]


def until(rows: Iterable[Row], step: int) -> list[Row]:
    """Return the rows that a run keeps which continues from a checkpoint of `step`, without a rollback to it."""
    return [row for row in rows if row["step"] + (kind_of(row) == Kind.rollback) <= step]


def last_step(rows: Iterable[Row], default: int = 0) -> int:
    """Return the highest step of rows."""
    return max((int(row["step"]) for row in rows), default=default)


def eval_losses(rows: Iterable[Row]) -> list[float]:
    """Return the objective's held-out losses, nan where one was not finite."""
    return [number(row["eval_loss"]) for row in evaluations(rows)]


def taken_steps(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of the steps that updated the weights."""
    taken, skipped = [], 0
    for row in steps(rows):
        pair, skipped_until = (number(row["loss"]), number(row.get("grad_norm"))), row.get("skipped", skipped)
        if skipped_until == skipped and all(map(math.isfinite, pair)):
            taken.append(pair)
        skipped = skipped_until
    return taken


def number(value: float | None) -> float:
    """Return a number of a row, nan for null."""
    return math.nan if value is None else float(value)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with None for numbers that are not finite, which JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def of_sources(rows: Iterable[Row], step: int) -> dict[str, float | None]:
    """Return what summary.json has of each source of a mixture: held-out losses before training and at `step`, passes over its rows."""
    measured, trained, loss = evaluations(rows), steps(rows), "eval_loss/"
    at = next((row for row in reversed(measured) if row["step"] == step), {})
    before = (
        {f"eval_loss_before/{name[len(loss) :]}": value for name, value in measured[0].items() if name.startswith(loss)} if measured else {}
    )
    after = {f"eval_loss_after/{name[len(loss) :]}": value for name, value in at.items() if name.startswith(loss)}
    return before | after | {name: value for name, value in trained[-1].items() if name.startswith("epoch/")}
