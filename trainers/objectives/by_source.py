"""An objective that also reports the loss of each source of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainers.batch import SOURCE, Batch, Output, Sizes
from trainers.objectives.base import Loss, Measured, Objective


class BySource:
    """An objective that reports loss/NAME of each source, divided by the source's own targets; objectives without `each` have none."""

    def __init__(self, objective: Objective, names: Sequence[str]) -> None:
        """Take the sources in the order of their numbers."""
        self.objective, self.names = objective, names
        self.needs, self.signals = objective.needs, objective.signals

    def targets(self, sizes: Sizes) -> float:
        """Return the objective's own."""
        return self.objective.targets(sizes)

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the objective's loss with that of each source."""
        loss = self.objective(output, batch)
        if loss.each is None:
            return loss
        numbers = batch.signals[SOURCE].long()[:: 2 if len(loss.each[0]) < batch.num_documents else 1]  # of a pair the first one's
        sums, counts = (torch.zeros(len(self.names), device=numbers.device).index_add(0, numbers, values) for values in loss.each)
        return replace(loss, figures=loss.figures | self._by_name(sums), counts=loss.counts | self._by_name(counts))

    def measure(self, output: Output, batch: Batch) -> Tensor:
        """Return the objective's own."""
        assert isinstance(self.objective, Measured)
        return self.objective.measure(output, batch)

    def given(self, statistic: float) -> Objective:
        """Return the objective of a step whose statistic is known, with the loss of each source."""
        assert isinstance(self.objective, Measured)
        return BySource(self.objective.given(statistic), self.names)

    def _by_name(self, values: Tensor) -> dict[str, Tensor]:
        return {f"loss/{name}": value for name, value in zip(self.names, values, strict=True)}
