"""The held-out loss: when it is measured, how, and when it no longer falls."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from trainers.batch import Batch, Sizes
from trainers.config.schema import TrainConfig
from trainers.data.loader import Ints, eval_batches
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.health.activity import watch
from trainers.objectives import Objective, Tallied, per_target
from trainers.world import World

ASK_EVERY_S = 2.0
"""How often an evaluation asks the other ranks whether one of them is to stop."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on the held-out rows, per target."""

    loss: float
    figures: dict[str, float] = field(default_factory=dict)
    """The objective's own, as `eval_NAME`."""


def evaluate(engine: Engine, objective: Objective, batches: Iterable[Batch], world: World, targets: float) -> Evaluation | None:
    """Return the loss of held-out rows: one sum over all of them, each counted once; None where a rank was asked to stop.

    Takes as many microbatches on every rank. Only sums are kept, so memory does not grow with the number of rows. Collective.
    """
    found = summed(engine, objective, batches, world)
    return None if found is None else evaluation_of(objective, *found, targets)


@torch.no_grad()
def summed(engine: Engine, objective: Objective, batches: Iterable[Batch], world: World) -> tuple[dict[str, float], list[float]] | None:
    """Return what `evaluate` divides: the sums over all rows by name, the loss under "", and those of an objective's tally."""
    engine.train(False)
    sums: dict[str, float] = {}
    tally: Tensor | None = None
    every, began = 1, time.monotonic()
    for number, batch in enumerate(watch.each(batches), 1):
        on_device = batch.to(world.device)
        output = engine.forward(on_device, objective.needs)
        loss = objective(output, on_device)
        if isinstance(objective, Tallied):
            more = objective.tally(output, on_device).double()
            tally = more if tally is None else tally + more
        for name, value in {"": loss.total, **loss.sums()}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        if number == every:  # not at each: a sum over ranks takes as long as a small microbatch
            stop, seconds = world.max([float(world.signalled is not None), (time.monotonic() - began) / number])
            if stop:
                return None
            every += max(1, round(ASK_EVERY_S / max(seconds, 1e-6)))
    engine.train(True)
    names, each = sorted(sums), engine.mesh.same_rows  # as many ranks have the same rows
    whole = {name: total / each for name, total in zip(names, world.sum([sums[name] for name in names]), strict=True)}
    return whole, [] if tally is None else world.sum((tally / each).tolist())


def evaluation_of(objective: Objective, sums: dict[str, float], tally: list[float], targets: float) -> Evaluation:
    """Return what sums over rows are per target."""
    means = per_target(sums, targets)
    if isinstance(objective, Tallied) and tally:
        means |= objective.summary(tally)
    return Evaluation(loss=means[""], figures={f"eval_{name}": value for name, value in means.items() if name})


class HeldOut:
    """The held-out rows of a run, when they are evaluated, and the losses so far."""

    def __init__(self, table: TokenTable | None, train: TrainConfig, num_steps: int, world: World, pad_id: int) -> None:
        """Take no rows at all where there are none."""
        self.table, self.train, self.num_steps, self.world, self.pad_id = table, train, num_steps, world, pad_id
        self.sizes = Sizes() if table is None else table.sizes(np.arange(len(table)))
        self.losses: list[float] = []  # the objective's, the one before the first step first
        self.at = -1  # the step after which the newest was measured in this attempt; -1 before any

    def is_due(self, step: int) -> bool:
        """Tell whether to evaluate after `step`."""
        every = self.train.eval_every
        return self.table is not None and (step in (0, self.num_steps) or (every is not None and step % every == 0))

    def measure(self, engine: Engine, objective: Objective, step: int) -> Evaluation | None:
        """Evaluate after `step`; None where a rank was asked to stop. Collective."""
        assert self.table is not None
        if self.table.partners is not None:
            rows = self.train.eval_microbatch or self.train.microbatch
            given = self._with_statistic(engine, objective, objective.targets(self.sizes), rows)
            if given is None:
                return None
            objective = given
        if not self.table.sources:
            found = self._evaluate(engine, objective, np.arange(len(self.table)))
        else:
            found = self._by_source(engine, objective, self.table.rows_of_sources())
        if found is not None:
            self.losses.append(found.loss)
            self.at = step
        return found

    def _with_statistic(self, engine: Engine, objective: Objective, targets: float, rows: int) -> Objective | None:
        """Return the objective given its statistic over all held-out rows; None where a rank was asked to stop. Collective."""
        from trainers.data.mismatched import all_mismatched
        from trainers.statistic import AsLoss

        assert self.table is not None
        share = engine.mesh.share_of(self.world.rank) | {"pad_id": self.pad_id}
        batches = (batch for part in all_mismatched(self.table) for batch in eval_batches(part, rows, **share))
        measure = AsLoss(objective)
        found = evaluate(engine, measure, batches, self.world, targets)
        return None if found is None else measure.measured.given(found.loss)

    def _evaluate(self, engine: Engine, objective: Objective, rows: Ints) -> Evaluation | None:
        """Evaluate some of the rows."""
        assert self.table is not None
        return evaluate(engine, objective, self._batches(engine, self.table, rows), self.world, objective.targets(self.table.sizes(rows)))

    def _batches(self, engine: Engine, table: TokenTable, rows: Ints) -> Iterable[Batch]:
        size, share = self.train.eval_microbatch or self.train.microbatch, engine.mesh.share_of(self.world.rank)
        return eval_batches(table, size, pad_id=self.pad_id, rows=rows, **share)

    def _by_source(self, engine: Engine, objective: Objective, rows_of: dict[str, Ints]) -> Evaluation | None:
        """Evaluate the rows of each source: the numbers of all rows, and each source's as NAME/SOURCE."""
        assert self.table is not None
        sums, tally, figures = Counter[str](), list[float](), dict[str, float]()
        for name, rows in rows_of.items():
            part = summed(engine, objective, self._batches(engine, self.table, rows), self.world)
            if part is None:
                return None
            found = evaluation_of(objective, *part, objective.targets(self.table.sizes(rows)))
            figures |= {f"{figure}/{name}": value for figure, value in {"eval_loss": found.loss, **found.figures}.items()}
            sums.update(part[0])
            tally = [one + other for one, other in zip_longest(tally, part[1], fillvalue=0.0)]
        whole = evaluation_of(objective, dict(sums), tally, objective.targets(self.sizes))
        return Evaluation(loss=whole.loss, figures=whole.figures | figures)

    def loss_at(self, step: int) -> float | None:
        """Return the loss after `step`, None where it was not measured in this attempt."""
        return self.losses[-1] if self.at == step and self.losses else None

    def is_stalled(self) -> bool:
        """Tell whether the losses have not improved for as long as `train.patience` allows."""
        return stalled(self.losses, self.train.patience, self.train.min_improvement)


def stalled(losses: list[float], patience: int | None, min_improvement: float) -> bool:
    """Tell whether the last `patience` held-out losses brought no improvement over the best before each."""
    if patience is None:
        return False
    best, waited = math.inf, 0
    for loss in losses:
        if loss < best - min_improvement:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= patience
