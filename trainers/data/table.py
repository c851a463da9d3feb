"""Tokens of many documents in flat arrays on disk, and the rows they are packed into: what ranks memory-map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trainers.batch import SOURCE, WEIGHT, Sizes
from trainers.config.errors import ConfigError

Ints = NDArray[np.int64]
SIGNALS = "signals/"
APART, PARTED = "apart", "parted"
"""Names of the empty files that say `TokenTable.apart` and `TokenTable.parted`."""
SOURCES = "sources.json"
"""Name of the file of a joined table: where the tokens of each source are, and how many rows it has."""
TOKENS = ("tokens", "supervised")


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
    parted: bool = False
    """Documents are sources with their targets: what is before a document's labels is for the encoder, in a batch of its own."""
    signals: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What an objective reads besides tokens, by name: (documents,), (tokens,), or (labels, k) where each label has k, in their order."""
    sources: dict[str, int] = field(default_factory=dict)
    """Of a mixture: the rows of each source, one source after the other; signal SOURCE has the number of each document's."""

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

    @cached_property
    def weights(self) -> NDArray[np.float64] | None:
        """Return the sum of each document's weights, (documents,); None where nothing has one."""
        if WEIGHT not in self.signals:
            return None
        of = self.signals[WEIGHT].astype(np.float64)
        if of.ndim == 1:
            return of
        starts, sums = self.label_starts, np.zeros(len(self.offsets) - 1)
        labelled = np.diff(starts) > 0
        sums[labelled] = np.add.reduceat(of[:, 0], starts[:-1][labelled])
        return sums

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
        weight = 0.0 if self.weights is None else float(self.weights[documents].sum())
        tokens = int((ends - starts).sum())
        return Sizes(rows=len(rows), documents=len(documents), tokens=tokens, labels=labels, units=units, weight=weight)

    def rows_of_sources(self) -> dict[str, NDArray[np.int64]]:
        """Return the numbers of each source's rows."""
        ends = np.cumsum([0, *self.sources.values()])
        return {name: np.arange(start, end) for name, start, end in zip(self.sources, ends[:-1], ends[1:], strict=True)}

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
    _write(_arrays(replace(table, labels=labels_of(table))), table, folder)


def _write(arrays: dict[str, NDArray[Any]], table: TokenTable, folder: Path) -> None:
    """Write arrays, and the empty files that say what kind of table they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / f"{name}.npy", array)
    for mark in (name for name in (APART, PARTED) if getattr(table, name)):
        (folder / mark).touch()


def open_table(folder: Path) -> TokenTable:
    """Memory-map a table that `save_table` or `save_joined` wrote, of this version or one that had fewer arrays.

    Raises ConfigError where a source of a joined table is gone.
    """
    found: dict[str, Any] = {str(path.relative_to(folder).with_suffix("")): _mapped(path) for path in folder.rglob("*.npy")}
    signals = {name.removeprefix(SIGNALS): found.pop(name) for name in list(found) if name.startswith(SIGNALS)}
    if (folder / SOURCES).exists():
        known = json.loads((folder / SOURCES).read_text())
        for name in TOKENS:
            found[name] = Joined([_mapped(_require(folder / item["folder"] / f"{name}.npy")) for item in known.values()])
        found["sources"] = {name: item["rows"] for name, item in known.items()}
    return TokenTable(**found, signals=signals, apart=(folder / APART).exists(), parted=(folder / PARTED).exists())


def save_joined(tables: Mapping[str, TokenTable], places: Mapping[str, str], folder: Path) -> None:
    """Write the tables of a mixture's sources as one, which reads their tokens where they are: in `places`, seen from `folder`."""
    held = list(tables.values())
    documents = [len(table.offsets) - 1 for table in held]
    number_of = np.repeat(np.arange(len(held), dtype=np.float32), documents)
    names = dict.fromkeys(name for table in held for name in table.signals)
    signals = {name: np.concatenate([_signal(table, name, held) for table in held]) for name in names}
    whole = TokenTable(
        tokens=held[0].tokens[:0],
        supervised=held[0].supervised[:0],
        offsets=_one_after_another([table.offsets for table in held]),
        order=_raised([table.order for table in held], documents),
        rows=_one_after_another([table.rows for table in held]),
        labels=np.concatenate([_labels_of(table) for table in held]),
        units=None if held[0].units is None else _raised([cast(Ints, table.units) for table in held], [_units_of(table) for table in held]),
        partners=None if held[0].partners is None else _raised([cast(Ints, table.partners) for table in held], documents),
        signals=signals | {SOURCE: number_of},
        apart=held[0].apart,
        parted=held[0].parted,
    )
    _write({name: array for name, array in _arrays(whole).items() if name not in TOKENS}, whole, folder)
    parts = {name: {"folder": places[name], "rows": len(table)} for name, table in tables.items()}
    (folder / SOURCES).write_text(json.dumps(parts, indent=1))


