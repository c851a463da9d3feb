"""A model of this machine in a process of its own (`worker`): plain transformers, on the GPUs or the CPU. No torch here."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig, plain
from trainers.generate.request import Answer, Request, Sampling
from trainers.processes import prepare_child
from trainers.rundir.files import try_row

STOP_S = 10.0
LOOK_S = 0.5


class Broken(Exception):
    """The process has ended, or says nothing: why, as far as it has said."""


def nothing() -> None:
    """Look at nothing."""


class TooLarge(Broken):
    """A device's memory is too small: another process would find the same."""


class Local:
    """The process. It ends with this one, whatever ends that."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path | None,
        *,
        batch: int,
        setting: str = "--batch",
        dtype: str,
        device: str,
        timeout_s: float | None = None,
        open_s: float | None = None,
        look: Callable[[], None] = nothing,
        threads: int | None = None,
        words: Sequence[str] = (),
    ) -> None:
        """Start it; `folder` has the weights, None is the config's own model. On a CPU it uses so many threads, None is one a core.

        `setting` is what the caller's `batch` is called. `open_s` may pass until they are open, and `timeout_s` between two answers after
        that. `look` is called now and then while nothing is said, and may raise. `words` before its command start it on another machine.
        """
        self.timeout_s, self.open_s, self.look = timeout_s, open_s, look
        self.place = tempfile.TemporaryDirectory()
        self.log = Path(self.place.name) / "log"
        self.asked = {
            "config": plain(config),
            "folder": None if folder is None else str(folder),
            "batch": batch,
            "setting": setting,
            "dtype": dtype,
            "device": device,
            "threads": threads,
        }
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [*words, sys.executable, "-m", "trainers.generate.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                preexec_fn=prepare_child(last=signal.SIGTERM if words else signal.SIGKILL),  # words hand it on
            )
        self.said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.room = threading.Semaphore(1000)
        """Words that may wait to be read: the process waits where nobody takes its answers."""
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Local:
        """Wait until the model is open; raises ConfigError and Broken."""
        try:
            self._tell(self.asked)
            self._next(self.open_s)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def ask(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        took: Callable[[Answer], None],
        heard: Callable[[int], None] | None = None,
        apart: bool = True,
    ) -> None:
        """Ask for all answers; `took` gets each as soon as it is there, `heard` each token of a single one. Raises Broken.

        Without `apart` an answer may depend on the others that are asked for: see `decode`.
        """
        asked = {"requests": [asdict(request) for request in requests], "sampling": asdict(sampling)}
        self._tell(asked | {"stream": heard is not None, "apart": apart})
        while "done" not in (word := self._next(self.timeout_s)):
            if "answer" in word:
                took(Answer(**word["answer"]))
            elif heard is not None and "token" in word:
                heard(word["token"])

    def open(self, folder: Path) -> None:
        """Have it take the weights of another directory of the same model; raises ConfigError and Broken."""
        self._tell({"folder": str(folder)})
        while "done" not in self._next(self.open_s):
            pass

    def score(self, rows: Sequence[tuple[Sequence[int], int]], temperature: float) -> list[list[float]]:
        """Return the log-probabilities of the last ids of each row, (ids, how many of them), in nats; raises Broken."""
        self._tell({"rows": [[list(ids), count] for ids, count in rows], "temperature": temperature})
        found = []
        while "done" not in (word := self._next(self.timeout_s)):
            if "logps" in word:
                found.append(word["logps"])
        return found

    def _tell(self, order: dict[str, Any]) -> None:
        """Give it an order, from a thread: a process that reads no more blocks who writes more than its pipe takes."""
        threading.Thread(target=self._write, args=(json.dumps(order) + "\n",), daemon=True).start()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `_next` says
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def close(self) -> None:
        """End the process, and what it has left."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.place.cleanup()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if (word := try_row(line)) is not None:  # a model's own code may print what it likes
                self.room.acquire()
                self.said.put(word)
        self.process.wait()
        self.said.put(None)

    def _next(self, timeout_s: float | None) -> dict[str, Any]:
        """Return what it says next; raises ConfigError for what it refuses, and Broken."""
        began = time.monotonic()
        while True:
            try:
                word = self.said.get(timeout=LOOK_S if timeout_s is None else min(LOOK_S, timeout_s))
                break
            except queue.Empty:
                self.look()
                if timeout_s is not None and time.monotonic() - began >= timeout_s:
                    raise Broken(f"the model has given no answer for {timeout_s:g} s") from None
        self.room.release()
        if word is None:
            self.said.put(None)  # for who asks it again
            raise Broken(self._why())
        if "error" in word:
            raise ConfigError(**word["error"])
        if "failed" in word:
            raise TooLarge(word["failed"])
        return word

    def _why(self) -> str:
        self.process.wait()
        return f"the model's process has ended ({self.process.returncode}): {self.log.read_text('utf-8', 'replace')[-2000:].strip()}"
