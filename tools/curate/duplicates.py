"""Rows that are there twice: the same text, texts that overlap, and prompts that are answered in two ways.

Rows are known by their number, in the order of the input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.curate.config import Near, Settings
from tools.curate.rows import View
from tools.curate.shingles import Hashes, bands, jaccard, shingles, signatures
from trainers.config.choices import Layout

Keys = npt.NDArray[np.uint64]
"""(rows, words): what is equal of two rows, as 64-bit words."""
Numbers = npt.NDArray[np.int64]


APART = {Layout.preference: "pair", Layout.text: "text"}
"""Layouts other than conversations: a pair holds the answer of one, and does not take its place."""
SALT = {kind: np.uint64(number) for number, kind in enumerate(("", *APART.values()))}


MARGIN = 0.25
"""Between a similarity and its rough estimate from 64 permutations or more."""


@dataclass(frozen=True)
class Marks:
    """What is kept of some rows to find duplicates among all: a digest a row, and the shingles of all rows one after the other."""

    text: Keys
    prompt: Keys
    rank: npt.NDArray[np.float64]
    """By which the best row of a cluster is kept: the largest."""
    bands: Keys
    """(rows, bands)"""
    signature: npt.NDArray[np.uint8]
    """(rows, permutations): a byte of each MinHash, by which rows are compared roughly."""
    sizes: Numbers
    shingles: Hashes


@dataclass(frozen=True)
class Twin:
    """A row that is taken because of another."""

    row: int
    kept: int
    similarity: float | None = None
    """Of the two; None for rows with the same text."""


@dataclass
class Found:
    """Duplicates of a curation."""

    twins: dict[int, Twin] = field(default_factory=dict)
    contradictions: list[list[int]] = field(default_factory=list)
    """Rows with one prompt and different answers."""
    not_compared: int = 0
    """Candidates beyond `near.compared`."""


def digest(text: str) -> bytes:
    """Return 16 bytes that say whether two texts are the same but for spaces and capitals."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def marks(views: Sequence[View], layouts: Sequence[Layout], ranks: Sequence[float], near: Near | None) -> Marks:
    """Return what is kept of rows, as far as the steps need it. Pairs, texts and conversations are compared among themselves."""
    kinds = [APART.get(layout, "") for layout in layouts]
    sets = [shingles(view.text, near.characters) for view in views] if near else []
    least = signatures(sets, near.bands * near.band_rows if near else 0)
    salt = np.array([SALT[kind] for kind in kinds], np.uint64)
    return Marks(
        text=digests("\0".join((kind, view.prompt, *view.answers)) for kind, view in zip(kinds, views, strict=True)),
        prompt=digests(f"{kind}\0{view.prompt}" for kind, view in zip(kinds, views, strict=True)),
        rank=np.array(ranks, np.float64),
        bands=bands(least, near.bands) ^ salt[:, None] if near and sets else np.zeros((len(views), 0), np.uint64),
        signature=least.astype(np.uint8) if sets else np.zeros((len(views), 0), np.uint8),
        sizes=np.array([len(found) for found in sets], np.int64),
        shingles=np.concatenate(sets) if sets else np.zeros(0, np.uint32),
    )


def digests(texts: Iterable[str]) -> Keys:
    """Return the digest of each text, (rows, 2)."""
    return np.frombuffer(b"".join(map(digest, texts)), np.uint64).reshape(-1, 2)


def write_marks(folder: Path, found: Marks) -> None:
    """Write them as arrays in a folder."""
    for name, values in vars(found).items():
        np.save(folder / f"{name}.npy", values)


def read_marks(folder: Path) -> Marks:
    """Read what `write_marks` has written; shingles and bands, which are large, as they are asked for."""
    names = [found.name for found in fields(Marks)]
    return Marks(**{name: np.load(folder / f"{name}.npy", mmap_mode="r" if name in ("shingles", "bands") else None) for name in names})


def buckets(parts: Sequence[Marks], near: Near) -> Iterator[list[int]]:
    """Yield the rows that share a band, a band after the other, so that only one is in memory."""
    for number in range(near.bands):
        yield from groups(np.concatenate([part.bands[:, number : number + 1] for part in parts]))


def find(parts: Sequence[Marks], settings: Settings) -> Found:
    """Return the duplicates among the rows of all parts."""
    found = Found()
    text = np.concatenate([part.text for part in parts])
    if settings.exact:
        for group in groups(text):
            found.twins |= {row: Twin(row, group[0]) for row in group[1:]}
    if settings.near:
        _find_near(parts, settings.near, found)
    if settings.contradictions:
        for group in groups(np.concatenate([part.prompt for part in parts])):
            kept = [row for row in group if row not in found.twins]
            if len({text[row].tobytes() for row in kept}) > 1:
                found.contradictions.append(kept)
    return found


