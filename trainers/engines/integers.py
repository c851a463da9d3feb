"""Frozen parameters of integers under fully_shard, such as NF4's bytes: torch 2.13 shards them by itself, torch 2.11 does not."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param


@cache
def shard_integers() -> None:
    """Let fully_shard take parameters of integers from now on: without gradients from the start, and never cast to the compute type.

    torch 2.11 makes each sharded parameter with gradients before it takes them away, which integers refuse, and would gather bytes as
    bf16. Where torch does neither, this changes nothing.
    """
    kind: Any = _fsdp_param.FSDPParam
    shard, cast = kind._init_sharded_param, kind.init_dtype_attrs

    def without_gradients(self: Any, param: nn.Parameter, *rest: Any, **more: Any) -> None:
        plain: Any = _fsdp_param.nn
        if not param.is_floating_point():
            _fsdp_param.nn = SimpleNamespace(Parameter=partial(nn.Parameter, requires_grad=False), Module=nn.Module)  # type: ignore[assignment]
        try:
            shard(self, param, *rest, **more)
        finally:
            _fsdp_param.nn = plain

    def without_cast(self: Any, *arguments: Any) -> None:
        cast(self, *arguments)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    kind._init_sharded_param, kind.init_dtype_attrs = without_gradients, without_cast
