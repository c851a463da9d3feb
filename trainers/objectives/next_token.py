"""The next token: supervised fine-tuning and continued pre-training, which differ in labels alone."""

from __future__ import annotations

from trainers.batch import Batch, Needs, Output, Sizes
from trainers.objectives.base import Loss


class NextToken:
    """Cross-entropy of the labelled tokens: supervised fine-tuning and continued pre-training differ in labels alone."""

    needs = Needs()
    signals: frozenset[str] = frozenset()

    def targets(self, sizes: Sizes) -> int:
        """Return the number of labels."""
        return sizes.labels

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return minus the summed log-probability."""
        return Loss(total=-output.logps.sum())
