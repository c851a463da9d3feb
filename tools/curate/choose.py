"""Which rows stay of those that are too many of a kind, and which set each row goes to. Rows are known by their number."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tools.curate import duplicates
from tools.curate.config import Balance, Near, Split
from tools.curate.duplicates import Keys, Marks
from tools.curate.shingles import jaccard

SETS = ("train", "validation", "holdout", "regression")


def order_of(seed: int, key: Any) -> bytes:
    """Return what rows are put in a random order by, which depends on their text and the seed alone."""
    return hashlib.blake2b(seed.to_bytes(8, "little") + key.tobytes(), digest_size=16).digest()


def beyond_caps(values: Sequence[Sequence[str]], text: Keys, settings: Balance) -> dict[int, str]:
    """Return the rows that go because there are more of their kind than the cap, with the reason; `values` are a row's, a cap each."""
    order = sorted(range(len(values)), key=lambda row: order_of(settings.seed, text[row]))
    gone: dict[int, str] = {}
    for at, (name, most) in enumerate(settings.caps.items()):
        seen: Counter[str] = Counter()
        for row in order:
            if row not in gone:
                value = values[row][at]
                seen[value] += 1
                if seen[value] > most:
                    gone[row] = f"is beyond the first {most} rows with {name} {value!r}"
    return gone


def similar_pairs(parts: Sequence[Marks], near: Near) -> tuple[list[tuple[int, int]], int]:
    """Return all pairs of rows that share a band and reach the threshold, and how many were not compared."""
    sets = duplicates.Sets(parts)
    rough = np.concatenate([part.signature for part in parts])
    found: dict[int, bool] = {}
    left_out = 0
    for bucket in duplicates.buckets(parts, near):
        for place, row in enumerate(bucket):
            others = np.array(bucket[max(0, place - near.compared) : place], np.int64)
            left_out += max(0, place - near.compared)
            agree = (rough[others] == rough[row]).mean(axis=1)
            for other in others[agree >= near.threshold - duplicates.MARGIN].tolist():
                pair = (other << 40) | row
                if pair not in found:
                    found[pair] = jaccard(sets[other], sets[row]) >= near.threshold
    return [(pair >> 40, pair & ((1 << 40) - 1)) for pair, is_similar in found.items() if is_similar], left_out


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return all rows in groups that no pair crosses."""
    together = duplicates.clusters(pairs)
    in_group = {row for group in together for row in group}
    return together + [[row] for row in range(count) if row not in in_group]


def same(keys: Keys) -> list[tuple[int, int]]:
    """Return pairs that connect the rows with the same key."""
    return [(group[0], row) for group in duplicates.groups(keys) for row in group[1:]]


def sets_of(groups: Sequence[Sequence[int]], text: Keys, settings: Split) -> list[str]:
    """Return the set of each row, '' for one that is in no group.

    Groups are taken in a random order, and each goes to the first set that has room for all of it.
    """
    count = sum(map(len, groups))
    room = {"regression": settings.regression, "holdout": round(settings.holdout * count), "validation": round(settings.validation * count)}
    found = [""] * len(text)
    for group in sorted(groups, key=lambda group: min(order_of(settings.seed, text[row]) for row in group)):
        name = next((name for name, rows in room.items() if rows >= len(group)), "train")
        if name in room:
            room[name] -= len(group)
        for row in group:
            found[row] = name
    return found


def crossings(sets: Sequence[str], pairs: Iterable[tuple[int, int]]) -> int:
    """Return how many pairs have their rows in different sets."""
    return sum(sets[one] != sets[other] for one, other in pairs)
