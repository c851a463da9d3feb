"""What optimizers that step on this rank's elements have in common: where these belong, and the state next to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainers.config.choices import OptimizerState
from trainers.config.schema import OptimConfig

Placed = Callable[[str, Tensor], Tensor]
"""Makes of this rank's flat elements of a tensor, by its name, a part of the whole."""
ByRank = Callable[[Tensor], Tensor]
"""Makes of a tensor of each rank, as long on every rank, a part of all of them."""
TYPES = {OptimizerState.fp32: torch.float32, OptimizerState.bf16: torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's elements of one trained tensor: they are contiguous in the flattened whole."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Of the flattened whole, where they begin."""
    begin: int
    """Of the flattened parameter that the optimizer has, where they begin: one parameter may hold several tensors."""
    end: int
    unit: int
    """Elements that are never on two ranks: a row under fully_shard, 1 where elements are split."""
    ranks: int
    """Over how many ranks the whole is split."""
    is_table: bool
    """An embedding or a head, whose rows are tokens."""

    def share(self, ranks: int) -> int:
        """Return the elements of a rank other than the last ones, if the whole were split over so many."""
        return -(-(math.prod(self.shape) // self.unit) // ranks) * self.unit


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part, which shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharded(torch.optim.Optimizer):
    """An optimizer of this rank's elements; a subclass says how one parameter is updated, or overrides `step`.

    The state of a parameter is like the parameter, a DTensor where that is one, so that it is saved and resharded with it.
    """

    kinds: Mapping[str, torch.dtype]
    """State of as many elements as the parameter, by name."""
    counters: Sequence[str] = ("step",)
    """Numbers of a parameter, float64 on the CPU: to read one never waits for a GPU."""

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        """Keep no state yet; `begin` makes it."""
        self.optim, self.pieces = optim, dict[Tensor, list[Piece]]()
        super().__init__(groups, {"lr": 0.0, "betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps})

    def begin(self, pieces: Mapping[Tensor, list[Piece]]) -> None:
        """Make the state of each parameter at step 0, and know which tensors it holds."""
        self.pieces = dict(pieces)
        for p in pieces:
            self.state[p] = {kind: torch.zeros_like(p, dtype=dtype, requires_grad=False) for kind, dtype in self.kinds.items()}
            self.state[p] |= {name: torch.zeros((), dtype=torch.float64) for name in self.counters}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update each parameter that has a gradient. Gradients stay as they are: a method may look at them afterwards."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p in self.state:
                    self.update(group, p, local(p), local(p.grad), self.state[p])

    def update(self, group: dict[str, Any], p: Tensor, value: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Update this rank's elements `value` of a parameter by `grad`, both float32."""
        raise NotImplementedError

    def elements(self, p: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return the state of each tensor that a parameter holds, by tensor and kind: this rank's elements, flat and live."""
        flat = {kind: local(value).view(-1) for kind, value in self.state[p].items() if kind not in self.counters}
        return {piece.name: {kind: value[piece.begin : piece.end] for kind, value in flat.items()} for piece in self.pieces[p]}

    def saved(self, placed: Placed, by_rank: ByRank) -> dict[str, Any]:
        """Return what a checkpoint keeps: state by tensor and kind, in which `placed` puts elements into their whole."""
        state: dict[str, Any] = {}
        for p in self.pieces:
            counted = {name: self.state[p][name] for name in self.counters}
            for name, kinds in self.elements(p).items():
                state[name] = {kind: placed(name, value) for kind, value in kinds.items()} | counted
        return {"state": state}

    def expect(self, saved: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        """Prepare what `saved` returned to be read from a checkpoint, of which `load` reads a part."""

    def take(self, saved: dict[str, Any]) -> None:
        """Take over what was read into what `saved` returned."""
        for p in self.pieces:
            for name, kinds in self.elements(p).items():
                for kind, value in kinds.items():
                    value.copy_(local(saved["state"][name][kind]).view(-1))
                for counter in self.counters:
                    self.state[p][counter].copy_(saved["state"][name][counter])


def counted_step(state: dict[str, Tensor]) -> int:
    """Count a step and return its number, from 1; also on tensors without values, which read as 0."""
    state["step"] += 1
    return max(1, int(state["step"]))


def adamw_update(value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]) -> None:
    """Take AdamW's step in place, in the order of torch's own (Loshchilov and Hutter 2019, algorithm 2); all are float32."""
    beta1, beta2 = group["betas"]
    value.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    value.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
