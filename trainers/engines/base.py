"""What the loop asks of an engine."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import host
from trainers.batch import Batch, Needs, Output
from trainers.config.errors import ConfigError
from trainers.config.schema import EngineName, Offload, OptimizerName, Precision, RunConfig
from trainers.model.blueprint import Blueprint
from trainers.peft.base import Adaptation
from trainers.peft.update import Update
from trainers.world import World

log = logging.getLogger("fulltune")
NVME_BUFFERS = 5
"""Partitions that DeepSpeed may have in memory at once on their way from NVMe; its own default."""
HOST = "in host memory"
COMPUTE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


Accepts = Callable[[float], bool]
"""Whether a step of this gradient norm is to be taken."""


def accepts_all(norm: float) -> bool:
    """Take every step."""
    return True


class Engine(Protocol):
    """A model, its gradients and its optimizer, sharded over ranks. Every method is collective: all ranks call it."""

    adaptation: Adaptation
    """What is trained and what is exported."""

    def forward(self, batch: Batch, needs: Needs = ...) -> Output:
        """Return the log-probabilities of the labels, with a graph while training, and what else is needed."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar; `last` marks the step's last microbatch. Gradients sum over ranks."""
        ...

    def step(self, lr: float, accepts: Accepts = ...) -> float:
        """Clip, update, clear gradients; return the global gradient norm before clipping.

        A norm that is not finite, or that `accepts` denies, updates nothing. All ranks must be given the same answer.
        """
        ...

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, as torch.distributed.checkpoint writes it: the live tensors, which the next step changes."""
        ...

    def load(self, folder: Path) -> None:
        """Restore `state` from a directory of torch.distributed.checkpoint, at any world size."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export by name, whole and on the CPU, one at a time."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of all tensors of the model, tied ones once."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Return this rank's bytes by class: frozen weights, what is trained, its gradients at their peak, the optimizer's state."""
        ...

    def report(self) -> dict[str, str]:
        """Return the precision and memory statements for the start-up table, checked on the live tensors."""
        ...

    def close(self) -> None:
        """Remove what this run has put outside its run directory."""
        ...


def require_parts(config: RunConfig, world: World) -> None:
    """Have what the engine needs on this machine, before data is prepared or ranks wait for each other; raises ConfigError."""
    engine = config.engine
    if engine.offload_param is not Offload.none or engine.offload_optimizer is not Offload.none:
        threads = host.threads_per_rank(world.local_size)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # DeepSpeed's optimizer brings an OpenMP of its own, which reads this
        torch.set_num_threads(threads)
    if engine.name is EngineName.zero3:
        from trainers.engines.deepspeed import require_ops

        require_ops(config)


def build_engine(config: RunConfig, world: World, blueprint: Blueprint) -> Engine:
    """Build the engine the config names, weights loaded."""
    if getattr(blueprint.config.get_text_config(), "router_aux_loss_coef", 0):
        log.warning("the experts' router is trained by the objective alone: its auxiliary balancing loss is not added")
    if config.engine.name is EngineName.fsdp:
        from trainers.engines.fsdp import FSDPEngine

        return FSDPEngine(config, world, blueprint)
    from trainers.engines.deepspeed import ZeRO3Engine

    return ZeRO3Engine(config, world, blueprint)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only block inputs for backward; under the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring a model's buffers to a device; its parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def require_host(config: RunConfig, world: World, model: nn.Module) -> None:
    """Refuse an offloading run, before weights are read, where host memory cannot hold it; say what it takes of the host."""
    engine = config.engine
    optimizer, parameters = engine.offload_optimizer is Offload.cpu, engine.offload_param is Offload.cpu
    if engine.offload_optimizer is Offload.none and engine.offload_param is Offload.none:
        return
    log.info("offloading: %d threads each for %d ranks on %d cores", torch.get_num_threads(), world.local_size, host.cores())
    moments = 0 if config.optim.name is OptimizerName.sgd else 2
    if engine.name is EngineName.fsdp:
        on_host = host.fsdp_on_host(optimizer=optimizer, parameters=parameters, moments=moments)
    else:
        compute = COMPUTE[config.train.precision].itemsize
        swapped = engine.offload_optimizer is Offload.nvme
        on_host = host.zero3_on_host(optimizer=optimizer, parameters=parameters, swapped=swapped, compute_bytes=compute, moments=moments)
    numels = [p.numel() for p in model.parameters()]
    needed = host.host_bytes_needed(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        local_ranks=world.local_size,
        world_size=world.size,
        on_host=on_host,
        frozen_bytes=sum(p.nbytes for p in model.parameters() if not p.requires_grad) if parameters else 0,
        buffers=nvme_buffers(config, world.size, numels),
    )
    refused = None
    try:
        host.require_host_memory(needed, host.memory_limit(world.local_size), "engine.offload_optimizer", str(engine.offload_optimizer))
    except ConfigError as error:
        refused = (error.path, error.value, error.reason, error.remedy)
    for parts in world.gather(refused):  # each node has a limit of its own, and no rank may go on alone
        if parts is not None:
            raise ConfigError(*parts)  # type: ignore[misc]
    log.info("host memory: about %s a node (%s)", host.gib(needed.total), needed)


