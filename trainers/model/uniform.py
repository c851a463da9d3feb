"""The mean log-probability of the whole vocabulary next to that of each label: what label smoothing needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainers.batch import IGNORE

FLOATS = 1 << 22
"""Logits in float32 at once, of which there is one copy."""


class _UniformLogps(torch.autograd.Function):
    """Log-softmax at the labels and its mean over the vocabulary, in float32 chunks; the gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) in the compute type, labels (N,) -> (N,) and (N, 1) float32, 0.0 where the label is IGNORE."""
        kept, found = labels != IGNORE, []
        for chunk, label in zip(logits.split(_rows_at_once(logits)), labels.where(kept, 0).split(_rows_at_once(logits)), strict=True):
            values = chunk.float()
            found.append(torch.cat([values.gather(-1, label[:, None]), values.mean(-1, keepdim=True)], 1) - values.logsumexp(-1, True))
        ctx.save_for_backward(logits, labels)
        logps = torch.cat(found).where(kept[:, None], 0.0)
        return logps[:, 0].clone(), logps[:, 1:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient in the place of the logits."""
        logits, labels = ctx.saved_tensors
        write_slopes(logits, labels, grads[0], grads[1], logits)
        return logits, None


def uniform_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of labels (N,), and their mean over the vocabulary (N, 1); backward overwrites the logits (N, V)."""
    logps, means = _UniformLogps.apply(logits, labels)  # type: ignore[no-untyped-call]
    return logps, means


def write_slopes(logits: Tensor, labels: Tensor, grad: Tensor, grads: Tensor, out: Tensor) -> None:
    """Write what `uniform_logps` sends back for incoming gradients (N,) and (N, 1) into `out` (N, V), which may be `logits`.

    D log p_i / dz = onehot(i) - softmax(z), and of the mean: 1 / V - softmax(z).
    """
    kept, rows = labels != IGNORE, _rows_at_once(logits)
    safe, one, every = labels.where(kept, 0)[:, None], grad.where(kept, 0.0)[:, None], grads.where(kept[:, None], 0.0)
    for chunk, label, of_label, of_all, place in zip(*(x.split(rows) for x in (logits, safe, one, every, out)), strict=True):
        slopes = chunk.float().softmax(-1).mul_(-(of_label + of_all)).add_(of_all / logits.shape[-1])
        place.copy_(slopes.scatter_add_(-1, label, of_label))


def _rows_at_once(logits: Tensor) -> int:
    return max(1, FLOATS // logits.shape[-1])
