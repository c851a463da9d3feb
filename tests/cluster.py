"""The virtual SLURM cluster of slurm/cluster.sh: how tests start it, submit to it, harm its nodes and set it right again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT

SCRIPT = str(ROOT / "slurm" / "cluster.sh")
CANNOT = 2  # the exit code for "not on this machine", with the reason as its last line


class Cluster:
    """Three nodes, node1 to node3, of 4 pretended CPUs each."""

    nodes = 3

    def __init__(self) -> None:
        self.harmed: set[int] = set()
        self.before = traces()
        self.start()

    def start(self) -> None:
        if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"no SLURM here: `{SCRIPT} install` gets it from the distribution")  # no test installs anything
        done = subprocess.run([SCRIPT, "up", str(self.nodes)], capture_output=True, text=True, timeout=240, check=False)
        if done.returncode == CANNOT:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
        found = re.search(r"\. (\S+/env) ", done.stdout)
        assert found, done.stdout
        settings = re.findall(r"export (\w+)=(\S+)", Path(found[1]).read_text())
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | dict(settings)

    def stop(self) -> None:
        subprocess.run([SCRIPT, "down"], timeout=60, check=True)

    def run(self, *words: str, timeout_s: float = 30, **environment: str) -> str:
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: str, **environment: str) -> str:
        """Submit a job; returns its id."""
        return self.run("sbatch", "--parsable", *words, **environment)

    def job(self, job: str) -> dict[str, str]:
        """Return what the controller knows of a job, by its own names: JobState, Restarts, NodeList, Reason."""
        said = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def wait_for(self, what: str, holds: Callable[[], bool], timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, f"{what} did not come in {timeout_s} s\n{self.run('scontrol', 'show', 'job')}"
            time.sleep(0.1)

    def wait_for_state(self, job: str, state: str, restarts: int = 0, timeout_s: float = 60) -> None:
        def holds() -> bool:
            known = self.job(job)
            return known["JobState"] == state and int(known["Restarts"]) >= restarts

        self.wait_for(f"{state} of job {job}", holds, timeout_s)

    def on(self, node: int, *words: str) -> str:
        """Run a command on a node."""
        return self.run(SCRIPT, "exec", str(node), *words)

    def crash(self, node: int) -> None:
        self._harm("crash", node)

    def cut(self, node: int) -> None:
        self._harm("cut", node)

    def freeze(self, node: int) -> None:
        self._harm("freeze", node)

    def thaw(self, node: int) -> None:
        self.run(SCRIPT, "thaw", str(node))

    def heal(self, node: int) -> None:
        self.run(SCRIPT, "heal", str(node))
        self.harmed.discard(node)

    def _harm(self, how: str, node: int) -> None:
        self.harmed.add(node)
        self.run(SCRIPT, how, str(node))

    def reset(self) -> None:
        """End all jobs and heal all nodes, so that the next test finds an idle cluster."""
        if subprocess.run([SCRIPT, "status"], capture_output=True, timeout=30, check=False).returncode != 0:
            self.harmed.clear()
            self.start()
        self.run("scancel", "--quiet", "--user", "root")
        for node in sorted(self.harmed):
            self.heal(node)
        self.wait_for("idle nodes", lambda: len(self.run("sinfo", "-hN", "-p", "main", "-t", "idle").splitlines()) == self.nodes)


def traces() -> dict[str, list[str]]:
    """Return what of this machine a cluster changes: links, processes, mounts, files."""
    ours = re.compile(r"slurmd|slurmctld|slurmstepd|munged|unshare --net|cluster\.sh")
    return {
        "links": sorted(path.name for path in Path("/sys/class/net").glob("*")),
        "processes": sorted(line for line in map(_command, Path("/proc").glob("[0-9]*/cmdline")) if ours.search(line)),
        "mounts": sorted(line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {tempfile.gettempdir()}/" not in line),
        "hosts": Path("/etc/hosts").read_text().splitlines(),
        "files": sorted(str(path) for folder in ("/run", "/run/netns", "/etc/slurm") for path in Path(folder).glob("*")),
    }


def _command(path: Path) -> str:
    try:
        return path.read_text().replace("\0", " ")
    except OSError:  # ended meanwhile
        return ""
