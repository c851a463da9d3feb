"""Start the processes that measure models (`worker`), and show a bar for each model."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tools.evaluate.measurements import Measurement
from trainers.config.errors import ConfigError
from trainers.host import cores
from trainers.processes import prepare_child
from trainers.rundir.ending import Exit

STOP_S = 10.0


def run_workers(
    subjects: list[Measurement],
    *,
    batch: int,
    device: str,
    dtype: str,
    processes: int = 1,
    tasks: Sequence[str] = (),
    tasks_dir: str | None = None,
) -> int:
    """Let processes measure all subjects, with a bar for each; returns their exit code, raises ConfigError for what they refuse."""
    request = {"subjects": [subject.as_json() for subject in subjects], "batch": batch, "device": device, "dtype": dtype}
    request |= {"tasks": list(tasks), "tasks_dir": tasks_dir}
    with tempfile.TemporaryDirectory() as folder, Bars(subjects) as bars:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request), "utf-8")
        logs = [Path(folder) / f"{rank}.log" for rank in range(processes)]
        with started(file, logs) as children:
            refused = follow(children, bars.show)
        if refused is not None:
            raise refused
        broken = [(child.returncode == -signal.SIGTERM, log) for child, log in zip(children, logs, strict=True) if child.returncode]
        if broken:  # those that were ended because of another come last
            print(bars.failed or min(broken)[1].read_text("utf-8", "replace")[-4000:], file=sys.stderr)
            return Exit.failed
    return Exit.done


@contextmanager
def started(request: Path, logs: list[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a worker for each log; none is left running."""
    threads = str(max(1, cores() // len(logs)))
    children = []
    try:
        for rank, log in enumerate(logs):
            line = [sys.executable, "-m", "tools.evaluate.worker", str(request), str(rank), str(len(logs))]
            with log.open("w") as errors:
                environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
                child = subprocess.Popen(
                    line,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=prepare_child(last=signal.SIGKILL),
                )
            children.append(child)
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def follow(children: list[subprocess.Popen[str]], show: Callable[[dict[str, Any]], None]) -> ConfigError | None:
    """Hand on what workers say until all have ended, or one has failed; returns what one refuses."""
    said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def listen(child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                said.put(json.loads(line))
        child.wait()
        said.put(None)

    for child in children:
        threading.Thread(target=listen, args=(child,), daemon=True).start()
    for _ in children:
        while (word := said.get()) is not None:
            if "error" in word:
                return ConfigError(**word["error"])
            show(word)
        if any(child.poll() for child in children):
            return None
    return None


class Bars:
    """Progress, a bar for each model."""

    def __init__(self, subjects: list[Measurement]) -> None:
        """Prepare a bar for each, without its total, which the workers know."""
        self.subjects, self.failed = subjects, ""
        console = Console(stderr=True)
        words = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"))
        self.progress = Progress(*words, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.tasks = [self.progress.add_task(self._title(subject), total=None, visible=False) for subject in subjects]
        self.done: dict[tuple[int, str, int], int] = {}

    @staticmethod
    def _title(subject: Measurement) -> str:
        return escape(f"{subject.out.parent.name}: base" if subject.name == "base" else subject.out.parent.name)

    def __enter__(self) -> Bars:
        """Begin to show them."""
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave them as they are."""
        self.progress.stop()

    def show(self, word: dict[str, Any]) -> None:
        """Take what a worker has said."""
        if "failed" in word:
            self.failed = f"error: {word['failed']}"
            return
        number = word["subject"]
        if "parts" in word:
            subject = self.subjects[number]
            subject.parts, subject.weights, subject.files = word["parts"], word["weights"], word["files"]
            total = len({(part["folder"], document) for part in word["parts"].values() for document in part["documents"]})
            self.progress.update(self.tasks[number], total=total)
        if "opening" in word:
            if self.progress.disable and not self.progress.tasks[number].visible:
                print(f"measuring {self._title(self.subjects[number])}", file=sys.stderr, flush=True)
            self.progress.update(self.tasks[number], visible=True)
        if "lm_eval" in word:
            self.subjects[number].lm_eval = word["lm_eval"]
        if "done" in word:
            self.done[number, word["part"], word["rank"]] = word["done"]
            done = sum(count for (subject, *_), count in self.done.items() if subject == number)
            self.progress.update(self.tasks[number], completed=done)
