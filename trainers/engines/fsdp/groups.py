"""How a model is cut into groups, and what fully_shard is told of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

from trainers.config.choices import Float8, Offload
from trainers.config.errors import ConfigError, plural
from trainers.config.mesh import Mesh
from trainers.config.schema import EngineConfig, RunConfig
from trainers.model.reach import groups_of
from trainers.peft.tokens import ENCODER

STRAY_SHARE = 0.1
"""Largest share of all parameters that may be outside blocks and embeddings."""


def unreached_modules(model: nn.Module, unreached: set[str], blocks: list[nn.Module]) -> list[nn.Module]:
    """Return the modules outside of blocks that the data never reach: as groups of their own they are never gathered."""
    inside = {id(module) for block in blocks for module in block.modules()}
    found: list[nn.Module] = []
    for path in groups_of(unreached, {name: p.numel() for name, p in model.named_parameters()}):
        module = dict(model.named_modules()).get(path)
        found += module if isinstance(module, nn.ModuleList) else [module] if module is not None else []
    return [module for module in found if id(module) not in inside]


def require_groups(model: PreTrainedModel, blocks: list[nn.Module]) -> None:
    """Raise ConfigError where a model has no blocks, or much of it is outside of blocks and embeddings.

    That would be one group, gathered whole on every rank.
    """
    remedy = "engine=zero3, which splits each tensor by itself"
    if not blocks:
        reason = f"{type(model).__name__} names no repeated blocks, so fsdp cannot shard it block by block"
        raise ConfigError("engine.name", "fsdp", reason, remedy)
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, ENCODER, None))
    placed = {id(p) for module in (*blocks, *ends) if module is not None for p in module.parameters()}
    stray = {name: p.numel() for name, p in model.named_parameters() if id(p) not in placed}
    total = sum(p.numel() for p in model.parameters())
    if sum(stray.values()) > STRAY_SHARE * total:
        largest = max(stray, key=lambda name: stray[name])
        share = sum(stray.values()) / total
        reason = f"{share:.0%} of {type(model).__name__} is outside its blocks ({largest}, ...): it would be gathered whole on every rank"
        raise ConfigError("engine.name", "fsdp", reason, remedy)


def has_use(config: RunConfig, compute: torch.dtype, world_size: int) -> bool:
    """Tell whether fully_shard has anything to do.

    On one rank in float32 it would copy each block before each use, and each gradient: a quarter of the time of short rows on a CPU.
    """
    is_moved = config.engine.offload_param is not Offload.none or config.train.float8 is not Float8.none
    return world_size > 1 or compute is not torch.float32 or is_moved


def data_mesh(ranks: Mesh, device: str) -> DeviceMesh:
    """Return the ranks as copies of the model, where there are several, and those that shard one; collective."""
    if ranks.replicate > 1:
        return init_device_mesh(device, (ranks.replicate, ranks.copy_size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (ranks.size,), mesh_dim_names=("shard",))


def shard(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    unreached: Sequence[nn.Module],
    routers: Sequence[nn.Module],
    *,
    never_used: Collection[str],
    compute: torch.dtype,
    engine: EngineConfig,
    mesh: DeviceMesh,
    apart: tuple[Sequence[nn.Module], DeviceMesh] | None,
    device: str,
) -> None:
    """Make a group of each block, of each module that is never reached, and of each router, and of what remains the root group.

    `never_used` are the parameters that the data never reach; their blocks are not gathered ahead. `apart` are modules over ranks of
    their own, and these ranks; what comes to them stays in its type.
    """
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=engine.pin_memory and device == "cuda")
        if engine.offload_param is Offload.cpu
        else OffloadPolicy(),
    }
    idle = {id(model.get_parameter(name)) for name in never_used}
    used = [block for block in blocks if any(id(p) not in idle for p in block.parameters())]
    for router in routers:  # small, so that each stays gathered from its first use in a step to its last
        fully_shard(router, reshard_after_forward=False, **how | {"mp_policy": MixedPrecisionPolicy(torch.float32, torch.float32)})
    for module, own in () if apart is None else ((module, apart[1]) for module in apart[0]):
        other = {"mesh": own, "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)}
        other["shard_placement_fn"] = partial(_placement, own.shape[-1])
        fully_shard(module, reshard_after_forward=engine.reshard_after_forward, **how | other)
    for block in (*blocks, *unreached):
        fully_shard(block, reshard_after_forward=engine.reshard_after_forward, **how)
    fully_shard(model, reshard_after_forward=False, **how)
    if engine.prefetch > 1:  # 1 is fully_shard's own: the next block in backward, and what the CPU has issued ahead in forward
        for number, block in enumerate(used):
            ahead, behind = used[number + 1 :], used[:number][::-1]
            block.set_modules_to_forward_prefetch(ahead[: engine.prefetch])  # type: ignore[operator]
            block.set_modules_to_backward_prefetch(behind[: engine.prefetch])  # type: ignore[operator]


def _placement(ranks: int, stack: nn.Parameter) -> Shard | None:
    """Return the first dimension of a stack that `ranks` divide where it has fewer rows than these, else None, which is its rows.

    fully_shard would give each rank a row, and fill up the stack to as many: more ranks would hold no less each.
    """
    return next((Shard(dim) for dim in range(1, stack.ndim) if len(stack) < ranks and stack.shape[dim] % ranks == 0), None)


def layout(model: nn.Module, groups: Sequence[nn.Module], ranks: Mesh) -> str:
    """Say how the model is cut: groups, the largest one's share, ranks, copies where there are several, and the ranks that share rows."""
    sizes, total = [sum(p.nbytes for p in group.parameters()) for group in groups], sum(p.nbytes for p in model.parameters())
    largest = max(*sizes, total - sum(sizes)) / total
    words = f"{plural(len(sizes) + 1, 'group')}, the largest {largest:.0%} of all, over {plural(ranks.copy_size, 'rank')}"
    words += f", in {ranks.replicate} copies" if ranks.replicate > 1 else ""
    return words + (f"; {ranks.context} ranks share each row" if ranks.context > 1 else "")
