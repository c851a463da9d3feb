"""Log-probabilities from logits of which each rank has those of some tokens: no rank ever has the logits of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainers.batch import IGNORE
from trainers.model.head import Head, NotUnderstood, Step, Unmade, logits_of, run
from trainers.model.tensor import Team

FLOATS = 1 << 22
"""Logits in float32 at once."""
ALL = 1 << 62


class Apart(Unmade):
    """Logits of which a rank has some: each is changed by itself, whichever it is."""

    def _with(self, other: Any, step: Step) -> Unmade:
        if isinstance(other, Tensor) and other.numel() > 1:
            raise NotUnderstood("its logits are combined with a tensor that differs from token to token of the vocabulary")
        return super()._with(other, step)

    def __getitem__(self, key: Any) -> Unmade:
        """Refuse: which logits a rank has is not the model's concern."""
        raise NotUnderstood("it takes some logits and leaves out others")


class ApartHead(Head):
    """A head whose logits may be apart, and are whole: to try a model with."""

    kind = Apart

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        """Take a model before its layers are split; raises NotUnderstood for a head that is not a plain matrix."""
        super().__init__(model, tokens)
        if not self.is_linear:
            raise NotUnderstood("its output layer is more than a matrix")


class SplitHead(ApartHead):
    """The output layer of a model of which each rank has a part of the vocabulary, a few tokens' logits at a time, or all where 0.

    The maximum, the sum and the label's own logit are what the ranks exchange, three numbers for each token.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, team: Team) -> None:
        """Take a model before its layers are split."""
        super().__init__(model, tokens or ALL)
        self.team, self.keeps_logits = team, not tokens
        self.rows = self.vocab_size // team.size

    def _forward(self, hidden: Tensor) -> Tensor:
        """Return the labels' log-probabilities, (N,) float32."""
        if self.tail is None or self.ids is not None:
            raise NotUnderstood("whole logits or other tokens' log-probabilities are asked for")
        rows = self.team.copy(hidden.flatten(0, -2))
        logps, self.entropy = _SplitLogps.apply(rows, self.layer.weight, self.layer.bias, self.labels, self)  # type: ignore[no-untyped-call]
        return logps  # type: ignore[no-any-return]


class _SplitLogps(torch.autograd.Function):
    """Log-probabilities of a linear head with some rows of the vocabulary. Backward makes logits again where they were not kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: SplitHead) -> tuple[Tensor, Tensor]:
        """Read (N, H) with weight (V / size, H) and bias (V / size,): log-probabilities and entropy, where asked for, (N,) float32.

        Both are 0.0 where the label is IGNORE.
        """
        ctx.tail, ctx.tokens, ctx.team = head.tail or (), head.tokens, head.team
        own = labels - head.team.rank * head.rows
        mine = (own >= 0) & (own < head.rows) & (labels != IGNORE)
        own = own.where(mine, 0)
        log_sums, picked, means, kept = [], [], [], None
        for part, label in zip(hidden.split(head.tokens), own.split(head.tokens), strict=True):
            logits = logits_of(part, weight, bias)
            kept = logits if head.keeps_logits else None
            made = run(ctx.tail, logits)
            log_sums.append(_log_sums(made))
            picked.append(made.gather(-1, label[:, None]).squeeze(-1).float())
            means += [_mean_of(made, log_sums[-1])] if head.with_entropy else []
        log_sum, of_label, mean = _over_ranks(torch.cat(log_sums), torch.cat(picked).where(mine, 0.0), means, head.team)
        is_label = labels != IGNORE
        ctx.save_for_backward(hidden, weight, bias, own, mine, is_label, log_sum, kept)
        entropy = (log_sum - mean).where(is_label, 0.0) if means else log_sum.new_empty(0)
        ctx.mark_non_differentiable(entropy)
        return (of_label - log_sum).where(is_label, 0.0), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Return this rank's part of the gradient of what was read, and the gradients of weight and bias."""
        hidden, weight, bias, own, mine, is_label, log_sums, kept = ctx.saved_tensors
        grad = grads[0].where(is_label, 0.0)
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for start in range(0, len(hidden), ctx.tokens):
            few = slice(start, start + ctx.tokens)
            logits = logits_of(hidden[few], weight, bias) if kept is None else kept
            slopes = _slopes(logits, own[few], mine[few], grad[few], log_sums[few], ctx.tail)
            if to_hidden is not None:
                torch.mm(slopes, weight, out=to_hidden[few])
            if to_weight is not None:
                torch.addmm(to_weight, slopes.T, hidden[few], out=to_weight)
            if to_bias is not None:
                to_bias.add_(slopes.sum(0))
            del logits, slopes  # before the next ones are made
        return to_hidden, to_weight, to_bias, None, None


def _log_sums(logits: Tensor) -> Tensor:
    """Return log(sum(exp)) of each row, (N, V) -> (N,) float32."""
    return torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(_rows_at_once(logits))])


def _mean_of(logits: Tensor, log_sums: Tensor) -> Tensor:
    """Return the mean of each row's logits under their own softmax, (N, V) -> (N,) float32."""
    rows = _rows_at_once(logits)
    chunks = ((chunk.float(), log_sum[:, None]) for chunk, log_sum in zip(logits.split(rows), log_sums.split(rows), strict=True))
    return torch.cat([((values - log_sum).exp() * values).sum(-1) for values, log_sum in chunks])


def _over_ranks(log_sums: Tensor, picked: Tensor, means: list[Tensor], team: Team) -> tuple[Tensor, Tensor, Tensor]:
    """Return log(sum(exp)) over the whole vocabulary, the label's logit and the mean logit, (N,) each, of what each rank has of them.

    The mean is 0 where there are none.
    """
    most = team.largest(log_sums)
    shares = (log_sums - most).exp()
    weighed = [shares * torch.cat(means)] if means else []
    total, of_label, *mean = team.summed(torch.stack([shares, picked, *weighed])).unbind()
    return total.log() + most, of_label, mean[0] / total if mean else torch.zeros_like(total)


def _slopes(logits: Tensor, own: Tensor, mine: Tensor, grad: Tensor, log_sums: Tensor, tail: tuple[Step, ...]) -> Tensor:
    """Return the gradient of a head's output (n, V / size); without a tail in its place."""
    if not tail:
        _write_slopes(logits, own, mine, grad, log_sums, logits)
        return logits
    with torch.enable_grad():
        made = logits.detach().requires_grad_()
        capped = run(tail, made)
    slopes = torch.empty_like(capped)
    _write_slopes(capped.detach(), own, mine, grad, log_sums, slopes)
    return torch.autograd.grad(capped, made, slopes)[0]


def _write_slopes(logits: Tensor, own: Tensor, mine: Tensor, grad: Tensor, log_sums: Tensor, out: Tensor) -> None:
    """Write D logp / d logits = onehot(label) - softmax, times the incoming gradient (n,), into `out`, which may be `logits`."""
    rows = _rows_at_once(logits)
    for chunk, label, has, factor, log_sum, place in zip(*(x.split(rows) for x in (logits, own, mine, grad, log_sums, out)), strict=True):
        slope = chunk.float().sub(log_sum[:, None]).exp_().mul_(-factor[:, None])
        place.copy_(slope.scatter_add_(-1, label[:, None], factor.where(has, 0.0)[:, None]))


def _rows_at_once(logits: Tensor) -> int:
    return max(1, FLOATS // logits.shape[-1])
