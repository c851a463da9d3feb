"""What goes with layers that are split over ranks (engine.tensor), and over how many a model's layers divide. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from trainers.config.choices import Float8, ObjectiveName, Offload, OptimizerName, OptimizerState, PeftMethod, Quantisation
from trainers.config.derived import HEADED
from trainers.config.errors import ConfigError
from trainers.config.mesh import shard_of
from trainers.config.schema import EngineConfig, RunConfig

METHODS = (PeftMethod.none, PeftMethod.freeze, PeftMethod.lora)
OPTIMIZERS = (OptimizerName.adamw, OptimizerName.sgd)
COUNTS = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "intermediate_size": "features between the layers of its MLP",
    "vocab_size": "tokens in its vocabulary",
}
"""Fields of a model's config that must divide over the ranks, with what they count."""


def validate_tensor(config: RunConfig) -> None:
    """Refuse what does not work where ranks split layers, by name."""
    train, peft, optim, name = config.train, config.peft, config.optim, config.objective.name
    param, smooth, spreads = config.engine.offload_param, config.objective.label_smoothing, name in (ObjectiveName.sft, ObjectiveName.cpt)
    refused: list[tuple[str, Any, bool, str, str]] = [
        ("train.compile", True, train.compile, "sums over ranks inside a block, which is not compiled", "train.compile=false"),
        ("train.float8", train.float8, train.float8 is not Float8.none, "splits layers before they are converted", "train.float8=none"),
        ("peft.method", peft.method, peft.method not in METHODS, "splits layers, and adapters of lora", "peft=lora"),
        ("peft.quantise", peft.quantise, peft.quantise is not Quantisation.none, "splits no matrix in blocks of 4 bits", "peft=lora"),
        ("peft.modules_to_save", peft.modules_to_save, bool(peft.modules_to_save), "splits no second copy", "peft.modules_to_save=[]"),
        ("optim.name", optim.name, optim.name not in OPTIMIZERS, "leaves no optimizer whole rows", "optim=adamw or optim=sgd"),
        ("optim.state", optim.state, optim.state is not OptimizerState.fp32, "keeps moments in float32", "optim.state=fp32"),
        ("engine.offload_param", param, param is Offload.cpu, "keeps parts of layers where they are computed", "engine.offload_param=none"),
        ("objective.name", name, name is ObjectiveName.distil, "has a part of the vocabulary on each rank", "engine.tensor=1"),
        ("objective.name", name, name in HEADED, "has no head of scores", "engine.tensor=1"),
    ]
    apart = "has a part of the vocabulary on each rank"
    refused += [("objective.label_smoothing", smooth, spreads and smooth > 0, apart, "objective.label_smoothing=0")]
    for path, value, is_set, reason, remedy in refused:
        if is_set:
            value = str(value) if isinstance(value, StrEnum) else value
            raise ConfigError(path, value, f"engine.tensor={config.engine.tensor} {reason}", remedy)


def require_counts(known: Mapping[str, Any], engine: EngineConfig, ranks: int, ranks_per_node: int | None = None) -> None:
    """Raise ConfigError unless what a model's config counts divides over the ranks that split its layers, and these are on one node.

    What the config does not say is not known yet. The remedy is the nearest number by which `ranks`, those of a node and all of these
    divide. The ranks of a group wait for each other four times a block.
    """
    tensor, node = engine.tensor, ranks_per_node or ranks
    counts: dict[str, int] = {name: known[name] for name in COUNTS if isinstance(known.get(name), int) and known[name] > 0}

    def divides(size: int, name: str) -> bool:
        return counts[name] % size == 0

    wrong = next((name for name in counts if not divides(tensor, name)), None)
    if wrong is not None:
        reason = f"the model has {counts[wrong]:,} {COUNTS[wrong]}, which do not divide over {tensor} ranks"
    elif node % tensor:
        reason = f"nodes of {node} ranks do not divide into groups of {tensor}, and a layer's parts must be on one node"
    else:
        return
    fit = [size for size in range(1, ranks + 1) if ranks % size == node % size == 0 and all(divides(size, name) for name in counts)]
    near = min(fit, key=lambda size: (abs(size - tensor), size), default=1)
    raise ConfigError("engine.tensor", tensor, reason, f"engine.tensor={near}" + shard_of(engine, ranks // near))
