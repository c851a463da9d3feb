"""The one place that touches logits: from a batch to the log-probability of each label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainers.batch import IGNORE, Batch, Needs, Output
from trainers.model.attention import documents_of
from trainers.model.recurrent import lengths_for_kernels, takes_lengths


class _LabelLogps(torch.autograd.Function):
    """Log-softmax at the labels, in float32 chunks; the gradient overwrites the logits, so that there is one copy of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, V) in the compute type, labels (N,) -> (N,) float32, 0.0 where the label is IGNORE."""
        kept = labels != IGNORE
        safe = labels.where(kept, 0)
        log_sums = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(_chunk_rows(logits))])
        picked = logits.gather(-1, safe[:, None]).squeeze(-1).float()
        ctx.save_for_backward(logits, safe, kept, log_sums)
        return (picked - log_sums).where(kept, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """D logp / d logits = onehot(label) - softmax, times the incoming gradient."""
        logits, labels, kept, log_sums = ctx.saved_tensors
        scale = grads[0].where(kept, 0.0)
        rows = _chunk_rows(logits)
        for chunk, label, factor, log_sum in zip(*(x.split(rows) for x in (logits, labels, scale, log_sums)), strict=True):
            slope = (chunk.float() - log_sum[:, None]).exp_().mul_(-factor[:, None])
            chunk.copy_(slope.scatter_add_(-1, label[:, None], factor[:, None]))
        return logits, None


@torch.no_grad()
def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -sum p log p of each row's softmax, (N, V) -> (N,) float32, 0.0 where the label is IGNORE."""
    chunks = (chunk.float().log_softmax(-1) for chunk in logits.split(_chunk_rows(logits)))
    return torch.cat([-(logps.exp() * logps).sum(-1) for logps in chunks]).where(labels != IGNORE, 0.0)


def _chunk_rows(logits: Tensor, floats: int = 1 << 22) -> int:
    """Rows whose float32 logits take 16 MiB: they stay in a CPU's cache and never make the peak on a GPU."""
    return max(1, floats // logits.shape[-1])


def forward(model: nn.Module, batch: Batch, needs: Needs = Needs(), config: Any = None) -> Output:  # noqa: B008 - frozen
    """Return the log-probability of each label and what else is needed.

    Logits are made only for the columns in which some row has a label, in the compute type, and reduced in float32 chunks:
    (B, S, V) in float32 would be 4 GiB at 8k x 128k. Backward may run once.
    `config` is the model's own, where `model` wraps it in something whose `config` is another.
    """
    shape, config = batch.labels.shape, config or model.config
    flash, lengths = "flash" in str(getattr(config, "_attn_implementation", "")), takes_lengths(config)
    if (flash or lengths) and len(batch.labels) > 1:
        return _map_output(forward(model, batch.in_one_row(), needs, config), lambda values: values.view(shape))
    columns = batch.columns
    every = len(columns) == shape[1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if lengths:
        inputs |= lengths_for_kernels(batch)
    with documents_of(batch):
        output = model(**inputs, logits_to_keep=0 if every else columns)
    labels = batch.labels if every else batch.labels[:, columns]
    logits = output.logits.flatten(0, 1)
    entropy = _entropy(logits, labels.flatten()) if needs.entropy else None
    logps: Tensor = _LabelLogps.apply(logits, labels.flatten())  # type: ignore[no-untyped-call]

    def in_place(values: Tensor) -> Tensor:
        values = values.view(labels.shape)
        return values if every else values.new_zeros(shape).index_copy(1, columns, values)

    return _map_output(Output(logps=logps, entropy=entropy), in_place)


def _map_output(output: Output, f: Callable[[Tensor], Tensor]) -> Output:
    return Output(logps=f(output.logps), entropy=None if output.entropy is None else f(output.entropy))
