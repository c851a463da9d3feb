"""What each optimizer keeps, what it goes with, and what is refused by name. No torch."""

from __future__ import annotations

from trainers.config.choices import EngineName, Offload, OptimizerName, OptimizerState, Schedule
from trainers.config.errors import ConfigError
from trainers.config.schema import OptimConfig, RunConfig

BITSANDBYTES = (OptimizerName.adamw_8bit, OptimizerName.paged_adamw_8bit, OptimizerName.paged_adamw_32bit)
"""Optimizers whose kernels are bitsandbytes'."""
PAGED = (OptimizerName.paged_adamw_8bit, OptimizerName.paged_adamw_32bit)
MATRICES = (OptimizerName.muon, OptimizerName.adafactor)
"""Optimizers that look at whole rows and columns."""
ROUNDED = (OptimizerName.adamw, OptimizerName.lion)
"""Optimizers whose state may be bfloat16."""
MOMENTS = {
    OptimizerName.adamw: 2,
    OptimizerName.sgd: 0,
    OptimizerName.lion: 1,
    OptimizerName.schedule_free_adamw: 2,
    OptimizerName.paged_adamw_32bit: 2,
}
"""Numbers that an optimizer keeps for each parameter; those that are not here keep something else of some parameters."""
LARGEST = 8
"""Bytes a parameter that no optimizer's state exceeds."""


def bytes_per_parameter(optim: OptimConfig) -> int | None:
    """Return the bytes of state that each parameter has; None where they differ by parameter."""
    moments = MOMENTS.get(optim.name)
    return None if moments is None else moments * (2 if optim.state is OptimizerState.bf16 else 4)


def host_bytes(optim: OptimConfig) -> int:
    """Return the bytes a parameter that the state takes in host memory, where it is offloaded to it; at most."""
    each = bytes_per_parameter(optim)
    return LARGEST if each is None else each


def validate_optimizer(config: RunConfig) -> None:
    """Refuse what an optimizer does not go with; raises ConfigError for the first."""
    optim, engine = config.optim, config.engine
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", optim.betas, "must be two numbers from 0 to below 1")
    if optim.state is not OptimizerState.fp32 and optim.name not in ROUNDED:
        reason = f"optim.name={optim.name} keeps its state in a type of its own"
        raise ConfigError("optim.state", str(optim.state), reason, "optim.state=fp32, or optim.name=adamw")
    if optim.name in MATRICES and engine.name is EngineName.zero3:
        reason = "needs rows and columns, and zero3 hands optimizers flat partitions without shapes"
        raise ConfigError("optim.name", str(optim.name), reason, "engine=fsdp, or optim=adamw_8bit")
    if optim.name is OptimizerName.schedule_free_adamw:
        _validate_schedule_free(config)
    _validate_offload(config)


def _validate_schedule_free(config: RunConfig) -> None:
    optim = config.optim
    if optim.schedule is not Schedule.constant:
        reason = "schedule-free averages in the place of a schedule: after warm-up the rate must stay"
        raise ConfigError("optim.schedule", str(optim.schedule), reason, "optim.schedule=constant")
    if not optim.betas[0]:
        reason = "schedule-free averages by the first, which must be above 0"
        raise ConfigError("optim.betas", optim.betas, reason, "optim=schedule_free_adamw, whose preset has 0.9")
    if config.peft.method == "adalora":
        reason = "adalora sets singular values to zero after each step, which the average of earlier values would bring back"
        raise ConfigError("optim.name", "schedule_free_adamw", reason, "optim=adamw, or peft=lora")


def _validate_offload(config: RunConfig) -> None:
    """Refuse to move state that is not a number or two of each parameter, and files for all but AdamW's."""
    optim, engine = config.optim, config.engine
    if Offload.nvme in (engine.offload_param, engine.offload_optimizer) and (
        optim.name not in (OptimizerName.adamw, OptimizerName.sgd) or optim.state is not OptimizerState.fp32
    ):
        reason = "DeepSpeed keeps the float32 moments of adamw on NVMe, and of no other optimizer"
        raise ConfigError("optim.name", str(optim.name), reason, "optim=adamw optim.state=fp32, or engine=zero3_offload")
    for name in ("offload_param", "offload_optimizer"):
        if getattr(engine, name) is not Offload.none and (optim.name in MATRICES or optim.name in BITSANDBYTES):
            reason = f"optim.name={optim.name} takes its step where the parameters are, with small state or with paged one"
            raise ConfigError(f"engine.{name}", str(getattr(engine, name)), reason, "engine=fsdp, or optim=adamw")
