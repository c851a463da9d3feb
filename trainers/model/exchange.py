"""An all-to-all with a gradient: what each rank of a group sends to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(values: Tensor, group: dist.ProcessGroup, sends: Sequence[int] | None = None, receives: Sequence[int] | None = None) -> Tensor:
    """Return the rows that came: of `values` (sum(sends), ...) the first sends[0] go to rank 0, and receives[0] come from it.

    Without counts each rank gets as many. Backward sends the gradients back. Collective.
    """
    exchanged: Tensor = _Exchange.apply(values, group, sends, receives)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup, sends: Any, receives: Any) -> Tensor:
        ctx.group, ctx.sends, ctx.receives = group, sends, receives
        return _exchanged(values, group, sends, receives)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.group, ctx.receives, ctx.sends), None, None, None


def _exchanged(values: Tensor, group: dist.ProcessGroup, sends: Any, receives: Any) -> Tensor:
    given = values.contiguous()
    taken = torch.empty_like(given) if receives is None else given.new_empty(sum(receives), *given.shape[1:])
    dist.all_to_all_single(taken, given, receives, sends, group=group)
    return taken
