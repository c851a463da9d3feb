"""The process that prepares a stream's shards ahead of the ranks: python -m trainers.data.ahead RUN_DIR/config.yaml FOLDER."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainers.cache import build_once
from trainers.config.checks import load
from trainers.config.derived import sources_of
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data import sources
from trainers.data.encode import encoder_of
from trainers.data.prepare import Store, check_left_out, check_losses, encode_all, find_layout, save_split
from trainers.data.shards import ERROR, POLL_S, PROGRESS, WANTED, Index, Shard, Totals, shard_folder
from trainers.data.sources import Row
from trainers.data.table import open_table
from trainers.data.tokenizer import load_tokenizer
from trainers.processes import never_fail
from trainers.rundir.base import pinned
from trainers.rundir.files import try_json, write_json
from trainers.world import STOP_SIGNALS

NOTE_EVERY_S = 1.0
REMOVED = "tmp-removed-"
"""Shards under such names are no longer there."""


class Producer:
    """Prepares the shards that are wanted and not there, in the order of the list, and removes those that are not wanted."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Read the held-out rows; raises ConfigError as `prepare` does."""
        self.config, self.folder, self.index, self.tokenizer = config, folder, Index(folder), load_tokenizer(config)
        self.source, *others = sources_of(config.data)
        self.encoder = encoder_of(config, self.tokenizer, find_layout(config, self.source), ())
        self.noted, self.read = 0.0, 0
        self.held_out: NDArray[np.uint64] = np.zeros(0, np.uint64)
        """The first prompts of the held-out rows, which are not trained."""
        for source in others:
            store = Store(folder, "eval")
            rows = sources.rows(source, config.objective.name)
            encode_all(config, encoder_of(config, self.tokenizer, find_layout(config, source), ()), rows, store, self.note)
            self.held_out = np.unique(store.arrays()[3])
            store.remove()
        self.rows: Iterator[Row] = iter(())
        self.following: list[Row] = []
        """The row before `rows` where it has been read already."""
        self.at = -1
        """The shard that begins with the next row."""

    def run(self) -> None:
        """Work until this process is killed; raises ConfigError for data that cannot be prepared."""
        while True:
            wanted = try_json(self.folder / WANTED).get("shards") or list(range(self.config.data.window_shards))
            self.remove_others(wanted)
            number = self.missing(wanted)
            if number is None:
                time.sleep(POLL_S)
            else:
                self.make(number)

    def missing(self, wanted: Iterable[int]) -> int | None:
        """Return the first of the wanted shards that is not there; of those that nobody knows yet the next one."""
        total, known = self.index.num_shards(), len(self.index.refresh())
        for number in wanted:
            if number >= known and total is None:
                return known
            if number < known and not shard_folder(self.folder, number).is_dir():
                return number
        return None

    def remove_others(self, wanted: Iterable[int]) -> None:
        """Remove the shards that are not wanted."""
        kept = {shard_folder(self.folder, number).name for number in wanted}
        for path in self.folder.glob("data-*"):
            if path.is_dir() and path.name not in kept:
                self.remove(path)
        for path in self.folder.glob(f"{REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)  # tried again: on NFS a folder stays while a rank has its files open

    def remove(self, path: Path) -> None:
        """Take a shard away at once, whole, and the lock under which it was made; `remove_others` frees its disk."""
        path.rename(path.with_name(f"{REMOVED}{path.name}-{time.time_ns()}"))
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)

    def make(self, number: int) -> None:
        """Prepare a shard of which all before it are in the index."""
        if self.at != number:
            self._go_to(number)
        taken = list(self._noted(islice(chain(self.following, self.rows), self.config.data.shard_rows)))
        self.following, self.at = list(islice(self.rows, 1)), number + 1
        target, is_new, made = shard_folder(self.folder, number), number == len(self.index.refresh()), list[Totals]()
        if is_new and target.is_dir():  # a process that was killed has not noted it
            self.remove(target)
        build_once(self.folder, target.name, lambda partial: made.append(self._fill(taken, partial, is_new)), "a shard")
        if is_new:
            rows = len(open_table(target / "train")) if (target / "train").is_dir() else 0
            files = dict(Counter(row.file for row in taken))
            self.index.append(Shard(rows=rows, read=len(taken), files=files, is_last=not self.following), made[0])

    def _fill(self, rows: list[Row], folder: Path, is_new: bool) -> Totals:
        """Write the table of some rows, none where nothing of them is trained.

        Raises ConfigError where too much is lost until here; of a shard that is made again the totals know already.
        """
        store = Store(folder, "train")
        encode_all(self.config, self.encoder, iter(rows), store, self.note)
        own = Totals(Counter(store.counts), store.left_out)
        if is_new:
            whole = self.index.totals + own
            check_losses(self.config, whole.counts)
            check_left_out(self.config, whole.left_out, self.tokenizer)
        keep = ~np.isin(store.arrays()[3], self.held_out)
        if keep.any():
            save_split(self.config, store, keep, folder / "train")
        store.remove()
        return own

    def _go_to(self, number: int) -> None:
        """Read the data again from where a shard begins: files before it are not opened."""
        read: Counter[str] = Counter()
        for shard in self.index.refresh()[:number]:
            read.update(shard.files)
        done = list(read)[:-1]
        before = sum(read[name] for name in done)
        rest, most = sum(read.values()) - before, self.config.data.max_rows
        found = sources.rows(self.source, self.config.objective.name, frozenset(done))
        self.rows = islice(self._noted(found), rest, None if most is None else most - before)
        self.following, self.at = [], number

    def _noted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.note(1)
            yield row

    def note(self, rows: int) -> None:
        """Let the ranks see that this process gets on."""
        self.read += rows
        if (now := time.monotonic()) - self.noted > NOTE_EVERY_S:
            self.noted = now
            write_json(self.folder / PROGRESS, {"rows": self.read})


def main(config: str, folder: str) -> int:
    """Prepare shards until the rank that started this ends; returns the exit code where the data cannot be prepared."""
    never_fail()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals every process; the rank decides
    try:
        Producer(pinned(load(config), Path(config).parent), Path(folder)).run()
    except ConfigError as error:
        parts = error.parts()
        if error.path == "data.prepared_dir":  # what keeps prepared data writes a shard too
            parts |= {"path": "run_dir", "value": str(Path(config).parent), "remedy": "free space there, and the same command again"}
        write_json(Path(folder) / ERROR, parts)
    return 2


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
