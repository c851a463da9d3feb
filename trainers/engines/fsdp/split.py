"""A model whose layers are split over ranks, under fully_shard: which part of a whole each of this rank's tensors is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import PreTrainedModel

from trainers.config.derived import logits_chunk
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.config.schema import RunConfig
from trainers.config.tensor import require_counts
from trainers.model import head as heads
from trainers.model.experts import mixtures
from trainers.model.recurrent import recurrent_layers
from trainers.model.tensor import Team, split
from trainers.model.vocabulary import ApartHead, SplitHead


class Split:
    """The split of a model's layers: fully_shard is told of `data_mesh` alone, and sees this rank's smaller layers.

    A whole is split over `tensor` ranks first, and each part over those that shard it. So a DTensor over both, in this order, says
    which block of the whole a rank has. Parameters that no rank splits stay as fully_shard has them.
    """

    def __init__(self, model: PreTrainedModel, config: RunConfig, ranks: Mesh, rank: int, device: str, itemsize: int) -> None:
        """Split a model on `meta`, after its adapters; raises ConfigError where it cannot be. Collective."""
        self.ranks = ranks
        _require_plain(model, ranks.tensor)
        require_counts(model.config.get_text_config().to_dict(), config.engine, ranks.tensor * ranks.shard)
        shape = (ranks.replicate, ranks.shard * ranks.context, ranks.tensor)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard", "tensor"))
        self.data_mesh: DeviceMesh = mesh["replicate", "shard"] if ranks.replicate > 1 else mesh["shard"]
        order = torch.arange(ranks.size).view(shape).transpose(1, 2)
        self.mesh = DeviceMesh(device, order, mesh_dim_names=("replicate", "tensor", "shard"))
        self.team = Team(mesh.get_group("tensor"), ranks.tensor, rank % ranks.tensor)
        head, words = self._head_of(model, config, itemsize)
        self.told = self.view, self.state, head, words
        """What the engine asks of it: which part of a whole a tensor is, what a checkpoint holds, the output layer, and this in words."""
        done = split(model, self.team)
        wholes = {part: (whole.shape, dim) for whole, (part, dim) in done.parts.items()}
        self.wholes = {name: wholes[p] for name, p in model.named_parameters(remove_duplicate=False) if p in wholes}
        """Shape of each parameter that is split, and the dimension that the ranks of a team split; tied ones under both names."""

    def _head_of(self, model: PreTrainedModel, config: RunConfig, itemsize: int) -> tuple[SplitHead, str]:
        """Return what reads the output layer, and this in words."""
        if (reason := heads.why_not(model, ApartHead)) is not None:
            reason = f"the output layer of {type(model).__name__} cannot be split: {reason}"
            raise ConfigError("engine.tensor", self.ranks.tensor, reason, "engine.tensor=1")
        size = model.config.get_text_config().vocab_size // self.ranks.tensor
        tokens = logits_chunk(config, size, itemsize)
        few = f"of {tokens:,} tokens at once, made again in backward" if tokens else "of all tokens"
        return SplitHead(model, tokens, self.team), f"{few}; each rank has those of {size:,} of the vocabulary"

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of a parameter's shape as the part of its whole that it is, such as a moment; shares memory."""
        if name not in self.wholes or not tensor.ndim:
            return tensor
        shape, dim = self.wholes[name]
        part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), part.dtype)
        placements = (Replicate(), Shard(dim), Shard(0))
        return DTensor(part, DTensorSpec(self.mesh, placements, tensor_meta=meta), requires_grad=False)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Gather a tensor of a parameter's shape; collective."""
        part = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return self.team.joined(part, self.wholes[name][1]) if name in self.wholes else part

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds, as parts of wholes, of what it would hold of this rank's layers."""
        model = {name: self.view(name, tensor) for name, tensor in state["model"].items()}
        of_optimizer = {
            name: {kind: self.view(name, value) for kind, value in kinds.items()} for name, kinds in state["optimizer"]["state"].items()
        }
        return state | {"model": model, "optimizer": {"state": of_optimizer}}

    def once(self, squares: Tensor, model: nn.Module, measure: Callable[[Iterable[Tensor]], Tensor]) -> Tensor:
        """Return this rank's squares such that a sum over ranks counts gradients once that are the same on all ranks of a team."""
        same = (grad for name, grad in _gradients(model) if name not in self.wholes)
        return squares - measure(same).to(squares.device) * (1 - 1 / self.ranks.tensor)

    def words(self) -> str:
        """Say how layers are split."""
        return f"; {self.ranks.tensor} ranks split each layer"


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if p.grad is not None:
            yield name, p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad


def _require_plain(model: PreTrainedModel, size: int) -> None:
    """Raise ConfigError for a mixture of experts, and for a model with other layers than attention and an MLP."""
    name, layer = type(model).__name__, next(recurrent_layers(model), None)
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if mixtures(model):
        reason = f"{name} is a mixture of experts, whose stacks are not split"
    elif layer is not None or others:
        reason = f"{name} has layers that are not split ({', '.join(sorted(others)) or type(layer).__name__})"
    else:
        return
    raise ConfigError("engine.tensor", size, reason, "engine.tensor=1, and more ranks to shard it")
