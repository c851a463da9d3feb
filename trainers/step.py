"""One optimizer step. The loop, the plan, the benchmarks and the tests take it here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainers.batch import Batch
from trainers.engines.base import Engine
from trainers.health.spikes import NO_LIMITS, Limits
from trainers.objectives import Objective, per_target
from trainers.world import World, read


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of a step, the same on every rank."""

    loss: float
    """Per target; nan where the step has none."""
    grad_norm: float
    """Before clipping; 0 where the step has no targets, and nothing was updated."""
    figures: dict[str, float] = field(default_factory=dict)
    """The objective's, per target or by their own counts."""
    reports: list[float] = field(default_factory=list)
    """The largest over ranks of each number that `report` gave."""


def nothing() -> Sequence[float]:
    """Report nothing."""
    return ()


def take_step(
    engine: Engine,
    objective: Objective,
    batches: Sequence[Batch],
    world: World,
    *,
    lr: float,
    targets: float,
    limits: Limits = NO_LIMITS,
    report: Callable[[], Sequence[float]] = nothing,
    first: Sequence[Batch] = (),
) -> StepResult:
    """Take one optimizer step over this rank's microbatches, as many as on every other rank; collective.

    Sums over the targets of the whole step, which are known before, make it the same under any split into ranks, microbatches
    and accumulation. Nothing is updated above the limits, with a norm that is not finite, or without targets.
    Where the objective has a statistic of the whole step, it is measured on the microbatches of `first` and summed over ranks before
    the first backward: one more small collective.
    What `report` returns after the last backward travels with the loss: as many numbers on every rank, of which the largest count.
    The host waits for the device once, when all of the step's work but the update is done.
    """
    if first and targets:
        from trainers.statistic import with_statistic

        objective = with_statistic(engine, objective, first, world, targets)
    total = torch.zeros((), device=world.device)
    figures: dict[str, Tensor] = {}
    for number, batch in enumerate(batches if targets else (), 1):
        on_device = batch.to(world.device)
        loss = objective(engine.forward(on_device, objective.needs), on_device)
        engine.backward(loss.trained / targets, last=number == len(batches))
        total += loss.total.detach()
        for name, value in loss.sums().items():
            figures[name] = figures.get(name, 0.0) + value.detach()
    names, squares = sorted(figures), engine.squares() if targets else None
    sums, reports = world.sum_and_max(read([total, *(figures[name] for name in names), *([] if squares is None else [squares])]), report())
    norm = None if squares is None else math.sqrt(sums.pop())
    counted = targets * engine.mesh.context * engine.mesh.tensor  # as many ranks have the same rows
    mean = sums[0] / counted if targets else math.nan

    def accepts(norm: float) -> bool:
        return math.isfinite(norm) and not limits.exceeded(mean, norm)

    grad_norm = engine.step(lr, accepts, norm) if targets else 0.0
    return StepResult(loss=mean, grad_norm=grad_norm, figures=per_target(dict(zip(names, sums[1:], strict=True)), counted), reports=reports)
