"""What train.precision=fp16 asks of other settings; nothing here imports torch."""

from __future__ import annotations

import math

from trainers.config.choices import EngineName, PeftMethod, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig


def validate_precision(config: RunConfig) -> None:
    """Refuse a loss scale where nothing is scaled, one that would round, and what looks at gradients while they are scaled."""
    train = config.train
    if train.precision is not Precision.fp16:
        for name, value in (("loss_scale", train.loss_scale), ("loss_scale_steps", train.loss_scale_steps)):
            if value is not None:
                reason = f"only float16 needs one, and train.precision is {train.precision}"
                raise ConfigError(f"train.{name}", value, reason, f"train.{name}=null, or train.precision=fp16")
        return
    if train.loss_scale is not None and math.frexp(train.loss_scale)[0] != 0.5:
        near = 2.0 ** round(math.log2(train.loss_scale))
        raise ConfigError("train.loss_scale", train.loss_scale, "is not a power of two: scaling would round", f"train.loss_scale={near:g}")
    if config.peft.method is PeftMethod.adalora and config.engine.name is EngineName.zero3:
        reason = "peft.method=adalora looks at gradients before its step, and DeepSpeed unscales them within it"
        raise ConfigError("train.precision", "fp16", reason, "engine=fsdp, or train.precision=fp32")
