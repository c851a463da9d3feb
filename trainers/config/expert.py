"""What goes with experts that are dealt over ranks (engine.expert), and over how many a model's experts divide. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from trainers.config.choices import Float8, OptimizerState, Quantisation
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig
from trainers.config.tensor import METHODS, OPTIMIZERS

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs of models call the number of experts of a block."""


def validate_expert(config: RunConfig) -> None:
    """Refuse what does not work where experts are dealt over ranks, by name."""
    engine, train, peft, optim = config.engine, config.train, config.peft, config.optim
    refused: list[tuple[str, Any, bool, str, str]] = [
        ("engine.tensor", engine.tensor, engine.tensor > 1, "deals out experts, and split layers leave them whole", "engine.tensor=1"),
        ("train.compile", True, train.compile, "sends tokens inside a block, which is not compiled", "train.compile=false"),
        ("train.float8", train.float8, train.float8 is not Float8.none, "has experts in groups of their own", "train.float8=none"),
        ("peft.method", peft.method, peft.method not in METHODS, "deals out experts, and takes adapters of lora", "peft=lora"),
        ("peft.quantise", peft.quantise, peft.quantise is not Quantisation.none, "deals out no stack of 4 bits", "peft=lora"),
        ("optim.name", optim.name, optim.name not in OPTIMIZERS, "has tensors of two meshes", "optim=adamw or optim=sgd"),
        ("optim.state", optim.state, optim.state is not OptimizerState.fp32, "keeps moments in float32", "optim.state=fp32"),
    ]
    for path, value, is_set, reason, remedy in refused:
        if is_set:
            value = str(value) if isinstance(value, StrEnum) else value
            raise ConfigError(path, value, f"engine.expert={engine.expert} {reason}", remedy)


def experts_of(known: Mapping[str, Any]) -> int:
    """Return the experts of a block by a model's config; 0 where that names none."""
    return next((known[name] for name in COUNTS if isinstance(known.get(name), int) and known[name] > 0), 0)


def require_experts(known: Mapping[str, Any], expert: int, ranks: int, ranks_per_node: int | None) -> None:
    """Raise ConfigError unless what a model's config says of its experts divides over `expert` ranks, all of one node.

    The remedy is the nearest number by which these, the `ranks` of a copy and those of a node divide.
    """
    require_divides(experts_of(known), expert, ranks, ranks_per_node or expert)


def require_divides(count: int, expert: int, ranks: int, node: int) -> None:
    """Raise ConfigError unless `count` experts, 0 where that is not known yet, and `node` ranks divide over `expert` ranks, of `ranks`."""
    if count % expert:
        reason = f"the model has {plural(count, 'expert')} a block, which do not divide over {expert} ranks"
    elif node % expert:
        reason = f"nodes of {node} ranks do not divide into groups of {expert}, and ranks that have all experts together must be on one"
    else:
        return
    fit = [size for size in range(1, ranks + 1) if ranks % size == node % size == count % size == 0]
    near = min(fit, key=lambda size: (abs(size - expert), size))
    raise ConfigError("engine.expert", expert, reason, f"engine.expert={near}")
