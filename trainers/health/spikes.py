"""When a step's loss or gradient norm is out of the ordinary: far above the median of the last ones, by a measure no outlier moves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW, FEWEST = 100, 20
"""Steps that are remembered, and steps that must be before any is judged."""
TO_SIGMA = 1.4826
"""Standard deviations in a median absolute deviation of normal numbers."""
LEAST = 0.05
"""Smallest deviation that is believed, as a share of the median: curves may be flat."""


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

    def limits(self) -> tuple[float, float]:
        """Return the largest ordinary loss and gradient norm."""
        return limit(self.losses, self.threshold), limit(self.norms, self.threshold)
