"""What an objective is: what it reads, what divides its loss, and its summed loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from trainers.batch import Batch, Needs, Output, Sizes

REFERENCE = "reference"
"""The signal that holds the log-probability of each document under the model that training began with, in nats."""
TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"
"""The signals that hold a teacher's k likeliest tokens at each label, and their log-probabilities with that of all others, k + 1."""
ADVANTAGE = "advantage"
"""The signal of how much better than expected a sampled answer is: a number a document, or one a label."""
SAMPLED_LOGPS, OLD_LOGPS, REFERENCE_LOGPS = "sampled_logps", "old_logps", "reference_logps"
"""The signals of each label's log-probability in nats: under what sampled it, the policy before its first step on it, the reference."""
REWARD = "reward"
"""The signal of what a sampled answer is worth as a whole, (D,); of PPO, whose advantages are made of it."""
VALUES, RETURNS = "values", "returns"
"""The signals of the reward that the critic expects before each label is drawn, as the rollout was made, and of what it should say."""
OF_LABELS = frozenset({SAMPLED_LOGPS, OLD_LOGPS, REFERENCE_LOGPS, VALUES, RETURNS})
"""Signals with one number a label: (labels, 1) in a table, (B, S, 1) in a batch."""


@dataclass(kw_only=True)
class Loss:
    """A microbatch's loss as a SUM; `take_step` divides by the targets of the whole step."""

    total: Tensor
    """Scalar float32 with a graph; exactly 0 where nothing is labelled."""
    regulariser: Tensor | None = None
    """Scalar with a graph: trained on and not part of the loss that is reported; a SUM, divided like `total`."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are reported under their names, the same names in every microbatch; SUMS, divided like `total`."""
    counts: dict[str, Tensor] = field(default_factory=dict)
    """What divides some of these numbers instead, by their names: SUMS, such as the documents of one kind."""

    each: tuple[Tensor, Tensor] | None = None
    """What `total` and the targets are sums of, a number a document or pair; only where the batch says which source they are of."""

    def sums(self) -> dict[str, Tensor]:
        """Return the reported numbers, and the counts under their names with OVER."""
        return self.figures | {f"{name}{OVER}": count for name, count in self.counts.items()}

    @property
    def trained(self) -> Tensor:
        """Return what is minimised."""
        return self.total if self.regulariser is None else self.total + self.regulariser


OVER = "/"
"""Ends the name of a count among the sums."""


def per_target(sums: Mapping[str, float], targets: float) -> dict[str, float]:
    """Return the means of what an objective reports from sums over all ranks: by their own counts, else by the targets; nan for 0."""
    over = {name: sums.get(f"{name}{OVER}", targets) for name in sums if not name.endswith(OVER)}
    return {name: sums[name] / count if count else math.nan for name, count in over.items()}


class Objective(Protocol):
    """One objective: what it reads, what divides its loss, and its summed loss."""

    needs: Needs
    signals: frozenset[str]
    """Signals that the table must carry."""

    def targets(self, sizes: Sizes) -> float:
        """Return the denominator for rows of these sizes: labels, documents or units, or the sum of their weights."""
        ...

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch."""
        ...


@runtime_checkable
class Measured(Objective, Protocol):
    """An objective with a statistic of the whole step: a mean over its targets that must be known before the first backward.

    The data say what it is measured on (`Rows.first`), which need not be the step's own documents.
    """

    def measure(self, output: Output, batch: Batch) -> Tensor:
        """Return a microbatch's part of the statistic, a scalar SUM."""
        ...

    def given(self, statistic: float) -> Objective:
        """Return the objective of a step whose statistic, a mean over all ranks, is known."""
        ...


@runtime_checkable
class Tallied(Objective, Protocol):
    """An objective with metrics of held-out rows that a mean over them does not give, such as a ratio of counts."""

    def tally(self, output: Output, batch: Batch) -> Tensor:
        """Return a microbatch's part of what they are made of, (K,) SUMS."""
        ...

    def summary(self, sums: list[float]) -> dict[str, float]:
        """Return these metrics from the sums over all held-out rows."""
        ...
