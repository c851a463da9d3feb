"""What is minimised: functions of token log-probabilities that know no model and no engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainers.batch import IGNORE, Batch
from trainers.config.schema import ObjectiveConfig, ObjectiveName


@dataclass(kw_only=True)
class Loss:
    """A microbatch's loss as a SUM; the loop divides by the weight of the whole step."""

    total: Tensor
    """Scalar float32 with a graph; exactly 0 where nothing is labelled."""


class Objective(Protocol):
    """One objective: how much a microbatch weighs, and its summed loss."""

    def weight(self, batch: Batch) -> int:
        """Return the number of targets, from a batch on the CPU."""
        ...

    def __call__(self, logps: Tensor, batch: Batch) -> Loss:
        """Return the summed loss of logps (B, S) float32."""
        ...


class NextToken:
    """Cross-entropy of the labelled tokens: supervised fine-tuning and continued pre-training differ in labels alone."""

    def weight(self, batch: Batch) -> int:
        """Return the number of labelled tokens."""
        return int((batch.labels != IGNORE).sum())

    def __call__(self, logps: Tensor, batch: Batch) -> Loss:
        """Return minus the summed log-probability."""
        return Loss(total=-logps.sum())


CHOICES: dict[ObjectiveName, Callable[[ObjectiveConfig], Objective]] = {
    ObjectiveName.sft: lambda config: NextToken(),
    ObjectiveName.cpt: lambda config: NextToken(),
}
