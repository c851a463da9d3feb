"""What train.compile and train.float8 go with; nothing here imports torch."""

from __future__ import annotations

from trainers.config.choices import EngineName, Float8, PeftMethod, Precision, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig


def validate_kernels(config: RunConfig) -> None:
    """Refuse what compiled blocks and float8 products do not go with."""
    train, fsdp, method = config.train, config.engine.name is EngineName.fsdp, config.peft.method
    if train.compile and not fsdp:
        reason = "zero3 gathers each parameter in hooks inside a block, where a graph would end"
        raise ConfigError("train.compile", True, reason, "engine=fsdp, or train.compile=false")
    if train.compile and (found := _uncompiled(config)) is not None:
        setting, name, reason = found
        raise ConfigError("train.compile", True, f"{setting}={name} {reason}", f"train.compile=false, or another {setting}")
    if train.float8 is Float8.none:
        return
    value = str(train.float8)
    if not fsdp:
        raise ConfigError("train.float8", value, "zero3 gathers parameters in the compute type", "engine=fsdp, or train.float8=none")
    if train.precision is not Precision.bf16:
        reason = f"what is not float8 must be bf16, and train.precision is {train.precision}"
        raise ConfigError("train.float8", value, reason, "train.precision=bf16")
    if method not in (PeftMethod.none, PeftMethod.freeze):
        reason = f"peft.method={method} trains small matrices, whose products float8 makes slower, on a base that is rounded anew each step"
        raise ConfigError("train.float8", value, reason, "train.float8=none, or peft=none")


def _uncompiled(config: RunConfig) -> tuple[str, str, str] | None:
    """Return the setting of a method whose blocks make more than a few graphs, its value, and why; None where there is none."""
    if config.peft.method is PeftMethod.dora:
        return "peft.method", "dora", "asks in each layer where the class of a weight comes from, and each time a graph ends"
    if config.peft.method is PeftMethod.prefix:
        return "peft.method", "prefix", "gives each block keys of its own, and each block would be compiled alone"
    if config.peft.method is PeftMethod.bottleneck:
        return "peft.method", "bottleneck", "looks in each layer for the adapters that are active, which is not compiled here"
    if config.peft.quantise is Quantisation.nf4:
        return "peft.quantise", "nf4", "unpacks a matrix in dozens of pieces, of which a graph would have thousands"
    return None
