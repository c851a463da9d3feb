"""Processes of `tools.bench gpu`: one that measures a row while the next one imports, and none that outlives the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers.processes import prepare_child
from trainers.rundir.ending import killed_by

LOOK_S = 0.1


class NotDone(Exception):
    """A process gave no values: says why."""


class TimeIsUp(NotDone):
    """The time that it had is over."""


class Worker:
    """A process that has imported what it needs and waits for its order."""

    def __init__(self, scratch: Path, no_gpu: bool = False) -> None:
        """Start it; `no_gpu` hides the GPU from it, as a plan asks for."""
        self.folder = Path(tempfile.mkdtemp(prefix="row-", dir=scratch))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rank = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if no_gpu else {}
        self.process = start(
            [sys.executable, "-m", "tools.bench", "gpu-row", str(self.folder)], self.folder / "log", scratch, rank | hidden
        )

    def give(self, order: dict[str, Any]) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def wait(self, limit_s: float) -> dict[str, Any]:
        """Return its values; raises NotDone with the reason where it fails, TimeIsUp where it takes too long."""
        wait(self.process, limit_s, self.folder / "log")
        figures: dict[str, Any] = json.loads((self.folder / "0.done").read_text())
        return figures

    def reason(self) -> str:
        """Return what it left of its failure."""
        file = self.folder / "0.failed"
        return file.read_text() if file.exists() else ""


def start(line: list[str], log: Path, scratch: Path, more: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which logs to a file and shares compiled code with the others."""
    shared = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "TRITON_CACHE_DIR": str(scratch / "triton"), "HF_HUB_OFFLINE": "1"}
    env = os.environ | shared | {"FULLTUNE_CACHE": str(scratch / "cache"), "WANDB_MODE": "disabled"} | (more or {})
    with log.open("ab") as file:
        prepare = prepare_child(last=signal.SIGKILL)
        return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, start_new_session=True, preexec_fn=prepare)


def wait(process: subprocess.Popen[bytes], limit_s: float, log: Path) -> None:
    """Wait for a process to end well; raises NotDone, with the last line of its log, or TimeIsUp."""
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise TimeIsUp(f"not done in {limit_s:.0f} s") from None
    if code:
        how = killed_by(code) if code < 0 else f"exit code {code}"
        raise NotDone(f"{how}: {last_line(log)}")


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "its log is empty"


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started in its session, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Leave nothing of a process, however the block ends."""
    try:
        yield process
    finally:
        end(process)


def wait_until(happened: Any, process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Look until something has happened; returns False where the process has ended before. Raises TimeIsUp."""
    until = time.monotonic() + limit_s
    while not happened():
        if process.poll() is not None:
            return bool(happened())
        if time.monotonic() > until:
            raise TimeIsUp(f"not done in {limit_s:.0f} s")
        time.sleep(LOOK_S)
    return True
