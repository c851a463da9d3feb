"""A rank's part of each tensor, the optimizer over these parts, and what a checkpoint holds of both: live DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from trainers.config.schema import OptimConfig
from trainers.engines.base import table_parameters
from trainers.model.weights import Origin, load_parts, require_tied, tied_names
from trainers.optim import decay_groups, make_optimizer
from trainers.peft.base import Adaptation
from trainers.peft.update import Update

if TYPE_CHECKING:
    from trainers.engines.scaling import LossScale


def state_of(model: PreTrainedModel, optimizer: Any, update: Update | None, scale: LossScale | None) -> dict[str, Any]:
    """Return the live shards of what is trained, and of the optimizer; averages where that averages, which are copies."""
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    named = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Any] = {"model": {name: tensor for name, tensor in trained.items() if name not in named or named[name].requires_grad}}
    if hasattr(optimizer, "saved"):
        state["optimizer"] = optimizer.saved(partial(placed, model), partial(_of_each_rank, optimizer))
    else:
        state["optimizer"] = {"state": {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}}
    if hasattr(optimizer, "averaged"):
        state["model"] |= {name: placed(model, name, optimizer.averaged(named[name])) for name in state["model"] if name in named}
    if scale is not None:
        state["loss_scale"] = scale.state()
    return state if update is None else state | update.state(partial(placed, model))


def load(model: PreTrainedModel, optimizer: Any, update: Update | None, scale: LossScale | None, read: Callable[[Any], None]) -> None:
    """Restore model and optimizer, resharded to this world size; `read` fills a state from a checkpoint."""
    state = state_of(model, optimizer, update, scale)
    own: Any = optimizer if hasattr(optimizer, "saved") else None
    if own is not None:
        own.expect(state["optimizer"], lambda part: read({"optimizer": part}))
    read(state)
    trained = state["model"]
    if own is not None:
        own.take(state["optimizer"])
    if hasattr(own, "trained"):  # the checkpoint's model is an average
        trained = {name: kinds["y"] for name, kinds in state["optimizer"]["state"].items()}
    set_model_state_dict(model, trained, options=StateDictOptions(strict=False))  # `read` misses no key
    if scale is not None:
        scale.load(state["loss_scale"])
    if update is not None:
        update.load(state)


def _of_each_rank(optimizer: torch.optim.Optimizer, values: Tensor) -> Tensor:
    """Return a part of a tensor that holds as many values of each rank."""
    p: Any = next(iter(optimizer.state))
    if not isinstance(p, DTensor):
        return values
    return DTensor.from_local(values, p.device_mesh, p.placements, run_check=False)


def pieces(model: PreTrainedModel, ranks: int) -> dict[Tensor, list[Any]]:
    """Return which elements of which tensor each trained parameter has here, of so many ranks."""
    from trainers.optim.sharded import Piece

    tables = table_parameters(model)
    found: dict[Tensor, list[Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            values, offset = local_block(p)
            unit = p.shape[1:].numel()
            where = {"start": offset[0] * unit if offset else 0, "begin": 0, "end": values.numel(), "unit": unit}
            found[p] = [Piece(name=name, shape=tuple(p.shape), ranks=ranks, is_table=id(p) in tables, **where)]
    return found


def placed(model: PreTrainedModel, name: str, elements: Tensor) -> Tensor:
    """Return flat elements of this rank as a part of a whole that is split as the parameter is; shares memory."""
    p: Any = model.get_parameter(name)
    part = elements.view(local_block(p)[0].shape)
    return DTensor(part, p._spec, requires_grad=False) if isinstance(p, DTensor) else part


def load_in_place(state: dict[str, Any], scale: LossScale | None, read: Callable[[Any], None]) -> None:
    """Fill live tensors from a checkpoint, resharded to this world size, by `read`."""
    read(state)
    if scale is not None:
        scale.load(state["loss_scale"])


def load_values(model: PreTrainedModel, origin: Origin, part: Callable[[str, Tensor], Tensor]) -> None:
    """Read this rank's block of every tensor, which `part` makes one of the whole; none stays unwritten."""
    tied = tied_names(model)
    load_parts(origin, {name: local_block(part(name, tensor)) for name, tensor in model.state_dict().items() if name not in tied})
    require_tied(model)


def local_block(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's part of a tensor and its offset in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of this rank's parts."""
    return sum(local_block(tensor)[0].nbytes for tensor in tensors)


def bytes_on_host(*, optimizer: bool, parameters: bool, state: int = 8) -> dict[str, int]:
    """Return bytes a trainable parameter takes on the host, by part, where these are offloaded; `state` are the optimizer's."""
    parts = {"float32 parameters": 4, "float32 gradients": 4} if parameters else {}
    return parts | ({"optimizer state": state} if parameters or optimizer else {})


def optimizer_of(model: nn.Module, optim: OptimConfig, adaptation: Adaptation, mixed: bool) -> torch.optim.Optimizer:
    """Return the optimizer of what is trained, which is of `mixed` meshes or one, with weight decay on matrices and embeddings only."""
    groups = decay_groups(((p, p.ndim, adaptation.lr_scale(name)) for name, p in model.named_parameters()), optim.weight_decay)
    return make_optimizer([group | {"params": of} for group in groups for of in _by_mesh(group["params"])] if mixed else groups, optim)


def clip_by_mesh(parameters: Iterable[Tensor], clip: float, norm: Tensor) -> None:
    """Scale gradients whose norm is `norm` down to `clip`, on any meshes."""
    for alike in _by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(alike, clip, norm)


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return parameters by their mesh: torch clips, and its fused AdamW updates, only those of one mesh at once."""
    meshes: dict[Any, list[Tensor]] = {}
    for p in parameters:
        meshes.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return list(meshes.values())


def begin_state(optimizer: torch.optim.Optimizer, of: Callable[[], dict[Tensor, list[Any]]]) -> None:
    """Make the optimizer's state now, at step 0: memory is short at the start, and a checkpoint before the first update is exact."""
    begin: Any = getattr(optimizer, "begin", None)
    if begin is not None:
        begin(of())
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.AdamW) else ():
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def moved(p: Tensor, state: dict[str, Tensor], device: torch.device, pin: bool = False) -> dict[str, Tensor]:
    """Return moments, without counters, on another device than, perhaps, a mesh's: DTensor.from_local would move them back."""
    moved = dict(state)
    for name in [name for name, value in state.items() if value.ndim]:
        local = local_block(state[name])[0].to(device)
        local = local.pin_memory() if pin else local
        moved[name] = DTensor(local, p._spec, requires_grad=False) if isinstance(p, DTensor) else local
    return moved
