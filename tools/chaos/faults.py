"""Faults as they happen: signals, limits of the kernel, full and read-only disks, damaged files, networks that do not answer."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.chaos.attempts import Run, send
from trainers.rundir import paths

PAUSE_S = 3.0
"""For which a launcher is stopped, as by Ctrl-Z, before it continues."""
DISK_BYTES = 64 << 20
FILLER = "filler"
"""What fills a disk."""
DAY_S = 86_400
FATAL = r"killed by SIGKILL"


@dataclass(frozen=True)
class Fault:
    """What is done to a run, drawn from a seed."""

    kind: str
    phase: str
    """The phase of a rank in which it is done."""
    step: int
    """At the earliest, in phases that have a step."""
    role: str
    """The process that it is done to; empty where it is not done to one."""
    delay_s: float
    """After the phase is seen."""

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.kind} {f'of {self.role} ' if self.role else ''}while {self.phase}"


@dataclass(frozen=True)
class Kind:
    """A kind of fault: whom it can hit, what it does, and how the attempt may end then."""

    roles: tuple[str, ...]
    """Processes that it can be done to; empty for what is done to none."""
    harm: Callable[[Run, Fault, random.Random, int | None], None]
    """Do it: to the run, and to the process where there is one."""
    codes: frozenset[int]
    """Exit codes of the launcher that are right."""
    words: str = ""
    """What the reason in status.json says where the launcher ends with 1, as a regular expression."""
    kills: bool = False
    """The attempt is killed first, and this is done to what it has left."""
    network: str = ""
    """How W&B's server behaves during the attempt: refused, silent or reset."""
    disk: bool = False
    """The run directory is a disk of its own, which root alone can make."""


RANKS = ("rank 0", "rank 1")
ALL = ("launcher", "agent", *RANKS)


def _signal(number: signal.Signals) -> Callable[[Run, Fault, random.Random, int | None], None]:
    def harm(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
        if pid is not None:
            send(pid, number)

    return harm


def _stop(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    if pid is None:
        return
    send(pid, signal.SIGSTOP)
    if fault.role == "launcher":
        time.sleep(PAUSE_S)
        send(pid, signal.SIGCONT)


def _limit(what: int, extra: int = 0) -> Callable[[Run, Fault, random.Random, int | None], None]:
    """Return what sets a limit of a running process: to `extra` above what it has."""

    def harm(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
        if pid is None:
            return
        try:
            has = _has(pid, what)
            resource.prlimit(pid, what, (has + extra, has + extra))
        except (OSError, ProcessLookupError):  # ended just now
            return

    return harm


def _has(pid: int, what: int) -> int:
    """Return what a process has of what a limit is about; of files the lowest number that is free, as the next one would get it."""
    if what == resource.RLIMIT_AS:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    if what == resource.RLIMIT_NOFILE:
        taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
        return next(number for number in range(len(taken) + 1) if number not in taken)
    return 0


def _fill(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    free = os.statvfs(run.run_dir)
    with contextlib.suppress(OSError), (run.run_dir / FILLER).open("wb") as file:  # it may be full already
        for _ in range(free.f_bavail * free.f_frsize // (1 << 16) + 1):
            file.write(bytes(1 << 16))


def _newest(run: Run) -> Path | None:
    return next(reversed(run.complete()), None)


def _flip(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    if (newest := _newest(run)) is not None:
        file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)


def _truncate(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    """Cut a file of the newest checkpoint, the last row of metrics.jsonl, or status.json."""
    names = [run.run_dir / paths.METRICS, run.run_dir / paths.STATUS]
    names += [path for path in (_newest(run) or Path("/nowhere")).rglob("*") if path.is_file()]
    file = rng.choice(sorted(path for path in names if path.is_file() and path.stat().st_size))
    size = file.stat().st_size
    os.truncate(file, size - rng.randint(1, min(40, size)) if file.name == paths.METRICS else rng.randrange(size))


def _vanish(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    """Delete a file of the newest checkpoint, status.json, or what the ranks say of themselves."""
    names = [run.run_dir / paths.STATUS, *(run.run_dir / paths.RANKS).glob("*")]
    names += [path for path in (_newest(run) or Path("/nowhere")).rglob("*") if path.is_file()]
    rng.choice(sorted(path for path in names if path.is_file())).unlink()


def _turn_clock(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    """Give all files the times that a node would whose clock is a day ahead, or late."""
    shift = rng.choice((-DAY_S, DAY_S))
    for path in run.run_dir.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (path.stat().st_atime + shift, path.stat().st_mtime + shift))


def _second_launcher(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    second = Run(run_dir=run.run_dir, overrides=run.overrides, variables=run.variables).start()
    second.wait(120)


def _nothing(run: Run, fault: Fault, rng: random.Random, pid: int | None) -> None:
    """Leave it to the network."""


MEMORY = r"[Mm]emory|alloc|SIGABRT|SIGSEGV|SIGKILL|thread|mmap|Resource temporarily"
KINDS = {
    "kill": Kind(ALL, _signal(signal.SIGKILL), frozenset({-9, 0, 1}), FATAL),
    "stop": Kind(ALL, _stop, frozenset({0, 1}), r"stopped|never began|no progress|does not|longer than|for \d+ s|killed|was gone"),
    "term": Kind(ALL, _signal(signal.SIGTERM), frozenset({0, 75}), ""),
    "interrupt": Kind(("launcher",), _signal(signal.SIGINT), frozenset({0, 130}), ""),
    "no memory": Kind(RANKS, _limit(resource.RLIMIT_AS, 1 << 20), frozenset({0, 1}), MEMORY),
    "no more files": Kind(RANKS, _limit(resource.RLIMIT_NOFILE), frozenset({0, 1}), r"open files|file|descriptor|socket"),
    "full disk": Kind((), _fill, frozenset({0, 1}), r"[Nn]o space|disk|full|space", disk=True),
    "byte flipped": Kind((), _flip, frozenset({0, 1, -9}), "", kills=True),
    "file truncated": Kind((), _truncate, frozenset({0, 1, -9}), "", kills=True),
    "file vanished": Kind((), _vanish, frozenset({0, 1, -9}), "", kills=True),
    "clock turned": Kind((), _turn_clock, frozenset({0, 1, -9}), "", kills=True),
    "two launchers": Kind((), _second_launcher, frozenset({0, 1, 76}), ""),
    "W&B refused": Kind((), _nothing, frozenset({0}), "", network="refused"),
    "W&B silent": Kind((), _nothing, frozenset({0}), "", network="silent"),
    "W&B reset": Kind((), _nothing, frozenset({0}), "", network="reset"),
}
"""All kinds, by name. A slow disk, and a clock that jumps during a run, are not among them: both take another machine's kernel."""


@contextmanager
def server(behaviour: str) -> Iterator[str]:
    """Serve a port of this machine that refuses, never answers, or resets each connection; yields its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if behaviour != "refused":
            listener.listen(64)
            threading.Thread(target=_serve, args=(listener, behaviour), daemon=True).start()
        yield address


def _serve(listener: socket.socket, behaviour: str) -> None:
    held = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        if behaviour == "silent":
            held.append(connection)
            continue
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Make a folder a disk of its own while this lasts; yields whether that is allowed here."""
    folder.mkdir(parents=True, exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(line, capture_output=True, check=False, timeout=30).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True, timeout=30)
