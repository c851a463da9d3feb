"""Optimizers that update each element by itself: they work however a parameter is split, under both engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainers.config.choices import OptimizerName
from trainers.config.schema import OptimConfig
from trainers.optim.rounding import CHUNK, noise, round_into, salt
from trainers.optim.sharded import TYPES, Piece, Sharded, adamw_update, counted_step, local


class RoundedAdamW(Sharded):
    """AdamW whose moments are kept in bfloat16 and rounded stochastically: to nearest, a small change of one would be lost each time.

    The arithmetic is float32. The noise depends on tensor, element and step alone, so the split over ranks changes nothing.
    """

    kinds = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}  # noqa: RUF012

    def update(self, group: dict[str, Any], p: Tensor, value: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Update chunk by chunk, with the moments in float32 meanwhile."""
        step = counted_step(state)
        mean, square = (local(state[kind]).view(-1) for kind in self.kinds)
        for begin, end, start, mark in chunks(self.pieces[p], step):
            part = slice(begin, end)
            means, squares = mean[part].float(), square[part].float()
            adamw_update(value.view(-1)[part], grad.reshape(-1)[part], means, squares, step, group)
            bits = noise(means, start, mark)
            round_into(mean[part], means, bits.bitwise_and(0xFFFF))
            round_into(square[part], squares, bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF))


class Lion(Sharded):
    """Lion (arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum, with decoupled weight decay."""

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        """Keep the momentum in the type of `optim.state`."""
        super().__init__(groups, optim)
        self.kinds = {"exp_avg": TYPES[optim.state]}

    def update(self, group: dict[str, Any], p: Tensor, value: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Update chunk by chunk."""
        step, (beta1, beta2), mean = counted_step(state), group["betas"], local(state["exp_avg"]).view(-1)
        for begin, end, start, mark in chunks(self.pieces[p], step):
            part = slice(begin, end)
            values, grads, means = value.view(-1)[part], grad.reshape(-1)[part], mean[part].float()
            values.mul_(1 - group["lr"] * group["weight_decay"])
            values.add_(means.mul(beta1).add_(grads, alpha=1 - beta1).sgn_(), alpha=-group["lr"])
            means.mul_(beta2).add_(grads, alpha=1 - beta2)
            if mean.dtype is torch.bfloat16:
                round_into(mean[part], means, noise(means, start, mark).bitwise_and_(0xFFFF))


class ScheduleFreeAdamW(Sharded):
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1), in the form and the order of the package `schedulefree`.

    A parameter holds y, where gradients are taken; its state holds z. Evaluation and export take the average x, which follows
    from both. The package swaps x into the parameter and back, which rounds each time: here y is kept meanwhile.
    """

    kinds = {"z": torch.float32, "exp_avg_sq": torch.float32}  # noqa: RUF012
    counters = ("step", "weight_sum", "lr_max")

    def begin(self, pieces: Mapping[Tensor, list[Piece]]) -> None:
        """Begin with z at the parameters' values."""
        super().begin(pieces)
        self.kept = dict[Tensor, Tensor]()
        for p in pieces:
            local(self.state[p]["z"]).copy_(local(p.detach()))

    def elements(self, p: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return the state and y, which a checkpoint keeps next to the average: from x and z it would be rounded."""
        found, trained = super().elements(p), self.trained(p).view(-1)
        for piece in self.pieces[p]:
            found[piece.name]["y"] = trained[piece.begin : piece.end]
        return found

    def update(self, group: dict[str, Any], p: Tensor, value: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Move z by the normalised gradient, and y to where it is between z and the new average."""
        assert not self.kept, "the parameters hold their average: `average(False)` comes before a step"
        step, (beta1, beta2), lr = counted_step(state), group["betas"], group["lr"]
        state["lr_max"].clamp_(min=lr)
        weight = float(state["lr_max"]) ** 2
        state["weight_sum"] += weight
        total = float(state["weight_sum"])
        share = weight / total if total else 0.0
        z, square = local(state["z"]), local(state["exp_avg_sq"])
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        move = grad / square.div(1 - beta2**step).sqrt_().add_(group["eps"])
        if group["weight_decay"]:
            move.add_(value, alpha=group["weight_decay"])
        value.lerp_(z, share).add_(move, alpha=lr * (beta1 * (1 - share) - 1))
        z.sub_(move, alpha=lr)

    def averaged(self, p: Tensor) -> Tensor:
        """Return this rank's elements of the average x of a parameter, a copy."""
        if p in self.kept:
            return local(p.detach()).clone()
        value = local(p.detach())
        return value.lerp(local(self.state[p]["z"]).to(value.device), 1 - 1 / self.optim.betas[0])

    def trained(self, p: Tensor) -> Tensor:
        """Return this rank's elements of y, live."""
        return self.kept[p] if p in self.kept else local(p.detach())

    @torch.no_grad()
    def average(self, on: bool) -> bool:
        """Let the parameters hold their averages, or what is trained again; return whether that changed anything."""
        if on is bool(self.kept):
            return False
        for p in self.pieces:
            value = local(p.detach())
            if on:
                mean = self.averaged(p)
                self.kept[p] = value.clone()
                value.copy_(mean)
            else:
                value.copy_(self.kept.pop(p))
        return True


def chunks(pieces: list[Piece], step: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ranges of a flattened parameter, each of one tensor: (begin, end, first element in the tensor, its salt)."""
    for piece in pieces:
        mark = salt(piece.name, step)
        for begin in range(piece.begin, piece.end, CHUNK):
            yield begin, min(begin + CHUNK, piece.end), piece.start + begin - piece.begin, mark


@contextmanager
def averages(optimizer: torch.optim.Optimizer) -> Iterator[bool]:
    """Let the parameters hold their averages inside, where the optimizer has any."""
    change: Any = getattr(optimizer, "average", lambda on: False)
    changed = change(True)
    try:
        yield changed
    finally:
        if changed:
            change(False)


ELEMENTWISE: dict[OptimizerName, type[Sharded]] = {
    OptimizerName.adamw: RoundedAdamW,
    OptimizerName.lion: Lion,
    OptimizerName.schedule_free_adamw: ScheduleFreeAdamW,
}
