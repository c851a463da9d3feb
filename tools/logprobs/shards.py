"""Where a teacher's log-probabilities are written: shard by shard into one file a split, each with a hash, sealed when all are there."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tools.command import Refused
from trainers.cache import build_once, cache_root, content_key
from trainers.config.errors import ConfigError
from trainers.config.objectives import TEACHER
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.model import hub
from trainers.rundir.files import try_row, write_json
from trainers.teacher import FILES, PREFIX

Ints = NDArray[np.int64]
Found = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Of some labels: ids (labels, k), and log-probabilities in nats (labels, k + 1), those of all other tokens together last."""
VERSION = 1
"""Of what is written: raise it when the numbers come out differently."""
DONE = "done.jsonl"
ALIKE = 0.5
"""Nats by which a served model's log-probabilities may differ from one time to the next: kernels and batches round otherwise."""


class Failed(Exception):
    """A teacher has not answered."""


class Teacher(Protocol):
    """Whoever is asked."""

    name: str
    key: str
    """Tells its weights from others."""
    may_change: bool
    """Another model may be under the same key."""

    def ask(self, table: TokenTable, documents: Ints) -> Found:
        """Return what it says at the labels of these documents, in their order."""
        ...


def write(data: Prepared, teacher: Teacher, prepared_dir: str | None, options: argparse.Namespace) -> tuple[Path, bool]:
    """Return the directory of a teacher's log-probabilities, and whether it was there before."""
    k, stored = options.top_k, options.stored
    root, key = cache_root(prepared_dir), content_key(VERSION, data.path.name, teacher.key, k, stored)
    folder, partial = root / f"{PREFIX}{key}", root / f"{PREFIX}{key}.partial"
    tables = {name: table for name, table in (("train", data.train), ("eval", data.eval)) if table is not None}
    record = {
        "key": key,
        "name": teacher.name,
        "data": data.path.name,
        "k": k,
        "stored": stored,
        "written_at": time.strftime("%Y-%m-%d %H:%M"),
    }
    record["labels"] = {name: int(table.label_starts[-1]) for name, table in tables.items()}

    def build(staging: Path) -> None:
        with _bar(sum(record["labels"].values())) as bar:
            for name, table in tables.items():
                _fill(Split(partial / name, table, k, stored), teacher, options.shard, bar)
        for name in tables:
            (staging / name).mkdir()
            for file in FILES.values():
                _link(partial / name / file, staging / name / file)
        write_json(staging / TEACHER, record)

    found = build_once(root, folder.name, build, "the teacher's log-probabilities")
    shutil.rmtree(partial, ignore_errors=True)
    if found[1] and teacher.may_change:
        _require_alike(Split(folder / "train", data.train, k, stored), teacher, range(len(data.train.offsets) - 1), folder)
    return found


