"""Which of train.activations a run may have: nothing here imports torch."""

from __future__ import annotations

from trainers.config.choices import Activations, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig

BY_COST = (Activations.keep, Activations.selective, Activations.block, Activations.offload)
"""From what costs no time to what costs most of it, and from what needs most memory to what needs least."""


def offered(config: RunConfig) -> list[Activations]:
    """Return those that a run may have, in the order of what they cost."""
    return [how for how in BY_COST if _refusal(config, how) is None]


def validate_activations(config: RunConfig) -> None:
    """Raise ConfigError for what the rest of the run does not go with."""
    if (refusal := _refusal(config, config.train.activations)) is not None:
        raise refusal


def _refusal(config: RunConfig, how: Activations) -> ConfigError | None:
    if config.peft.method is PeftMethod.prefix and how not in (Activations.keep, Activations.auto):
        reason = "prefix tuning goes through the cache of keys and values, which computing a block again would fill twice"
        return ConfigError("train.activations", str(how), reason, "train.activations=keep, or peft=prompt")
    if getattr(config.train, "compile", False) and how is Activations.offload:
        reason = "blocks are compiled, and torch.compile does not take the hooks that move their inputs"
        return ConfigError("train.activations", "offload", reason, "train.activations=block")
    if config.engine.expert > 1 and how is Activations.selective:
        reason = "engine.expert gathers a rank's experts inside a block, where what is kept is found again by the order of operators"
        return ConfigError("train.activations", "selective", reason, "train.activations=block")
    if config.peft.method is PeftMethod.adalora and how is Activations.selective:
        reason = "peft adds adalora's product in place to that of the base, which would be kept and so added to twice"
        return ConfigError("train.activations", "selective", reason, "train.activations=block")
    return None
