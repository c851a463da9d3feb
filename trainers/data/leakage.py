"""What held-out documents share with trained ones: the same text, the same first prompt, or nearly the same text.

Only marks are read (glance.py), and the tokens of the few documents whose sketches are alike. So the cost is about 2 us for each
trained document, and memory is that of the held-out ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.data.glance import BINS, NONE, Keys, runs
from trainers.data.table import open_table

SIMILAR = 0.8
"""Jaccard similarity of two documents' runs of tokens from which they are nearly the same."""
BLOCK = 1 << 15
"""Trained documents that are looked at together."""
SAMPLE, SHARED = 500, 0.2
"""Documents of a side in which runs are counted, and the share of them from which a run, such as of a system prompt, says nothing."""
PAIRS = 100_000
"""Documents that are compared token by token at most."""
EXAMPLES = 20


@dataclass(frozen=True)
class Side:
    """Documents of one table: flat tokens, where each document begins, (documents + 1,), and marks, (documents, WIDTH)."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    marks: Keys

    def runs(self, document: int, special: NDArray[np.bool_]) -> Keys:
        """Return the keys of a document's runs, each once."""
        tokens = np.asarray(self.tokens[self.offsets[document] : self.offsets[document + 1]])
        return np.unique(runs(tokens, np.array([len(tokens)]), special)[0])


@dataclass
class Near:
    """Held-out documents that are nearly trained ones: (held-out document, trained document, similarity), each held-out one once."""

    pairs: dict[int, tuple[int, float]] = field(default_factory=dict)
    compared: int = 0
    not_compared: int = 0


def marks_file(folder: Path, split: str) -> Path:
    """Return where prepared data keep the marks of a split."""
    return folder / f"{split}.marks.npy"


def shared(folders: Sequence[Path], special: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the leakage between the splits of prepared data, under `leakage`; nothing where nothing is held out.

    Data that were prepared before there were marks have none, and nothing is returned.
    """
    if not all(marks_file(folder, "train").is_file() for folder in folders):
        return {}
    trained, held_out = ([side(folder, split) for folder in folders if marks_file(folder, split).is_file()] for split in ("train", "eval"))
    return {"leakage": leakage(trained, held_out, special)} if held_out else {}


def side(folder: Path, split: str) -> Side:
    """Return the documents of a split of prepared data, memory-mapped."""
    table = open_table(folder / split)
    return Side(table.tokens, table.offsets, np.load(marks_file(folder, split), mmap_mode="r"))


def leakage(trained: Sequence[Side], held_out: Sequence[Side], special: NDArray[np.bool_]) -> dict[str, Any]:
    """Return how many held-out documents have a text, a first prompt or nearly a text that is trained, and examples by number.

    Documents are numbered over all sides. Tokens that are `special`, (vocabulary,), and runs that many documents have do not count.
    """
    marks = np.concatenate([side.marks for side in held_out])
    text, prompt = np.zeros(len(marks), bool), np.zeros(len(marks), bool)
    for block, _ in _blocks(trained):
        text |= np.isin(marks[:, 0], block[:, 0])
        prompt |= np.isin(marks[:, 1], block[:, 1])
    prompt &= marks[:, 1] > 0
    near = _near(trained, held_out, special, text)
    is_near = np.isin(np.arange(len(marks)), list(near.pairs))
    pairs = [[document, *pair] for document, pair in near.pairs.items()]
    return {
        "documents": len(marks),
        "text": int(text.sum()),
        "near": len(pairs),
        "prompt": int(prompt.sum()),
        "any": int((text | prompt | is_near).sum()),
        "similarity": SIMILAR,
        "not_compared": near.not_compared,
        "pairs": pairs[:EXAMPLES],
    }


def _blocks(sides: Sequence[Side]) -> Iterator[tuple[Keys, int]]:
    """Yield the marks of some documents at a time, with the number of the first."""
    first = 0
    for side in sides:
        for at in range(0, len(side.marks), BLOCK):
            yield np.asarray(side.marks[at : at + BLOCK]), first + at
        first += len(side.marks)


def _near(trained: Sequence[Side], held_out: Sequence[Side], special: NDArray[np.bool_], known: NDArray[np.bool_]) -> Near:
    """Find the held-out documents, but for those that are `known`, that are nearly a trained one."""
    found, common = Near(), _common([*trained, *held_out], special)
    keys = np.concatenate([_keys(side.marks, common) for side in held_out])
    keys[known] = 0
    order = np.argsort(keys, axis=None)
    ordered = keys.ravel()[order]
    for block, first in _blocks(trained):
        theirs = _keys(block, common)
        has = (theirs > 0) & np.isin(theirs, ordered)
        for row in np.flatnonzero(has.any(axis=1) & (2 * has.sum(axis=1) >= (theirs > 0).sum(axis=1))).tolist():
            starts, ends = (np.searchsorted(ordered, theirs[row][has[row]], side) for side in ("left", "right"))
            shared = Counter(place // BINS for start, end in zip(starts, ends, strict=True) for place in order[start:end].tolist())
            least = (theirs[row] > 0).sum() / 2
            for document in (document for document, count in shared.items() if count >= least and document not in found.pairs):
                _compare(trained, held_out, first + row, document, special, common, found)
    return found


def _keys(marks: Keys, common: Keys) -> Keys:
    """Return the sketches of marks as keys of runs, (documents, BINS); 0 where a bin is empty or its run is `common`."""
    numbers = np.ascontiguousarray(marks[:, 2:]).view(np.uint32).astype(np.uint64)
    keys: Keys = numbers | (np.arange(BINS, dtype=np.uint64) << np.uint64(32))
    keys[(numbers == NONE) | np.isin(keys, common)] = 0
    return keys


def _common(sides: Sequence[Side], special: NDArray[np.bool_]) -> Keys:
    """Return the runs that many documents of a side have, by a sample."""
    common = np.zeros(0, np.uint64)
    for side in (side for side in sides if len(side.marks)):
        documents = range(0, len(side.marks), max(1, len(side.marks) // SAMPLE))
        keys, counts = np.unique(np.concatenate([side.runs(document, special) for document in documents]), return_counts=True)
        common = np.union1d(common, keys[counts > max(5, SHARED * len(documents))])
    return common


def _compare(
    trained: Sequence[Side], held_out: Sequence[Side], one: int, other: int, special: NDArray[np.bool_], common: Keys, found: Near
) -> None:
    """Add a pair whose similarity is high enough."""
    if found.compared == PAIRS:
        found.not_compared += 1
        return
    found.compared += 1
    ours, theirs = (np.setdiff1d(_runs(sides, number, special), common) for sides, number in ((held_out, other), (trained, one)))
    shared = len(np.intersect1d(ours, theirs, assume_unique=True))
    similarity = shared / max(1, len(ours) + len(theirs) - shared)
    if similarity >= SIMILAR:
        found.pairs[other] = one, round(similarity, 3)


def _runs(sides: Sequence[Side], number: int, special: NDArray[np.bool_]) -> Keys:
    for side in sides:
        if number < len(side.marks):
            return side.runs(number, special)
        number -= len(side.marks)
    raise IndexError("there are fewer documents")
