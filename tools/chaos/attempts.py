"""A small run by the command that a user types: its attempts, its processes, and what it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.presets import CONF
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.checkpoints import number_of, steps, why_incomplete
from trainers.rundir.rows import read_rows

ATTEMPT_S = 300.0
"""Longest that an attempt may take."""
GONE_S = 60.0
"""Longest that a run's processes may be there after their launcher has ended."""
PLANTED = 999_999
KEYS = ("step", "loss", "lr", "grad_norm", "tokens", "epoch", "rows_hash", "eval_loss")


class Wrong(Exception):
    """A run that did not continue as it must."""


@dataclass(kw_only=True)
class Run:
    """A run directory, and the command that starts and continues it."""

    run_dir: Path
    overrides: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    """Added to the environment."""

    @property
    def log(self) -> Path:
        """Return where the attempts' output goes."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")

    def command(self) -> list[str]:
        """Return what a user types."""
        return [sys.executable, "-m", "launcher", f"run_dir={self.run_dir}", *self.overrides]

    def start(self) -> subprocess.Popen[bytes]:
        """Start an attempt."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command(),
                cwd=CONF.parent,
                env=os.environ | self.variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare_child(),
            )

    def finish(self) -> None:
        """Give the command and let it come to its end; raises Wrong where that is not a good one."""
        if (code := self.attempt(ATTEMPT_S)) != 0:
            raise Wrong(f"the run did not end well (exit code {code}): {self.log}")

    def attempt(self, limit_s: float) -> int:
        """Give the command and return its exit code; nothing of the run is left then. Raises TimeoutExpired after `limit_s`."""
        process = self.start()
        try:
            return process.wait(limit_s)
        finally:
            self.kill_all(process)

    def kill_all(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the launcher's session, and wait for it and for what it started; raises Wrong where something stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(GONE_S)
        self.wait_gone()

    def wait_gone(self) -> None:
        """Wait until no process of the run is there; raises Wrong where one stays, and kills it."""
        until = time.monotonic() + GONE_S
        while left := self.processes():
            if time.monotonic() > until:
                for pid in left:
                    send(pid, signal.SIGKILL)
                raise Wrong(f"{', '.join(sorted(left.values()))} still there {GONE_S:.0f} s after the end: {self.log}")
            time.sleep(0.05)

    def complete(self) -> dict[Path, str]:
        """Return the complete checkpoints, oldest first, with a hash of all that is in them."""
        return {path: digest(path) for path in steps(self.run_dir / paths.CHECKPOINTS) if not why_incomplete(path)}

    def newest(self) -> int:
        """Return the highest step that has a folder of the run's own."""
        return max((step for step in map(number_of, steps(self.run_dir / paths.CHECKPOINTS)) if step != PLANTED), default=0)

    def begun_from(self) -> int:
        """Return the step that the newest attempt continued from."""
        logs = sorted((self.run_dir / paths.LOGS).glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))
        said = (logs[-1] / "rank-0.log").read_text() if logs and (logs[-1] / "rank-0.log").is_file() else ""
        found = [line for line in said.splitlines() if "continuing from" in line]
        return int(found[-1].rpartition(": step ")[2].partition(",")[0]) if found else 0

    def trace(self) -> list[tuple[Any, ...]]:
        """Return what metrics.jsonl says that no interruption may change."""
        return [tuple(row.get(key) for key in KEYS) for row in read_rows(self.run_dir)]

    def processes(self) -> dict[int, str]:
        """Return the run's processes on this machine with what they are: launcher, agent, rank R, or a worker that a rank has forked."""
        found: dict[int, str] = {}
        parents: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = folder.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
                stat = folder.joinpath("stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z" and (role := self._role(words, folder)):
                    found[int(folder.name)], parents[int(folder.name)] = role, int(stat[1])
            except OSError:  # ended just now
                continue
        return {pid: "worker" if found.get(parents[pid]) == role and role.startswith("rank") else role for pid, role in found.items()}

    def _role(self, words: list[str], folder: Path) -> str:
        if f"run_dir={self.run_dir}" in words:
            return "launcher"
        if str(self.run_dir / paths.CONFIG) not in words:
            return ""
        if "trainers.agent" in words:
            return "agent"
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", folder.joinpath("environ").read_bytes())
        return f"rank {rank[1].decode()}" if rank else "rank 0"


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def digest(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def size_of(folder: Path) -> int:
    """Return the bytes in a folder that may be renamed or deleted meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total
