"""Log-probabilities of several tokens at each place, and of all others together: what a teacher's are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainers.batch import IGNORE

NEVER = float("-inf")
FLOATS = 1 << 22
"""Logits in float32 at once, of which there are up to three copies."""


class _GatheredLogps(torch.autograd.Function):
    """Log-softmax at the labels, at some ids and over the rest, in float32 chunks; the gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) in the compute type, labels (N,), ids (N, k) -> (N,) and (N, k + 1) float32, 0.0 where the label is IGNORE."""
        rows, found = _rows_at_once(logits), []
        for chunk, places in zip(logits.split(rows), _places(labels, ids).split(rows), strict=True):
            values = chunk.float()
            rest = values.scatter(-1, places[:, 1:], NEVER).logsumexp(-1, keepdim=True)
            found.append(torch.cat([values.gather(-1, places), rest], 1) - values.logsumexp(-1, keepdim=True))
        ctx.save_for_backward(logits, labels, ids)
        logps = torch.cat(found).where((labels != IGNORE)[:, None], 0.0)
        return logps[:, 0].clone(), logps[:, 1:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the place of the logits."""
        logits, labels, ids = ctx.saved_tensors
        write_slopes(logits, labels, ids, grads[0], grads[1], logits)
        return logits, None, None


def gathered_logps(logits: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of labels (N,), and of ids and all others together (N, k + 1); backward overwrites the logits (N, V).

    The ids of a place differ. The last is -inf where they are the whole vocabulary. Summing the others' logits loses nothing where
    their share is small, as 1 - sum would.
    """
    logps, gathered = _GatheredLogps.apply(logits, labels, ids)  # type: ignore[no-untyped-call]
    return logps, gathered


def write_slopes(logits: Tensor, labels: Tensor, ids: Tensor, grad: Tensor, grads: Tensor, out: Tensor) -> None:
    """Write what `gathered_logps` sends back for incoming gradients (N,) and (N, k + 1) into `out` (N, V), which may be `logits`.

    d log p_i / dz = onehot(i) - softmax(z), and of the others' sum: their own softmax - softmax(z).
    """
    rows = _rows_at_once(logits)
    weights = torch.cat([grad[:, None], grads], 1).where((labels != IGNORE)[:, None], 0.0)
    for chunk, places, weight, place in zip(*(x.split(rows) for x in (logits, _places(labels, ids), weights, out)), strict=True):
        values = chunk.float()
        others = values.scatter(-1, places[:, 1:], NEVER)
        others.sub_(others.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)).exp_().mul_(weight[:, -1:])
        slopes = values.sub_(values.logsumexp(-1, keepdim=True)).exp_().mul_(-weight.sum(-1, keepdim=True)).add_(others)
        place.copy_(slopes.scatter_add_(-1, places, weight[:, :-1]))


def _rows_at_once(logits: Tensor) -> int:
    return max(1, FLOATS // (3 * logits.shape[-1]))


def _places(labels: Tensor, ids: Tensor) -> Tensor:
    """Return the label and the ids of each place, (N, 1 + k) int64."""
    return torch.cat([labels.where(labels != IGNORE, 0)[:, None], ids.to(torch.int64)], 1)
