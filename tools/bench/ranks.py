"""Ranks of a benchmark: processes of a sub-command that say in files how far they are."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.processes import prepare_child
from trainers.rundir.ending import killed_by

SAMPLE_S = 0.02
"""Seconds between two looks at the ranks: at their memory, or whether they are done."""
TOGETHER_S = 1.0
REASON_LENGTH = 400


class RanksFailed(RuntimeError):
    """A rank ended before it was done."""

    def __init__(self, reason: str, said: str) -> None:
        """Keep the reason, one line, and what that rank's log ends with."""
        self.reason, self.said = reason, said
        super().__init__(f"{reason}\n{said}")


@contextmanager
def start_ranks(command: list[str], count: int, run_dir: Path, threads: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a sub-command as `count` ranks that log to run_dir; none is left at the end, however it comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    shared["TORCHINDUCTOR_CACHE_DIR"] = str(run_dir / "inductor")  # torch makes it when imported, wherever temporary files go
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            line = [sys.executable, "-m", "tools.bench", *command]
            with (run_dir / f"{rank}.log").open("wb") as log:
                children.append(
                    subprocess.Popen(
                        line, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, preexec_fn=prepare_child(last=signal.SIGKILL)
                    )
                )
        yield children
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def write_line(child: subprocess.Popen[bytes]) -> None:
    """Let a rank continue that waits for a line."""
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()


def wait_for(
    children: list[subprocess.Popen[bytes]], run_dir: Path, state: str, look: Callable[[], None], limit_s: float = math.inf
) -> None:
    """Look again and again until each rank has written its `state` file; raises RanksFailed if one ends before."""
    started = time.monotonic()
    while not all((run_dir / f"{rank}.{state}").exists() for rank in range(len(children))):
        if any(child.poll() is not None for child in children):
            raise _failure(children, run_dir)
        if time.monotonic() - started > limit_s:
            raise RanksFailed(f"the ranks were not {state} in {limit_s:.0f} s", _end_of_log(run_dir, 0))
        look()
        time.sleep(SAMPLE_S)


def _failure(children: list[subprocess.Popen[bytes]], run_dir: Path) -> RanksFailed:
    """Find the rank that failed first: one that was killed, else the first that gave a reason; the others fail because of it."""
    deadline = time.monotonic() + TOGETHER_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(SAMPLE_S)
    reasons = sorted(run_dir.glob("*.failed"), key=lambda file: file.stat().st_mtime_ns)
    for rank, child in enumerate(children):
        if child.returncode == -signal.SIGKILL:
            return RanksFailed(f"rank {rank} {killed_by(child.returncode)}", _end_of_log(run_dir, rank))
    if reasons:
        return RanksFailed(reasons[0].read_text(), _end_of_log(run_dir, int(reasons[0].stem)))
    rank, code = next((rank, child.returncode) for rank, child in enumerate(children) if child.returncode is not None)
    how = killed_by(code) if code < 0 else f"ended with exit code {code}"
    return RanksFailed(f"rank {rank} {how}", _end_of_log(run_dir, rank))


def _end_of_log(run_dir: Path, rank: int) -> str:
    return (run_dir / f"{rank}.log").read_text("utf-8", "replace")[-3000:].strip()


@contextmanager
def explaining(run_dir: Path) -> Iterator[None]:
    """Leave the reason of this rank's failure, one line, where `_failure` looks for it."""
    try:
        yield
    except ConfigError as error:
        leave(run_dir, "failed", " ".join(str(error).split())[:REASON_LENGTH])
        sys.exit(2)
    except Exception as error:
        leave(run_dir, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH])
        raise


def leave(run_dir: Path, state: str, text: str) -> None:
    """Write this rank's `state` file, complete or absent."""
    name = f"{os.environ['RANK']}.{state}"
    partial = run_dir / f"{name}.partial"
    partial.write_text(text)
    partial.rename(run_dir / name)


def raise_on_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, once: a second one must not end the cleaning up."""

    def interrupt(_number: int, _frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
