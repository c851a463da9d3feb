"""One training run in processes of its own, watched from outside: steps as they end, memory, and why there are none."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainers.processes import prepare_child
from trainers.rundir.ending import killed_by

LOOK_S = 0.1
END_S = 60.0
"""Seconds that a run has for its end, after its last step."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that has ended."""

    loss: float
    at: float
    """Seconds since 1970."""
    device_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a run."""

    losses: list[float]
    step_seconds: float
    """Median of the steps after the first."""
    first_step_s: float
    """From the command to the end of the first step."""
    peak_bytes: int
    """The largest memory until the last step: CUDA memory where there is some, else the host's of all its processes."""
    cpu_seconds: float
    """Median CPU time of the steps after the first, of all its processes: unlike `step_seconds` it does not grow on a busy machine."""


class RunFailed(Exception):
    """A run left no numbers: says why, in a line."""


def measure(
    line: list[str],
    folder: Path,
    env: dict[str, str],
    num_steps: int,
    limit_s: float,
    steps_of: Callable[[], list[Step]],
    show: Callable[[int], None],
    log: Path | None = None,
) -> Measured:
    """Run a command in `folder` until it ends; raises RunFailed. Nothing of it is left, however this ends.

    `steps_of` returns the steps that have ended so far; `show` is told how many these are.
    """
    log = log or folder / "log"
    began, until, peak, steps = time.time(), time.monotonic() + limit_s, 0, list[Step]()
    used = list[tuple[int, float]]()
    with log.open("wb") as file:
        child = subprocess.Popen(
            line,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=prepare_child(last=signal.SIGKILL),
        )
    family: set[int] = {child.pid}
    try:
        while child.poll() is None and time.monotonic() < until:
            if len(steps) < num_steps:
                family = _family(child.pid) or family
                peak = max(peak, _together(family))
                steps = steps_of()
                if len(steps) > (used[-1][0] if used else 0):
                    used.append((len(steps), sum(map(_cpu_seconds, family))))
                until = min(until, time.monotonic() + END_S) if len(steps) == num_steps else until
                show(len(steps))
            time.sleep(LOOK_S)
        is_late = child.poll() is None and len(steps) < num_steps
    finally:
        _end(child, family)
    steps = steps_of()
    if is_late:
        raise RunFailed(f"took longer than {limit_s:.0f} s, at step {len(steps)} of {num_steps}")
    if len(steps) < num_steps:
        raise RunFailed(_why(child.returncode, log, len(steps), num_steps))
    times = [step.at for step in steps[:num_steps]]
    on_device = [step.device_bytes for step in steps if step.device_bytes]
    return Measured(
        losses=[step.loss for step in steps[:num_steps]],
        step_seconds=statistics.median(after - before for before, after in pairwise(times)),
        first_step_s=times[0] - began,
        peak_bytes=max(on_device) if on_device else peak,
        cpu_seconds=statistics.median([(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(used)] or [math.nan]),
    )


def recorded(file: Path) -> list[Step]:
    """Return the steps that a peer's recorder has written; lines that are not whole are left out."""
    found = []
    for line in file.read_text("utf-8", "replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            found.append(Step(loss=float(row["loss"]), at=float(row["at"]), device_bytes=row.get("device_bytes")))
    return found


def _family(pid: int) -> set[int]:
    """Return a process and all that it has started, as far as they live."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, grown = {pid} & parents.keys(), True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found


def _together(family: set[int]) -> int:
    """Return the memory of processes: the largest resident size that one of them has had, and what the others have for themselves.

    A process that was forked shares most of its pages with the one that it comes from: they count once.
    """
    own = {pid: _bytes(pid, "smaps_rollup", "Private_") for pid in family}
    peaks = {pid: _bytes(pid, "status", "VmHWM:") for pid in family}  # after `own`: what a child shared is its parent's own as it ends
    largest = max(peaks, key=lambda pid: peaks[pid])
    return peaks[largest] + sum(size for pid, size in own.items() if pid != largest)


def _bytes(pid: int, file: str, name: str) -> int:
    """Return the sum of a process's lines of /proc that begin with `name`; 0 where it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(name))
    return 0


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, with that of its children that have ended; 0 where it is gone."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _end(child: subprocess.Popen[bytes], family: set[int]) -> None:
    """End what is left of a run: its process, and what that has started."""
    left = family | _family(child.pid) if child.poll() is None else set()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in left - {child.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def _why(code: int, log: Path, done: int, num_steps: int) -> str:
    """Say how a run ended, with the last line of its log that looks like an error."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("error:")]
    said = (errors or lines or ["nothing was printed"])[-1][:300]
    how = f"{killed_by(code)}" if code < 0 else f"ended with exit code {code}"
    return f"{how} after {done} of {num_steps} steps: {said}"
