"""Steps as stages that can be killed: each part of a stage is written whole or not at all, and what is there is not done again.

Local processes do the parts here, tasks of SLURM arrays in cluster.py. A library's executor would bring its own files and readers,
which keep no row to the byte.
"""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from trainers.processes import die_with_parent

Work = Callable[[Path, Path, Any], None]
"""What makes one part: (folder of the curation, new folder to fill, what the part is about)."""
Tell = Callable[[str, int, int], None]
"""Gets a stage, its parts that are done, and all of them."""
RECORD = "slurm.json"
"""Next to the stages: the array that was submitted last."""
STAGING = "staging"
"""Folder of parts that are not whole."""


class Pool:
    """Processes that do the parts of stages; with one, this process does them itself."""

    def __init__(self, processes: int, own: bool = False) -> None:
        self.processes = processes
        pool = ProcessPoolExecutor(processes, mp_context=get_context("fork"), initializer=_begin, initargs=(os.getpid(),))
        self.executor = pool if processes > 1 or own else None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.executor is not None:
            if kind is not None:
                for child in active_children():  # also those of a pool that this one is inside of, which ends too
                    child.terminate()
            self.executor.shutdown(wait=True, cancel_futures=True)

    def single(self) -> Pool:
        """Return one process of its own, for parts that share what takes much memory and all cores, such as a model."""
        return Pool(1, own=True)

    def run(self, folder: Path, stage: str, work: Work, parts: Sequence[tuple[str, Any]], tell: Tell) -> None:
        """Do the parts of a stage that are not there yet, each into folder/stage/NAME."""
        open_parts = open_of(folder, stage, parts)
        done = len(parts) - len(open_parts)
        tell(stage, done, len(parts))
        if self.executor is None:
            for number, (name, about) in enumerate(open_parts, done + 1):
                do_part(folder, stage, name, work, about)
                tell(stage, number, len(parts))
            return
        waiting = [self.executor.submit(do_part, folder, stage, name, work, about) for name, about in open_parts]
        for number, future in enumerate(as_completed(waiting), done + 1):
            future.result()
            tell(stage, number, len(parts))


def _begin(parent: int) -> None:
    """Let a process end with the one that started it, which alone hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)


def open_of(folder: Path, stage: str, parts: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the parts of a stage that are not there yet."""
    (folder / stage).mkdir(exist_ok=True)
    (folder / STAGING).mkdir(exist_ok=True)
    return [(name, about) for name, about in parts if not (folder / stage / name).is_dir()]


def do_part(folder: Path, stage: str, name: str, work: Work, about: Any) -> None:
    """Fill a part's folder elsewhere and put it in its place once it is whole.

    A lost node may still do what another does again: each has a folder of its own, and the first one's stays.
    """
    staging = folder / STAGING / f"{stage}-{name}-{uuid.uuid4().hex}"
    staging.mkdir()
    work(folder, staging, about)
    try:
        staging.rename(folder / stage / name)
    except OSError:
        if not (folder / stage / name).is_dir():
            raise
        shutil.rmtree(staging)
