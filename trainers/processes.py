"""Processes of a run: ending with a parent, or in any case but for what they print; what the system knows of one, and signals. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded before a fork, in which loading may wait for a lock for ever."""
PR_SET_PDEATHSIG = 1
STATES = {"T": "stopped", "t": "stopped", "Z": "dead", "D": "waiting for a disk or a device"}
"""Of a process in /proc; others are alive."""
HALTED = ("stopped", "dead", "gone")
"""What a process that makes no progress is."""


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent ends, however it ends; end where `parent` has ended before.

    The parent says who it is, in what it hands on: asked here, a process whose parent is gone would take its heir for it.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def prepare_child(hold: tuple[signal.Signals, ...] = (), last: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """Return what the child calls before its program starts; None where the system has no prctl. It gets `last` when this process ends."""
    return partial(_prepare, hold, last, os.getpid()) if sys.platform == "linux" else None


def _prepare(hold: tuple[signal.Signals, ...], last: signal.Signals, parent: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, hold)
    die_with_parent(parent, last)


MALLOC = {"tcache_count": 0, "mxfast": 0, "mmap_threshold": 32 << 20, "trim_threshold": 1 << 30}
"""glibc's, for tensors on the host: no small blocks are kept apart, larger ones than these bytes are mapped, and so many are kept free."""


def allocator_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which a process that trains is started; none where a user has set up malloc.

    glibc before 2.38 cuts tensors out of larger blocks. The pieces go to small objects, so that what is freed around them never joins:
    on a CPU a quarter of what a step holds was such gaps. Pieces that are not kept apart join again. torch asks for huge pages for what is
    mapped by itself, such as logits, or each use would cost a page fault each 4 KiB.
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE") for name in environment):
        return {}
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
    return {"GLIBC_TUNABLES": tunables, "THP_MEM_ALLOC_ENABLE": "1"}


_reserve: list[Any] = []
"""This process's."""


EXHAUSTED = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
PROBE_BYTES = 16 << 20


def keep_reserve() -> None:
    """Keep a little memory and a few open files, for a process that runs out of them to say so."""
    _reserve.extend([bytearray(4 << 20), *(os.open(os.devnull, os.O_RDONLY) for _ in range(8))])


def free_reserve() -> None:
    """Give it back."""
    while _reserve:
        if isinstance(kept := _reserve.pop(), int):
            os.close(kept)


def raise_exhausted(error: BaseException) -> None:
    """Raise an error again that comes of memory or open files that ran out: what was being read is not at fault.

    Libraries wrap such errors, or fail oddly some lines after them, so that its causes are looked at and a little of each is asked for.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) in EXHAUSTED or "allocate memory" in str(cause):
            raise error
        cause = cause.__cause__ or cause.__context__
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # else what was freed and kept would do
    try:
        bytearray(PROBE_BYTES)
        os.close(os.open(os.devnull, os.O_RDONLY))
    except (MemoryError, OSError):
        raise error from None


def exit_after(seconds: float, code: int) -> None:
    """End this process with `code` if it is still there then."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def state_of(host: str, pid: int) -> str:
    """Say what the system knows about a process: alive, waiting, or one of HALTED; empty where it is of another machine."""
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return ""
    try:
        return STATES.get(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0], "alive")
    except OSError:
        return "gone"


def send(host: str, pid: int, run_dir: Path, *numbers: signal.Signals) -> None:
    """Send signals to a process of this machine whose command line names `run_dir`: the id may be another process's by now."""
    if host != socket.gethostname():
        return
    with contextlib.suppress(OSError):
        if str(run_dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            for number in numbers:
                os.kill(pid, number)


def kill_left(config: Path, launcher: int) -> None:
    """Kill what a launcher has started and what has outlived it: a rank that is stopped cannot end with its agent."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"FULLTUNE_LAUNCHER={launcher}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if ours and str(config).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


class _Lossy(io.FileIO):
    """A file whose writes never fail: what a closed pipe, a full disk or a terminal that is gone does not take is lost."""

    def write(self, data: Any, /) -> int:
        """Write what can be written."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def never_fail() -> None:
    """Let standard output and error take any text, replacing what their encoding does not have, and lose what nobody takes.

    A run is done though its sample is in Korean and the terminal in ASCII, and though `| head` has read enough.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # other ones are a test's, or None where it is closed
        if type(stream) is not io.TextIOWrapper or type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO:
            continue
        stream.flush()
        lossy: Any = _Lossy(stream.fileno(), "w", closefd=False)
        buffer = lossy if stream.write_through else io.BufferedWriter(lossy)
        lines, through = stream.line_buffering, stream.write_through
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=lines, write_through=through))
