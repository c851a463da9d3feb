"""Whether packed documents see each other: asked of the model, not of a list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.batch import IGNORE, Batch
from trainers.config.errors import ConfigError

LEAK_SHARE = 0.02
"""Largest effect of another document, over that of a document's own first token."""


def require_isolation(logps_of: Callable[[Batch], Tensor], vocab_size: int, microbatch: int) -> None:
    """Refuse packing unless another document in the row leaves a document's log-probabilities alone.

    `logps_of` returns the log-probabilities of a batch's labels, without dropout. It is asked of the real model on the real device,
    with two short documents a row: that holds for any architecture and backend. A document's neighbour may move it by LEAK_SHARE of
    what its own first token does: rounding in experts' batches, no more.
    """
    length = 12
    ids = torch.arange(2 * length).remainder(vocab_size).repeat(microbatch, 1)
    positions = torch.arange(length).repeat(2).expand_as(ids)
    labels = ids.roll(-1, 1).where(positions != length - 1, IGNORE)
    neighbour, own = ids.clone(), ids.clone()
    neighbour[:, :length] = (ids[:, :length] + vocab_size // 2).remainder(vocab_size)
    own[:, length] = (ids[:, length] + vocab_size // 2).remainder(vocab_size)
    logps = []
    with torch.no_grad():
        for rows in (ids, neighbour, own):
            batch = Batch.of(rows, labels, positions)
            logps.append(logps_of(batch)[:, length:].cpu())
    leak, effect = (float((changed - logps[0]).abs().max()) for changed in logps[1:])
    if not leak <= LEAK_SHARE * effect:
        reason = f"this model with this attention backend lets packed documents see each other ({leak:.2g} nats)"
        raise ConfigError("data.packing", True, reason, "data.packing=false")
