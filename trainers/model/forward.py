"""The one place that touches logits: from a batch to the log-probability of each label."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.batch import IGNORE, VOCABULARY, Batch, Needs, Output, last_tokens
from trainers.model.attention import VARLEN, documents_of
from trainers.model.recurrent import begins_anew, lengths_for_kernels, takes_lengths

SCORE = "score"
"""transformers' name of the head of a model that scores documents: one matrix (C, hidden size) without a bias."""


class Head(Protocol):
    """What reads a model's output layer a few tokens at a time, as `trainers.model.head.Head` does."""

    entropy: Tensor
    """(N,) of the labels read last, where it was asked for."""
    gathered: Tensor
    """(N, k + 1) of the ids read last, where there were some."""

    def reading(self, labels: Tensor, entropy: bool, ids: Tensor | None = None) -> AbstractContextManager[None]:
        """Let the model return log-probabilities of the labels (N,) as its logits; `ids` (N, k) are others that are asked for."""
        ...


class _LabelLogps(torch.autograd.Function):
    """Log-softmax at the labels, in float32 chunks; the gradient overwrites the logits, so that there is one copy of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, V) in the compute type, labels (N,) -> (N,) float32, 0.0 where the label is IGNORE."""
        kept = labels != IGNORE
        log_sums = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(_chunk_rows(logits))])
        picked = logits.gather(-1, labels.where(kept, 0)[:, None]).squeeze(-1).float()
        ctx.save_for_backward(logits, labels, log_sums)
        return (picked - log_sums).where(kept, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient in the place of the logits."""
        logits, labels, log_sums = ctx.saved_tensors
        write_slopes(logits, labels, grads[0], logits, log_sums)
        return logits, None


def write_slopes(logits: Tensor, labels: Tensor, grad: Tensor, out: Tensor, log_sums: Tensor | None = None) -> None:
    """Write D logp / d logits = onehot(label) - softmax, times the incoming gradient (N,), into `out` (N, V), which may be `logits`.

    `log_sums` (N,) float32 are the logarithms of the softmaxes' denominators, where they are known.
    """
    kept, rows = labels != IGNORE, _chunk_rows(logits)
    safe, scale = labels.where(kept, 0), grad.where(kept, 0.0)
    known = (None,) * -(-len(logits) // rows) if log_sums is None else log_sums.split(rows)
    for chunk, label, factor, log_sum, place in zip(*(x.split(rows) for x in (logits, safe, scale)), known, out.split(rows), strict=True):
        values = chunk.float()
        log_sum = values.logsumexp(-1) if log_sum is None else log_sum
        slope = torch.sub(values, log_sum[:, None], out=place if place.dtype is torch.float32 else None)
        slope.exp_().mul_(-factor[:, None]).scatter_add_(-1, label[:, None], factor[:, None])
        if slope is not place:
            place.copy_(slope)


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities (N,) float32 of labels (N,), 0.0 where the label is IGNORE; backward overwrites the logits (N, V)."""
    logps: Tensor = _LabelLogps.apply(logits, labels)  # type: ignore[no-untyped-call]
    return logps


def measure(logits: Tensor, labels: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities (N,) of labels and, where there are ids (N, k), theirs; backward overwrites the logits (N, V).

    Where k is 0, the mean over the vocabulary is returned instead, (N, 1).
    """
    if ids is None:
        return label_logps(logits, labels), None
    if not ids.shape[-1]:
        from trainers.model.uniform import uniform_logps

        return uniform_logps(logits, labels)
    from trainers.model.gathered import gathered_logps

    return gathered_logps(logits, labels, ids)


@torch.no_grad()
def entropy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -sum p log p of each row's softmax, (N, V) -> (N,) float32, 0.0 where the label is IGNORE."""
    chunks = (chunk.float().log_softmax(-1) for chunk in logits.split(_chunk_rows(logits)))
    return torch.cat([-(logps.exp() * logps).sum(-1) for logps in chunks]).where(labels != IGNORE, 0.0)


def _chunk_rows(logits: Tensor, floats: int = 1 << 22) -> int:
    """Rows whose float32 logits take 16 MiB: they stay in a CPU's cache and never make the peak on a GPU."""
    return max(1, floats // logits.shape[-1])


def gives_scores(model: nn.Module) -> bool:
    """Tell whether a model has a head of scores in the place of its output layer, as `trainers.model.scores` builds it."""
    return getattr(model, "scores_documents", False)


def forward(
    model: nn.Module,
    batch: Batch,
    needs: Needs = Needs(),  # noqa: B008 - frozen
    config: Any = None,
    head: Head | None = None,
) -> Output:
    """Return the log-probability of each label and what else is needed.

    Where attention is told the documents, rows are computed as one, without their padding. Logits are made only where there are
    labels, else for the columns in which some row has one, in the compute type, and reduced in float32 chunks: (B, S, V) in float32
    would be 4 GiB at 8k x 128k. With a `head` only a few tokens' logits exist at once. Backward may run once.
    `config` is the model's own, where `model` wraps it in something whose `config` is another.
    """
    config = config or model.config
    in_one_row = is_told_documents(model, config) or takes_lengths(config)
    if needs.scores or batch.source is not None:
        return _otherwise(model, batch, needs, config, head, in_one_row)
    if in_one_row:
        return _in_columns(model, batch.in_one_row(), needs, config, head).map_tokens(batch.out_of_one_row)
    return _in_columns(model, batch, needs, config, head)


def is_told_documents(model: nn.Module, config: Any) -> bool:
    """Tell whether the attention of a model is told where documents are, so that all rows can be one."""
    backend = str(getattr(config, "_attn_implementation", ""))
    return ("flash" in backend or (backend == VARLEN and not begins_anew(model))) and takes_positions(model)


def takes_positions(model: nn.Module) -> bool:
    """Tell whether a model, or the one that is wrapped in it, takes positions: Bart's decoder counts them, and must see each row alone."""
    return _takes_positions(type(next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)))  # type: ignore[arg-type]


@cache
def _takes_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _in_columns(model: Any, batch: Batch, needs: Needs, config: Any, head: Head | None) -> Output:
    """Return what `forward` returns, computed of the rows as they are."""
    shape, columns = batch.labels.shape, batch.columns
    every = len(columns) == shape[1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if takes_lengths(config):
        inputs |= lengths_for_kernels(batch)
    labels = batch.labels if every else batch.labels[:, columns]
    ids = None
    if needs.gathered is not None:
        asked = batch.labels.new_empty(*shape, 0) if needs.gathered == VOCABULARY else batch.signals[needs.gathered]
        ids = (asked if every else asked[:, columns]).flatten(0, 1)
    with documents_of(batch), nullcontext() if head is None else head.reading(labels.flatten(), needs.entropy, ids):
        output = model(**inputs, logits_to_keep=0 if every else columns)
    if head is None:
        logits = output.logits.flatten(0, 1)
        entropy = entropy_of(logits, labels.flatten()) if needs.entropy else None
        logps, gathered = measure(logits, labels.flatten(), ids)
    else:
        logps, entropy, gathered = output.logits, head.entropy if needs.entropy else None, None if ids is None else head.gathered

    def in_place(values: Tensor) -> Tensor:
        values = values.view(*labels.shape, *values.shape[1:])
        return values if every else values.new_zeros(*shape, *values.shape[2:]).index_copy(1, columns, values)

    return Output(logps=logps, entropy=entropy, gathered=gathered).map_tokens(in_place)


def _otherwise(model: nn.Module, batch: Batch, needs: Needs, config: Any, head: Head | None, in_one_row: bool) -> Output:
    """Return what `forward` returns of a model that has an encoder, or that makes scores.

    Scores are of the documents, or of each token, (D, C) float32; log-probabilities are then 0.0, of the batch's own shape.
    """
    if not needs.scores:
        from trainers.model.seq2seq import Decoding, whole

        return _in_columns(Decoding(model, batch, config), whole(batch), needs, config, head)
    rows = batch.in_one_row() if in_one_row else batch
    more = lengths_for_kernels(rows) if takes_lengths(config) else {}
    with documents_of(rows):
        scores = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, ends=last_tokens(rows), **more)
    return Output(logps=scores.new_zeros(batch.labels.shape).detach(), scores=scores)
