"""What torch's caching allocator needs on a GPU for a step's allocations, in their order."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

from trainers.plan.trace import Kind, Trace

ROUND, SMALL = 512, 1 << 20
PAGE = {True: 2 << 20, False: 20 << 20}
"""c10/cuda/CUDACachingAllocator.cpp of torch 2.13 with expandable_segments, which ranks set: requests are rounded to 512 bytes, up to
1 MiB are in pages of 2 MiB, larger ones in pages of 20 MiB; a page in which nothing is left can be given back for another use."""


@dataclass
class Pool:
    """A range of addresses: the smallest free block that fits is taken, its rest stays free, free neighbours merge."""

    page: int
    free: list[tuple[int, int]] = field(default_factory=list)
    """(size, address) of what is free below the end, in order."""
    end: int = 0
    starts: dict[int, int] = field(default_factory=dict)
    """Sizes of free blocks by their address, and addresses by their end."""
    ends: dict[int, int] = field(default_factory=dict)
    used: Counter[int] = field(default_factory=Counter)
    """Live blocks by page."""

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes."""
        place = bisect.bisect_left(self.free, (size, -1))
        if place < len(self.free):
            length, address = self.free[place]
            self._take(address)
            if length > size:
                self._put(address + size, length - size)
        else:
            address = self._last_free()
            self.end = address + size
        self.used.update(self._pages(address, size))
        return address

    def release(self, address: int, size: int) -> None:
        """Give a block back."""
        self.used.subtract(self._pages(address, size))
        if address + size in self.starts:
            size += self._take(address + size)
        if address in self.ends:
            before = self.ends[address]
            size += self._take(before)
            address = before
        self._put(address, size)

    def _last_free(self) -> int:
        """Return where new addresses begin: at the free block at the end, if there is one."""
        if self.end in self.ends:
            address = self.ends[self.end]
            self._take(address)
            return address
        return self.end

    def _take(self, address: int) -> int:
        size = self.starts.pop(address)
        del self.ends[address + size]
        self.free.pop(bisect.bisect_left(self.free, (size, address)))
        return size

    def _put(self, address: int, size: int) -> None:
        self.starts[address], self.ends[address + size] = size, address
        bisect.insort(self.free, (size, address))

    def _pages(self, address: int, size: int) -> range:
        return range(address // self.page, (address + size - 1) // self.page + 1)

    def bytes(self) -> int:
        """Return the bytes of pages in which something is live."""
        return self.page * sum(count > 0 for count in self.used.values())


@dataclass(frozen=True)
class Replay:
    """What the allocator makes of a step."""

    slack: int
    """Bytes that it needs beyond those of the tensors, where these are highest."""
    reserved: int
    """Bytes that it takes where the device has them: nothing is given back before memory is short."""


def replay(trace: Trace) -> Replay:
    """Place a trace's allocations in their order; what is gathered and reduced has pages of its own, for its own CUDA streams."""
    pools: dict[tuple[bool, bool], Pool] = {}
    placed: dict[int, tuple[Pool, int, int]] = {}
    sizes: dict[int, int] = {}
    live = most = slack = 0
    for number, size in trace.on_device():
        if number in placed:
            pool, address, rounded = placed.pop(number)
            pool.release(address, rounded)
            live -= sizes.pop(number)
        if size:
            rounded = -(-size // ROUND) * ROUND
            small = rounded <= SMALL
            pool = pools.setdefault((small, trace.kinds[number] is Kind.buffers), Pool(PAGE[small]))
            placed[number], sizes[number] = (pool, pool.allocate(rounded), rounded), size
            live += size
            if live > most:
                most, slack = live, sum(pool.bytes() for pool in pools.values()) - live
    return Replay(slack, sum(-(-pool.end // pool.page) * pool.page for pool in pools.values()))
