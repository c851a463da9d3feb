"""Steps out of the ordinary, steps that update nothing, ranks that disagree: which are left out, and when there are too many.

A spike is a loss or gradient norm far above the median of the last ones, by a measure that no outlier moves.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainers.config.choices import OnSpike, Precision
from trainers.config.schema import TrainConfig

log = logging.getLogger("fulltune")
DISAGREEMENT = 1e-5
"""Largest relative difference of the gradient norm between ranks."""
WINDOW, FEWEST = 100, 20
"""Steps that are remembered, and steps that must be before a limit is known."""
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
    """The last ordinary steps of a run; a function of its metrics, so that a continued run has the limits of one that was not stopped."""

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


class Spike(Exception):
    """A step's loss or gradient norm is out of the ordinary: says which. It has updated nothing."""


class TrainingFailed(Exception):
    """The run cannot continue, for a reason the user can act on."""


class Guard:
    """Looks at each step's loss and gradient norm."""

    def __init__(self, train: TrainConfig) -> None:
        """Remember no step yet."""
        self.train, self.spikes = train, Spikes(train.spike_threshold)
        self.skipped_in_a_row, self.rollbacks, self.back_at = 0, 0, 0
        self.step, self.grad_norm = 0, 0.0  # the newest step and its gradient norm on this rank

    def recall(self, taken: Iterable[tuple[float, float]]) -> None:
        """Begin with the (loss, gradient norm) of the steps that the run has taken."""
        self.spikes.recall(taken)

    def limits(self) -> Limits:
        """Return above what the next step is a spike."""
        return NO_LIMITS if self.train.on_spike is OnSpike.none else self.spikes.limits()

    def check(self, step: int, loss: float, grad_norm: float, targets: float, limits: Limits) -> bool:
        """Tell whether `step`, counted from 1, updated the weights, and remember it.

        Raises Spike where more than the step is to be left out, TrainingFailed where too many in a row were skipped.
        """
        self.step, self.grad_norm = step, grad_norm
        spike = limits.exceeded(loss, grad_norm)
        if not spike and math.isfinite(loss) and math.isfinite(grad_norm):
            self.spikes.add(loss, grad_norm)
        if spike and self.train.on_spike is not OnSpike.skip:
            raise Spike(spike)
        if not spike and math.isfinite(grad_norm) and targets:
            self.skipped_in_a_row = 0
            return True
        self._count_skipped(spike or (f"the gradient norm is {grad_norm}" if targets else "no row has a supervised token"))
        return False

    def _count_skipped(self, why: str) -> None:
        self.skipped_in_a_row += 1
        log.warning("step %d is skipped: %s (%d in a row)", self.step, why, self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.train.max_skipped:
            remedy = "lower optim.lr, raise optim.warmup_steps, or look at the rows with python -m tools.show_batch"
            if self.train.precision is Precision.fp16:
                remedy += "; if float16, up to 65,504, is too narrow for the model, train.precision=fp32, or bf16 where the card has it"
            raise TrainingFailed(f"{self.skipped_in_a_row} steps in a row were skipped, the last because {why}; {remedy}")

    def count_rollback(self, saved_step: int, spike: Spike) -> None:
        """Count a rollback to the checkpoint of `saved_step`, 0 where there is none; raises TrainingFailed where one more does not help."""
        self.rollbacks = self.rollbacks + 1 if self.back_at == saved_step else 1
        self.back_at = saved_step
        if self.rollbacks > self.train.max_skipped or not saved_step:
            reason = f"it did not {self.rollbacks - 1} times from step {saved_step}" if saved_step else "there is no checkpoint yet"
            raise TrainingFailed(f"step {self.step}: {spike}; going back does not help: {reason}")

    def norms(self) -> list[float]:
        """Return two numbers whose largest over ranks say whether the newest step's norm was the same on all."""
        return [self.grad_norm, -self.grad_norm] if math.isfinite(self.grad_norm) else [0.0, 0.0]

    def require_agreement(self, largest: Sequence[float]) -> None:
        """Take the largest of each rank's `norms`; raises TrainingFailed where they say that ranks had different ones."""
        highest, lowest = largest[0], -largest[1]
        if highest - lowest > DISAGREEMENT * highest:
            reason = f"ranks disagree on the gradient norm of step {self.step}: from {lowest} to {highest}"
            raise TrainingFailed(f"{reason}; their weights are no longer one model: continue from a checkpoint before it, on other devices")
