"""The model outside any engine: built without weights, grown to its tokenizer; its blocks, positions and FLOPs."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainers.config.choices import ENCODER_DECODERS, Attention, Experts
from trainers.config.errors import ConfigError, did_you_mean
from trainers.config.local import looks_local
from trainers.config.schema import ModelConfig
from trainers.model.backends import library_name
from trainers.model.experts import choose
from trainers.model.recurrent import begin_anew
from trainers.model.safetensors_files import FLOATS, Weights, listed
from trainers.model.weights import load_parts, materialise, origin_of, tied_names
from trainers.processes import raise_exhausted

log = logging.getLogger("fulltune")
QUANTISED = ("quantization_config", "compression_config")
"""Fields of a config that say how its weights are quantised."""
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on a document's length."""


@dataclass(kw_only=True)
class Blueprint:
    """What every rank needs to build its part of a model."""

    config: PreTrainedConfig
    folder: Path | None
    """Directory of safetensors files; None for random weights."""
    revision: str | None
    """Commit of a hub model."""
    seed: int
    trust_remote_code: bool
    saved_dtype: torch.dtype = torch.float32
    """Type of the export: the base checkpoint's own, so that the export can take its place."""
    experts: Experts = Experts.auto
    """How a mixture's experts are computed."""
    attention: str | None = None
    """Why `config` has the attention backend that it has; None where nobody has chosen one yet."""
    vocab_on_disk: int | None = None
    """Rows of the checkpoint's embedding where `config` has more; None where they agree."""
    scores: bool = False
    """`config` has a head of scores of documents in the place of the base's output layer."""

    def build(self, device: str = "meta") -> PreTrainedModel:
        """Build the model in float32: parameters on `meta` (buffers are real), or whole and with its values on `cpu`."""
        model = self._build()
        if device == "cpu":
            origin = origin_of(model, self)
            materialise(model, torch.device("cpu"))
            state, tied = model.state_dict(), tied_names(model)
            load_parts(origin, {name: (tensor, (0,) * tensor.ndim) for name, tensor in state.items() if name not in tied})
        return model

    def _maker(self) -> Callable[..., PreTrainedModel]:
        if not self.scores and self.config.model_type not in ENCODER_DECODERS:
            return AutoModelForCausalLM.from_config
        if not self.scores:
            from trainers.model.seq2seq import maker

            return maker(self.config, self.folder)
        from trainers.model.scores import build_scores

        return build_scores

    def _build(self) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            try:
                model = self._maker()(copy.deepcopy(self.config), dtype=torch.float32, trust_remote_code=self.trust_remote_code)
            except ValueError as error:  # from_config writes the type into the config it is given, hence the copy
                reason = str(error).split(" yet.")[0].splitlines()[0]
                if "attention" in reason:
                    raise ConfigError("model.attention", self.config._attn_implementation, reason, "model.attention=auto") from error
                raise ConfigError("model.id" if self.folder else "model.architecture", self.config.model_type, reason) from error
        choose(model, self.experts)
        model.tie_weights()
        begin_anew(model, model.config)
        return _by_document(model) if any(getattr(module, "rope_type", "") in BY_LENGTH for module in model.modules()) else model


def _by_document(model: PreTrainedModel) -> PreTrainedModel:
    from trainers.model.rotary import by_document

    by_document(model)
    return model


