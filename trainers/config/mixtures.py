"""What settings of mixtures of experts ask of others: adapters on stacks of experts, and the balance loss."""

from __future__ import annotations

from trainers.config.choices import AdapterInit, Experts, Float8, ObjectiveName, PeftMethod, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig

STACKS = "experts"
"""The name in `peft.targets` that means all stacks of experts; `experts.NAME` means one of them."""
OF_LABELS = (ObjectiveName.sft, ObjectiveName.cpt, ObjectiveName.distil)
"""Objectives that divide by labels."""
PREPENDED = (PeftMethod.prompt, PeftMethod.prefix, PeftMethod.ptuning)


def names_stacks(targets: list[str]) -> list[str]:
    """Return those of `peft.targets` that mean stacks of experts."""
    return [name for name in targets if STACKS in name.split(".")[-2:]]


def validate_mixtures(config: RunConfig) -> None:
    """Refuse what an adapter on a stack of experts cannot have, and a balance loss of rows that have more than their own tokens."""
    peft = config.peft
    if config.train.balance_loss is not None and peft.method in PREPENDED:
        reason = f"peft.method={peft.method} puts tokens in front of each row, which belong to no document"
        raise ConfigError("train.balance_loss", config.train.balance_loss, reason, "train.balance_loss=null, or peft=lora")
    if config.train.balance_loss is not None and (config.train.compile or config.train.float8 is not Float8.none):
        name, value = ("compile", True) if config.train.compile else ("float8", str(config.train.float8))
        reason = "fills rows up inside the forward, whose tokens a balance loss (train.balance_loss) could not tell from documents'"
        raise ConfigError(f"train.{name}", value, reason, "train.balance_loss=null, or without it")
    if config.train.balance_loss is not None and config.objective.name not in OF_LABELS:
        reason = f"counts each document by its labels, and objective={config.objective.name} does not divide by them"
        raise ConfigError("train.balance_loss", config.train.balance_loss, reason, "train.balance_loss=null, or objective=sft")
    stacks = names_stacks(peft.targets)
    if not stacks:
        return
    if peft.method is not PeftMethod.lora:
        reason = f"peft.method={peft.method} adapts layers, and {', '.join(stacks)} is a stack of matrices"
        raise ConfigError("peft.targets", peft.targets, reason, "peft=lora, or targets without it")
    named = {"dropout": 0.0, "init": AdapterInit.default, "quantise": Quantisation.none}
    for name, only in named.items():
        if (value := getattr(peft, name)) != only:
            said = value if isinstance(value, float) else str(value)
            reason = f"an adapter on a stack of experts ({', '.join(stacks)}) has no {name}"
            raise ConfigError(f"peft.{name}", said, reason, f"peft.{name}={only}, or leave {', '.join(stacks)} out of peft.targets")
    if config.train.compile:
        reason = f"adapters on a stack of experts ({', '.join(stacks)}) are not compiled"
        raise ConfigError("train.compile", True, reason, "train.compile=false")
    if config.model.experts not in (Experts.auto, Experts.grouped_mm):
        reason = f"adapters on a stack of experts ({', '.join(stacks)}) are computed with grouped_mm"
        raise ConfigError("model.experts", str(config.model.experts), reason, "model.experts=auto")
