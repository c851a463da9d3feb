"""Layers whose state runs along a row (Mamba, gated delta rule, short convolutions): begun anew with each document.

Where transformers finds the kernels that take cumulative lengths, they get these and compute all documents at once. Elsewhere each
document goes through the layer by itself, whatever the layer does: exact on any device, with one call a document.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import is_causal_conv1d_available, is_flash_linear_attention_available, is_mamba_2_ssm_available

from trainers.batch import Batch
from trainers.model.attention import Packed, continues, documents_now

KERNELS = {"chunk_gated_delta_rule": is_flash_linear_attention_available, "mamba_chunk_scan_combined": is_mamba_2_ssm_available}
"""By what a model's code calls: whether there is the kernel of it that takes several documents. The convolution has one of its own."""

LENGTHS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def recurrent_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers with a causal convolution along the row: all recurrent ones that transformers has come with one."""
    for module in model.modules():
        convolutions = [child for child in module.children() if isinstance(child, nn.Conv1d)]
        if any(child.groups == child.in_channels and child.padding != (0,) for child in convolutions):
            yield module


def begin_anew(model: Any, config: PreTrainedConfig) -> None:
    """Let each recurrent layer of a model begin anew with each document of a batch that `documents_of` names."""
    if takes_lengths(config):
        return
    for layer in recurrent_layers(model):
        layer.forward = partial(_each_document, layer.forward)  # type: ignore[method-assign]
        model.begins_anew = True


def begins_anew(model: nn.Module) -> bool:
    """Tell whether a model has layers that `begin_anew` has changed: they compute rows of one document at once, and others in turn."""
    return bool(getattr(model, "begins_anew", False))


def takes_lengths(config: PreTrainedConfig) -> bool:
    """Tell whether the recurrent layers of an architecture take cumulative lengths here: all of their kernels are installed."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    known = mapping.get(type(config), None) if is_causal_conv1d_available() else None
    return known is not None and _has_kernels(known.__module__)


@cache
def _has_kernels(module: str) -> bool:
    source = inspect.getsource(sys.modules[module])
    found = [is_there for name, is_there in KERNELS.items() if name in source]
    return bool(found) and all(is_there() for is_there in found)


def lengths_for_kernels(batch: Batch) -> dict[str, Tensor]:
    """Return what transformers' recurrent layers hand on to their kernels, for a batch in one row (1, S)."""
    begins = torch.zeros_like(batch.documents, dtype=torch.int32).index_fill_(1, batch.starts[:-1].long(), 1)
    return {"cu_seq_lens_q": batch.starts, "seq_idx": begins.cumsum(1, dtype=torch.int32) - 1}


def _each_document(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer's forward for each document and put the results in their places; (B, S, ...) in, (B, S, ...) out."""
    kwargs = {name: value for name, value in kwargs.items() if name not in LENGTHS}  # which torch's own code refuses
    rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    packed, size = documents_now(rows.shape[0] * rows.shape[1]), rows.shape[:2]
    if packed is None or not continues(packed.segments, size[1]):
        return plain(*args, **kwargs)
    cut = partial(parts_of, packed=packed, size=size)
    given, named = [cut(value) for value in args], {name: cut(value) for name, value in kwargs.items()}
    outputs = [
        plain(*(parts[number] for parts in given), **{name: parts[number] for name, parts in named.items()})
        for number in range(len(packed.segments))
    ]
    if isinstance(outputs[0], tuple):
        return tuple(joined(parts, size) for parts in zip(*outputs, strict=True))
    return joined(outputs, size)


def parts_of(value: Any, packed: Packed, size: torch.Size) -> list[Any]:
    """Return a value for each document: a part of what has the rows' sizes, else the value itself."""
    lengths = [abs(length) for length in packed.segments]
    if not isinstance(value, Tensor) or value.shape[:2] != size:
        return [value] * len(lengths)
    return [part[None] for part in value.flatten(0, 1).split(lengths)]


def joined(parts: Any, size: torch.Size) -> Any:
    """Return the parts (1, S, ...) of documents in rows of `size`, (B, S, ...); or the first part, where parts are something else."""
    return torch.cat(list(parts), 1).unflatten(1, size).squeeze(0) if isinstance(parts[0], Tensor) else parts[0]
