"""Texts as sets of short runs of characters, their MinHash signatures, and the real Jaccard similarity of two sets.

MinHash: Broder 1997. Bands of a signature: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint32]
AT_ONCE = 32
"""Texts whose shingles are hashed together: numpy takes as long to begin as to hash one text, and the hashes stay in a cache."""
MIX = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str, length: int) -> Hashes:
    """Return the distinct hashes of a text's runs of `length` characters, sorted; (n,) uint32, of the whole where it is shorter.

    Case and spaces do not count.
    """
    text = " ".join(text.casefold().split())
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    length = max(1, min(length, len(codes)))
    rolled = np.zeros(max(1, len(codes) - length + 1), np.uint64)
    if len(codes):
        for at in range(length):
            rolled = rolled * np.uint64(0x100000001B3) + codes[at : len(codes) - length + 1 + at]
    rolled = (rolled ^ (rolled >> np.uint64(29))) * MIX
    rolled = (rolled ^ (rolled >> np.uint64(32))) * MIX
    found = np.sort((rolled >> np.uint64(32)).astype(np.uint32))  # np.unique takes three times as long
    distinct: Hashes = found[np.concatenate([[True], found[1:] != found[:-1]])]
    return distinct


@cache
def permutations(count: int) -> tuple[Hashes, Hashes]:
    """Return the odd factors and the offsets of `count` permutations of 32-bit numbers, always the same."""
    drawn = np.random.Generator(np.random.PCG64(18)).integers(0, 1 << 32, (2, count), np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]


def signatures(sets: Sequence[Hashes], size: int) -> Hashes:
    """Return the MinHash signature of each set, by `size` permutations, (sets, size) uint32. No set is empty."""
    factors, offsets = permutations(size)
    least = np.empty((len(sets), size), np.uint32)
    for at in range(0, len(sets), AT_ONCE):
        together = sets[at : at + AT_ONCE]
        found = np.concatenate(together)
        starts = np.cumsum([0, *(len(one) for one in together[:-1])])
        hashed = np.empty_like(found)
        for number in range(size):
            np.multiply(found, factors[number], out=hashed)
            np.add(hashed, offsets[number], out=hashed)
            least[at : at + AT_ONCE, number] = np.minimum.reduceat(hashed, starts)
    return least


def bands(least: Hashes, count: int) -> npt.NDArray[np.uint64]:
    """Return the hash of each of the `count` bands of signatures, (sets, count) uint64."""
    mixed = np.tile(np.arange(count, dtype=np.uint64), (len(least), 1))
    for row in np.moveaxis(least.reshape(len(least), count, -1), 2, 0):
        mixed = (mixed ^ row.astype(np.uint64)) * MIX
        mixed ^= mixed >> np.uint64(29)
    return mixed


def jaccard(one: Hashes, other: Hashes) -> float:
    """Return the Jaccard similarity of two sorted sets, in [0, 1]."""
    shared = np.intersect1d(one, other, assume_unique=True).size
    return shared / (one.size + other.size - shared)