class Split:
    """The files of one split, and which of its documents are in them."""

    def __init__(self, folder: Path, table: TokenTable, k: int, stored: str) -> None:
        """Open the files, or make them."""
        self.folder, self.table, self.starts = folder, table, table.label_starts
        self.counts = np.diff(self.starts)
        folder.mkdir(parents=True, exist_ok=True)
        labels = int(self.starts[-1])
        shapes = {"ids.npy": ((labels, k), "int32"), "logps.npy": ((labels, k + 1), stored)}
        self.arrays = [_map(folder / name, shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()]

    def done(self) -> NDArray[np.bool_]:
        """Return which documents are written, (documents,): those of shards whose hashes are right."""
        done: NDArray[np.bool_] = self.counts == 0
        lines = (self.folder / DONE).read_text().splitlines() if (self.folder / DONE).is_file() else []
        for row in filter(None, map(try_row, lines)):
            first, last = row["first"], row["last"]
            if not done[first:last].all() and self.digest(first, last) == row["sha256"]:
                done[first:last] = True
        return done

    def shards(self, done: NDArray[np.bool_], labels: int) -> list[tuple[int, int]]:
        """Return what is missing as ranges of documents, of about so many labels each."""
        ranges: list[tuple[int, int]] = []
        for document in np.flatnonzero(~done):
            first, last = ranges[-1] if ranges else (-1, -1)
            if last == document and self.starts[document + 1] - self.starts[first] <= labels:
                ranges[-1] = (first, last + 1)
            else:
                ranges.append((int(document), int(document) + 1))
        return ranges

    def put(self, first: int, last: int, found: Found) -> None:
        """Write a shard, and then that it is written."""
        rows = slice(int(self.starts[first]), int(self.starts[last]))
        for array, values in zip(self.arrays, found, strict=True):
            array[rows] = values
            if isinstance(array, np.memmap):
                array.flush()
        with (self.folder / DONE).open("a") as file:
            file.write(json.dumps({"first": first, "last": last, "sha256": self.digest(first, last)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def digest(self, first: int, last: int) -> str:
        """Return the hash of a shard's bytes."""
        rows, digest = slice(int(self.starts[first]), int(self.starts[last])), hashlib.sha256()
        for array in self.arrays:
            digest.update(np.ascontiguousarray(array[rows]).tobytes())
        return digest.hexdigest()


def _fill(split: Split, teacher: Teacher, labels: int, bar: Progress) -> None:
    """Ask the teacher for the documents that are missing."""
    done, task = split.done(), bar.tasks[0].id
    bar.advance(task, int(split.counts[done].sum()))
    if teacher.may_change and split.counts[done].any():
        _require_alike(split, teacher, np.flatnonzero(done), split.folder.parent)
    for first, last in split.shards(done, labels):
        documents = np.arange(first, last)
        documents = documents[split.counts[documents] > 0]
        found = teacher.ask(split.table, documents)
        _require_sound(found, teacher, first, last)
        split.put(first, last, found)
        bar.advance(task, int(split.counts[first:last].sum()))


def _require_sound(found: Found, teacher: Teacher, first: int, last: int) -> None:
    """Raise Refused for numbers that cannot be log-probabilities."""
    logps = found[1]
    if not np.isfinite(logps[:, :-1]).all() or np.isnan(logps).any() or (logps > 1e-3).any():
        raise Refused(f"{teacher.name} gives numbers that cannot be log-probabilities at documents {first} to {last - 1}: --dtype float32")


def _require_alike(split: Split, teacher: Teacher, written: Iterable[int], folder: Path) -> None:
    """Raise Refused where a served model does not say of a document what was written of it."""
    document = next(int(document) for document in written if split.counts[document])
    rows = slice(int(split.starts[document]), int(split.starts[document + 1]))
    ids, logps = teacher.ask(split.table, np.array([document]))
    near = np.abs(logps[:, 0] - split.arrays[1][rows][:, 0].astype(np.float32)).mean()
    if near > ALIKE or (ids[:, 0] == split.arrays[0][rows][:, 0]).mean() < 1 - ALIKE:
        raise Refused(f"{teacher.name} says other things than were written of it in {folder}: another model has its name. rm -r {folder}")


def _map(file: Path, shape: tuple[int, int], kind: np.dtype[Any]) -> NDArray[Any]:
    """Map a file for writing; it is made anew where its shape is another, as in one that a killed process left."""
    if not shape[0]:
        np.save(file, np.zeros(shape, kind))
        return np.zeros(shape, kind)
    sealed = (file.parents[1] / TEACHER).is_file()
    try:
        found: NDArray[Any] = np.load(file, mmap_mode="r" if sealed else "r+", allow_pickle=False)
        if found.shape == shape and found.dtype == kind:
            return found
    except (OSError, ValueError):
        pass
    (file.parent / DONE).unlink(missing_ok=True)
    made: NDArray[Any] = np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)
    return made


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, so that a kill before the rename loses nothing; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _bar(total: int) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("labels"), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("asking the teacher"), *columns, console=Console(stderr=True))
    bar.add_task("labels", total=total)
    return bar


def require_same_vocabulary(own: PreTrainedTokenizerBase, options: argparse.Namespace) -> None:
    """Raise ConfigError where the teacher's ids are not the same tokens as the run's."""
    option, name = ("--tokenizer", options.tokenizer) if options.tokenizer else ("--model", options.model)
    folder, _ = hub.fetch(option, name, options.revision if name == options.model else None, hub.TOKENIZER)
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # whatever transformers raises
        reason = f"the tokenizer cannot be loaded: {hub.first_line(error)}"
        raise ConfigError(option, name, reason, "--tokenizer DIR|ID with a tokenizer.json") from error
    ours, others = ({number: token for token, number in one.get_vocab().items()} for one in (own, theirs))
    different = sorted(number for number in ours.keys() | others.keys() if ours.get(number) != others.get(number))
    if different:
        first = different[0]
        reason = (
            f"has another vocabulary: {len(different):,} of {len(ours):,} ids are other tokens; {first} is "
            f"{ours.get(first)!r} in the run and {others.get(first)!r} in the teacher"
        )
        raise ConfigError(option, name, reason, "a teacher of the student's own family, or a student that has the teacher's tokenizer")
