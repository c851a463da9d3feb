"""Which attempt of a run may still write into its run directory, and what status.json says of it. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.rundir.files import read_json, staged, try_json

DONE, FAILED, BAD_INPUT, STOPPED, SUPERSEDED = 0, 1, 2, 75, 76
"""Exit codes of ranks and of the launcher; 75: stopped, the same command continues; 76: a newer attempt has taken the place."""
PASSING = ("error", "stragglers", "signal")
"""Keys of status.json that belong to what it said last, and to nothing that it says next."""
LOOK_EVERY_S = 1.0
LOCK_WAIT_S = 3.0
TOGETHER_S = 10
"""A rank that fails so shortly before another one is found killed has most likely failed because of that."""


def killed_by(code: int) -> str:
    """Say how a process ended, by its negative exit code."""
    return f"was killed by {signal.Signals(-code).name}" + (" (out of memory, or kill -9)" if code == -signal.SIGKILL else "")


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return status.json; empty where there is none that can be read."""
    return try_json(run_dir / "status.json")


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


def _discard(path: Path) -> None:
    """Delete what was staged; renamed first, so that nobody puts into place what is half deleted."""
    with contextlib.suppress(OSError):  # its attempt was quicker
        gone = path.rename(path.with_name(f".gone-{os.getpid()}-{path.name.strip('.')}"))
        if gone.is_dir():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink()


@dataclass
class Attempt:
    """One life of a run. A cluster may restart a run while ranks of the last life continue on a node that was cut off.

    What it leaves is staged as *.tmp, then it looks whether it is current, then it renames. A newer one takes all that is staged away
    as it begins: whenever the older was stopped, its look or its rename fails.
    """

    run_dir: Path
    number: int = 0
    """From 1; 0 before the ranks have met: what goes wrong until then may be written down, if no other attempt has begun."""
    _looked_at: float = field(default=-LOOK_EVERY_S, repr=False)
    _newest: int = field(default=0, repr=False)
    _before: int = field(default=0, repr=False)
    _life: str | None = field(default_factory=lambda: os.environ.get("FULLTUNE_LIFE"), repr=False)
    """Of a SLURM job, each of whose tasks may be the first to say something: job and how often it was queued again."""
    _status_before: float | None = field(default=None, repr=False)
    """Elsewhere: time of a status.json that an older attempt may have left; None where a launcher has begun a new one."""

    def __post_init__(self) -> None:
        """Note which attempt was the newest until now, and what was said of it."""
        self._before = newest_attempt(self.run_dir)
        if "FULLTUNE_LAUNCHER" not in os.environ:
            self._status_before = read_status(self.run_dir).get("time")

    def claim(self) -> int:
        """Take the next number by making its log folder, and what older attempts have staged; return it. One rank claims, for all."""
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
        for path in [*self.run_dir.glob("*.tmp"), *self.run_dir.glob("checkpoints/.*.tmp")]:
            _discard(path)
        return number

    def begin(self, number: int) -> None:
        """Be the attempt of this number."""
        self.number, self._looked_at = number, -LOOK_EVERY_S

    def is_current(self, at_once: bool = False) -> bool:
        """Tell whether no newer attempt has started, as far as was seen within the last second, or now."""
        if at_once or time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at, self._newest = time.monotonic(), newest_attempt(self.run_dir)
        return self._newest <= (self.number or self._before)

    def require_current(self) -> None:
        """Raise Superseded if a newer attempt has started."""
        if not self.is_current(at_once=True):
            raise Superseded(f"attempt {self._newest} of this run has started since; attempt {self.number} writes nothing any more")

    def write_json(self, path: Path, value: object) -> bool:
        """Write a JSON file of the run directory, unless a newer attempt has started; tell whether it was written.

        The last look is after the staging, which a newer attempt takes away: no moment is left to be stopped in between.
        """
        while True:
            staging = staged(path, value)
            if not self.is_current(at_once=True):
                staging.unlink(missing_ok=True)
                return False
            with contextlib.suppress(FileNotFoundError):
                staging.rename(path)
                return True

    def set_status(self, state: str, **more: object) -> None:
        """Update status.json: the state and whatever else is known; other keys stay, but for those that are PASSING.

        A failed attempt stays failed until the next one is submitted: the ranks that did not fail are stopped because of it, and say so.
        """
        with _alone(self.run_dir):
            known = read_json(self.run_dir / "status.json")
            if self._has_ended(known, "failed") and state != "submitted":
                return
            kept = {key: value for key, value in known.items() if key not in PASSING}
            self.write_json(self.run_dir / "status.json", kept | {"state": state, "time": time.time()} | self._lived() | more)

    def record_failure(self, error: dict[str, Any], at: float, together_s: float = 0.0, over_stop: bool = False) -> bool:
        """Mark the run failed with an error of time `at`, unless one is known from `together_s` before or earlier; tell whether it was.

        Nor where a rank has stopped as it was asked to, and said so: others fail because it is gone. Unless it was asked to only
        because of this failure: `over_stop`.
        What a watchdog has found, an error with `ranks`, stays: it ends ranks, which may die as they write
        their stacks: Python reads threads that run meanwhile (torch's times are whole seconds).
        """
        with _alone(self.run_dir):
            known = read_json(self.run_dir / "status.json")
            if not over_stop and self._has_ended(known, "preempted"):
                return False
            error_before = known.get("error", {})
            before = at + 1.0 if "ranks" in error_before else at - together_s
            if self._has_ended(known, "failed") and error_before.get("time", 0.0) <= before:
                return False
            failed = known | {"state": "failed", "time": time.time(), "error": error | {"time": at}} | self._lived()
            return self.write_json(self.run_dir / "status.json", failed)

    def has_ended(self, *states: str) -> bool:
        """Tell whether status.json says so of this attempt; False where it cannot be read."""
        return self._has_ended(read_status(self.run_dir), *states)

    def _has_ended(self, status: dict[str, Any], *states: str) -> bool:
        new = status.get("time") != self._status_before if self._life is None else status.get("life") == self._life
        return status.get("state") in states and new

    def _lived(self) -> dict[str, str]:
        return {} if self._life is None else {"life": self._life}

    @property
    def folder(self) -> Path:
        """Its log folder; until it has a number, the one that it will get if no other begins at the same time."""
        return attempt_folder(self.run_dir, self.number or newest_attempt(self.run_dir) + 1)
