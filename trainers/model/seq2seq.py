"""Encoder-decoders: how they are built, when the decoder's output layer is its own, and what they are called with.

transformers 5 ties the output layer of every T5 to the embedding, unless files hold both with different values, as Flan-T5's and
mT5's do. Its from_pretrained finds that out once all values are read; here it is known before the model is built.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from trainers.batch import NO_TOKEN, Batch
from trainers.config.choices import ENCODER_DECODERS
from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig
from trainers.model.safetensors_files import Weights

HEAD, SHARED = "lm_head.weight", "shared.weight"
EMBEDDINGS = (SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""What files call the embedding, under one or more of these names."""
COMPARED = 64
"""Rows of output layer and embedding that are compared; the rest is when they are read."""


def opener_of(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that opens a directory of this architecture."""
    return AutoModelForSeq2SeqLM if config.model_type in ENCODER_DECODERS else AutoModelForCausalLM


def misnamed(model: ModelConfig, config: PreTrainedConfig) -> ConfigError:
    """Return the error of a model that is an encoder-decoder, or that is called one."""
    if model.encoder_decoder:
        reason = f"{model.id or 'the model'} is a {config.model_type}, and encoder-decoders are {', '.join(ENCODER_DECODERS)} here"
        return ConfigError("model.encoder_decoder", True, reason, "model.encoder_decoder=false")
    path, value = ("model.id", model.id) if model.id else ("model.architecture.model_type", config.model_type)
    reason = f"{config.model_type} is an encoder-decoder, and model.encoder_decoder is not set"
    return ConfigError(path, value, reason, "model.encoder_decoder=true data.packing=false")


def maker(config: PreTrainedConfig, folder: Path | None) -> Callable[..., PreTrainedModel]:
    """Return what builds the model of a config, with an output layer of its own where its files have one.

    Without files it is as published: tied in T5 1.0, whose decoder's output is scaled, and its own in all later ones. A config without
    a token that begins an answer gets the one that pads; raises ConfigError without either.
    """
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    if config.decoder_start_token_id is None:
        reason = "nothing begins an answer: the config has neither decoder_start_token_id nor pad_token_id"
        raise ConfigError("model.tokenizer", config.model_type, reason, "a tokenizer with a pad token")
    own = has_own_head(folder) if folder is not None else not getattr(config, "scale_decoder_outputs", False)
    return partial(_build, own)


def has_own_head(folder: Path) -> bool:
    """Tell whether files hold an output layer that differs from the embedding."""
    weights = Weights(folder)
    embedding = next((name for name in EMBEDDINGS if name in weights.stored), None)
    if embedding is None or HEAD not in weights.stored:
        return False
    shape = weights.stored[HEAD].shape
    first = (min(COMPARED, shape[0]), *shape[1:])
    head, shared = (weights.read(name, (0, 0), first).float() for name in (HEAD, embedding))
    return not torch.equal(head, shared)


def _build(own_head: bool, config: PreTrainedConfig, **how: Any) -> PreTrainedModel:
    """Return transformers' model for a config, its output layer tied to the embedding or its own."""
    model: Any = AutoModelForSeq2SeqLM.from_config(config, **how)
    if own_head:
        model._tied_weights_keys = {name: source for name, source in model._tied_weights_keys.items() if name != HEAD}
        model.all_tied_weights_keys.pop(HEAD, None)
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    return model  # type: ignore[no-any-return]


def flops_of_parts(
    targets: float, shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, attended: float, frozen: Collection[str] = ()
) -> float:
    """Return the FLOPs of forward and backward for one token, as `flops_per_token` counts them; `targets` is the share of those written.

    Each token goes through the encoder or through the decoder and the output layer. Keys and values that the decoder has of the source
    are computed of tokens that are read. The embedding does no matrix work, unless it is the output layer.
    """
    active = 0.0
    for name, shape in shapes.items():
        reads = name.startswith("encoder.") or ".EncDecAttention.k." in name or ".EncDecAttention.v." in name
        share = 0.0 if name == SHARED and HEAD in shapes else 1 - targets if reads else targets
        active += share * (4 / 6 if name in frozen else 1.0) * math.prod(shape)
    text = config.get_text_config()
    return float(6 * active + 12 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * attended)


class Decoding:
    """A model that is called with targets as a causal one is with rows, and reads their sources itself."""

    def __init__(self, model: Any, batch: Batch, config: Any) -> None:
        """Take the batch that the model will be called with."""
        self.model, self.batch, self.start = model, batch, config.decoder_start_token_id

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        """Return what the model makes of targets (B, T), whose first input is what begins every answer."""
        source = self.batch.source
        assert source is not None
        begun = torch.cat([torch.full_like(input_ids[:, :1], self.start), input_ids[:, 1:]], 1)
        mask = (source != NO_TOKEN).long()
        return self.model(input_ids=source.clamp(min=0), attention_mask=mask, decoder_input_ids=begun, use_cache=False)


def decoder_cache(config: Any) -> dict[str, Any]:
    """Return what more `generate` needs: where a decoder is deeper than its encoder, a cache that grows with the layers that fill it.

    The one that transformers makes has as many layers as the encoder.
    """
    if not config.is_encoder_decoder or config.num_decoder_layers <= config.num_layers:
        return {}
    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


def whole(batch: Batch) -> Batch:
    """Return a batch of which all columns are computed: T5 makes the logits of each token."""
    return dataclasses.replace(batch, columns=torch.arange(batch.labels.shape[1], device=batch.labels.device))