def groups(keys: Keys) -> Iterator[list[int]]:
    """Yield the places of each key, a line of words, that is there more than once, ascending; keys in the order of their first place."""
    if not len(keys):
        return
    order = np.lexsort(keys.T)
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)]))
    sizes = np.diff(np.append(starts, len(keys)))
    many = sizes > 1
    several = [order[start : start + size].tolist() for start, size in zip(starts[many], sizes[many], strict=True)]
    yield from sorted(several)


def _find_near(parts: Sequence[Marks], near: Near, found: Found) -> None:
    """Add the rows that are removed as near duplicates: each has the threshold's similarity with the row that stays for it.

    Repeated until nothing is found: then no two rows that stay are similar and share a band, but for those that were not compared.
    """
    sets = Sets(parts)
    rough = np.concatenate([part.signature for part in parts])
    rank = np.concatenate([part.rank for part in parts])
    shared = list(buckets(parts, near))
    seen: dict[int, bool] = {}
    while True:
        found.not_compared = 0
        similar: list[tuple[int, int]] = []
        for bucket in shared:
            rows = sorted((row for row in bucket if row not in found.twins), key=lambda row: (-rank[row], row))
            found.not_compared += _compare(rows, near, rough, sets, seen, similar)
        if not similar:
            return
        for cluster in clusters(similar):
            _keep_best(cluster, rank, near.threshold, sets, found)


def _compare(
    rows: list[int],
    near: Near,
    rough: npt.NDArray[np.uint8],
    sets: Sets,
    seen: dict[int, bool],
    similar: list[tuple[int, int]],
) -> int:
    """Compare the rows of a bucket, the best first, with better ones that none was similar to; returns how many pairs were left out.

    Rows whose signatures agree in far fewer places than the threshold are not similar: MARGIN is five standard deviations.
    """
    leaders: list[int] = []
    left_out = 0
    for row in rows:
        others = leaders[: near.compared]
        agree = (rough[others] == rough[row]).mean(axis=1) if others else np.zeros(0)
        close = [other for other, share in zip(others, agree.tolist(), strict=True) if share >= near.threshold - MARGIN]
        if any(_are_similar(other, row, near.threshold, sets, seen, similar) for other in close):
            continue
        left_out += max(0, len(leaders) - near.compared)
        leaders.append(row)
    return left_out


def _are_similar(one: int, other: int, threshold: float, sets: Sets, seen: dict[int, bool], similar: list[tuple[int, int]]) -> bool:
    """Tell whether two rows reach the threshold, and keep the pair where they do; a pair is compared once."""
    pair = (min(one, other) << 40) | max(one, other)
    if pair not in seen:
        seen[pair] = jaccard(sets[one], sets[other]) >= threshold
        if seen[pair]:
            similar.append((one, other))
    return seen[pair]


def clusters(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the rows that are connected by pairs, each cluster ascending."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in pairs:
        first, second = sorted((root(one), root(other)))
        parent[second] = first
    clusters: dict[int, list[int]] = {}
    for row in sorted(parent):
        clusters.setdefault(root(row), []).append(row)
    return list(clusters.values())


def _keep_best(cluster: list[int], rank: npt.NDArray[np.float64], threshold: float, sets: Sets, found: Found) -> None:
    """Keep the best row of a cluster and remove those that are similar to it; of the others again, until none is left."""
    rest = sorted(cluster, key=lambda row: (-rank[row], row))
    while rest:
        best, others = rest[0], rest[1:]
        rest = []
        for row in others:
            similarity = jaccard(sets[best], sets[row])
            if similarity >= threshold:
                found.twins[row] = Twin(row, best, similarity)
            else:
                rest.append(row)


class Sets:
    """The shingles of a row by its number; those of a part are read from its file when they are asked for.

    Read, not looked at where they are mapped: the kernel maps the pages around each, in the end the whole file.
    """

    def __init__(self, parts: Sequence[Marks]) -> None:
        self.parts = parts
        self.firsts = np.cumsum([0, *(len(part.sizes) for part in parts)])
        self.starts = [np.cumsum(np.concatenate([[0], part.sizes])).astype(np.int64) for part in parts]

    def __getitem__(self, row: int) -> Hashes:
        part = int(np.searchsorted(self.firsts, row, side="right")) - 1
        start, end = self.starts[part][row - self.firsts[part] :][:2]
        stored = self.parts[part].shingles
        if not isinstance(stored, np.memmap) or stored.filename is None:
            return stored[start:end]
        return np.fromfile(stored.filename, np.uint32, end - start, offset=stored.offset + int(start) * stored.itemsize)
