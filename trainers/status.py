"""Small files of the run directory that are never seen half-written, and which attempt may still write there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUPERSEDED = 76
"""Exit code of a rank that a newer attempt has taken the place of."""
LOOK_EVERY_S = 1.0
LOCK_WAIT_S = 3.0


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is never seen half-written."""
    staging = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    staging.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    staging.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where the file is absent."""
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def set_status(run_dir: Path, state: str, **more: object) -> None:
    """Update status.json: the state and whatever else is known; other keys stay.

    A failed attempt stays failed until the next one is submitted: the ranks that did not fail are stopped because of it, and say so.
    """
    with _alone(run_dir):
        known = read_json(run_dir / "status.json")
        if known.get("state") == "failed" and state != "submitted":
            return
        known.pop("error", None)
        write_json(run_dir / "status.json", known | {"state": state, "time": time.time()} | more)


def record_failure(run_dir: Path, error: dict[str, Any], at: float, together_s: float = 0.0) -> bool:
    """Mark the run failed with an error of time `at`, unless one is known from `together_s` before or earlier; tell whether it was."""
    with _alone(run_dir):
        known = read_json(run_dir / "status.json")
        if known.get("state") == "failed" and known.get("error", {}).get("time", 0.0) <= at - together_s:
            return False
        write_json(run_dir / "status.json", known | {"state": "failed", "time": time.time(), "error": error | {"time": at}})
    return True


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep other processes from status.json between reading and writing; for LOCK_WAIT_S at most, since its holder may be stopped."""
    until = time.monotonic() + LOCK_WAIT_S
    with (run_dir / ".status.lock").open("a") as lock:
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield


class Superseded(Exception):
    """A newer attempt of the same run has started: this one writes nothing any more, and ends."""


def newest_attempt(run_dir: Path) -> int:
    """Return the number of the attempt that started last, 0 before the first.

    Read from a file that is written in place: of a network's file system, opening one asks the server, listing may not.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):  # absent, or just being written
        return int((run_dir / "logs" / "attempt").read_text())
    taken = [path.name.removeprefix("attempt-") for path in (run_dir / "logs").glob("attempt-*")]
    return max((int(number) for number in taken if number.isdigit()), default=0)


def attempt_folder(run_dir: Path, number: int) -> Path:
    """Return the log folder of an attempt."""
    return run_dir / "logs" / f"attempt-{number}"


@dataclass
class Attempt:
    """One life of a run. A cluster may restart a run while ranks of the last life go on, on a node that was cut off."""

    run_dir: Path
    number: int = 0
    """From 1; 0 before the ranks have met: what goes wrong until then may be written down."""
    _looked_at: float = field(default=-LOOK_EVERY_S, repr=False)
    _newest: int = field(default=0, repr=False)

    def claim(self) -> int:
        """Take the next number by making its log folder, and return it. One rank claims, and tells the others."""
        logs = self.run_dir / "logs"
        logs.mkdir(exist_ok=True)
        number = newest_attempt(self.run_dir) + 1
        while True:
            try:
                attempt_folder(self.run_dir, number).mkdir()
                break
            except FileExistsError:
                number += 1
        (logs / "attempt").write_text(f"{number}\n")
        return number

    def begin(self, number: int) -> None:
        """Be the attempt of this number."""
        self.number, self._looked_at = number, -LOOK_EVERY_S

    def is_current(self, at_once: bool = False) -> bool:
        """Tell whether no newer attempt has started, as far as was seen within the last second, or now."""
        if at_once or time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at, self._newest = time.monotonic(), newest_attempt(self.run_dir)
        return self.number == 0 or self._newest <= self.number

    def require_current(self) -> None:
        """Raise Superseded if a newer attempt has started."""
        if not self.is_current(at_once=True):
            raise Superseded(f"attempt {self._newest} of this run has started since; attempt {self.number} writes nothing any more")

    def set_status(self, state: str, **more: object) -> None:
        """Update status.json, unless it is a newer attempt's."""
        if self.is_current(at_once=True):
            set_status(self.run_dir, state, **more)

    def record_failure(self, error: dict[str, Any], at: float) -> bool:
        """Mark the run failed, unless it is a newer attempt's or an earlier failure is known; tell whether this is the first."""
        return self.is_current(at_once=True) and record_failure(self.run_dir, error, at)

    @property
    def folder(self) -> Path:
        """Its log folder; until it has a number, the one that it will get if no other begins at the same time."""
        return attempt_folder(self.run_dir, self.number or newest_attempt(self.run_dir) + 1)