def nvme_buffers(config: RunConfig, world_size: int, numels: list[int]) -> int:
    """Return the bytes of a rank's buffers between NVMe and the device: parameters, and four tensors of the largest sub-group."""
    engine, parameters, optimizer = config.engine, 0, 0
    if engine.offload_param is Offload.nvme:
        parameters = NVME_BUFFERS * COMPUTE[config.train.precision].itemsize * -(-max(numels) // world_size)
    if engine.offload_optimizer is Offload.nvme:
        optimizer = 4 * 4 * min(engine.sub_group_size + max(numels) // world_size, sum(numels) // world_size)
    return parameters + optimizer


def counted(total: int, trained: int) -> str:
    """Say how many parameters there are, and how many are trained."""
    return f"{total:,}, " + ("all trained" if trained == total else f"{trained:,} trained ({trained / total:.3%})")


def unpacked_numel(adaptation: Adaptation, name: str, stored: int) -> int:
    """Return how many parameters a tensor stands for, of which `stored` elements are kept."""
    return math.prod(adaptation.packed[name]) if name in adaptation.packed else stored


def update_statement(update: Update | None, where: str) -> dict[str, str]:
    """Say type, bytes a rank and place of what the method keeps of this rank's elements, by its name; nothing where it keeps none."""
    kept = [tensor for kinds in update.elements.values() for tensor in kinds.values()] if update is not None else []
    if update is None or not kept:
        return {}
    return {update.name: statement(update.name, kept, torch.float32, sum(tensor.nbytes for tensor in kept), where)}


def frozen_statement(frozen: Iterable[tuple[Tensor, Tensor]], compute: torch.dtype, where: str) -> str:
    """Say types, bytes a rank and place of frozen weights, each given with this rank's part of it.

    Raises RuntimeError if one has another type, or a gradient.
    """
    frozen = list(frozen)
    if any(tensor.grad is not None for tensor, _ in frozen):
        raise RuntimeError("a frozen weight has a gradient")
    packed = [part for _, part in frozen if part.dtype is torch.uint8]
    rest = [part for _, part in frozen if part.dtype is not torch.uint8]
    parts = [f"nf4, {_mib(packed)}" + (f" {where}" if where else "")] if packed else []
    parts += [statement("frozen weights", rest, compute, sum(tensor.nbytes for tensor in rest), where)] if rest else []
    return "; ".join(parts) or "none"


def _mib(tensors: Iterable[Tensor]) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors) / 2**20:,.1f} MiB a rank"


def statement(what: str, live: Iterable[Tensor], wanted: torch.dtype, num_bytes: int, where: str) -> str:
    """Say type, bytes a rank and place of one kind of state; raises RuntimeError if a live tensor has another type or place."""
    require_type(what, live, wanted, where)
    return f"{in_short(wanted)}, {num_bytes / 2**20:,.1f} MiB a rank" + (f" {where}" if where else "")


def require_type(what: str, live: Iterable[Tensor], wanted: torch.dtype, where: str = "") -> None:
    """Raise RuntimeError if a tensor is of another type, or not in host memory where `where` says so."""
    live = list(live)
    away = [tensor.device for tensor in live if where == HOST and tensor.device.type != "cpu"]
    if away:
        raise RuntimeError(f"the {what} must be {HOST}, and some are on {away[0]}")
    found = {tensor.dtype for tensor in live} - {wanted}
    if found:
        raise RuntimeError(f"the {what} must be {in_short(wanted)}, and some are {', '.join(map(in_short, found))}")


def in_short(dtype: torch.dtype) -> str:
    """Return a type's name as torch prints it, without `torch.`."""
    return str(dtype).removeprefix("torch.")
