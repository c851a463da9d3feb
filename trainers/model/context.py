"""Rows that several ranks share: each computes a slice of every row's tokens, and attends with some of the heads.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509): before attention an all-to-all gives each rank whole rows of its heads, and after it
one gives back its tokens of all heads. Masks, documents and windows are therefore those of whole rows. Where the ranks are more than
heads, groups of them exchange heads, and the groups gather keys and values (trainers/model/queries.py). What a slice makes of its
tokens is gathered, so that objectives see whole rows on each rank of the group. Each of these ranks has the same loss, and
backward gives it the gradient of its own slice's part: their sum is the gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AttentionInterface

from trainers.batch import IGNORE, Batch, Needs, Output
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.config.sharding import SHARED
from trainers.model.attention import documents_now, documents_of
from trainers.model.exchange import exchange
from trainers.model.experts import Routing
from trainers.model.filled import cut, filled_up
from trainers.model.forward import Head, forward, is_told_documents
from trainers.model.queries import Spans, attend_to_gathered, in_order, spans_of
from trainers.model.recurrent import recurrent_layers
from trainers.model.rotary import require_short


@dataclass(frozen=True, eq=False)
class Slices:
    """The ranks that share rows, and which slice is this one's.

    Consecutive ranks exchange heads. Where these are not all, the row is dealt out to `size / heads_size` groups of them in a zigzag.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    heads: dist.ProcessGroup
    """Those that exchange heads."""
    heads_size: int
    rows: dist.ProcessGroup | None = None
    """Those that have the other groups' tokens of this one's heads; None where there is one group."""

    @property
    def groups(self) -> int:
        """Return how many groups of ranks exchange heads."""
        return self.size // self.heads_size

    @property
    def multiple(self) -> int:
        """Return what the tokens of a row must be a multiple of."""
        return self.size if self.rows is None else math.lcm(self.size, 2 * self.groups)

    def queries(self, length: int) -> Spans:
        """Return which tokens of rows of `length` this rank has in attention: those of its group."""
        if self.rows is None:
            return ((0, length),)
        each, group = length // self.groups, self.rank // self.heads_size
        return spans_of(length, self.groups, group * each, (group + 1) * each)

    def part(self, batch: Batch) -> Batch:
        """Return this rank's slice of rows, (B, S) -> (B, S / size); documents keep their numbers.

        Segments and starts stay those of whole rows, and are for attention, which has these.
        """
        shape = batch.labels.shape
        length = shape[1] // self.size
        ends = self.rank * length, (self.rank + 1) * length
        spans = (ends,) if self.rows is None else spans_of(shape[1], self.groups, *ends)

        def own(tensor: Tensor) -> Tensor:
            parts = [tensor[:, begin:end] for begin, end in spans]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

        sliced = batch.map(lambda tensor: own(tensor) if tensor.shape[:2] == shape else tensor)  # keeps all that is not (B, S)
        every = torch.arange(shape[0] * length, device=batch.labels.device)
        if len(batch.columns) > shape[1] - self.multiple:  # all but padding: nothing to look for, which a plan could not
            columns = every[:length]
        else:
            found = (sliced.labels != IGNORE).any(0).nonzero().flatten()
            columns = found if len(found) else every[:1]
        return replace(sliced, kept=every, columns=columns, labelled=columns)

    def gather(self, values: Tensor) -> Tensor:
        """Return what all ranks have of their tokens, (B, S / size, ...) -> (B, S, ...); backward takes this rank's part."""
        gathered: Tensor = _Gather.apply(values, self)  # type: ignore[no-untyped-call]
        return gathered if self.rows is None else in_order(gathered, self.groups)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks; backward hands the gradient on as it is, as each rank has the same loss."""
        summed: Tensor = _Sum.apply(values, self)  # type: ignore[no-untyped-call]
        return summed

    def heads_for_tokens(self, values: Tensor) -> Tensor:
        """Return its group's tokens of this rank's heads, of n ranks (B, H, S / size, D) -> (B, H / n, n S / size, D)."""
        parts = values.unflatten(1, (self.heads_size, -1)).movedim(1, 0)
        return exchange(parts, self.heads).movedim(0, 2).flatten(2, 3)

    def tokens_for_heads(self, values: Tensor) -> Tensor:
        """Return all heads of this rank's tokens, of n ranks (B, n S / size, H / n, D) -> (B, S / size, H, D)."""
        parts = values.unflatten(1, (self.heads_size, -1)).movedim(1, 0)
        return exchange(parts, self.heads).movedim(0, 2).flatten(2, 3)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, slices: Slices) -> Tensor:
        ctx.slices, ctx.length = slices, values.shape[1]
        given = values.contiguous()
        every = given.new_empty(slices.size * len(given), *given.shape[1:])
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.13
        gather(every, given, group=slices.group)
        return torch.cat(every.unflatten(0, (slices.size, -1)).unbind(), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(1, ctx.slices.rank * ctx.length, ctx.length), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, values: Tensor, slices: Slices) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=slices.group)
        return summed

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def require_no_state(model: Any, context: int, seq_len: int) -> None:
    """Raise ConfigError for a model with layers whose state runs along a row, or positions that depend on a document's length."""
    layer = next(recurrent_layers(model), None)
    if layer is not None:
        reason = f"{type(model).__name__} has recurrent layers ({type(layer).__name__}), whose state runs along a row"
        raise ConfigError("engine.context", context, reason, "engine.context=1")
    require_short(model.config, seq_len, context)


