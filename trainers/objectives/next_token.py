"""The next token: supervised fine-tuning and continued pre-training, which differ in labels alone."""

from __future__ import annotations

import torch

from trainers.batch import SOURCE, WEIGHT, Batch, Needs, Output, Sizes, by_document, label_weights
from trainers.objectives.base import Loss


class NextToken:
    """Cross-entropy of the labelled tokens: supervised fine-tuning and continued pre-training differ in labels alone."""

    needs = Needs()
    signals: frozenset[str] = frozenset()

    def targets(self, sizes: Sizes) -> float:
        """Return the number of labels, or the sum of their weights."""
        return sizes.weight or sizes.labels

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return minus the summed log-probability, each label times its weight."""
        if batch.signals.keys().isdisjoint((WEIGHT, SOURCE)):
            return Loss(total=-output.logps.sum())
        return self._each(output, batch)

    def _each(self, output: Output, batch: Batch) -> Loss:
        weights = label_weights(batch)
        losses = -output.logps if weights is None else -output.logps * weights
        each = by_document(losses.detach(), batch), by_document(torch.ones_like(losses) if weights is None else weights, batch)
        return Loss(total=losses.sum(), each=each)
