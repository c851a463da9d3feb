"""Attention of our own over rows of several documents, `varlen`: no mask is made, and no document sees another.

trainers/model/backends.py decides which backend a run takes.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    eager_mask,
    flex_attention_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from trainers.batch import Batch

VARLEN = "varlen"


class Sharing(Protocol):
    """Ranks that have a slice of the same rows each, as trainers.model.context has them."""

    @property
    def size(self) -> int:
        """Return how many they are."""
        ...

    @property
    def heads_size(self) -> int:
        """Return how many of them exchange heads."""
        ...

    @property
    def rows(self) -> Any:
        """Return those that have the other groups' tokens of this one's heads; None where all exchange heads."""
        ...

    @property
    def groups(self) -> int:
        """Return how many groups of them exchange heads."""
        ...

    def queries(self, length: int) -> tuple[tuple[int, int], ...]:
        """Return which tokens of rows of `length` this rank has in attention: (first, one after the last) of each run of them."""
        ...

    def heads_for_tokens(self, values: Tensor) -> Tensor:
        """Return its group's tokens of this rank's heads, of n ranks (B, H, S / size, D) -> (B, H / n, n S / size, D)."""
        ...

    def tokens_for_heads(self, values: Tensor) -> Tensor:
        """Return all heads of this rank's tokens, of n ranks (B, n S / size, H / n, D) -> (B, S / size, H, D)."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the documents of a batch are: what `varlen` gets in the place of a mask."""

    segments: tuple[int, ...]
    """As Batch.segments: the lengths of documents, and below 0 of padding, in the order of the flattened rows."""
    starts: Tensor
    """As Batch.starts: (N + 1,) int32, on the device of the rows."""
    longest: int
    """Tokens of the longest segment in `starts`."""
    documents: Tensor
    """As Batch.documents."""
    window: int | None = None
    """Tokens that a token sees at most, itself included; None where it sees all before it."""
    slices: Sharing | None = None
    """The ranks that have a slice of these rows each; None where this rank has all of them."""
    tokens: int = 0
    """Of what a model is called with: of these rows, or of this rank's slice of them."""


class _Now(threading.local):
    """The batch that a model computes on, for what transformers calls without saying so: each thread's own."""

    last: Packed | None = None
    """That of the last forward, the class's. Backward computes checkpointed blocks of it again, in a thread of autograd's own."""

    def __init__(self) -> None:
        """Name none, for each thread anew: a default of the class is all that torch.compile would see."""
        self.packed: Packed | None = None


_now = _Now()


@contextmanager
def documents_of(batch: Batch, slices: Sharing | None = None) -> Iterator[None]:
    """Let `varlen` attention and recurrent layers know the documents of the batch that a model is called with.

    With `slices` the model is called with this rank's slice of it, whose own documents say nothing: what is named first holds.
    """
    tokens = sum(map(abs, batch.segments)) // (1 if slices is None else slices.size)
    _now.packed = _Now.last = _now.packed or Packed(batch.segments, batch.starts, batch.longest, batch.documents, None, slices, tokens)
    try:
        yield
    finally:
        _now.packed = None


def documents_now(tokens: int) -> Packed | None:
    """Return the documents of the batch that is computed, forward or again in backward; None where nobody named it.

    `tokens` are those of its rows: with another number, as with virtual tokens in front of each row, there are none.
    """
    packed = _now.packed or (_Now.last if torch.is_grad_enabled() else None)
    return packed if packed is not None and packed.tokens == tokens else None


def packed_mask(
    *, batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, local_size: int | None = None, **more: Any
) -> Any:
    """Return what `attend` needs to know: where documents are, or the mask of sdpa where it is asked for something else.

    transformers calls this once a forward for each kind of layer. `local_size` is the window of sliding layers.
    """
    packed = _now.packed
    plain = attention_mask is None and q_length == kv_length and not more.get("use_vmap") and "allow_is_bidirectional_skip" not in more
    if packed is None or not plain or packed.tokens != batch_size * q_length:
        sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        return sdpa_mask(**sizes, attention_mask=attention_mask, local_size=local_size, **more)
    return dataclasses.replace(packed, window=local_size)


def with_documents(plain: Callable[..., Any], *, mask_function: Callable[..., Any] = causal_mask_function, **more: Any) -> Any:
    """Return the mask of another backend, in which no document sees another even where the model's code has forgotten `position_ids`.

    GPT-OSS and OPT are such models. A mask that may not be left out has its documents in it already.
    """
    packed, rows = _now.packed, (more["batch_size"], more["q_length"])
    if packed is not None and packed.slices is not None:
        return _of_whole_rows(plain, packed, packed.slices, **more)
    causal = more.get("attention_mask") is None and more.get("allow_is_causal_skip", False)
    if (
        packed is not None
        and causal
        and packed.documents.shape == rows
        and more["kv_length"] == rows[1]
        and continues(packed.segments, rows[1])
    ):
        mask_function = and_masks(mask_function, packed_sequence_mask_function(packed.documents))
        more["allow_is_causal_skip"] = False
    return plain(mask_function=mask_function, **more)


