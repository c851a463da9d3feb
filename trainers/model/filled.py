"""Rows made longer by padding, for what takes other lengths than rows have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainers.batch import IGNORE, NO_DOCUMENT, Batch, Output


def filled_up(batch: Batch, length: int) -> Batch:
    """Return rows of `length` tokens (B, S) -> (B, length): what is added is padding, as it is at a row's end, and all of it is kept."""
    rows, size = batch.labels.shape
    more = max(0, length - size)
    if not more and len(batch.kept) == batch.labels.numel():
        return batch

    def wider(tensor: Tensor, value: float) -> Tensor:
        return nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, more), value=value)

    labelled = batch.kept[batch.labelled]
    last = batch.position_ids[:, -1:].where(batch.documents[:, -1:] == NO_DOCUMENT, -1)
    positions = last + torch.arange(1, more + 1, device=last.device)
    return replace(
        batch,
        input_ids=wider(batch.input_ids, 0),
        labels=wider(batch.labels, IGNORE),
        position_ids=torch.cat([batch.position_ids, positions], 1),
        documents=wider(batch.documents, NO_DOCUMENT),
        scored=wider(batch.scored, NO_DOCUMENT) if batch.num_scores else batch.scored,
        segments=tuple(_wider_segments(batch.segments, size, more)),
        starts=batch.starts[:0],
        kept=torch.arange(rows * (size + more), device=last.device),
        labelled=labelled + labelled // size * more,
        signals={name: wider(signal, 0.0) if signal.shape[:2] == batch.labels.shape else signal for name, signal in batch.signals.items()},
    )


def _wider_segments(segments: tuple[int, ...], size: int, more: int) -> Iterator[int]:
    """Yield segments, and more padding wherever a row of this size ends."""
    end = 0
    for segment in segments:
        yield segment
        end += abs(segment)
        if more and end % size == 0:
            yield -more


def cut(output: Output, length: int) -> Output:
    """Return the first `length` columns."""
    return output.map_tokens(lambda values: values[:, :length])
