"""A model of this machine in a process of its own (`worker`): plain transformers, on the GPUs or the CPU. No torch here."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
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


class Broken(Exception):
    """The process has ended, or says nothing: why, as far as it has said."""


class Local:
    """The process. It ends with this one, whatever ends that."""

    def __init__(
        self, config: RunConfig, folder: Path | None, *, batch: int, dtype: str, device: str, timeout_s: float | None = None
    ) -> None:
        """Start it; `folder` has the weights, None is the config's own model. `timeout_s` may pass between two answers once it is open."""
        self.timeout_s = timeout_s
        self.place = tempfile.TemporaryDirectory()
        self.log = Path(self.place.name) / "log"
        asked = {
            "config": plain(config),
            "folder": None if folder is None else str(folder),
            "batch": batch,
            "dtype": dtype,
            "device": device,
        }
        file = Path(self.place.name) / "model.json"
        file.write_text(json.dumps(asked), "utf-8")
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainers.generate.worker", str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                preexec_fn=prepare_child(last=signal.SIGKILL),
            )
        self.said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.room = threading.Semaphore(1000)
        """Words that may wait to be read: the process waits where nobody takes its answers."""
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Local:
        """Wait until the model is open; raises ConfigError and Broken."""
        try:
            self._next(None)
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
    ) -> None:
        """Ask for all answers; `took` gets each as soon as it is there, `heard` each token of a single one. Raises Broken."""
        asked = {"requests": [asdict(request) for request in requests], "sampling": asdict(sampling), "stream": heard is not None}
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Broken(self._why()) from None
        while "done" not in (word := self._next(self.timeout_s)):
            if "answer" in word:
                took(Answer(**word["answer"]))
            elif heard is not None and "token" in word:
                heard(word["token"])

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
        try:
            word = self.said.get(timeout=timeout_s)
        except queue.Empty:
            raise Broken(f"the model has given no answer for {timeout_s:g} s") from None
        self.room.release()
        if word is None:
            raise Broken(self._why())
        if "error" in word:
            raise ConfigError(**word["error"])
        if "failed" in word:
            raise Broken(word["failed"])
        return word

    def _why(self) -> str:
        self.process.wait()
        return f"the model's process has ended ({self.process.returncode}): {self.log.read_text('utf-8', 'replace')[-2000:].strip()}"
