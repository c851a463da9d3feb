"""A model whose layers are split over ranks, under fully_shard: which part of a whole each of this rank's tensors is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from trainers.config.derived import logits_chunk
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.config.schema import RunConfig
from trainers.config.tensor import require_counts
from trainers.engines.fsdp.wholes import Wholes, gradients
from trainers.model import head as heads
from trainers.model.experts import mixtures
from trainers.model.recurrent import recurrent_layers
from trainers.model.tensor import Team, split
from trainers.model.vocabulary import ApartHead, SplitHead


class Split:
    """The split of a model's layers: fully_shard is told of `data_mesh` alone, and sees this rank's smaller layers."""

    apart = None
    """No module has a mesh of its own."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, ranks: Mesh, rank: int, device: str, itemsize: int) -> None:
        """Split a model on `meta`, after its adapters; raises ConfigError where it cannot be. Collective."""
        self.ranks = ranks
        _require_plain(model, ranks.tensor)
        require_counts(model.config.get_text_config().to_dict(), config.engine, ranks.tensor * ranks.shard)
        shape = (ranks.replicate, ranks.shard * ranks.context, ranks.tensor)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard", "tensor"))
        self.data_mesh: DeviceMesh = mesh["replicate", "shard"] if ranks.replicate > 1 else mesh["shard"]
        self.team = Team(mesh.get_group("tensor"), ranks.tensor, rank % ranks.tensor)
        head, words = self._head_of(model, config, itemsize)
        self.wholes = Wholes(self.team, device, torch.arange(ranks.size).view(shape), model, split(model, self.team))
        self.told = self.wholes.view, self.wholes.state, head, words
        """What the engine asks of it: which part of a whole a tensor is, what a checkpoint holds, the output layer, and this in words."""

    def _head_of(self, model: PreTrainedModel, config: RunConfig, itemsize: int) -> tuple[SplitHead, str]:
        """Return what reads the output layer, and this in words."""
        if (reason := heads.why_not(model, ApartHead)) is not None:
            reason = f"the output layer of {type(model).__name__} cannot be split: {reason}"
            raise ConfigError("engine.tensor", self.ranks.tensor, reason, "engine.tensor=1")
        size = model.config.get_text_config().vocab_size // self.ranks.tensor
        tokens = logits_chunk(config, size, itemsize)
        few = f"of {tokens:,} tokens at once, made again in backward" if tokens else "of all tokens"
        return SplitHead(model, tokens, self.team), f"{few}; each rank has those of {size:,} of the vocabulary"

    def squares(self, model: nn.Module, measure: Callable[[Iterable[Tensor]], Tensor]) -> Tensor:
        """Return this rank's squares such that a sum over ranks counts gradients once that are the same on all ranks of a team."""
        grads = dict(gradients(model))
        same = [grad for name, grad in grads.items() if name not in self.wholes.shapes]
        return measure(grads.values()) - measure(same) * (1 - 1 / self.ranks.tensor)

    def words(self) -> str:
        """Say how layers are split."""
        return f"; {self.ranks.tensor} ranks split each layer"


def _require_plain(model: PreTrainedModel, size: int) -> None:
    """Raise ConfigError for a mixture of experts, and for a model with other layers than attention and an MLP."""
    name, layer = type(model).__name__, next(recurrent_layers(model), None)
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if mixtures(model):
        reason = f"{name} is a mixture of experts, whose stacks are not split but dealt out (engine.expert)"
    elif layer is not None or others:
        reason = f"{name} has layers that are not split ({', '.join(sorted(others)) or type(layer).__name__})"
    else:
        return
    raise ConfigError("engine.tensor", size, reason, "engine.tensor=1, and more ranks to shard it")
