"""An objective's statistic of a whole step, or of all held-out rows: measured before what is minimised, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainers.batch import Batch, Output, Sizes
from trainers.engines.base import Engine
from trainers.objectives import Loss, Objective
from trainers.objectives.base import Measured
from trainers.world import World, read


@torch.no_grad()
def with_statistic(engine: Engine, objective: Objective, batches: Sequence[Batch], world: World, targets: float) -> Objective:
    """Return the objective given its statistic over this rank's microbatches, as many as on every other rank; collective.

    It is the sum over all ranks, divided by the step's targets: the same under any split.
    """
    measure = AsLoss(objective)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in batches:
        on_device = batch.to(world.device)
        total += measure(engine.forward(on_device, measure.needs), on_device).total.double()
    return measure.measured.given(world.sum(read([total]))[0] / engine.mesh.same_rows / targets)


class AsLoss:
    """An objective's statistic in the place of its loss, so that what sums losses sums it."""

    def __init__(self, objective: Objective) -> None:
        """Take an objective that has one."""
        assert isinstance(objective, Measured)
        self.measured, self.needs, self.signals = objective, objective.needs, objective.signals

    def targets(self, sizes: Sizes) -> float:
        """Return the objective's own."""
        return self.measured.targets(sizes)

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return a microbatch's part of the statistic."""
        return Loss(total=self.measured.measure(output, batch))
