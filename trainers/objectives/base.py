"""What an objective is: what it reads, what divides its loss, and its summed loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from trainers.batch import Batch, Needs, Output, Sizes

REFERENCE = "reference"
"""The signal that holds the log-probability of each document under the model that training began with, in nats."""


@dataclass(kw_only=True)
class Loss:
    """A microbatch's loss as a SUM; `take_step` divides by the targets of the whole step."""

    total: Tensor
    """Scalar float32 with a graph; exactly 0 where nothing is labelled."""
    regulariser: Tensor | None = None
    """Scalar with a graph: trained on and not part of the loss that is reported; a SUM, divided like `total`."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are reported under their names, the same names in every microbatch; SUMS, divided like `total`."""

    @property
    def trained(self) -> Tensor:
        """Return what is minimised."""
        return self.total if self.regulariser is None else self.total + self.regulariser


class Objective(Protocol):
    """One objective: what it reads, what divides its loss, and its summed loss."""

    needs: Needs
    signals: frozenset[str]
    """Signals that the table must carry."""

    def targets(self, sizes: Sizes) -> int:
        """Return the denominator for rows of these sizes: labels, documents or units."""
        ...

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch."""
        ...
