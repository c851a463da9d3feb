"""Bottleneck adapters of a run: peft's config of them, and what they can be put on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from trainers.config.errors import ConfigError
from trainers.config.schema import PeftConfig
from trainers.model.reach import ask, twin_of


def library_config(settings: PeftConfig, model: PreTrainedModel, **same: Any) -> Any:
    """Return the config of a run, of the method that `bottleneck_adapter` adds to peft; serial ones are put on matrices alone."""
    from trainers.peft.bottleneck_adapter import BottleneckConfig

    return BottleneckConfig(
        **same,
        bottleneck_size=settings.bottleneck,
        activation=str(settings.activation),
        scale=settings.scale,
        parallel=settings.parallel,
        hidden_size=model.config.get_text_config().hidden_size if settings.parallel else None,
    )


def require_suitable(model: PreTrainedModel, settings: PeftConfig) -> None:
    """Raise ConfigError where a module with an adapter does not take and return a tensor of its size, by a forward on `meta`."""
    from trainers.peft.bottleneck_adapter import Unsuitable

    try:
        ask(twin_of(model))
    except Unsuitable as error:
        raise ConfigError("peft.targets", settings.targets, str(error), "peft.targets=[mlp], or names of linear layers") from error
