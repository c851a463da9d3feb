"""Rows of an encoder-decoder as a batch: sources apart from targets."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.batch import IGNORE, NO_DOCUMENT, NO_TOKEN, Batch

MULTIPLE = 8
"""What widths are rounded up to, as those of other batches."""


def part(batch: Batch) -> Batch:
    """Return the rows (B, S) of a batch on the CPU as sources (B, R), and targets (B, T) in the place of the rows.

    A row's labels follow one another, and the tokens up to that which predicts the first one are its source. What belongs to tokens
    moves with them. A row of padding has one token as its source, so that its attention has something to see.
    """
    labelled = batch.labels != IGNORE
    first, count = labelled.int().argmax(1), labelled.sum(1)
    sources, targets = (_width(int(lengths.max())) for lengths in (first + 1, count))
    at_source = torch.arange(sources).expand(len(first), -1)
    of_source = at_source <= first[:, None]
    places = first[:, None] + torch.arange(targets)
    of_target = places < (first + count)[:, None]
    places = places.clamp(max=batch.labels.shape[1] - 1)
    source = _taken(batch.input_ids, at_source.clamp(max=batch.labels.shape[1] - 1), of_source, NO_TOKEN)
    shape = batch.labels.shape

    def moved(signal: Tensor) -> Tensor:
        return _taken(signal, places, of_target, 0) if signal.shape[:2] == shape else signal

    return Batch(
        input_ids=batch.input_ids.gather(1, places),
        labels=_taken(batch.labels, places, of_target, IGNORE),
        position_ids=torch.arange(targets).repeat(len(first), 1),
        documents=_taken(batch.documents, places, of_target, NO_DOCUMENT),
        signals={name: moved(signal) for name, signal in batch.signals.items()},
        num_rows=batch.num_rows,
        num_tokens=batch.num_tokens,
        num_documents=batch.num_documents,
        source=source,
    )


def _width(tokens: int) -> int:
    return MULTIPLE * max(1, -(-tokens // MULTIPLE))


def _taken(values: Tensor, places: Tensor, kept: Tensor, other: int) -> Tensor:
    """Return what is at places of each row, (B, S, ...) -> (B, T, ...), and `other` where it is not kept."""
    rows = torch.arange(len(values))[:, None]
    found = values[rows, places]
    return found.where(kept.view(*kept.shape, *(1,) * (found.ndim - 2)), other)
