"""Loss scaling for float16, whose smallest number is 6e-8: gradients are taken of a multiple of the loss, and divided by it in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INITIAL, STEPS = 65536.0, 2000
"""torch.amp.GradScaler's defaults."""


@dataclass
class LossScale:
    """The factor of the loss, which follows torch.amp.GradScaler's rule with its factors of 2 and 1/2.

    A power of two, so that neither scaling nor unscaling rounds anything. All ranks see the same norms and so have the same factor.
    """

    factor: float = INITIAL
    interval: int = STEPS
    """Steps in a row with finite gradients after which the factor doubles."""
    finite_in_a_row: int = 0

    def after(self, finite: bool) -> None:
        """Count a step: halve the factor where its gradients were not finite, double it where they have been for long enough."""
        self.finite_in_a_row = self.finite_in_a_row + 1 if finite else 0
        if not finite:
            self.factor /= 2
        elif self.finite_in_a_row == self.interval:
            self.factor, self.finite_in_a_row = self.factor * 2, 0

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, the same on every rank."""
        return {"factor": torch.tensor(self.factor, dtype=torch.float64), "finite_in_a_row": torch.tensor(self.finite_in_a_row)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint holds."""
        self.factor, self.finite_in_a_row = float(state["factor"]), int(state["finite_in_a_row"])

    def words(self) -> str:
        """Say the factor and when it changes, for the start-up table."""
        return f"{self.factor:,.10g}, halved where gradients overflow, doubled after {self.interval:,} steps in a row without"