def slices_of(mesh: Mesh, rank: int, device: str, heads: int | None) -> Slices:
    """Return the ranks of a mesh that share this one's rows, and let attention exchange heads among them; collective.

    As many of them exchange heads as divide `heads`, those of the model; all where nobody knows.
    """
    groups = init_device_mesh(device, (mesh.data_size, mesh.context, mesh.tensor), mesh_dim_names=("data", "context", "tensor"))
    group, size = groups.get_group("context"), math.gcd(mesh.context, (heads or 0) // mesh.tensor)
    slices = Slices(group=group, size=mesh.context, rank=mesh.slice_rank(rank), heads=group, heads_size=size)
    if size < mesh.context:
        shape = (mesh.data_size, mesh.context // size, size, mesh.tensor)
        groups = init_device_mesh(device, shape, mesh_dim_names=("data", "rows", "heads", "tensor"))
        slices = replace(slices, heads=groups.get_group("heads"), rows=groups.get_group("rows"))
    for backend in SHARED[1:]:
        plain = AttentionInterface().get(str(backend))
        if not isinstance(plain, partial):
            AttentionInterface.register(str(backend), partial(_attend, plain))
    return slices


def forward_in_slices(
    model: nn.Module, batch: Batch, needs: Needs, slices: Slices, head: Head | None = None, routing: Routing | None = None
) -> Output:
    """Return what `forward` returns of whole rows, which each rank of the group gives, from this rank's slice and those of the others.

    Rows get padding up to a multiple of the ranks, or of `Slices.multiple`. Collective over the group.
    """
    in_one_row = is_told_documents(model, model.config)
    rows = batch.in_one_row() if in_one_row else batch
    size = rows.labels.shape[1]
    wide = filled_up(rows, math.ceil(size / slices.multiple) * slices.multiple)
    part = slices.part(wide)
    run = partial(forward, model, part, needs, head=head)
    with documents_of(wide, slices):
        output = run() if routing is None else routing.with_balance(part, run, slices.sum)
    output = cut(output.map_tokens(slices.gather), size)
    return output.map_tokens(batch.out_of_one_row) if in_one_row else output


def _attend(
    plain: Callable[..., Any] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **more: Any,
) -> tuple[Tensor, Any]:
    """Attend to whole rows with this rank's heads where the batch is shared, (B, H, T, D) each -> (B, T, H, D); else as ever.

    Where heads are exchanged in several groups, of the tokens of this rank's group.
    """
    plain = plain or sys.modules[type(module).__module__].eager_attention_forward
    packed = documents_now(query.shape[0] * query.shape[2])
    slices = None if packed is None else packed.slices
    if slices is None:
        return plain(module, query, key, value, attention_mask, *args, **more)  # type: ignore[no-any-return]
    times = slices.heads_size // math.gcd(slices.heads_size, key.shape[1])
    if times > 1:
        key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    query, key, value = map(slices.heads_for_tokens, (query, key, value))
    grouped = _Grouped(module, query.shape[1] // key.shape[1])
    if slices.rows is not None:
        return slices.tokens_for_heads(
            attend_to_gathered(plain, grouped, query, key, value, attention_mask, slices.rows, *args, **more)
        ), None
    output, _ = plain(grouped, query, key, value, attention_mask, *args, **more)
    return slices.tokens_for_heads(output), None


class _Grouped:
    """An attention module to a function of transformers, with as many query heads to a key's as a rank has."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
