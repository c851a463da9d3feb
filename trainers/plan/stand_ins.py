"""What a plan takes in the place of work that is too much, or that depends on values which it does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from trainers.model import dealt
from trainers.peft import nf4
from trainers.plan.trace import Trace


@contextmanager
def few_chunks(trace: Trace) -> Iterator[None]:
    """Unpack two chunks of each 4-bit matrix and count them for all: there are dozens in one, and nothing of one outlives the next."""

    def first(packed: Tensor, step: int) -> Iterator[Tensor]:
        parts = packed.split(step)
        with trace.repeated(len(parts) / min(2, len(parts))):
            yield from parts[:2]

    plain = nf4.chunks_of
    nf4.chunks_of = first
    try:
        yield
    finally:
        nf4.chunks_of = plain


@contextmanager
def dealt_evenly() -> Iterator[None]:
    """Let as many tokens go to the experts of each rank, and as many come to this one's: which ones are chosen depends on values."""

    def even(sends: Tensor, receives: Tensor, total: int) -> tuple[list[int], list[int]]:
        sizes = [(total + rank) // len(receives) for rank in range(len(sends))]
        return sizes, sizes

    plain = dealt.read_sizes
    dealt.read_sizes = even
    try:
        yield
    finally:
        dealt.read_sizes = plain