def _signal(table: TokenTable, name: str, others: Sequence[TokenTable]) -> NDArray[Any]:
    """Return a signal of a table; weights of 1, in the shape that the others have, where its rows have none."""
    if name in table.signals or name != WEIGHT:
        return table.signals[name]
    shape = next(other.signals[WEIGHT].shape[1:] for other in others if WEIGHT in other.signals)
    return np.ones((int(_labels_of(table).sum()) if shape else len(table.offsets) - 1, *shape), np.float32)


class Joined:
    """Arrays one after the other, read as one array without a copy of it: by slices, and by numbers of elements, (N,)."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        """Take arrays of one type."""
        self.parts = parts
        self.ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        """Return the elements of all."""
        return int(self.ends[-1])

    def __getitem__(self, where: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Return elements, (N,)."""
        if isinstance(where, slice):
            start, stop, _ = where.indices(len(self))
            pieces = [part[max(0, start - at) : max(0, stop - at)] for part, at in zip(self.parts, self.ends[:-1], strict=True)]
            filled = [piece for piece in pieces if len(piece)]
            return filled[0] if len(filled) == 1 else np.concatenate([pieces[0][:0], *filled])
        part_of = np.searchsorted(self.ends, where, side="right") - 1
        found = np.empty(len(where), dtype=self.parts[0].dtype)
        for number in np.unique(part_of):
            mine = part_of == number
            found[mine] = self.parts[number][where[mine] - self.ends[number]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return a copy of all, which numpy's functions ask for."""
        return np.concatenate(self.parts).astype(dtype or self.parts[0].dtype, copy=False)


def _mapped(path: Path) -> NDArray[Any]:
    found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def _require(file: Path) -> Path:
    if not file.exists():
        reason = f"{file.resolve().parent} is gone, which is a part of a mixture"
        raise ConfigError("data.prepared_dir", str(file.resolve().parents[2]), reason, "the run's command again, which prepares it")
    return file


def _one_after_another(bounds: Sequence[Ints]) -> Ints:
    """Return bounds [0, ..., n] of what is in several tables as those of one table."""
    ends = np.cumsum([0, *(int(bound[-1]) for bound in bounds)])
    return np.concatenate([*(bound[:-1] + end for bound, end in zip(bounds, ends[:-1], strict=True)), ends[-1:]])


def _raised(numbers: Sequence[Ints], counts: Sequence[int]) -> Ints:
    """Return numbers below the counts of several tables as those of one table."""
    starts = np.cumsum([0, *counts])[:-1]
    return np.concatenate([found + start for found, start in zip(numbers, starts, strict=True)])


def _units_of(table: TokenTable) -> int:
    return 0 if table.units is None else int(table.units.max()) + 1


def _labels_of(table: TokenTable) -> Ints:
    """Return the labels of each document, counted where nobody has, (documents,)."""
    return labels_of(table) if table.labels is None else table.labels


def _arrays(table: TokenTable) -> dict[str, NDArray[Any]]:
    """Return the arrays of a table by the names of their files."""
    arrays = {item.name: getattr(table, item.name) for item in fields(table) if item.name not in ("signals", APART, PARTED, "sources")}
    arrays |= {f"{SIGNALS}{name}": signal for name, signal in table.signals.items()}
    return {name: array for name, array in arrays.items() if array is not None}
