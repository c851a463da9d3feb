"""Tokens of many documents in flat arrays on disk, and the rows they are packed into: what ranks memory-map."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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

    def documents(self, row: int) -> NDArray[np.int64]:
        """Return the documents of a row."""
        found: NDArray[np.int64] = self.order[self.rows[row] : self.rows[row + 1]]
        return found

    def prompt(self, document: int) -> NDArray[np.int32]:
        """Return a document's tokens before the first supervised one; its first 16 where there is no such prompt."""
        start, end = int(self.offsets[document]), int(self.offsets[document + 1])
        first = int(self.supervised[start:end].argmax())
        return self.tokens[start : start + first] if first > 1 else self.tokens[start : min(end, start + 16)]


def save_table(table: TokenTable, folder: Path) -> None:
    """Write a table as one .npy file an array."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in fields(table):
        np.save(folder / f"{item.name}.npy", getattr(table, item.name))


def open_table(folder: Path) -> TokenTable:
    """Memory-map a table that `save_table` wrote."""
    arrays: dict[str, Any] = {item.name: np.load(folder / f"{item.name}.npy", mmap_mode="r") for item in fields(TokenTable)}
    return TokenTable(**arrays)
