"""The one shape of data between loader, model and objective, and the one place that touches logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100


@dataclass(kw_only=True)
class Batch:
    """A microbatch of rows of one length S.

    input_ids (B, S) int64; labels (B, S) int64, already shifted: labels[:, t] is the token after input_ids[:, t],
    or IGNORE where nothing is trained; position_ids (B, S) int64, restarting at 0 with every document of a packed
    row, padding included, so that attention never crosses them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    num_rows: int
    """Rows that count; the others of the B are padding rows that keep the ranks in step."""
    num_tokens: int
    """Tokens that are no padding."""
    columns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(K,) int64, K >= 1: the columns in which some row has a label. Found on the CPU, so that a GPU need not wait."""

    def __post_init__(self) -> None:
        """Find the labelled columns; a batch without labels keeps one, so that its graph and gradient (0) exist."""
        if not len(self.columns):
            self.columns = (self.labels != IGNORE).any(0).nonzero().flatten()
        if not len(self.columns):
            self.columns = torch.zeros(1, dtype=torch.int64, device=self.labels.device)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            num_rows=self.num_rows,
            num_tokens=self.num_tokens,
            columns=self.columns.to(device, non_blocking=True),
        )

    def in_one_row(self) -> Batch:
        """Return the rows one behind the other in a single row (1, B x S); positions restart where a row began.

        transformers finds packed documents for flash attention in a single row only: in several, documents would see each
        other. The labelled columns are found anew, for which a GPU waits.
        """
        return Batch(
            input_ids=self.input_ids.reshape(1, -1),
            labels=self.labels.reshape(1, -1),
            position_ids=self.position_ids.reshape(1, -1),
            num_rows=self.num_rows,
            num_tokens=self.num_tokens,
        )


class _LabelLogps(torch.autograd.Function):
    """Log-softmax at the labels, in float32 chunks; the gradient overwrites the logits instead of standing beside them."""

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


def _chunk_rows(logits: Tensor, floats: int = 1 << 22) -> int:
    """Rows whose float32 logits take 16 MiB: they stay in a CPU's cache and never make the peak on a GPU."""
    return max(1, floats // logits.shape[-1])


def token_logps(model: nn.Module, batch: Batch, config: Any = None) -> Tensor:
    """Return the log-probability of each label, 0.0 where the label is IGNORE.

    (B, S) float32, in nats. Logits are made only for the columns in which some row has a label, in the compute type,
    and reduced in float32 chunks: (B, S, V) in float32 would be 4 GiB at 8k x 128k. Backward may run once.
    `config` is the model's own, where `model` wraps it in something whose `config` is another.
    """
    if "flash" in str(getattr(config or model.config, "_attn_implementation", "")) and len(batch.labels) > 1:
        return token_logps(model, batch.in_one_row(), config).view(batch.labels.shape)
    columns = batch.columns
    every = len(columns) == batch.labels.shape[1]
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, logits_to_keep=0 if every else columns)
    labels = batch.labels if every else batch.labels[:, columns]
    logps: Tensor = _LabelLogps.apply(output.logits.flatten(0, 1), labels.flatten())  # type: ignore[no-untyped-call]
    logps = logps.view(labels.shape)
    return logps if every else logps.new_zeros(batch.labels.shape).index_copy(1, columns, logps)
