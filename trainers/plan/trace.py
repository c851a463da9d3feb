"""Every storage that a step allocates and frees, with what it is for: on tensors without values, or on real ones."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten
Sent = defaultdict[str, float]
COMMUNICATE = ("c10d", "_c10d_functional", "fsdp")
"""Namespaces of operators whose tensors are on their way between ranks."""
FORWARD, BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Attention that torch's own counter of FLOPs leaves out."""
_sdpa: Any = sdpa_flop
_sdpa_backward: Any = sdpa_backward_flop
SENT = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce", "broadcast": "broadcast"}
SENT |= {"alltoall": "all-to-all"}


class Kind(StrEnum):
    """What memory is for."""

    parameters = "parameters"
    gradients = "gradients"
    optimizer = "optimizer"
    activations = "activations"
    logits = "logits"
    buffers = "buffers"
    """What is gathered of other ranks' parameters, and what is on its way to them."""
    host = "host"
    """In host memory, on a machine with GPUs."""


@dataclass
class Moment:
    """A part of a step between two marks: bytes by kind where memory is highest in it, and the work that is done in it."""

    name: str
    microbatch: int | None
    block: int | None
    peak: dict[Kind, float]
    end: dict[Kind, float] = field(default_factory=dict)
    """Bytes by kind at its end."""
    flops: float = 0.0
    flops_float8: float = 0.0
    """Of `flops`, those of products in float8."""
    moved: float = 0.0
    """Bytes that operators other than matrix products read and write."""
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that this rank sends, by collective and by the ranks that take part, as `all-gather 0:8:1`."""

    @property
    def total(self) -> float:
        """Return the device's bytes at the highest point."""
        return sum(size for kind, size in self.peak.items() if kind is not Kind.host)


