"""The optimizer with its parameter groups, and the learning rate that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainers.config.choices import OptimizerName, OptimizerState
from trainers.config.errors import ConfigError
from trainers.config.optimizers import BITSANDBYTES
from trainers.config.schema import OptimConfig


def require_warmup_ends(optim: OptimConfig, num_steps: int) -> None:
    """Raise ConfigError if the steps of warm-up that a config names do not end within the run."""
    if optim.warmup_steps >= num_steps and optim.warmup_steps:
        reason = f"warm-up never ends: the run has {num_steps} steps"
        raise ConfigError("optim.warmup_steps", optim.warmup_steps, reason, "optim.warmup_steps=0 optim.warmup_fraction=0.03")


def decay_groups(parameters: Iterable[tuple[Tensor, int, float]], weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups from (parameter, dimensions, lr_scale), frozen ones left out.

    Matrices and embeddings decay, norms and biases do not; a group's learning rate is `lr_scale` times the run's.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter, dimensions, lr_scale in parameters:
        if parameter.requires_grad:
            groups.setdefault((lr_scale, 0.0 if dimensions < 2 else weight_decay), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in groups.items()]


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that a config names; `set_lr` gives it a learning rate before each step.

    AdamW and SGD are torch's own; the others step on this rank's elements (`trainers.optim.sharded`).
    """
    if optim.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=0.0)
    if optim.name is OptimizerName.adamw and optim.state is OptimizerState.fp32:
        return torch.optim.AdamW(groups, lr=0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)
    return _sharded(groups, optim)


def _sharded(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Return an optimizer of `trainers.optim.sharded`; what another run needs is not imported."""
    if optim.name in BITSANDBYTES:
        from trainers.optim.bits import BlockwiseAdamW

        return BlockwiseAdamW(groups, optim)
    if optim.name is OptimizerName.muon:
        from trainers.optim.muon import Muon

        return Muon(groups, optim)
    if optim.name is OptimizerName.adafactor:
        from trainers.optim.adafactor import Adafactor

        return Adafactor(groups, optim)
    from trainers.optim.elementwise import ELEMENTWISE

    return ELEMENTWISE[optim.name](groups, optim)


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give each group of an optimizer its share of a learning rate."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the live tensors of an optimizer's state, without its counters."""
    held: Any = getattr(optimizer, "held", None)
    values = held() if held is not None else [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, Tensor) and value.ndim]
