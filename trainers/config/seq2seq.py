"""What does not go with an encoder-decoder. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from trainers.config.choices import (
    ENCODER_DECODERS,
    Activations,
    DocumentOf,
    Float8,
    ObjectiveName,
    PeftMethod,
    Precision,
    Quantisation,
    Reasoning,
    Supervise,
)
from trainers.config.errors import ConfigError
from trainers.config.methods import VIRTUAL
from trainers.config.mix import named, sources_of_mix
from trainers.config.schema import RunConfig

SAID = "an encoder-decoder (model.encoder_decoder)"


def validate_encoder_decoder(config: RunConfig) -> None:
    """Raise ConfigError for the first setting that an encoder-decoder does not go with, also of a mixture's source."""
    _require(config)
    require_general_source(config)
    for name, one in sources_of_mix(config).items() if config.data.mix else ():
        with named(name):
            _require(one)


def _require(config: RunConfig) -> None:
    for path, value, reason, remedy in _refused(config):
        raise ConfigError(path, value if isinstance(value, bool | int | float) else str(value), reason, remedy)


def require_general_source(config: RunConfig) -> None:
    """Raise ConfigError unless general text is rows of the run's mixture: texts have no source that an encoder could read."""
    if (name := config.evaluation.general) is not None and name not in config.data.mix:
        reason = f"the general text of {SAID} is held-out rows of its own mixture"
        raise ConfigError("evaluation.general", name, reason, "evaluation.general=null, or a source of data.mix with held-out rows")


def require_no_encoder(folder: str) -> None:
    """Raise ConfigError where a model directory is of an encoder-decoder, which nobody has named as one."""
    if has_encoder(Path(folder)):
        remedy = "model.encoder_decoder=true data.packing=false"
        raise ConfigError("model.id", folder, "is an encoder-decoder, and model.encoder_decoder is not set", remedy)


def has_encoder(folder: Path) -> bool:
    """Tell whether a model directory is of an encoder-decoder; what opens it says what is wrong with its config."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get("model_type") in ENCODER_DECODERS
    except (OSError, ValueError, AttributeError):
        return False


def _refused(config: RunConfig) -> Iterator[tuple[str, object, str, str]]:
    """Yield setting, value, reason and remedy of what does not go with it."""
    data, train, engine, peft = config.data, config.train, config.engine, config.peft
    if config.objective.name is not ObjectiveName.sft:
        yield "objective.name", config.objective.name, f"{SAID} is trained on answers, with objective=sft", "objective=sft"
    if data.packing:
        yield "data.packing", True, f"{SAID} would read the sources of a packed row as one", "data.packing=false"
    if data.streaming:
        yield "data.streaming", True, f"{SAID} is trained on rows that are prepared before", "data.streaming=false"
    if data.template is not None:
        yield "data.template", data.template, f"{SAID} reads plain text, without a chat template", "data.template=null"
    if data.supervise is not Supervise.assistant:
        yield "data.supervise", data.supervise, f"{SAID} writes answers and no prompts", "data.supervise=assistant"
    if data.reasoning is not Reasoning.keep:
        yield "data.reasoning", data.reasoning, f"{SAID} writes an answer as it is in its row", "data.reasoning=keep"
    if data.document is not DocumentOf.row:
        yield "data.document", data.document, f"{SAID} reads one question a row", "data.document=row"
    for name in ("context", "tensor", "expert"):
        if (size := getattr(engine, name)) > 1:
            yield f"engine.{name}", size, f"ranks do not split the layers or rows of {SAID}", f"engine.{name}=1"
    if train.compile:
        yield "train.compile", True, f"the blocks of {SAID} are not compiled: each batch has two lengths", "train.compile=false"
    if train.float8 is not Float8.none:
        yield "train.float8", train.float8, f"{SAID} is not computed in float8", "train.float8=none"
    if train.precision is Precision.fp16:
        yield "train.precision", "fp16", f"activations of {SAID} exceed the range of fp16: T5 was trained in bf16", "train.precision=bf16"
    if train.activations in (Activations.offload, Activations.auto):
        yield "train.activations", train.activations, f"the inputs of the blocks of {SAID} stay on the device", "train.activations=block"
    if train.balance_loss is not None:
        yield "train.balance_loss", train.balance_loss, f"{SAID} has no experts here", "train.balance_loss=null"
    if peft.method in VIRTUAL:
        yield "peft.method", peft.method, f"{SAID} gets adapters in its layers, and no virtual tokens", "peft=lora"
    if peft.method is PeftMethod.bottleneck:
        yield "peft.method", peft.method, f"the layers of {SAID} get no bottleneck adapters here", "peft=lora"
    if peft.last_blocks is not None:
        reason = f"the first list of blocks of {SAID} is the encoder's, and all that follows would be trained"
        yield "peft.last_blocks", peft.last_blocks, reason, "peft.freeze=[encoder.*] peft.last_blocks=null"
    if peft.quantise is not Quantisation.none:
        yield "peft.quantise", peft.quantise, f"the base of {SAID} is not quantised", "peft.quantise=none"
