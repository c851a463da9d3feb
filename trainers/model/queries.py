"""Attention of some tokens of a row to all before them, where the ranks that share rows are more than heads.

Keys and values of the whole row are gathered, as in the training of Llama 3 (arXiv 2407.21783, section 3.3.2): with a few heads a
rank they are small. A rank's tokens are two chunks of the row, one from each end (zigzag), so that causal attention is as much work
on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from trainers.batch import PADDING_PIECE
from trainers.model.attention import Packed, kernel_options

Spans = tuple[tuple[int, int], ...]
"""Where tokens are in a row: (first, one after the last) of each run of them."""


def zigzag(groups: int) -> list[int]:
    """Return the chunks of a row in the order in which groups of ranks have them: two each, from both ends."""
    return [chunk for group in range(groups) for chunk in (group, 2 * groups - 1 - group)]


def spans_of(length: int, groups: int, begin: int, end: int) -> Spans:
    """Return where the tokens `begin` to `end` of a row in the order of `zigzag` are in the row of `length` tokens; neighbours as one."""
    size, found = length // (2 * groups), list[tuple[int, int]]()
    for place, chunk in enumerate(zigzag(groups)):
        first, last = max(begin, place * size), min(end, (place + 1) * size)
        if first < last:
            at = (chunk - place) * size
            if found and found[-1][1] == first + at:
                found[-1] = (found[-1][0], last + at)
            else:
                found.append((first + at, last + at))
    return tuple(found)


def in_order(values: Tensor, groups: int, dim: int = 1) -> Tensor:
    """Return tokens in the order of `zigzag` in that of the row, along a dimension."""
    chunks, order = values.chunk(2 * groups, dim), zigzag(groups)
    return torch.cat([chunks[order.index(chunk)] for chunk in range(2 * groups)], dim)


class _Gather(torch.autograd.Function):
    """Keys and values of the whole row, (B, H, S / groups, D) -> (B, H, S, D) each; backward sums what the ranks have of each token.

    One function of both, so that each rank takes part in the collectives of backward in the same order.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, group: dist.ProcessGroup, groups: int) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.groups = group, groups
        key, value = (_gathered(tensor, group, groups) for tensor in (key, value))
        return key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        key, value = (_scattered(grad, ctx.group, ctx.groups) for grad in grads)
        return key, value, None, None


def _gathered(values: Tensor, group: dist.ProcessGroup, groups: int) -> Tensor:
    given = values.movedim(2, 0).contiguous()
    every = given.new_empty(groups * len(given), *given.shape[1:])
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.13
    gather(every, given, group=group)
    return in_order(every, groups, 0).movedim(0, 2)


