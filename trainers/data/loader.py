"""The microbatches of a step, from (seed, step, rank, world size) alone: there is no loader state to save. A thread makes them ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.batch import IGNORE, NO_DOCUMENT, Batch, Sizes
from trainers.config.derived import length
from trainers.config.schema import TrainConfig
from trainers.data.table import TokenTable

Ints = NDArray[np.int64]
LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class Made:
    """What is to be told of the rows that were made for a step."""

    figures: dict[str, float] = field(default_factory=dict)
    """Shown with the loss."""
    more: dict[str, float] = field(default_factory=dict)
    """In metrics.jsonl alone."""
    seconds: float = 0.0
    """Spent on them: a part of the step's."""


class Rows(Protocol):
    """What the loop asks for data: every answer is a function of the step, so that nothing of it is saved.

    A thread asks for the next step while one is taken.
    """

    num_steps: int
    pad_id: int
    signals: frozenset[str]
    """What its tables carry that prepared data do not."""
    made_until: int
    """The first step whose rows must be made before they are asked for."""
    made: Made
    """What is told of the last step's."""

    def make(self, step: int, ahead: int = 0) -> bool:
        """Have the rows of a step, `ahead` steps further in the stream; False where a rank was asked to stop. Collective.

        It is the step `made_until`, or one to which the run has gone back.
        """
        ...

    def table(self, step: int) -> TokenTable:
        """Return the table that a step takes its rows from."""
        ...

    def row_ids(self, step: int, ahead: int = 0) -> Ints:
        """Return the table's rows that all ranks together take in a step, `ahead` steps further in the stream."""
        ...

    def sizes(self, step: int, row_ids: Ints) -> Sizes:
        """Return how much is in a step's rows."""
        ...

    def batches(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return this rank's microbatches of a step's rows, as many as on every other rank."""
        ...

    def first(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return this rank's microbatches that an objective's statistic of the step is measured on; none where it has no such one."""
        ...

    def epoch(self, step: int) -> float:
        """Return the passes over the rows that are done after `step` steps."""
        ...

    def passes(self, step: int) -> dict[str, float]:
        """Return the passes over each source's rows that are done after `step` steps; empty where there are no sources."""
        ...


class Stream(Protocol):
    """An order of rows other than epochs of all of them, such as a mixture's."""

    num_rows: int
    """Of the run."""
    pass_rows: int
    """Of one epoch."""

    def row_ids(self, positions: Ints) -> Ints:
        """Return the table's rows at positions of the stream."""
        ...

    def passes(self, position: int) -> dict[str, float]:
        """Return the passes over each source's rows before a position."""
        ...


class Loader:
    """Rows of a table in one global stream, the same for every world size, dealt out to ranks.

    Position p of the stream is row `row_order(seed, p // rows)[p % rows]`; step s takes the positions from
    s x global_batch; within a step, the k-th microbatch of rows goes to rank k % world_size. Another `stream` may say which row it is.
    """

    signals: frozenset[str] = frozenset()
    made = Made()

    def __init__(
        self, table: TokenTable, train: TrainConfig, *, seed: int, rank: int, world_size: int, pad_id: int, stream: Stream | None = None
    ) -> None:
        """Raise ValueError for an empty table."""
        if not len(table):
            raise ValueError("the table has no rows")
        self.rows, self.seed, self.rank, self.world_size, self.pad_id = table, seed, rank, world_size, pad_id
        self.global_batch, self.microbatch = train.global_batch, train.microbatch
        self.stream = stream
        self.num_rows, self.num_steps = length(train, len(table), None if stream is None else stream.num_rows)
        self.made_until = self.num_steps
        self.epoch_rows = len(table) if stream is None else stream.pass_rows
        self.capacity: int | None = None

    def make(self, step: int, ahead: int = 0) -> bool:
        """Make nothing: all rows are there from the start."""
        return True

    def table(self, step: int) -> TokenTable:
        """Return the table: the same in every step."""
        return self.rows

    def row_ids(self, step: int, ahead: int = 0) -> Ints:
        """Return the table's rows that all ranks together take in a step, in stream order; the last step may have fewer.

        They are `ahead` steps further in the stream, after a window of rows was left out.
        """
        positions = np.arange(step * self.global_batch, min((step + 1) * self.global_batch, self.num_rows)) + ahead * self.global_batch
        if self.stream is not None:
            return self.stream.row_ids(positions)
        epochs = positions // len(self.rows)
        places = positions % len(self.rows)
        return np.array(
            [row_order(self.seed, int(epoch), len(self.rows))[place] for epoch, place in zip(epochs, places, strict=True)], np.int64
        )

    def sizes(self, step: int, row_ids: Ints) -> Sizes:
        """Return how much is in a step's rows."""
        return self.table(step).sizes(row_ids)

    def step(self, step: int) -> list[Batch]:
        """Return this rank's microbatches of a step: as many on every rank, filled up with rows that do not count."""
        return self.batches(step, self.row_ids(step))

    def batches(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return this rank's microbatches of a step's rows."""
        mine = deal(row_ids, self.microbatch, self.rank, self.world_size)
        return [make_batch(self.table(step), rows, self.microbatch, self.pad_id) for rows in mine]

    def first(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return the prompts of the step's documents with answers to others where the table has such partners."""
        table = self.table(step)
        if table.partners is None:
            return []
        from trainers.data.mismatched import longest_row, mismatched

        self.capacity = self.capacity or longest_row(table)
        other = mismatched(table, table.documents_of(row_ids), self.capacity)
        mine = deal(np.arange(len(other)), self.microbatch, self.rank, self.world_size)
        return [make_batch(other, rows, self.microbatch, self.pad_id) for rows in mine]

    def epoch(self, step: int) -> float:
        """Return the passes over the table that are done when `step` steps are."""
        return min(step * self.global_batch, self.num_rows) / self.epoch_rows

    def passes(self, step: int) -> dict[str, float]:
        """Return the passes over each source's rows that are done when `step` steps are."""
        return {} if self.stream is None else self.stream.passes(min(step * self.global_batch, self.num_rows))


@dataclass(frozen=True)
class Dealt:
    """What a step takes."""

    row_ids: Ints
    """The table's rows that all ranks together take."""
    batches: list[Batch]
    """This rank's microbatches, in pinned memory where they go to a GPU: the copy then waits for nothing."""
    sizes: Sizes
    """Of all ranks' rows."""
    first: list[Batch] = field(default_factory=list)
    """This rank's microbatches for the objective's statistic."""


class Prefetch:
    """Hands out each step's rows, and has a thread make those of the step after it.

    Rows are a function of the step, so that nothing of this is saved: what was made for a step that does not come is dropped.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        """Make nothing yet."""
        self.rows, self.device = rows, device
        self.thread = ThreadPoolExecutor(1, "prefetch", self._enter_device)
        self.made: tuple[tuple[int, int], Future[Dealt]] | None = None

    def take(self, step: int, ahead: int) -> Dealt:
        """Return what a step takes, `ahead` steps further in the stream; raises what making it raised."""
        place = (step, ahead)
        made, self.made = self.made, None
        dealt = made[1].result() if made is not None and made[0] == place else self._make(*place)
        if step + 1 < self.rows.made_until:
            self.made = (step + 1, ahead), self.thread.submit(self._make, step + 1, ahead)
        return dealt

    def _enter_device(self) -> None:
        """Let what the thread does with CUDA be on this rank's device: a new thread is on the first one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _make(self, step: int, ahead: int) -> Dealt:
        row_ids = self.rows.row_ids(step, ahead)
        batches, first = self.rows.batches(step, row_ids), self.rows.first(step, row_ids)
        if self.device.type == "cuda":
            batches, first = ([batch.map(torch.Tensor.pin_memory) for batch in made] for made in (batches, first))
        return Dealt(row_ids, batches, self.rows.sizes(step, row_ids), first)

    def __enter__(self) -> Prefetch:
        """Return itself; the thread ends with the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the thread, with what it is making."""
        self.thread.shutdown(cancel_futures=True)


def eval_batches(
    table: TokenTable, microbatch: int, *, rank: int, world_size: int, pad_id: int, rows: Ints | None = None
) -> Iterator[Batch]:
    """Yield a rank's share of all rows, or of some, longest first: each row once over all ranks, as many batches on every rank."""
    taken = np.arange(len(table)) if rows is None else rows
    longest_first = taken[np.argsort(-table.row_lengths()[taken], kind="stable")]
    for dealt in deal(longest_first, microbatch, rank, world_size):
        yield make_batch(table, dealt, microbatch, pad_id)


def deal(rows: Ints, microbatch: int, rank: int, world_size: int) -> list[Ints]:
    """Return a rank's microbatches of rows, as many as every other rank's; the last ones may be short or empty."""
    count = math.ceil(len(rows) / (microbatch * world_size))
    chunks = [number * world_size + rank for number in range(count)]
    return [rows[chunk * microbatch : (chunk + 1) * microbatch] for chunk in chunks]


@lru_cache(maxsize=2)
def row_order(seed: int, epoch: int, num_rows: int) -> Ints:
    """Return the order of the rows in an epoch, a permutation of (num_rows,).

    Sorted by raw Philox output, which numpy promises never to change, unlike its `permutation`.
    """
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(raw, kind="stable")


def make_batch(table: TokenTable, rows: Ints, num: int, pad_id: int) -> Batch:
    """Return rows as a batch of `num` rows (B), as long as the longest, rounded up to a multiple of 8 (S).

    Of a table whose documents lie apart, each document is a row of the batch: B is `num` times those of a row.

    Labels are shifted within each document, so that nothing predicts the next document's first token. What pads a row,
    or is a row of padding, has no labels and counts its positions from 0 like a document of its own.
    """
    documents = [table.documents(int(row)) for row in rows]
    if table.apart:
        documents = [document[None] for group in documents for document in group]
        num *= int(table.rows[1] - table.rows[0])
    flat = np.concatenate([*documents, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    starts, lengths = table.offsets[flat], table.offsets[flat + 1] - table.offsets[flat]
    row_of = np.repeat(np.arange(len(documents)), [len(group) for group in documents])
    used = np.bincount(row_of, weights=lengths, minlength=num).astype(np.int64)
    size = LENGTH_MULTIPLE * max(1, math.ceil(int(used.max(initial=0)) / LENGTH_MULTIPLE))
    input_ids = np.full(num * size, pad_id, dtype=np.int64)
    labels = np.full(num * size, IGNORE, dtype=np.int64)
    columns = np.arange(size, dtype=np.int64)
    position_ids = np.where(columns < used[:, None], 0, columns - used[:, None]).ravel()
    behind = np.cumsum(lengths)
    position = np.arange(behind[-1] if len(flat) else 0) - np.repeat(behind - lengths, lengths)
    source = np.repeat(starts, lengths) + position
    row_starts = np.cumsum(used) - used
    target = np.repeat(row_of * size - row_starts[row_of] + behind - lengths, lengths) + position
    tokens = table.tokens[source]
    input_ids[target], position_ids[target] = tokens, position
    shifted = (position[1:] > 0) & (table.supervised[source[1:]] > 0)
    labels[target[:-1][shifted]] = tokens[1:][shifted]
    document_of = np.full(num * size, NO_DOCUMENT, dtype=np.int64)
    document_of[target] = np.repeat(np.arange(len(flat)), lengths)
    arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "documents": document_of}
    tensors: dict[str, Any] = {name: torch.from_numpy(array.reshape(num, size)) for name, array in arrays.items()}
    signals = {
        name: _signal(table, signal, flat, source, target, (num, size))
        if signal.ndim == 1
        else _of_labels(table, signal, flat, labels).view(num, size, -1)
        for name, signal in table.signals.items()
    }
    batch = Batch(**tensors, signals=signals, num_rows=len(rows), num_tokens=int(used.sum()), num_documents=len(flat))
    return _parted(batch) if table.parted else batch


def _parted(batch: Batch) -> Batch:
    from trainers.data.parted import part

    return part(batch)


def _signal(table: TokenTable, signal: NDArray[np.float32], documents: Ints, source: Ints, target: Ints, shape: tuple[int, int]) -> Tensor:
    """Return a signal of a batch's documents, (D,), or of its tokens, (B, S) with 0 where it is padding."""
    if len(signal) == len(table.offsets) - 1:
        return torch.from_numpy(signal[documents].astype(np.float32))
    values = np.zeros(shape[0] * shape[1], dtype=np.float32)
    values[target] = signal[source]
    return torch.from_numpy(values.reshape(shape))


def _of_labels(table: TokenTable, signal: NDArray[Any], documents: Ints, labels: Ints) -> Tensor:
    """Return a signal (labels, k) at a batch's flat labels, (B x S, k) with 0 elsewhere: documents follow one another as labels do."""
    starts, counts = table.label_starts[documents], np.diff(table.label_starts)[documents]
    rows = np.repeat(starts + counts - np.cumsum(counts), counts) + np.arange(counts.sum())
    values = np.zeros((len(labels), signal.shape[1]), np.float32 if signal.dtype.kind == "f" else np.int32)
    values[labels != IGNORE] = signal[rows]
    return torch.from_numpy(values)
