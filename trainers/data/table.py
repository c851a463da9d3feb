"""Tokens of many documents in flat arrays on disk, and the rows they are packed into: what ranks memory-map."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.batch import Sizes


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Documents and rows; `len` is the number of rows."""

    tokens: NDArray[np.int32]
    """All documents, one after the other."""
    supervised: NDArray[np.uint8]
    """1 where the token is a label; always 0 at the first token of a document, which nothing predicts."""
    offsets: NDArray[np.int64]
    """Document d is `tokens[offsets[d]:offsets[d + 1]]`."""
    order: NDArray[np.int64]
    """Documents in the order of the rows."""
    rows: NDArray[np.int64]
    """Row r holds the documents `order[rows[r]:rows[r + 1]]`."""
    labels: NDArray[np.int64] | None = None
    """Supervised tokens of each document, (documents,); None where they are counted when needed."""
    units: NDArray[np.int64] | None = None
    """The unit of each document, (documents,): those of one unit, such as a pair, share a row. None where each is its own."""
    partners: NDArray[np.int64] | None = None
    """The document whose answer follows each document's prompt where an objective has a baseline of such, (documents,)."""
    apart: bool = False
    """The documents of a row lie below each other in a batch, each padded, and not one after the other: pairs without packing."""
    signals: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What an objective reads besides tokens, by name: (documents,), (tokens,), or (labels, k) where each label has k, in their order."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows) - 1

    def row_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each row, (rows,)."""
        ends = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[self.order])])
        lengths: NDArray[np.int64] = np.diff(ends[self.rows])
        return lengths

    def mean_attended(self) -> float:
        """Return the mean length of the document that a token is in."""
        lengths = np.diff(self.offsets).astype(np.float64)
        return float((lengths**2).sum() / lengths.sum())

    @cached_property
    def label_starts(self) -> NDArray[np.int64]:
        """Return how many labels are before each document, (documents + 1,): where its rows of a signal of labels begin."""
        counts = labels_of(self) if self.labels is None else self.labels
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def documents(self, row: int) -> NDArray[np.int64]:
        """Return the documents of a row."""
        found: NDArray[np.int64] = self.order[self.rows[row] : self.rows[row + 1]]
        return found

    def documents_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the documents of some rows, those of a row that is named twice twice."""
        return np.concatenate([np.zeros(0, np.int64), *(self.documents(int(row)) for row in rows)]).astype(np.int64)

    def sizes(self, rows: NDArray[np.int64]) -> Sizes:
        """Return how much is in some rows, named by number; a row that is named twice counts twice."""
        documents = self.documents_of(rows)
        starts, ends = self.offsets[documents], self.offsets[documents + 1]
        if self.labels is not None:
            labels = int(self.labels[documents].sum())
        else:
            labels = sum(int(np.count_nonzero(self.supervised[start:end])) for start, end in zip(starts, ends, strict=True))
        units = 0 if self.units is None else sum(len(np.unique(self.units[self.documents(int(row))])) for row in rows)
        return Sizes(rows=len(rows), documents=len(documents), tokens=int((ends - starts).sum()), labels=labels, units=units)

    def prompt(self, document: int) -> NDArray[np.int32]:
        """Return a document's tokens before the first supervised one; its first 16 where there is no such prompt."""
        start, end = int(self.offsets[document]), int(self.offsets[document + 1])
        first = int(self.supervised[start:end].argmax())
        return self.tokens[start : start + first] if first > 1 else self.tokens[start : min(end, start + 16)]


def labels_of(table: TokenTable) -> NDArray[np.int64]:
    """Count the labels of each document, (documents,)."""
    if len(table.offsets) < 2:
        return np.zeros(0, np.int64)
    counts: NDArray[np.int64] = np.add.reduceat(table.supervised, table.offsets[:-1], dtype=np.int64)
    return counts


def save_table(table: TokenTable, folder: Path) -> None:
    """Write a table as one .npy file an array, with the labels of each document counted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in _arrays(replace(table, labels=labels_of(table))).items():
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / f"{name}.npy", array)
    if table.apart:
        (folder / APART).touch()


def open_table(folder: Path) -> TokenTable:
    """Memory-map a table that `save_table` wrote, of this version or one that had fewer arrays."""
    found = {
        str(path.relative_to(folder).with_suffix("")): np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.rglob("*.npy")
    }
    signals = {name.removeprefix(SIGNALS): found.pop(name) for name in list(found) if name.startswith(SIGNALS)}
    return TokenTable(**found, signals=signals, apart=(folder / APART).exists())


SIGNALS = "signals/"
APART = "apart"
"""Name of the empty file that says `TokenTable.apart`."""


def _arrays(table: TokenTable) -> dict[str, NDArray[Any]]:
    """Return the arrays of a table by the names of their files."""
    arrays = {item.name: getattr(table, item.name) for item in fields(table) if item.name not in ("signals", "apart")}
    arrays |= {f"{SIGNALS}{name}": signal for name, signal in table.signals.items()}
    return {name: array for name, array in arrays.items() if array is not None}
