"""The next token: supervised fine-tuning and continued pre-training, which differ in labels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.batch import SOURCE, Batch, Needs, Output, Sizes, by_document
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
        return Loss(total=-output.logps.sum(), each=_by_document(output, batch) if SOURCE in batch.signals else None)


def _by_document(output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    return by_document(-output.logps.detach(), batch), by_document(torch.ones_like(output.logps), batch)
