"""Layers that are split over ranks, by the plan that transformers has for each architecture (tensor parallelism).

Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): a layer that widens has some of the outputs on each rank, the layer after it
takes these as its inputs, and the sum over the ranks is the result. Each rank attends with its own heads. What is between is the same
on every rank. Parameters are plain tensors of this rank's part, so that whatever shards, steps or counts them sees smaller layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, activations

from trainers.config.errors import ConfigError
from trainers.model.safetensors_files import listed


class Team:
    """The ranks that split each layer. Whatever is the same on all of them has the same gradient on all of them."""

    def __init__(self, group: dist.ProcessGroup, size: int, rank: int) -> None:
        """Take a process group, its size and this rank's place in it."""
        self.group, self.size, self.rank = group, size, rank
        self.last: tuple[Tensor, Tensor] | None = None
        """What was handed to split layers last, as it came and as they take it."""

    def copy(self, values: Tensor) -> Tensor:
        """Return values for layers that are split, each of which sends back its own part of their gradient; backward sums these."""
        copied: Tensor = _Copy.apply(values, self)  # type: ignore[no-untyped-call]
        return copied

    def copy_once(self, values: Tensor) -> Tensor:
        """Return the same copy for layers that take the same values, so that backward sums once for all of them."""
        if self.last is None or self.last[0] is not values:
            self.last = values, self.copy(values)
        return self.last[1]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of what split layers make; the gradient is handed on as it is."""
        self.last = None
        summed: Tensor = _Sum.apply(values, self)  # type: ignore[no-untyped-call]
        return summed

    def join(self, values: Tensor) -> Tensor:
        """Return all parts of the last dimension, (..., D / size) -> (..., D); backward takes this rank's."""
        joined: Tensor = _Join.apply(values, self)  # type: ignore[no-untyped-call]
        return joined

    def part(self, values: Tensor) -> Tensor:
        """Return this rank's part of the last dimension, (..., D) -> (..., D / size); backward joins the gradients."""
        parted: Tensor = _Part.apply(values, self)  # type: ignore[no-untyped-call]
        return parted

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, without a graph."""
        total = values.clone()  # what came may be kept for backward
        dist.all_reduce(total, group=self.group)
        return total

    def largest(self, values: Tensor) -> Tensor:
        """Return the maximum over the ranks, without a graph."""
        most = values.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return most

    def joined(self, values: Tensor, dim: int = -1) -> Tensor:
        """Return all parts of a dimension, without a graph; those of the first are where they are gathered, others are copied once more."""
        given, dim = values.contiguous(), dim % values.ndim
        every = given.new_empty(self.size * len(given), *given.shape[1:])
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.13
        gather(every, given, group=self.group)
        joined: Tensor = every.unflatten(0, (self.size, len(given))).movedim(0, dim).flatten(dim, dim + 1)
        return joined

    def own(self, values: Tensor) -> Tensor:
        """Return this rank's part of the last dimension, without a graph."""
        width = values.shape[-1] // self.size
        return values.narrow(-1, self.rank * width, width).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.team.summed(grads[0]), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, values: Tensor, team: Team) -> Tensor:
        return team.summed(values)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return team.joined(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.team.own(grads[0]), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return team.own(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.team.joined(grads[0]), None


class Splitting:
    """What of a model on `meta` has been split, parameter by parameter."""

    def __init__(self, team: Team) -> None:
        """Begin with nothing."""
        self.team = team
        self.parts: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}
        """This rank's part of each whole parameter, and the dimension that is split; tied ones once."""

    def keep_part(self, module: nn.Module, name: str, dim: int) -> None:
        """Give a module this rank's part of a parameter in the place of the whole, where it has one; its device is `meta`."""
        whole = module._parameters.get(name)
        if whole is None:
            return
        if whole not in self.parts:
            shape = list(whole.shape)
            shape[dim] //= self.team.size
            part = nn.Parameter(torch.empty(shape, dtype=whole.dtype, device=whole.device), requires_grad=whole.requires_grad)
            self.parts[whole] = part, dim
        setattr(module, name, self.parts[whole][0])


def plan_of(model: PreTrainedModel, size: int) -> dict[str, str]:
    """Return how transformers splits a model but for its ends: a style for each module by path.

    Raises ConfigError where it has no plan, or one of what is not split here.
    """
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = {path: re.sub(r"\.\d+(?=\.|$)", ".*", path) for path, module in model.named_modules() if module not in ends}
    found = {path: plan[pattern] for path, pattern in paths.items() if pattern in plan}
    stacked = [name for name, _ in model.named_parameters() if re.sub(r"\.\d+(?=\.|$)", ".*", name) in plan]
    name = type(model).__name__
    if not found:
        raise ConfigError("engine.tensor", size, f"transformers has no plan of how to split {name}", "engine.tensor=1, or engine.context")
    others = sorted({style for style in found.values() if style not in STYLES})
    if others or stacked:
        reason = f"the plan of {name} splits {listed(stacked) if stacked else listed(others)}, which is not done here"
        raise ConfigError("engine.tensor", size, reason, "engine.tensor=1")
    return found | _between(model, found, size)


def _between(model: PreTrainedModel, plan: dict[str, str], size: int) -> dict[str, str]:
    """Return a style for what the plan does not name next to a layer of which each rank has some outputs.

    An activation with scalars, or a norm of each head, sees this rank's part alone: its gradients are summed. Raises ConfigError for
    other parameters there, such as one for each head.
    """
    found = {}
    for parent in dict.fromkeys(path.rpartition(".")[0] for path, style in plan.items() if style == "colwise"):
        module = model.get_submodule(parent)
        head = getattr(module, "head_dim", None)
        for name, parameter in module.named_parameters(prefix=parent):
            owner = name.rpartition(".")[0]
            if any(f"{owner}.".startswith(f"{path}.") for path in plan):
                continue
            scalar = parameter.numel() == 1 and type(model.get_submodule(owner)).__module__ == activations.__name__
            if owner == parent or not (scalar or parameter.shape == (head,)):
                reason = f"{name} is between layers that are split, and the plan of {type(model).__name__} does not say how it is"
                raise ConfigError("engine.tensor", size, reason, "engine.tensor=1")
            found[owner] = "replicated_with_grad_allreduce"
    return found


def split(model: PreTrainedModel, team: Team) -> Splitting:
    """Split the layers of a model on `meta` in place; embeddings and head keep a part of the vocabulary on each rank.

    The head is left to who computes log-probabilities (`trainers.model.vocabulary`). Raises ConfigError for what cannot be split.
    """
    plan, done = plan_of(model, team.size), Splitting(team)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError("engine.tensor", team.size, f"{type(model).__name__} has no plain input embedding", "engine.tensor=1")
    _require_divides("its vocabulary", embedding.num_embeddings, team.size)
    _split_embedding(embedding, done)
    if head is not None:
        done.keep_part(head, "weight", 0)
        done.keep_part(head, "bias", 0)
    for path, style in plan.items():
        _split_adapted(model, path, model.get_submodule(path), style, done)
    return done


def _split_adapted(model: PreTrainedModel, path: str, module: nn.Module, style: str, done: Splitting) -> None:
    """Split a layer, and a LoRA on it: of the two factors the one next to the dimension that is split."""
    base: Any = getattr(module, "base_layer", module)
    if style not in LINEAR:
        STYLES[style](base, done)
        return
    parent = model.get_submodule(path.rpartition(".")[0])
    _require_whole_heads(path, parent, base, style, done.team.size)
    STYLES[style](base, done)
    if base is not module:
        for factor in getattr(module, "lora_B" if style in WIDENS else "lora_A").values():
            STYLES[style](factor, done)


def _require_whole_heads(path: str, parent: Any, layer: Any, style: str, size: int) -> None:
    """Raise ConfigError unless a layer's split dimension divides, and by whole heads where it has heads."""
    if type(layer) is not nn.Linear:
        raise ConfigError("engine.tensor", size, f"{path} is a {type(layer).__name__}, and plain layers are split", "engine.tensor=1")
    width = layer.out_features if style in WIDENS else layer.in_features
    head = getattr(parent, "head_dim", None)
    if style in ("colwise", "rowwise") and isinstance(head, int) and head and width % head == 0:
        width //= head
    _require_divides(path, width, size)


def _require_divides(what: str, count: int, size: int) -> None:
    if count % size:
        raise ConfigError("engine.tensor", size, f"{what} has {count:,} parts, which do not divide over {size} ranks", "engine.tensor=1")


def _split_embedding(layer: Any, done: Splitting) -> None:
    """Let each rank look up the tokens of its part of the vocabulary; the sum over the ranks has all of them."""
    team, rows = done.team, layer.num_embeddings // done.team.size
    first, plain, padding = team.rank * rows, layer.forward, layer.padding_idx
    layer.padding_idx = padding - first if padding is not None and first <= padding < first + rows else None
    done.keep_part(layer, "weight", 0)

    def forward(ids: Tensor) -> Tensor:
        own = ids - first
        mine = (own >= 0) & (own < rows)
        return team.sum(plain(own.where(mine, 0)) * mine[..., None])

    layer.forward = forward


def _outputs(layer: Any, done: Splitting) -> None:
    """Let a layer make some of its outputs, (..., in) -> (..., out / size)."""
    plain, team = layer.forward, done.team
    done.keep_part(layer, "weight", 0)
    done.keep_part(layer, "bias", 0)
    layer.forward = lambda values: plain(team.copy_once(values))


def _outputs_joined(layer: Any, done: Splitting) -> None:
    """Let a layer make some of its outputs, and have those of all, (..., in) -> (..., out)."""
    _outputs(layer, done)
    some, team = layer.forward, done.team
    layer.forward = lambda values: team.join(some(values))


def _inputs(layer: Any, done: Splitting) -> None:
    """Let a layer take some of its inputs, and sum over the ranks, (..., in / size) -> (..., out); a bias is added once."""
    team = done.team
    done.keep_part(layer, "weight", 1)

    def forward(values: Tensor) -> Tensor:
        summed = team.sum(nn.functional.linear(values, layer.weight))
        return summed if layer.bias is None else summed + layer.bias

    layer.forward = forward


def _inputs_parted(layer: Any, done: Splitting) -> None:
    """Let a layer take its part of inputs that every rank has, and sum over the ranks, (..., in) -> (..., out)."""
    _inputs(layer, done)
    some, team = layer.forward, done.team
    layer.forward = lambda values: some(team.part(values))


def _whole_within(module: nn.Module, done: Splitting) -> None:
    """Let a module with whole parameters compute this rank's part, such as a norm of each head; their gradients are summed."""
    plain, team = module.forward, done.team

    def forward(*args: Any, **more: Any) -> Any:
        copies = {name: team.copy(p) for name, p in module._parameters.items() if p is not None}
        vars(module).update(copies)  # before the parameters, which stay registered under the same names
        try:
            return plain(*args, **more)
        finally:
            for name in copies:
                vars(module).pop(name)

    module.forward = forward


WIDENS = ("colwise", "colwise_gather_output")
LINEAR = (*WIDENS, "rowwise", "rowwise_split_input")
STYLES: dict[str, Callable[[Any, Splitting], None]] = {
    "colwise": _outputs,
    "colwise_gather_output": _outputs_joined,
    "rowwise": _inputs,
    "rowwise_split_input": _inputs_parted,
    "replicated_with_grad_allreduce": _whole_within,
}
"""What is done for each style of transformers' plans."""