def make_blueprint(model: ModelConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """Resolve a hub id or directory, or random weights, into a Blueprint; raises ConfigError naming the field."""
    if model.id is None:
        folder, revision = None, None
        config = from_architecture(model.architecture, tokenizer, num_ids(tokenizer))
    else:
        folder, revision = _fetch(model)
        config = read_config(folder, model.trust_remote_code)
    return blueprint_of(model, seed, config, num_ids(tokenizer), folder, revision)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs for a tokenizer: its largest id + 1, which is more than its tokens where ids leave gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return a model directory's config; raises ConfigError where its weights are quantised."""
    config = open_config(folder, trust_remote_code)
    if methods := _quantisation(config):
        kinds = listed(_quantised_types(folder))
        reason = f"holds weights as {kinds}: quantised ({listed(methods)}), which cannot be trained further as they are"
        raise ConfigError("model.id", str(folder), reason, "name the checkpoint in bf16 or fp32")
    return config


def open_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return a model directory's config, without a quantization_config that is left of other weights than those on disk."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if (methods := _quantisation(config)) and not _quantised_types(folder):
        for part in _parts(config):
            for name in QUANTISED:
                if hasattr(part, name):
                    delattr(part, name)
        said = "%s/config.json asks for quantised weights (%s), and those in its files are not quantised: left out, in the export too"
        log.warning(said, folder, listed(methods))
    return config


def _quantised_types(folder: Path) -> list[str]:
    """Return the types of matrices on disk that are not floating-point numbers of 16 bits or more."""
    return sorted({stored.type for stored in Weights(folder).stored.values() if len(stored.shape) > 1} - set(FLOATS))


def _quantisation(config: PreTrainedConfig) -> list[str]:
    """Return the methods that a config names for itself or a part."""
    settings = [found for part in _parts(config) for name in QUANTISED if (found := getattr(part, name, None))]
    return sorted({str(found.get("quant_method", "unnamed") if isinstance(found, dict) else found.quant_method) for found in settings})


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]


def blueprint_of(
    model: ModelConfig, seed: int, config: PreTrainedConfig, num_tokens: int, folder: Path | None = None, revision: str | None = None
) -> Blueprint:
    """Return the Blueprint of a transformers config for a tokenizer of `num_tokens`; without a folder, one that has no values to read."""
    if model.encoder_decoder != (config.model_type in ENCODER_DECODERS):
        from trainers.model.seq2seq import misnamed

        raise misnamed(model, config)
    vocab_on_disk = _grow(model, config, num_tokens)
    saved_dtype = config.dtype if model.id is not None and isinstance(config.dtype, torch.dtype) else torch.float32
    config._attn_implementation = None if model.attention is Attention.auto else library_name(model.attention)
    return Blueprint(
        config=config,
        folder=folder,
        revision=revision,
        seed=seed,
        trust_remote_code=model.trust_remote_code,
        saved_dtype=saved_dtype,
        experts=model.experts,
        vocab_on_disk=vocab_on_disk,
    )


def _grow(model: ModelConfig, config: PreTrainedConfig, num_tokens: int) -> int | None:
    """Give `config` a vocabulary of `num_tokens` if it has fewer and may grow; return what it had, or None. It never shrinks."""
    text = config.get_text_config()
    vocab_size: int = text.vocab_size or 0
    if num_tokens <= vocab_size:
        return None
    reason = f"has {num_tokens} tokens, the model only {vocab_size}"
    if model.id is None:
        raise ConfigError(
            "model.architecture.vocab_size", vocab_size, f"the tokenizer {reason}", "leave it out: it comes from the tokenizer"
        )
    if not (model.grow_vocabulary or model.add_tokens):
        remedy = "model.grow_vocabulary=true gives the model a row for each new one, with peft=none: the base of an adapter cannot grow"
        raise ConfigError("model.tokenizer", model.tokenizer, reason, remedy)
    for part in (config, text):
        if getattr(part, "vocab_size", None) == vocab_size:
            part.vocab_size = num_tokens
    return vocab_size


class Vocabulary(Protocol):
    """What a model must know of its tokenizer."""

    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any


