"""The next token: supervised fine-tuning and continued pre-training, which differ in labels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.batch import SOURCE, VOCABULARY, WEIGHT, Batch, Needs, Output, Sizes, by_document, label_weights
from trainers.objectives.base import Loss


class NextToken:
    """Cross-entropy of the labelled tokens: supervised fine-tuning and continued pre-training differ in labels alone.

    With label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7) a share of each label's probability is spread evenly over the
    vocabulary, the label's own token included.
    """

    signals: frozenset[str] = frozenset()

    def __init__(self, smoothing: float = 0.0) -> None:
        """Take the share that is spread."""
        self.smoothing = smoothing
        self.needs = Needs(gathered=VOCABULARY) if smoothing else Needs()

    def targets(self, sizes: Sizes) -> float:
        """Return the number of labels, or the sum of their weights."""
        return sizes.weight or sizes.labels

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return minus the summed log-probability, each label times its weight; smoothed, the plain one is reported as `nll`."""
        if not self.smoothing and batch.signals.keys().isdisjoint((WEIGHT, SOURCE)):
            return Loss(total=-output.logps.sum())
        weights = label_weights(batch)
        weights = torch.ones_like(output.logps) if weights is None else weights
        losses, figures = -output.logps * weights, dict[str, Tensor]()
        if self.smoothing:
            assert output.gathered is not None
            figures = {"nll": losses.detach().sum()}
            losses = (1 - self.smoothing) * losses - self.smoothing * output.gathered[..., 0] * weights
        each = by_document(losses.detach(), batch), by_document(weights, batch)
        return Loss(total=losses.sum(), figures=figures, each=each)
