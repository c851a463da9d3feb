"""Whether packed documents see each other: asked of the model, not of a list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.batch import IGNORE, Batch
from trainers.config.errors import ConfigError

LENGTH = 12
ROUNDING = 1e-5
"""Nats by which a document's log-probabilities may move: with other values in other rows, a kernel adds the same numbers up."""
LEAK_SHARE = 0.01
"""What experts in 16 bits may round, over the effect of a document's own first token on its later ones: their batches change."""


def require_isolation(logps_of: Callable[[Batch], Tensor], vocab_size: int, microbatch: int, rounds: bool = False) -> None:
    """Refuse packing unless another document in the row leaves a document's log-probabilities as they are.

    `logps_of` returns the log-probabilities of a batch's labels, without dropout. It is asked of the real model on the real device,
    with two short documents a row: that holds for any architecture and backend. Random weights hardly let tokens see each other, so
    what a neighbour does is not compared with what the document itself does. It is nothing but rounding: where the same batch gives
    other values each time, twice as much as that. With `rounds`, for experts in 16 bits, LEAK_SHARE is allowed.
    """
    ids = torch.arange(2 * LENGTH).remainder(vocab_size).repeat(microbatch, 1)
    positions = torch.arange(LENGTH).repeat(2).expand_as(ids)
    labels = ids.roll(-1, 1).where(positions != LENGTH - 1, IGNORE)
    neighbour, own = ids.clone(), ids.clone()
    neighbour[:, :LENGTH] = (ids[:, :LENGTH] + vocab_size // 2).remainder(vocab_size)
    own[:, LENGTH] = (ids[:, LENGTH] + vocab_size // 2).remainder(vocab_size)
    with torch.no_grad():
        first, again, *changed = (logps_of(Batch.of(rows, labels, positions))[:, LENGTH:].cpu() for rows in (ids, ids, neighbour, own))
    noise, leak = (float((logps - first).abs().max()) for logps in (again, changed[0]))
    effect = float((changed[1] - first)[:, 1:].abs().max())  # the first token itself is predicted from, whatever sees what
    if not leak <= max(ROUNDING, 2 * noise, LEAK_SHARE * effect if rounds else 0.0):
        reason = f"this model with this attention backend lets packed documents see each other ({leak:.2g} nats)"
        raise ConfigError("data.packing", True, reason, "data.packing=false")