class Trace(TorchDispatchMode):
    """A record of allocations, FLOPs and collectives while it is entered."""

    def __init__(self, vocab_size: int, fake: FakeTensorMode | None = None, is_shared: bool = False) -> None:
        """`vocab_size` tells logits from activations; `fake` is the mode whose tensors count, None where those with values do.

        `is_shared` says that ranks share rows: what they attend to of other ranks' tokens is then a part of causal attention.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_shared = is_shared
        self.vocab_size, self.fake, self.is_paused, self.times = vocab_size, fake, False, 1.0
        self.live: dict[int, int] = {}
        """Storages that are there, by address, with their number."""
        self.sizes: list[tuple[int, int]] = []
        """(storage's number, its bytes from now on), in order."""
        self.kinds: list[Kind] = []
        """By a storage's number."""
        self.marks: list[tuple[int, tuple[str, int | None, int | None]]] = []
        self.work: list[tuple[float, float, Sent]] = []
        """FLOPs, bytes moved and bytes sent since each mark."""
        self.float8: list[float] = []
        """Of the FLOPs since each mark, those in float8."""
        self.mark("build")

    def mark(self, name: str, microbatch: int | None = None, block: int | None = None) -> None:
        """Begin another moment."""
        self.marks.append((len(self.sizes), (name, microbatch, block)))
        self.work.append((0.0, 0.0, defaultdict(float)))
        self.float8.append(0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing that is allocated inside."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    @contextmanager
    def repeated(self, times: float) -> Iterator[None]:
        """Count the work inside so many times: one of several that are alike counts for all."""
        before, self.times = self.times, times
        try:
            yield
        finally:
            self.times = before

    def restart(self) -> None:
        """Forget the marks so far; what is there stays."""
        self.marks.clear()
        self.work.clear()
        self.float8.clear()
        self.mark("before")

    def label(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what the storages of tensors are for, from their allocation on."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            number = self.live.get(local.untyped_storage()._cdata)
            if number is not None:
                self.kinds[number] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it has made and done."""
        if any(issubclass(kind, DTensor) or kind.__module__.startswith("torchao.") for kind in types):
            return NotImplemented  # operators on the tensors that it is made of come by
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0 if args[0].dtype.is_floating_point else 0  # nothing has overflowed, and a norm lets a step be taken
        out = (_grouped if func is aten._grouped_mm.default and self.fake else func)(*args, **kwargs)
        space, name = func.namespace, func._opname
        found = [item for item in tree_leaves(out) if isinstance(item, Tensor)]
        if space in COMMUNICATE:
            given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
            for tensor in (*given, *found):
                self._note(tensor, Kind.activations if self._is_of_rows(name) else Kind.buffers)
            if name == "chunk_cat":
                self.label(args[0], Kind.gradients)
            self._sent(name, args, given)
        if any(getattr(tensor, "fake_mode", None) is not self.fake for tensor in found):
            return out  # DTensor looks at shapes with tensors of a mode of its own
        for tensor in found:
            self._note(tensor, Kind.logits if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size else Kind.activations)
        self._worked(func, args, kwargs, out, found)
        return out

    def _is_of_rows(self, name: str) -> bool:
        """Tell whether a collective exchanges what a microbatch computes, which attention keeps; an optimizer's moment has none."""
        return "alltoall" in name and self.marks[-1][1][1] is not None

    def _note(self, tensor: Tensor, kind: Kind) -> None:
        """Know a storage from now on, unless it is known; `kind` is what it seems to be for."""
        if self.is_paused or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.live:
            if kind is Kind.buffers and self.kinds[self.live[address]] is Kind.activations:
                self.kinds[self.live[address]] = kind
            return
        number = self.live[address] = len(self.kinds)
        self.kinds.append(kind)
        self.sizes.append((number, storage.nbytes()))
        weakref.finalize(storage, self._forget, address, number).atexit = False

    def _forget(self, address: int, number: int) -> None:
        if self.live.get(address) == number:
            del self.live[address]
        self.sizes.append((number, 0))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage has another size: fully_shard frees and fills what it gathers in this way, past all operators."""
        number = self.live.get(storage._cdata)
        if number is not None:
            self.kinds[number] = Kind.buffers
            self.sizes.append((number, storage.nbytes()))

    def __enter__(self) -> Any:
        """Begin to record."""
        self.resize = torch.UntypedStorage.resize_
        trace = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            made = trace.resize(storage, size)
            trace.resized(storage)
            return made

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Record nothing more."""
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _worked(self, func: Any, args: Any, kwargs: Any, out: Any, found: list[Tensor]) -> None:
        packet = func._overloadpacket
        flops = moved = 0.0
        if packet is FORWARD:
            flops += self._shown(args[4:], kwargs) * _sdpa(*(tensor.shape for tensor in args[:3]))
        elif packet is BACKWARD:
            flops += self._shown(args[7:], kwargs) * _sdpa_backward(*(tensor.shape for tensor in args[:4]))
        elif packet is aten._grouped_mm:  # rows by expert, which torch's counter leaves out, too
            flops += 2.0 * args[0].numel() * args[1].shape[-1]
        elif packet in flop_registry:
            flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif found and not func.is_view and func.namespace == "aten":
            given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
            moved += sum(tensor.numel() * tensor.itemsize for tensor in (*given, *found))
        self.float8[-1] += self.times * flops if packet is aten._scaled_mm else 0.0
        before, read, sent = self.work[-1]
        self.work[-1] = (before + self.times * flops, read + self.times * moved, sent)

    def _shown(self, is_causal: Sequence[bool], kwargs: Any) -> int:
        """Return how often attention counts: that to earlier tokens twice, since causal attention counts as if each token saw all."""
        return 2 if self.is_shared and not any(is_causal) and kwargs.get("attn_mask") is None else 1

    def _sent(self, name: str, args: Any, given: list[Tensor]) -> None:
        """Count what a collective sends, by its ring: a rank's share of the whole goes round to all but one."""
        word = next((words for part, words in SENT.items() if part in name), None)
        group = next((item for item in args if isinstance(item, torch.ScriptObject)), None)
        if word is None or group is None or not given:
            return
        ranks = torch.distributed.get_process_group_ranks(torch.distributed.ProcessGroup.unbox(group))
        largest = float(max(tensor.numel() * tensor.itemsize for tensor in given))
        factor = 2 if word == "all-reduce" else 1
        self.work[-1][2][f"{word} {ranks[0]}:{ranks[-1] + 1}:{len(ranks)}"] += factor * largest * (len(ranks) - 1) / len(ranks)

    def on_device(self) -> Iterator[tuple[int, int]]:
        """Yield (storage's number, its bytes from now on), in order, of what is on the device."""
        return ((number, size) for number, size in self.sizes if self.kinds[number] is not Kind.host)

    def moments(self) -> list[Moment]:
        """Return the parts between marks, in order, without what was before the first."""
        now = dict.fromkeys(Kind, 0.0)
        held = [0] * len(self.kinds)
        for number, size in self.sizes[: self.marks[0][0]]:
            now[self.kinds[number]] += size - held[number]
            held[number] = size
        found = []
        ends = [place for place, _ in self.marks[1:]] + [len(self.sizes)]
        for (begin, name), end, (flops, moved, sent), float8 in zip(self.marks, ends, self.work, self.float8, strict=True):
            total = top = sum(size for kind, size in now.items() if kind is not Kind.host)
            best = dict(now)
            for number, size in self.sizes[begin:end]:
                kind, change = self.kinds[number], size - held[number]
                held[number] = size
                now[kind] += change
                total += change if kind is not Kind.host else 0
                if total > top:
                    best, top = dict(now), total
            found.append(Moment(*name, best, dict(now), flops, float8, moved, dict(sent)))
        return [moment for moment in found if moment.name not in ("build", "before")]


def _grouped(rows: Tensor, experts: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return what a grouped product makes of tensors without values: torch computes it in any type, and its shapes only in bf16."""
    out = aten._grouped_mm.default(rows.bfloat16(), experts.bfloat16(), *args, **kwargs)
    return torch.empty_like(out, dtype=rows.dtype)


def combine(moments: Sequence[Moment], how: Callable[[list[float]], float]) -> Moment:
    """Return a moment whose every value is computed from those of several by `how`."""
    first = moments[0]

    def each(name: str) -> dict[Any, float]:
        keys = dict.fromkeys(key for moment in moments for key in getattr(moment, name))
        return {key: how([getattr(moment, name).get(key, 0.0) for moment in moments]) for key in keys}

    flops, float8, moved = (how([getattr(moment, name) for moment in moments]) for name in ("flops", "flops_float8", "moved"))
    return Moment(first.name, first.microbatch, first.block, each("peak"), each("end"), flops, float8, moved, each("sent"))
