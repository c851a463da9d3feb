"""So many rows that are unlike each other: maximal marginal relevance (Carbonell and Goldstein 1998) over vectors of small integers.

A vector is a text's runs of characters, hashed, or an embedding that the row brings. Its elements are whole numbers with a length of
about 127, so that every sum is exact in float32 and no machine or number of threads changes which rows are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tools.curate.shingles import shingles
from trainers.data.formats import BadRow

Vectors = npt.NDArray[np.int8]
LENGTH = 127
CHARACTERS = 5
"""Of the runs that are hashed."""
AT_ONCE = 1024
"""Rows whose similarity is computed anew together."""


def hashed(text: str, dimensions: int) -> Vectors:
    """Return a text's runs of characters as a vector, (dimensions,), by hashing with signs (Weinberger et al. 2009, arXiv 0902.2206)."""
    found = shingles(text, CHARACTERS)
    signs = np.where(found & np.uint32(1), 1.0, -1.0)
    sums = np.zeros(dimensions)
    np.add.at(sums, (found >> np.uint32(1)) % np.uint32(dimensions), signs)
    return whole(sums)


def embedded(value: Any) -> Vectors:
    """Return a row's own embedding as a vector; raises BadRow for what is not a list of numbers."""
    try:
        vector = np.array(value, np.float64)
    except (TypeError, ValueError):
        vector = np.zeros(0)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise BadRow("has no embedding, a list of numbers")
    return whole(vector)


def whole(vector: npt.NDArray[np.float64]) -> Vectors:
    """Return a vector with the length LENGTH, in whole numbers."""
    norm = float(np.sqrt((vector * vector).sum()))
    return np.rint(vector * (LENGTH / norm if norm else 0.0)).astype(np.int8)


def relevance_of(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how good each row is, in [0, 1]: the share of the other scores that are lower; 0 where there is no score."""
    known = np.sort(scores[~np.isnan(scores)])
    return np.where(np.isnan(scores), 0.0, np.searchsorted(known, scores) / max(1, len(known) - 1))


def choose(vectors: Vectors, relevance: npt.NDArray[np.float64], count: int, weight: float) -> list[int]:
    """Return the `count` rows that are taken, in their order: each has the largest value at its turn, of equal ones the first row.

    The value is weight x relevance - (1 - weight) x the largest similarity with a row that is taken, at least 0. Values only fall as
    rows are taken. So the value that a row had is a bound, and only rows with large bounds are computed anew (Minoux 1978).
    """
    count = min(count, len(vectors))
    taken = np.zeros((count, vectors.shape[1]), np.float32)
    nearest, seen, bound = np.zeros(len(vectors)), np.zeros(len(vectors), np.int64), weight * relevance
    rows: list[int] = []
    while len(rows) < count:
        batch, outside = _leading(bound)
        own = vectors[batch].astype(np.float32)
        _renew(own, taken[: len(rows)], nearest, seen, batch)
        while len(rows) < count:
            bound[batch] = np.where(np.isneginf(bound[batch]), -np.inf, weight * relevance[batch] - (1 - weight) * nearest[batch])
            best = int(bound[batch].argmax())
            row = int(batch[best])
            if outside is not None and (bound[row], -row) < (bound[outside], -outside):
                break
            taken[len(rows)] = own[best]
            rows.append(row)
            bound[row] = -np.inf
            nearest[batch] = np.maximum(nearest[batch], own @ own[best] / LENGTH**2)
            seen[batch] = len(rows)
    return rows


def _leading(bound: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], int | None]:
    """Return the AT_ONCE rows with the largest bounds, ascending, and the next one; of equal bounds the first rows lead."""
    if len(bound) <= AT_ONCE:
        return np.arange(len(bound)), None
    least = np.partition(bound, -AT_ONCE)[-AT_ONCE]
    above, equal = np.flatnonzero(bound > least), np.flatnonzero(bound == least)
    room = AT_ONCE - len(above)
    following = int(equal[room]) if len(equal) > room else int(np.where(bound < least, bound, -np.inf).argmax())
    return np.sort(np.concatenate([above, equal[:room]])), following


def _renew(
    own: npt.NDArray[np.float32],
    taken: npt.NDArray[np.float32],
    nearest: npt.NDArray[np.float64],
    seen: npt.NDArray[np.int64],
    batch: npt.NDArray[np.int64],
) -> None:
    """Bring the nearest similarity of rows up to what has been taken."""
    stale = np.flatnonzero(seen[batch] < len(taken))
    if not len(stale):
        return
    for start in range(int(seen[batch[stale]].min()), len(taken), AT_ONCE):
        similar = (own[stale] @ taken[start : start + AT_ONCE].T).max(axis=1) / LENGTH**2
        nearest[batch[stale]] = np.maximum(nearest[batch[stale]], similar)
    seen[batch] = len(taken)
