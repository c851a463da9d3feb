"""Which part of a whole each of this rank's tensors is, where fully_shard is told of the part alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from trainers.model.tensor import Splitting, Team


class Wholes:
    """A whole is split over the ranks of a team first, and each part over those that shard it.

    So a DTensor over both, in this order, says which block of the whole a rank has. Parameters that no team splits stay as fully_shard
    has them.
    """

    def __init__(self, team: Team, device: str, ranks: Tensor, model: nn.Module, done: Splitting) -> None:
        """Know the parts of a model; `ranks` are (copies, those that shard a part, the team). Collective."""
        self.team = team
        self.mesh = DeviceMesh(device, ranks.transpose(1, 2), mesh_dim_names=("replicate", "team", "shard"))
        found = {part: (whole.shape, dim) for whole, (part, dim) in done.parts.items()}
        self.shapes: Mapping[str, tuple[torch.Size, int]] = {
            name: found[p] for name, p in model.named_parameters(remove_duplicate=False) if p in found
        }
        """Shape of each parameter that is split, and the dimension that the ranks of a team split; tied ones under both names."""

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of a parameter's shape as the part of its whole that it is, such as a moment; shares memory."""
        if name not in self.shapes or not tensor.ndim:
            return tensor
        shape, dim = self.shapes[name]
        part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), part.dtype)
        placements = (Replicate(), Shard(dim), tensor.placements[-1] if isinstance(tensor, DTensor) else Shard(0))
        return DTensor(part, DTensorSpec(self.mesh, placements, tensor_meta=meta), requires_grad=False)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Gather a tensor of a parameter's shape; collective."""
        part = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return self.team.joined(part, self.shapes[name][1]) if name in self.shapes else part

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds, as parts of wholes, of what it would hold of this rank's layers."""
        model = {name: self.view(name, tensor) for name, tensor in state["model"].items()}
        of_optimizer = {
            name: {kind: self.view(name, value) for kind, value in kinds.items()} for name, kinds in state["optimizer"]["state"].items()
        }
        return state | {"model": model, "optimizer": {"state": of_optimizer}}


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of each gradient; shares memory."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            yield name, p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
