"""Rotary embeddings whose frequencies depend on a document's length (longrope: Phi; dynamic NTK), each document by its own.

transformers chooses them once a forward, by the largest position of all rows, and dynamic NTK keeps those of the longest row so far.
A document would then be computed differently next to a longer one, in another microbatch, or after a checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainers.config.errors import ConfigError
from trainers.model.attention import documents_now
from trainers.model.recurrent import joined, parts_of

DYNAMIC, LONGROPE = "dynamic", "longrope"


def by_document(model: nn.Module) -> None:
    """Let each rotary embedding of a model take the length of each document of a batch that `documents_of` names."""
    for module in model.modules():
        if getattr(module, "rope_type", None) in (DYNAMIC, LONGROPE) and not getattr(module, "is_by_document", False):
            bare = inspect.unwrap(type(module).forward)  # without transformers' own choice
            module.forward = partial(_each_document, module, module.forward, bare)  # type: ignore[method-assign]
            module.is_by_document = True  # type: ignore[assignment]


def limit_of(config: PreTrainedConfig) -> int | None:
    """Return the tokens above which a document's length matters to a model's frequencies; None where it never does."""
    text: Any = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") == LONGROPE:
        return int(parameters["original_max_position_embeddings"])
    return int(text.max_position_embeddings) if parameters.get("rope_type") == DYNAMIC else None


def require_short(config: PreTrainedConfig, seq_len: int, context: int) -> None:
    """Raise ConfigError where documents may be longer than that, which a rank that has a slice of them cannot tell."""
    limit = limit_of(config)
    if limit is not None and seq_len > limit:
        reason = f"the model's rotary embedding depends on a document's length above {limit:,} tokens, and a rank sees a slice of it"
        raise ConfigError("engine.context", context, reason, f"data.seq_len={limit}, or engine.context=1")


def _each_document(module: Any, plain: Callable[..., Any], bare: Callable[..., Any], x: Tensor, position_ids: Tensor) -> Any:
    """Return what a rotary embedding does, for each document as if it were alone: two tensors (B, S, D), for x (B, ...).

    Positions are (B, S), or (1, S) for all rows, which transformers makes where a model is given none.
    """
    size = torch.Size((x.shape[0], position_ids.shape[-1]))
    packed = documents_now(size.numel())
    if packed is None or packed.slices is not None:
        return plain(x, position_ids)
    with torch.no_grad():
        parts = [_rotated(module, bare, x, part) for part in parts_of(position_ids.expand(size), packed, size)]
        return tuple(joined(values, size) for values in zip(*parts, strict=True))


def _rotated(module: Any, bare: Callable[..., Any], x: Tensor, position_ids: Tensor) -> Any:
    """Return what the bare forward makes of the positions (1, S) of one document, with the frequencies of its length."""
    kept, limit, length = module.inv_freq, limit_of(module.config), position_ids.shape[1]
    module.inv_freq = module.original_inv_freq
    if limit is not None and length > limit:
        module.inv_freq, _ = ROPE_INIT_FUNCTIONS[module.rope_type](module.config, position_ids.device, seq_len=length)
    try:
        return bare(module, x, position_ids)
    finally:
        module.inv_freq = kept
