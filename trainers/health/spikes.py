"""When a step's loss or gradient norm is out of the ordinary: far above the median of the last ones, by a measure no outlier moves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW, FEWEST = 100, 20
"""Steps that are remembered, and steps that must be before any is judged."""
TO_SIGMA = 1.4826
"""Standard deviations in a median absolute deviation of normal numbers."""
LEAST = 0.05
"""Smallest deviation that is believed, as a share of the median: curves may be flat."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest ordinary loss and gradient norm of a step."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def exceeded(self, loss: float, grad_norm: float) -> str:
        """Say which of the two is too large, and what would be ordinary; nothing where neither is, or is not finite."""
        if loss > self.loss:
            return f"the loss is {loss:.4g}, and up to {self.loss:.4g} would be ordinary"
        if grad_norm > self.grad_norm and math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm:.4g}, and up to {self.grad_norm:.4g} would be ordinary"
        return ""


NO_LIMITS = Limits()


def limit(values: Iterable[float], threshold: float) -> float:
    """Return median + threshold x deviation, the deviation being 1.4826 x the median distance from the median; infinite if too few."""
    ordered = sorted(values)
    if len(ordered) < FEWEST:
        return math.inf
    middle = _median(ordered)
    deviation = max(TO_SIGMA * _median(sorted(abs(value - middle) for value in ordered)), LEAST * abs(middle))
    return middle + threshold * deviation


def _median(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Spikes:
    """The last ordinary steps of a run; a function of its metrics, so that a continued run judges as one that was not stopped."""

    def __init__(self, threshold: float) -> None:
        """Remember nothing yet."""
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def recall(self, steps: Iterable[tuple[float, float]]) -> None:
        """Begin with the (loss, gradient norm) of the steps that a run has taken."""
        self.losses.clear()
        self.norms.clear()
        for loss, norm in steps:
            self.add(loss, norm)

    def add(self, loss: float, norm: float) -> None:
        """Remember a step that was taken."""
        self.losses.append(loss)
        self.norms.append(norm)

    def limits(self) -> Limits:
        """Return the largest ordinary loss and gradient norm."""
        return Limits(loss=limit(self.losses, self.threshold), grad_norm=limit(self.norms, self.threshold))