def _scattered(grad: Tensor, group: dist.ProcessGroup, groups: int) -> Tensor:
    chunks = grad.movedim(2, 0).chunk(2 * groups)
    given = torch.cat([chunks[chunk] for chunk in zigzag(groups)])
    own = given.new_empty(len(given) // groups, *given.shape[1:])
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name until torch 2.13
    scatter(own, given, group=group)
    return own.movedim(0, 2)


def attend_to_gathered(
    plain: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, rows: Any, *args: Any, **more: Any
) -> Tensor:
    """Return attention of this rank's tokens to all before them in the row, (B, H, S / groups, D) each -> (B, S / groups, H, D).

    `rows` is the process group of the ranks that have the others' tokens of the same heads, `plain` a function as transformers has it.
    """
    groups = rows.size()
    key, value = _Gather.apply(key, value, rows, groups)  # type: ignore[no-untyped-call]
    if not isinstance(mask, Packed):  # made for these queries, by trainers.model.attention
        output: Tensor = plain(module, query, key, value, mask, *args, **more)[0]
        return output
    assert len(query) == 1, "rows that are told their documents are one"
    assert mask.slices is not None
    spans = mask.slices.queries(key.shape[2])
    if query.device.type == "cuda":
        return _with_kernel(query, key, value, mask, spans, more.get("scaling"))
    return _piece_by_piece(module, query, key, value, mask, spans, more.get("dropout", 0.0), more.get("scaling"))


def pieces_of(segments: tuple[int, ...], first: int, last: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield each document's tokens, or those of padding, between two places of a row: where it begins, (first, last), if it is padding."""
    for (begin, end), length in zip(pairwise(accumulate(map(abs, segments), initial=0)), segments, strict=True):
        if max(begin, first) < min(end, last):
            yield begin, max(begin, first), min(end, last), length < 0


def _piece_by_piece(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, spans: Spans, dropout: float, scaling: float | None
) -> Tensor:
    """Attend document by document on a CPU. Padding gets zeros, unless there is nothing else: each rank's graph has keys and values."""
    pieces = [piece for span in spans for piece in pieces_of(packed.segments, *span)]
    nothing, begin, outputs = all(is_padding for *_, is_padding in pieces), 0, []
    for document, first, last, is_padding in pieces:
        own = query[:, :, begin : begin + last - first]
        begin += last - first
        if is_padding and not nothing:
            outputs.append(value.new_zeros(1, last - first, own.shape[1], value.shape[-1]))
            continue
        start = first if is_padding else document if packed.window is None else max(document, first + 1 - packed.window)
        keys, values = key[:, :, start:last], value[:, :, start:last]
        is_near = packed.window is None or last - start <= packed.window
        if start == first and is_near:
            outputs.append(sdpa_attention_forward(module, own, keys, values, None, dropout=dropout, scaling=scaling, is_causal=True)[0])
        elif is_near and not dropout:
            groups = own.shape[1] // keys.shape[1]
            outputs.append(after(own, repeat_kv(keys, groups), repeat_kv(values, groups), scaling).transpose(1, 2))
        else:
            behind = torch.arange(first, last, device=own.device)[:, None] - torch.arange(start, last, device=own.device)
            seen = (behind >= 0) & (behind < (packed.window or last))
            outputs.append(sdpa_attention_forward(module, own, keys, values, seen[None, None], dropout=dropout, scaling=scaling)[0])
    return torch.cat(outputs, 1)


def after(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Return causal attention of a document's last L tokens, (B, H, L, D), to its N >= L ones, (B, H, N, D), without a mask of L x N.

    That to the tokens before the L ones and that to themselves are put together by the logarithms of their softmaxes' denominators.
    """
    width = value.shape[-1]
    if width < query.shape[-1]:  # the kernel has one width, and latent attention two
        value = pad(value, (0, query.shape[-1] - width))
    output: Tensor = _After.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return output[..., :width]


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        parts, sums = zip(
            *(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, is_causal, scale=scaling)
                for keys, values, is_causal in _parts(query, key, value)
            ),
            strict=True,
        )
        both = torch.logaddexp(*sums)
        earlier, own = (part * (one - both).exp()[..., None] for part, one in zip(parts, sums, strict=True))
        output: Tensor = (earlier + own).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, both)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, both = ctx.saved_tensors
        of_query, of_key, of_value = zip(
            *(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grads[0], query, keys, values, output, both, 0.0, is_causal, scale=ctx.scaling
                )
                for keys, values, is_causal in _parts(query, key, value)
            ),
            strict=True,
        )
        return of_query[0] + of_query[1], torch.cat(of_key, 2), torch.cat(of_value, 2), None


def _parts(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield keys and values before the queries' own, and theirs, and whether a query sees only some of them."""
    before = key.shape[2] - query.shape[2]
    yield key[:, :, :before], value[:, :, :before], False
    yield key[:, :, before:], value[:, :, before:], True


def _with_kernel(query: Tensor, key: Tensor, value: Tensor, packed: Packed, spans: Spans, scaling: float | None) -> Tensor:
    """Attend with torch's FlashAttention kernel, in 16 bits on a GPU, span by span: it lets the last query see the last key."""
    from torch.nn.attention.varlen import varlen_attn

    width, groups = value.shape[-1], query.shape[1] // key.shape[1]
    more: dict[str, Any] = {"enable_gqa": True} if groups > 1 and "enable_gqa" in kernel_options() else {}
    if groups > 1 and not more:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if width < query.shape[-1]:
        value = pad(value, (0, query.shape[-1] - width))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window, begin, outputs = (-1 if packed.window is None else packed.window - 1, 0), 0, list[Tensor]()
    for span in spans:
        start, queries, keys, longest = _starts(packed.segments, span, query.device)
        own = query[begin : begin + span[1] - span[0]]
        begin += len(own)
        seen = key[start : span[1]], value[start : span[1]]
        output: Tensor = varlen_attn(own, *seen, queries, keys, *longest, scale=scaling, window_size=window, **more)  # type: ignore[assignment]
        outputs.append(output)
    return torch.cat(outputs)[None, ..., :width]


@lru_cache(maxsize=4)
def _starts(segments: tuple[int, ...], span: tuple[int, int], device: torch.device) -> tuple[int, Tensor, Tensor, tuple[int, int]]:
    """Return where the keys of a span's queries begin, cumulative lengths of queries and of keys by document, and their longest.

    Once for all layers: they are made on the CPU. Padding is cut into pieces, as in Batch.starts.
    """
    begins, queries, keys = [], list[int](), list[int]()
    for document, first, last, is_padding in pieces_of(segments, *span):
        cuts = [*range(first, last, PADDING_PIECE if is_padding else last - first), last]
        begins.append(first if is_padding else document)
        queries += [end - begin for begin, end in pairwise(cuts)]
        keys += [end - begin for begin, end in pairwise(cuts if is_padding else (document, last))]
    of_queries, of_keys = (torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries, keys))
    return begins[0], of_queries, of_keys, (max(queries), max(keys))
