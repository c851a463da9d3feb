"""A model whose experts are dealt over ranks, under fully_shard: each stack in a group of its own, over the ranks that have the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from trainers.config.mesh import Mesh
from trainers.config.schema import RunConfig
from trainers.engines.base import head_of
from trainers.engines.fsdp.wholes import Wholes, gradients
from trainers.model.dealt import deal
from trainers.model.experts import stacks
from trainers.model.tensor import Team


class Dealt:
    """The deal of a model's experts: consecutive ranks of a copy have all of them, and each one's part is sharded over such teams."""

    def __init__(
        self, model: PreTrainedModel, config: RunConfig, ranks: Mesh, rank: int, data_mesh: DeviceMesh, compute: torch.dtype
    ) -> None:
        """Deal out the experts of a model on `meta`, after its adapters; raises ConfigError where that cannot be. Collective."""
        self.size, self.data_mesh, device = ranks.expert, data_mesh, data_mesh.device_type
        shape = (ranks.replicate, ranks.copy_size // ranks.expert, ranks.expert)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard", "expert"))
        team = Team(mesh.get_group("expert"), ranks.expert, rank % ranks.expert)
        head = head_of(model, config, compute)  # which copies the model, and a process group has no copy
        self.wholes = Wholes(team, device, torch.arange(ranks.size).view(shape), model, deal(model, team))
        self.told = self.wholes.view, self.wholes.state, *head
        """What the engine asks of it: which part of a whole a tensor is, what a checkpoint holds, the output layer, and this in words."""
        self.apart = list(stacks(model).values()), mesh["replicate", "shard"] if ranks.replicate > 1 else mesh["shard"]
        """Modules in groups of their own, and their mesh."""

    def squares(self, model: nn.Module, measure: Callable[[Iterable[Tensor]], Tensor]) -> Tensor:
        """Return the sum of this rank's squared gradients, once those of experts are means over all ranks, as the others are.

        fully_shard takes means over the ranks that have the same experts, and all tokens of a team are in these gradients.
        """
        grads = dict(gradients(model))
        for name in self.wholes.shapes.keys() & grads.keys():
            grads[name].div_(self.size)
        return measure(grads.values())

    def words(self) -> str:
        """Say how experts are dealt out."""
        return f"; {self.size} ranks deal out the experts of each block"
