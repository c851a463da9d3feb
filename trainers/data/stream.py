"""A stream of shards: rows of a data set that a process prepares ahead of the ranks, shuffled in a window, on bounded disk.

Shard n is `data.shard_rows` rows of the data, prepared as a data set of its own. A window is `data.window_shards` shards, whose rows
are in one order by seed and number of the window. When the data end they begin again. So the row at a position of the stream is a
function of the seed and of how many rows each shard has, which the index keeps: no state is saved, and any number of ranks takes the
same rows. A shard that is not there any more is prepared again (ahead.py); shards.py is what is kept of each.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainers.batch import WEIGHT, Batch, Sizes
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data.loader import Ints, Made, deal, make_batch, row_order
from trainers.data.shards import ERROR, POLL_S, PROGRESS, WANTED, Index, shard_folder
from trainers.data.table import TokenTable, open_table
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.beats import Phase
from trainers.rundir.files import try_json, write_json
from trainers.world import World

log = logging.getLogger("fulltune")
REMIND_S = 30.0
RESTARTS = 3
"""Of the process ahead without a new shard in between."""


@dataclass(frozen=True)
class Window:
    """Shards whose rows are shuffled together."""

    number: int
    """Of the stream, from 0."""
    epoch: int
    start: int
    """Its first position of the stream."""
    first_shard: int
    first_row: int
    """Of the pass."""
    rows: int
    num_shards: int


class Ahead:
    """The process that prepares shards; rank 0's child, which starts it again where it is killed."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Start it."""
        self.line = [sys.executable, "-m", "trainers.data.ahead", str(Path(config.run_dir) / paths.CONFIG), str(folder)]
        self.folder, self.index, self.deaths, self.made = folder, Index(folder), 0, 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).unlink(missing_ok=True)
        self._start()

    def _start(self) -> None:
        self.child = subprocess.Popen(self.line, stdin=subprocess.DEVNULL, preexec_fn=prepare_child(last=signal.SIGKILL))

    def check(self) -> None:
        """Start it again where it has died; raises TrainingFailed where that does not help."""
        code = self.child.poll()
        if code is None or (self.folder / ERROR).exists():
            return
        made = len(self.index.refresh())
        self.deaths, self.made = (self.deaths + 1 if made == self.made else 1), made
        if self.deaths > RESTARTS:
            times = f"{RESTARTS + 1} times without a new shard, with exit code {code}"
            raise TrainingFailed(f"the process that prepares data ahead has ended {times}; what it wrote is above ({self.folder})")
        log.warning("the process that prepares data ahead has ended with exit code %d; it is started again", code)
        self._start()

    def close(self) -> None:
        """End it."""
        self.child.kill()
        self.child.wait()

    def remove(self, done: bool) -> None:
        """Remove what it left half made, and all shards of a run that is done; what cannot be removed is told of."""
        for path in [*self.folder.glob("tmp-*"), *(self.folder.glob("data-*") if done else ())]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if done and (left := sorted(path.name for path in self.folder.glob("*-*"))):
            log.warning("%s still has %s, which nobody needs any more", self.folder, ", ".join(left[:3]))


