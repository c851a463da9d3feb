"""Which attempt of a run may still write into its run directory, and what status.json says of it. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.rundir.ending import State, Status, with_failure, with_state
from trainers.rundir.files import read_json, staged, try_json
from trainers.rundir.paths import LOGS, STATUS, attempt_folder

LOOK_EVERY_S = 1.0
LOCK_WAIT_S = 3.0
STAGED = ("*.tmp", "logs/*/*.tmp", "checkpoints/.*.tmp", "rollouts/*.tmp", "rollouts/weights/*.tmp")
"""Where attempts stage what they leave, hidden names included."""
ENDED = (State.preempted, State.failed, State.done)


def read_status(run_dir: Path) -> Status:
    """Return status.json; empty where it is absent or cannot be read."""
    return try_json(run_dir / STATUS)


def read_state(run_dir: Path) -> str:
    """Return the State that status.json says; "unknown" where it is absent or cannot be read."""
    return str(read_status(run_dir).get("state", "unknown"))


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

    Read from a file that is written in place: of a network's file system, opening one asks the server, listing may not. A folder alone
    does not make one: ranks that never met leave the stacks of all threads there.
    """
    try:
        return int((run_dir / LOGS / "attempt").read_text())
    except FileNotFoundError:
        return 0
    except ValueError:  # just being written
        pass
    taken = [path.name.removeprefix("attempt-") for path in (run_dir / LOGS).glob("attempt-*")]
    return max((int(number) for number in taken if number.isdigit()), default=0)


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
    """One attempt at a run. A cluster may start the next while ranks of the last still run, on a node that was cut off.

    What it leaves is staged as *.tmp, then it looks whether it is current, then it renames. A newer one takes all that is staged away
    as it begins: whenever the older was stopped, its look or its rename fails.
    """

    run_dir: Path
    number: int = 0
    """From 1; 0 before the ranks have met: what goes wrong until then may be written down, if no other attempt has begun."""
    _looked_at: float = field(default=-LOOK_EVERY_S, repr=False)
    _newest: int = field(default=0, repr=False)
    _before: int = field(default=0, repr=False)
    _slurm_attempt: str | None = field(default_factory=lambda: os.environ.get("FULLTUNE_SLURM_ATTEMPT"), repr=False)
    """The job's id and how often it was queued again: any of its tasks may be the first to write, before there is a number."""
    _status_before: float | None = field(default=None, repr=False)
    """Without SLURM: time of a status.json that an older attempt may have left; None where a launcher has begun a new one."""

    def __post_init__(self) -> None:
        """Note which attempt was the newest until now, and what was said of it."""
        self._before = newest_attempt(self.run_dir)
        if "FULLTUNE_LAUNCHER" not in os.environ:
            self._status_before = read_status(self.run_dir).get("time")

    def claim(self) -> int:
        """Take the next number by making its log folder, and what older attempts have staged; return it. One rank claims, for all."""
        logs = self.run_dir / LOGS
        logs.mkdir(exist_ok=True)
        number = newest_attempt(self.run_dir) + 1
        while True:
            try:
                attempt_folder(self.run_dir, number).mkdir()
                self.begin(number)  # what goes wrong from here on is this attempt's
                break
            except FileExistsError:
                number += 1
        (logs / "attempt").write_text(f"{number}\n")
        for path in [path for pattern in STAGED for path in self.run_dir.glob(pattern)]:
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

        It looks last after staging, and a newer attempt deletes what is staged: no moment is left to be stopped in between.
        """
        while True:
            staging = staged(path, value)
            if not self.is_current(at_once=True):
                staging.unlink(missing_ok=True)
                return False
            with contextlib.suppress(FileNotFoundError):
                staging.rename(path)
                return True

    def set_status(self, state: State, **more: object) -> None:
        """Update status.json: the state and whatever else is known, where the rules of ending.py let it follow what is there."""
        with _alone(self.run_dir):
            known = read_json(self.run_dir / STATUS)
            self._write_status(with_state(known, self._ended(known), state), **more)

    def record_failure(self, error: dict[str, Any], at: float, together_s: float = 0.0, over_stop: bool = False) -> bool:
        """Mark the run failed with an error of the time `at`, where the rules of ending.py let it; tell whether it was."""
        with _alone(self.run_dir):
            known = read_json(self.run_dir / STATUS)
            return self._write_status(with_failure(known, self._ended(known), error, at, together_s, over_stop))

    def _write_status(self, status: Status | None, **more: object) -> bool:
        of_slurm = {} if self._slurm_attempt is None else {"slurm_attempt": self._slurm_attempt}
        return status is not None and self.write_json(self.run_dir / STATUS, status | {"time": time.time()} | of_slurm | more)

    def has_ended(self, *states: State) -> bool:
        """Tell whether status.json says one of these states, of this attempt; False where it cannot be read."""
        return self._ended(read_status(self.run_dir)) in states

    def _ended(self, status: Status) -> State | None:
        """Return the state in which this attempt has ended; None where status.json is an older one's, or knows of no end."""
        of_this = (
            status.get("time") != self._status_before if self._slurm_attempt is None else status.get("slurm_attempt") == self._slurm_attempt
        )
        return State(status["state"]) if of_this and status.get("state") in ENDED else None

    @property
    def folder(self) -> Path:
        """Its log folder; until it has a number, the one that it will get if no other begins at the same time."""
        return attempt_folder(self.run_dir, self.number or newest_attempt(self.run_dir) + 1)
