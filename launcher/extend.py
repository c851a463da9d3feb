"""Longer training by `train.extend=true`: exact, or refused with the way that there is."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from launcher.changes import field_of
from trainers.config.choices import Exhausted, PeftMethod
from trainers.config.derived import learning_rate, length, peak_lr
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.rundir import checkpoints, paths
from trainers.rundir.files import try_json

LENGTH = ("train.steps", "train.epochs")
BEGIN_WITH = {
    PeftMethod.none: "model.id",
    PeftMethod.freeze: "model.id",
    **dict.fromkeys((PeftMethod.lora, PeftMethod.dora, PeftMethod.ia3, PeftMethod.prompt, PeftMethod.prefix), "peft.adapter"),
    PeftMethod.bottleneck: "peft.adapter",
}
"""The setting by which a new run begins with an export."""


def is_other_length(kept: list[str]) -> bool:
    """Tell whether all that a command would change of what is trained is for how long."""
    return bool(kept) and all(field_of(line) in LENGTH for line in kept)


def continues_from(run_dir: Path, old: RunConfig, new: RunConfig) -> int:
    """Return the step of the checkpoint that the longer run continues from, 0 where it has none: until there both lengths are the same run.

    Raises ConfigError where the new length is not longer, is not asked for by `train.extend`, or would have trained the steps before
    every checkpoint differently.
    """
    rows = pass_rows(run_dir)
    if rows is None:
        raise _new_run(run_dir, old, new, "how long this run is, is not known yet")
    before, after = length(old.train, rows)[1], length(new.train, rows)[1]
    if after <= before:
        reason = f"this run has {before} steps, and {after} is not longer; `touch {run_dir / paths.STOP}` ends one that is running"
        raise ConfigError(*_asked(new), reason, "the settings of this run")
    if new.data.mix and new.data.mix_exhausted is not Exhausted.repeat:
        raise _new_run(run_dir, old, new, f"data.mix_exhausted={new.data.mix_exhausted} decides when it ends", after - before)
    if new.train.patience is not None:
        raise _new_run(run_dir, old, new, "train.patience decides when this run ends", after - before)
    if new.rl.staleness:
        reason = f"with rl.staleness={new.rl.staleness} the weights of its last steps were kept for no rollout"
        raise _new_run(run_dir, old, new, reason, after - before)
    same = same_steps(old, new, rows)
    saved = [checkpoints.number_of(path) for path in _complete(run_dir)]
    usable = [step for step in saved if step <= same]
    if saved and not usable:
        reason = f"{after} steps instead of {before} would have had other learning rates from step {same + 1} on"
        raise _new_run(run_dir, old, new, f"{reason}, and the oldest checkpoint is of step {min(saved)}", after - before)
    if not new.train.extend:
        start = f"it continues from step {max(usable, default=0)}"
        raise ConfigError(*_asked(new), f"this run was made for {before} steps", f"{_given(new)} train.extend=true: {start}")
    return max(usable, default=0)


def same_steps(old: RunConfig, new: RunConfig, rows: int) -> int:
    """Return how many first steps of a run are the same with another length: their rows and their learning rates."""
    if old.peft.method is PeftMethod.adalora:  # it spreads its ranks over the whole length
        return 0
    (num_rows, before), (_, after) = length(old.train, rows), length(new.train, rows)
    whole = num_rows // old.train.global_batch  # the last step of epochs may be short
    peak = peak_lr(old.optim, old.peft).value
    rates = ((learning_rate(old.optim, peak, step, before), learning_rate(old.optim, peak, step, after)) for step in range(whole))
    return next((step for step, (one, other) in enumerate(rates) if one != other), whole)


def pass_rows(run_dir: Path) -> int | None:
    """Return the rows of one epoch; None where the data were never prepared."""
    known = try_json(run_dir / paths.MANIFEST)
    rows: int | None = known.get("data", {}).get("splits", {}).get("train", {}).get("rows")
    of_mixture: int | None = known.get("mixture", {}).get("pass_rows")
    return of_mixture or rows


def set_aside(run_dir: Path, step: int, num_steps: int) -> None:
    """Take what was made after `step` out of the way of a longer run: checkpoints, and rollouts of later weights.

    They keep their content, under the length that they belong to.
    """
    later = [path for path in checkpoints.steps(run_dir / paths.CHECKPOINTS) if checkpoints.number_of(path) > step]
    rollouts = checkpoints.steps(run_dir / paths.ROLLOUTS)
    later += [path for path in rollouts if try_json(path / paths.ABOUT).get("version", math.inf) > step]
    for path in later:
        with contextlib.suppress(FileNotFoundError):  # another machine's launcher was quicker
            path.rename(path.with_name(f"{path.name}.of-{num_steps}-steps"))


def _complete(run_dir: Path) -> list[Path]:
    run = str(try_json(run_dir / paths.MANIFEST).get("wandb_id", ""))
    return [path for path in checkpoints.steps(run_dir / paths.CHECKPOINTS) if not checkpoints.why_not_of(run, path)]


def _asked(new: RunConfig) -> tuple[str, float | None]:
    return ("train.steps", new.train.steps) if new.train.steps is not None else ("train.epochs", new.train.epochs)


def _given(new: RunConfig) -> str:
    name, value = _asked(new)
    return f"{name}={'null' if value is None else value}"


def _new_run(run_dir: Path, old: RunConfig, new: RunConfig, reason: str, more: int | None = None) -> ConfigError:
    """Return the refusal that names the way there is: a new run that begins with what this one has exported."""
    field, export = BEGIN_WITH.get(old.peft.method), run_dir / paths.EXPORT
    steps = [] if more is None else [f"train.steps={more}"]
    if field is None or not export.is_dir():
        remedy = f"run_dir={run_dir}-longer, a new run of that length"
    else:
        remedy = " ".join([f"{field}={export}", *steps, f"run_dir={run_dir}-longer"]) + ", a new run that begins where this one ended"
    return ConfigError(*_asked(new), f"this run cannot be made longer: {reason}", remedy)
