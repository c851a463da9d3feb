"""The optimizer over partitions, its state, and what a checkpoint holds of both: flat DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainers.config.choices import OptimizerName
from trainers.config.schema import OptimConfig, RunConfig
from trainers.engines.deepspeed.partitions import MOMENTS, Partitions
from trainers.engines.deepspeed.settings import takes_cpu_adam
from trainers.engines.ops import require_op
from trainers.optim import decay_groups, make_optimizer
from trainers.peft.base import Adaptation
from trainers.peft.update import Update

if TYPE_CHECKING:
    from trainers.engines.scaling import LossScale


def optimizer_of(model: PreTrainedModel, config: RunConfig, adaptation: Adaptation, native: bool) -> torch.optim.Optimizer:
    """Return torch's optimizer, or DeepSpeed's own for the host where the state is there; `native` allows its compiled code."""
    optim = config.optim
    parameters: dict[str, Any] = dict(model.named_parameters())
    scale = adaptation.lr_scale
    groups = decay_groups(((p, len(p.ds_shape), scale(name)) for name, p in parameters.items()), optim.weight_decay)
    if not takes_cpu_adam(config) or not native:
        return make_optimizer(groups, optim)
    require_op("cpu_adam", "engine.offload_optimizer", str(config.engine.offload_optimizer))
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    betas = (optim.betas[0], optim.betas[1])
    on_host: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=optim.eps, adamw_mode=True)
    return on_host


def begin_state(partitions: Partitions, optim: OptimConfig) -> None:
    """Make the state at step 0, sub-group by sub-group: memory is short at the start, and a checkpoint can be read into it."""
    own: Any = partitions.optimizer.optimizer
    if hasattr(own, "begin"):
        own.begin(partitions.pieces())
    if optim.name is not OptimizerName.adamw or hasattr(own, "begin"):
        return
    native = hasattr(own, "ds_opt_adam")
    for number, master in enumerate(partitions.masters()):
        with partitions.present(number):
            moments = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
            own.state[master] = {"step": 0 if native else torch.zeros((), device=master.device), **moments}


def state_of(partitions: Partitions, update: Update | None, scale: LossScale | None) -> dict[str, Any]:
    """Return this rank's master weights and moments as flat DTensors on the host: copies, but of what lives there."""
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    own: Any = partitions.optimizer.optimizer
    for number, master, places in partitions.sub_groups():
        swapped = partitions.optimizer._swappable_optimizer_subgroup(number)
        with partitions.present(number):
            values = own.averaged(master) if hasattr(own, "averaged") else master.data
            for name, (start, end) in places.items():
                state["model"][name] = partitions.flat(values[start:end], partitions.parameters[name].ds_numel, swapped)
            if hasattr(own, "saved"):
                continue
            for name, kinds in partitions.state_of(master, places).items():
                numel = partitions.parameters[name].ds_numel
                state["optimizer"][name] = {kind: partitions.flat(part, numel, swapped) for kind, part in kinds.items()}
                state["optimizer"]["step"] = torch.as_tensor(own.state[master]["step"], dtype=torch.float32).cpu()
    if hasattr(own, "saved"):
        state["optimizer"] = own.saved(partitions.placed, partitions.of_each_rank)
    if scale is not None:
        state["loss_scale"] = scale.state()
    if update is not None:
        state |= update.state(partitions.placed)
    return state


def load(partitions: Partitions, update: Update | None, scale: LossScale | None, read: Callable[[Any], None]) -> None:
    """Restore master weights and moments at any world size, then take the parameters over; `read` fills a state from a checkpoint."""
    state = state_of(partitions, update, scale)
    own: Any = partitions.optimizer.optimizer if hasattr(partitions.optimizer.optimizer, "saved") else None
    if own is not None:
        own.expect(state["optimizer"], lambda part: read({"optimizer": part}))
    read(state)
    for number, master, places in partitions.sub_groups():
        with partitions.present(number):
            for name, (start, end) in places.items() if not hasattr(own, "trained") else ():  # its checkpoint's model is an average
                master.data[start:end].copy_(state["model"][name].to_local())
            if own is None:
                _load_moments(partitions, master, places, state["optimizer"])
    if own is not None:
        own.take(state["optimizer"])
    for number in range(len(partitions.optimizer.fp16_groups)):
        with partitions.present(number):
            partitions.optimizer._reassign_or_swap_out_partitioned_parameters(number)  # as after a step
    _count_to(partitions.optimizer.optimizer, int(state["optimizer"].get("step", 0)))
    partitions.gather_persistent()
    if scale is not None:
        scale.load(state["loss_scale"])
    if update is not None:
        update.load(state)


def _load_moments(partitions: Partitions, master: Tensor, places: dict[str, tuple[int, int]], saved: dict[str, Any]) -> None:
    """Take a sub-group's moments and their step over from what a checkpoint holds."""
    for name, kinds in partitions.state_of(master, places).items():
        for kind, part in kinds.items():
            part.copy_(saved[name][kind].to_local())
    if moments := partitions.optimizer.optimizer.state.get(master, {}):
        step = saved["step"]
        moments["step"] = step.to(master.device, copy=True) if isinstance(moments["step"], Tensor) else int(step)


def _count_to(adam: Any, step: int) -> None:
    """Bring DeepSpeed's own AdamW, which multiplies beta ** step on from step to step, to where it was after `step` steps.

    After a gap it would take a power instead, which rounds otherwise: a continued run would differ in the last bit.
    """
    nothing = torch.empty(0)
    for number in range(1, step + 1) if hasattr(adam, "ds_opt_adam") else ():
        betas, eps = adam.param_groups[0]["betas"], adam.param_groups[0]["eps"]
        adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, *betas, eps, 0.0, True, nothing, nothing, nothing, nothing)