class Streamed:
    """A run's rows from shards, as the loop asks for them."""

    signals: frozenset[str] = frozenset()
    made = Made()

    def __init__(
        self, config: RunConfig, folder: Path, world: World, *, rank: int, world_size: int, pad_id: int, ahead: Ahead | None = None
    ) -> None:
        """Wait for nothing yet; `rank` of `world_size` takes the rows, and `ahead` is rank 0's of `world`."""
        assert config.train.steps is not None
        self.config, self.folder, self.rank, self.world_size, self.pad_id, self.ahead = config, folder, rank, world_size, pad_id, ahead
        self.world, self.num_steps, self.made_until, self.shift = world, config.train.steps, 0, 0
        self.global_batch = config.train.global_batch
        self.index, self.windows, self.wanted = Index(folder), list[Window](), list[int]()
        self.open = lru_cache(4 * config.data.window_shards)(lambda number: open_table(shard_folder(folder, number) / "train"))
        self.gathered: tuple[bytes, TokenTable] | None = None
        self.oldest = 0
        """The first position that some rank may still read."""
        self.lock = threading.RLock()
        """Steps are made in a thread, the first of an attempt where the loop is."""

    def make(self, step: int, ahead: int = 0) -> bool:
        """Wait for the shards of a step, `ahead` steps further in the stream; False where a rank was asked to stop. Collective.

        Where none is waited for, those of the following steps in the same window are there too, and may be asked for ahead.
        """
        began, self.shift, waiting, waited = time.perf_counter(), max(self.shift, ahead), self._waiting(), False
        while True:
            stop, missing = self.world.any(self.world.signalled is not None, not self._has(step + ahead))
            if stop:
                return False
            if not missing:
                break
            if not waited:
                waited = True
                watch.enter(Phase.step, step + 1)
            next(waiting)
        window = self._window((step + ahead + 1) * self.global_batch - 1)
        whole = 0 if waited else (window.start + window.rows) // self.global_batch - ahead
        self.made_until = min(self.num_steps, max(step + 1, whole))
        self.made = Made(seconds=time.perf_counter() - began if waited else 0.0)
        return True

    def row_ids(self, step: int, ahead: int = 0) -> Ints:
        """Return the rows of a pass that all ranks together take in a step; waits for their shards."""
        positions = np.arange((step + ahead) * self.global_batch, (step + ahead + 1) * self.global_batch)
        with self.lock:
            self._wait(lambda: self._has(step + ahead))
            found = []
            for position in positions:
                window = self._window(int(position))
                order = row_order(self.config.seed, window.number, window.rows)
                found.append(window.first_row + int(order[position - window.start]))
            return np.array(found, np.int64)

    def _has(self, place: int) -> bool:
        """Tell whether all shards of the windows of a step are there, and ask for them; `place` is the step's in the stream."""
        first, last = place * self.global_batch, (place + 1) * self.global_batch - 1
        with self.lock:
            self.oldest = max(0, first - 2 * self.global_batch)
            while not self.windows or self.windows[-1].start + self.windows[-1].rows <= last:
                if self.index.num_shards() is None and len(self.index.refresh()) < self._next_shard() + self.config.data.window_shards:
                    self._want()
                    return False
                self._add_window()
            self._want()
            used = [window for window in self.windows if window.start <= last and first < window.start + window.rows]
            numbers = [window.first_shard + number for window in used for number in range(window.num_shards)]
            return all(shard_folder(self.folder, number).is_dir() for number in numbers)

    def _want(self) -> None:
        """Let the process ahead know which shards are needed: those of the windows that some rank may read, and of two more."""
        if self.ahead is None:
            return
        size, known = self.config.data.window_shards, [window for window in self.windows if window.start + window.rows > self.oldest]
        shards = [window.first_shard + number for window in known for number in range(window.num_shards)]
        total, first = self.index.num_shards(), self._next_shard()
        more = range(first, first + 2 * size) if total is None else [(first + number) % total for number in range(2 * size)]
        wanted = list(dict.fromkeys([*shards, *more]))
        if wanted != self.wanted:
            self.wanted = wanted
            write_json(self.folder / WANTED, {"shards": wanted})

    def _next_shard(self) -> int:
        if not self.windows:
            return 0
        last, total = self.windows[-1], self.index.num_shards()
        after = last.first_shard + last.num_shards
        return 0 if total is not None and after >= total else after

    def _window(self, position: int) -> Window:
        """Return the window of a position whose shards are known."""
        return next(window for window in reversed(self.windows) if window.start <= position)

    def _add_window(self) -> None:
        """Add the next window, whose shards are known."""
        size, shards, first = self.config.data.window_shards, self.index.refresh(), self._next_shard()
        last = self.windows[-1] if self.windows else None
        taken = shards[first : first + size]
        number, start = (0, 0) if last is None else (last.number + 1, last.start + last.rows)
        epoch = 0 if last is None else last.epoch + (first == 0)
        before = sum(shard.rows for shard in shards[:first])
        self.open.cache_clear()  # what is not needed any more is removed, and made again for the next pass
        self.windows.append(Window(number, epoch, start, first, before, sum(shard.rows for shard in taken), len(taken)))
        if last is not None and first == 0 and not sum(shard.rows for shard in shards):
            raise ConfigError(
                "data.path", self.config.data.path, "no row of the stream is trained", "python -m tools.show_batch shows them"
            )

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Wait for what the process ahead makes; raises its ConfigError."""
        waiting = self._waiting()
        while not is_there():
            next(waiting)

    def _waiting(self) -> Iterator[None]:
        """Look after the process ahead each time that something is waited for; raises its ConfigError."""
        known, reminded = None, time.monotonic()
        while True:
            if (error := try_json(self.folder / ERROR)) and "path" in error:
                raise ConfigError(**error)
            if self.ahead is not None:
                self.ahead.check()
            if known != (known := (len(self.index.refresh()), read_bytes(self.folder / PROGRESS))):
                watch.beat()
            if self.ahead is not None and time.monotonic() - reminded > REMIND_S:
                reminded = time.monotonic()
                log.info("waiting for the process that prepares data ahead: %d shards are known, %s", known[0], self.folder)
            time.sleep(POLL_S)
            yield

    def shard(self, number: int) -> TokenTable:
        """Return a shard's rows, once they are prepared."""
        self._wait(lambda: shard_folder(self.folder, number).is_dir())
        return self.open(number)

    def gather(self, row_ids: Ints) -> TokenTable:
        """Return a step's rows as a table of their own, in their order."""
        with self.lock:
            return self._gather(row_ids)

    def _gather(self, row_ids: Ints) -> TokenTable:
        key = row_ids.tobytes()
        if self.gathered is None or self.gathered[0] != key:
            ends = np.cumsum([shard.rows for shard in self.index.refresh()])
            numbers = np.searchsorted(ends, row_ids, side="right")
            firsts = np.concatenate([np.zeros(1, np.int64), ends])
            places = [(self.shard(int(number)), int(row - firsts[number])) for row, number in zip(row_ids, numbers, strict=True)]
            self.gathered = key, joined_rows(places)
        return self.gathered[1]

    def table(self, step: int) -> TokenTable:
        """Return the rows of a step."""
        return self.gather(self.row_ids(step))

    def sizes(self, step: int, row_ids: Ints) -> Sizes:
        """Return how much is in a step's rows."""
        return self.gather(row_ids).sizes(np.arange(len(row_ids)))

    def batches(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return this rank's microbatches of a step's rows."""
        table, size = self.gather(row_ids), self.config.train.microbatch
        mine = deal(np.arange(len(row_ids)), size, self.rank, self.world_size)
        return [make_batch(table, rows, size, self.pad_id) for rows in mine]

    def first(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return nothing: no objective that is streamed has a statistic of the step."""
        return []

    def epoch(self, step: int) -> float:
        """Return the passes that are done after `step` steps: 0 while the first is under way, whose length nobody knows."""
        last = max(0, step * self.global_batch - 1)
        window = next(window for window in reversed(self.windows) if window.start <= last)  # without the lock: the step has been made
        if window.epoch == 0:
            return 0.0
        rows = sum(shard.rows for shard in self.index.shards)
        return window.epoch + (window.first_row + step * self.global_batch - window.start) / rows

    def passes(self, step: int) -> dict[str, float]:
        """Return nothing: a stream has one source."""
        return {}

    def close(self) -> None:
        """End the process ahead, and let go of the shards, whose files could not be removed from NFS otherwise."""
        self.gathered = None
        self.open.cache_clear()
        if self.ahead is not None:
            self.ahead.close()


def joined_rows(places: list[tuple[TokenTable, int]]) -> TokenTable:
    """Return rows of several tables, each with its number, as one table, in their order."""
    documents = [(table, int(document)) for table, row in places for document in table.documents(row)]
    spans = [(table, slice(int(table.offsets[number]), int(table.offsets[number + 1]))) for table, number in documents]
    counts = [len(table.documents(row)) for table, row in places]
    labels = np.array([np.diff(table.label_starts[number : number + 2])[0] for table, number in documents], np.int64)
    first = places[0][0]
    return TokenTable(
        tokens=np.concatenate([table.tokens[span] for table, span in spans]),
        supervised=np.concatenate([table.supervised[span] for table, span in spans]),
        offsets=np.concatenate([[0], np.cumsum([span.stop - span.start for _, span in spans])]).astype(np.int64),
        order=np.arange(len(documents), dtype=np.int64),
        rows=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=labels,
        units=None if first.units is None else np.arange(len(documents), dtype=np.int64) // 2,  # a pair is two neighbours
        apart=first.apart,
        signals=_weights(documents, labels),
    )


def _weights(documents: list[tuple[TokenTable, int]], labels: Ints) -> dict[str, NDArray[np.float32]]:
    """Return the weights of documents, or of their labels, 1 where a table has none; nothing where no table has any."""
    held = next((table.signals[WEIGHT] for table, _ in documents if WEIGHT in table.signals), None)
    if held is None:
        return {}
    found = []
    for (table, number), count in zip(documents, labels.tolist(), strict=True):
        start, end = (int(table.label_starts[number]), int(table.label_starts[number + 1])) if held.ndim == 2 else (number, number + 1)
        size = count if held.ndim == 2 else 1
        found.append(table.signals[WEIGHT][start:end] if WEIGHT in table.signals else np.ones((size, *held.shape[1:]), np.float32))
    return {WEIGHT: np.concatenate(found)}


def read_bytes(path: Path) -> bytes:
    """Return a file's content, nothing where it is not there."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""