def _of_whole_rows(plain: Callable[..., Any], packed: Packed, slices: Sharing, local_size: int | None = None, **more: Any) -> Any:
    """Return the mask of the whole rows of which a model has a slice, or of the tokens of them that this rank has in attention.

    What the model knows of documents is of the slice alone.
    """
    (num, length), together = packed.documents.shape, continues(packed.segments, packed.documents.shape[1])
    mask = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    if together:
        mask = and_masks(mask, packed_sequence_mask_function(packed.documents))
    sizes = {"batch_size": num, "q_length": length, "kv_length": length, "local_size": local_size}
    if slices.groups > 1:
        runs = [torch.arange(*run, device=packed.documents.device) for run in slices.queries(length)]
        mask, together, sizes["q_length"] = _of_queries(mask, own := torch.cat(runs)), True, len(own)
    return plain(mask_function=mask, **more | sizes | {"allow_is_causal_skip": not together})


def _of_queries(mask: Callable[..., Any], places: Tensor) -> Callable[..., Any]:
    """Return the function of a mask whose queries are those at some places of a row."""
    return lambda batch, head, query, key: mask(batch, head, places[query], key)


def continues(segments: tuple[int, ...], length: int) -> bool:
    """Tell whether a document follows another in a row of this length; padding follows whatever it may."""
    begins = accumulate(map(abs, segments), initial=0)
    return any(segment > 0 and begin % length for segment, begin in zip(segments, begins, strict=False))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each document: (B, H, S, D) each -> (B, S, H, D), in the form of transformers' functions.

    Keys and values may have fewer heads. Padding gets zeros, and costs nothing, on a CPU; on a GPU it is made of short documents.
    """
    if not isinstance(attention_mask, Packed):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    if query.device.type == "cuda":
        return _with_kernel(query, key, value, attention_mask, scaling), None
    return _one_by_one(module, query, key, value, attention_mask, {"dropout": dropout, "scaling": scaling, "is_causal": True}), None


def _one_by_one(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, how: dict[str, Any]) -> Tensor:
    """Attend document by document with torch's own kernel, which needs no mask for that.

    In float32 on a CPU this took between 0.05 and 0.9 of the time of one kernel with a mask, and never more.
    """
    shape, lengths = query.shape, [abs(length) for length in packed.segments]
    only_padding = max(packed.segments) < 0  # has a graph all the same: ranks reduce the gradients of the same parameters
    if min(packed.segments) == max(packed.segments) and (only_padding or packed.window is None or lengths[0] <= packed.window):
        if lengths[0] == shape[2]:
            return sdpa_attention_forward(module, query, key, value, None, **how)[0]
        query, key, value = (x.transpose(1, 2).unflatten(1, (-1, lengths[0])).flatten(0, 1).transpose(1, 2) for x in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, None, **how)[0].view(shape[0], shape[2], shape[1], -1)
    pieces = zip(*(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (query, key, value)), strict=True)
    outputs = [
        _attend_one(module, q, k, v, packed.window, how) if length > 0 else v.new_zeros(*q.shape[:2], v.shape[-1])
        for length, (q, k, v) in zip(packed.segments, pieces, strict=True)
    ]
    return torch.cat(outputs).view(shape[0], shape[2], shape[1], -1)


def _attend_one(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, how: dict[str, Any]) -> Tensor:
    """Return a document's attention, (L, H, D) each -> (L, H, D)."""
    length = len(query)
    mask = None if window is None or length <= window else _band(length, window, query.device)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **how)[0]
    return output[0]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return which tokens of a document see which, (1, 1, L, L) bool: the last `window` ones, itself included."""
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((behind >= 0) & (behind < window))[None, None]


def _with_kernel(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None) -> Tensor:
    """Attend to all documents at once with torch's FlashAttention kernel, in 16 bits on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    shape, width = query.shape, value.shape[-1]
    groups = query.shape[1] // key.shape[1]
    more: dict[str, Any] = {"enable_gqa": True} if groups > 1 and "enable_gqa" in kernel_options() else {}
    if groups > 1 and not more:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if width < query.shape[-1]:  # the kernel has one width, and latent attention two
        value = pad(value, (0, query.shape[-1] - width))
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    window = (-1 if packed.window is None else packed.window - 1, 0)
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query, key, value, packed.starts, packed.starts, packed.longest, packed.longest, scale=scaling, window_size=window, **more
    )
    return output[..., :width].reshape(shape[0], shape[2], shape[1], width)


@lru_cache
def kernel_options() -> frozenset[str]:
    """Return the parameters that torch's varlen_attn has: `enable_gqa` is younger than the function, and so is `window_size`."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


AttentionInterface.register(VARLEN, attend)
AttentionMaskInterface.register(VARLEN, packed_mask)
for _name, _plain in (("eager", eager_mask), ("sdpa", sdpa_mask), ("flex_attention", flex_attention_mask)):
    AttentionMaskInterface.register(_name, partial(with_documents, _plain))