def from_architecture(fields: dict[str, Any], tokenizer: Vocabulary, num_tokens: int) -> PreTrainedConfig:
    """Return a transformers config for random weights; raises ConfigError for a field its class does not have."""
    fields = dict(fields)
    kind = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            "model.architecture.model_type", kind, "transformers has no such architecture", did_you_mean(kind, CONFIG_MAPPING)
        ) from error
    for name, value in fields.items():
        if not hasattr(known, name) and not _is_read(known, name):
            raise ConfigError(
                f"model.architecture.{name}", value, f"{type(known).__name__} has no such field", did_you_mean(name, vars(known))
            )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return AutoConfig.for_model(kind, **({"vocab_size": num_tokens} | special | fields))
    except Exception as error:  # transformers' own check of types and of sizes that do not divide
        raise_exhausted(error)
        raise ConfigError("model.architecture", fields, " ".join(str(error).split())) from error


def _is_read(config: PreTrainedConfig, name: str) -> bool:
    """Tell whether a model's code asks for a field that its config does not declare, as Qwen3-MoE's does for head_dim."""
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model is not None and f'config, "{name}"' in inspect.getsource(sys.modules[model.__module__])


def _fetch(model: ModelConfig) -> tuple[Path, str | None]:
    assert model.id is not None
    folder, revision = (Path(model.id), None) if looks_local(model.id) else _snapshot(model)
    if model.convert and not any(folder.glob("*.safetensors")):
        from trainers.model.convert import converted

        folder = converted(folder)
    return folder, revision


def _snapshot(model: ModelConfig) -> tuple[Path, str | None]:
    from trainers.model import hub

    assert model.id is not None
    pickled = hub.require_readable(model.id, model.revision, model.convert)
    folder, commit = hub.fetch("model.id", model.id, model.revision, hub.BINS if pickled else hub.WEIGHTS)
    hub.require_weights(model.id, folder, model.convert)
    return folder, commit


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class transformers has for a config; None for code that comes with the model."""
    mapping: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.model_type in ENCODER_DECODERS else MODEL_FOR_CAUSAL_LM_MAPPING
    known: type[PreTrainedModel] | None = mapping.get(type(config), None)
    return known


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of an architecture, the outermost ones: what transformers' own sharding plan names `layers.*`.

    Where the plan does not fit the architecture (GPT-2's `h`), the lists of modules that transformers must not split. Some have none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    planned = [name for name in lists if f"{name}.*" in (model.fsdp_plan or {})]
    unsplit = set(model._no_split_modules or [])
    names = planned or [name for name, layers in lists.items() if type(layers[0]).__name__ in unsplit]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [block for name in outermost for block in lists[name]]


def flops_per_token(shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, attended: float, frozen: Collection[str] = ()) -> float:
    """Return the FLOPs of forward and backward for one token: 6 a parameter, 12 x layers x width x `attended` for attention.

    A frozen one takes 4: there is no gradient of its own.

    PaLM, appendix B (Chowdhery et al. 2022), without recomputation. `attended` is the mean length of the document a token
    is in. Untied input embeddings do no matrix work; of experts only those that a token is sent to count.
    """
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_k", None) or 1
    stacked = next((shape[0] for name, shape in shapes.items() if ".experts." in name and len(shape) == 3), None)
    experts = stacked or getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or chosen
    active = 0.0
    for name, shape in shapes.items():
        active += (4 / 6 if name in frozen else 1.0) * math.prod(shape) * (chosen / experts if ".experts." in name else 1.0)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = heads * _head_width(text, heads)
    embeddings = 0.0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size * (4 / 6 if frozen else 1.0)
    flops: float = 6 * (active - embeddings) + 12 * text.num_hidden_layers * width * attended
    return flops


def _head_width(text: PreTrainedConfig, heads: int) -> float:
    """Return a head's width, the mean of its two products' where keys and values differ (DeepSeek's latent attention)."""
    value = getattr(text, "v_head_dim", None)
    if value and (rotated := getattr(text, "qk_rope_head_dim", None)):
        return float(rotated + text.qk_nope_head_dim + value) / 2
    return float(getattr(text, "head_dim", None) or text.hidden_size // heads)


def positions_limit(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """Return the longest document the model was made for, or None, and whether longer ones are impossible (learned positions)."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) is None
