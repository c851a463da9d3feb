"""Whole documents into rows of one length: longest first, best fit, rows filled to the last token where the lengths allow it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
MOST_TOGETHER = 4
"""Documents that are looked for together to fill what is left of a row exactly."""
TRIES = 8
"""Lengths tried for each of them but the last two, longest first."""


def pack(lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Return (order, rows): row r holds the documents `order[rows[r]:rows[r + 1]]`, at most `capacity` tokens in all.

    Best fit decreasing (Johnson, Near-Optimal Bin Packing Algorithms, 1973), and the same with each row closed by up to
    four documents that fill it exactly; whichever needs fewer rows. Sets of lengths are integers with one bit for each,
    so that the tightest fit, or a pair with a given sum, is one shift: linear in the number of documents. Raises ValueError
    where a document is empty or over `capacity`.
    """
    if lengths.size and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"documents have {lengths.min()} to {lengths.max()} tokens; a row has {capacity}")
    falling = np.argsort(-lengths, kind="stable")
    sizes = lengths[falling].tolist()
    row_of = min(best_fit(sizes, capacity), exact_fill(sizes, capacity), key=lambda rows: max(rows, default=0))
    numbers = np.array(row_of, dtype=np.int64)
    order = falling[np.argsort(numbers, kind="stable")]
    return order, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(numbers), dtype=np.int64)])


def pack_units(lengths: Ints, units: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Return (order, rows) as `pack` does, with all documents of a unit in one row, in their order; a unit is packed as one document."""
    _, unit_of = np.unique(units, return_inverse=True)
    totals = np.bincount(unit_of, weights=lengths).astype(np.int64)
    order, rows = pack(totals, capacity)
    members = np.split(np.argsort(unit_of, kind="stable"), np.cumsum(np.bincount(unit_of))[:-1])
    sizes = np.array([len(members[unit]) for unit in order], dtype=np.int64)
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    return np.concatenate([members[unit] for unit in order]), ends[rows]


def one_each(num_documents: int) -> tuple[Ints, Ints]:
    """Return (order, rows) with one document a row."""
    return np.arange(num_documents, dtype=np.int64), np.arange(num_documents + 1, dtype=np.int64)


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Return the row of each document, for lengths in falling order: the fullest row that has room, or a new one."""
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # a bit for each room that some row has left
    assigned, num_rows = [], 0
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        room -= length
        by_room[room].append(row)
        rooms |= 1 << room
        assigned.append(row)
    return assigned


def exact_fill(lengths: list[int], capacity: int) -> list[int]:
    """Return the row of each document, for lengths in falling order, one row filled after the other."""
    left = _Lengths(lengths, capacity)
    of_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        of_length.setdefault(length, []).append(number)
    assigned, row = [0] * len(lengths), 0
    while left.present:
        for length in _fill_row(left, capacity):
            assigned[of_length[length].pop()] = row
        row += 1
    return assigned


class _Lengths:
    """Lengths that are still to be placed, with their counts."""

    def __init__(self, lengths: list[int], capacity: int) -> None:
        self.capacity = capacity
        self.counts = [0] * (capacity + 1)
        self.present = 0  # bit l: length l is there
        self.mirrored = 0  # bit capacity - l: length l is there
        for length in lengths:
            self.put(length)

    def put(self, length: int) -> None:
        self.counts[length] += 1
        if self.counts[length] == 1:
            self._flip(length)

    def take(self, length: int) -> None:
        self.counts[length] -= 1
        if not self.counts[length]:
            self._flip(length)

    def _flip(self, length: int) -> None:
        self.present ^= 1 << length
        self.mirrored ^= 1 << (self.capacity - length)

    def longest(self, room: int) -> int:
        """Return the longest length up to `room`, or 0."""
        return max(0, (self.present & ((2 << room) - 1)).bit_length() - 1)

    def exactly(self, room: int, num: int) -> list[int]:
        """Return `num` lengths that add up to `room`, or nothing."""
        if num == 1:
            return [room] if self.present >> room & 1 else []
        if num == 2:
            return self._pair(room)
        length = room
        for _ in range(TRIES):
            length = self.longest(length - 1)
            if not length:
                break
            self.take(length)
            rest = self.exactly(room - length, num - 1)
            self.put(length)
            if rest:
                return [length, *rest]
        return []

    def _pair(self, room: int) -> list[int]:
        pairs = self.present & (self.mirrored >> (self.capacity - room))
        while pairs:
            length = pairs.bit_length() - 1
            if 2 * length != room or self.counts[length] > 1:
                return [length, room - length]
            pairs ^= 1 << length
        return []


def _fill_row(left: _Lengths, capacity: int) -> list[int]:
    """Take the lengths of one row: the longest that fit, until a few fill the rest exactly."""
    row: list[int] = []
    room = capacity
    while length := left.longest(room):
        longest = left.longest(capacity)
        closing = next(
            (found for num in range(1, MOST_TOGETHER + 1) if room <= num * longest and (found := left.exactly(room, num))), [length]
        )
        for taken in closing:
            left.take(taken)
            room -= taken
        row += closing
    return row
