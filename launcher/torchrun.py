"""Ranks on several machines without a scheduler: the same command on each, meeting at launch.rdzv_endpoint."""

from __future__ import annotations

import hashlib
import shlex

from launcher import local
from launcher.config import LaunchConfig
from launcher.job import Job

SOMEWHERE = "<launch.rdzv_endpoint>"


def submit(job: Job) -> int:
    """Run this machine's ranks of a frozen job to its end; returns the launcher's exit code."""
    return local.start(job, command(job))


def command(job: Job) -> list[str]:
    """Return the command that starts this machine's ranks, the same on every machine."""
    return local.torchrun(job, _meeting(job, job.launch)) if _meets(job.launch) else local.command(job)


def _meets(launch: LaunchConfig) -> bool:
    """Tell whether agents meet somewhere: a single one may too, where it is told to."""
    return launch.nodes > 1 or launch.rdzv_endpoint is not None


def _meeting(job: Job, launch: LaunchConfig) -> list[str]:
    """Name the rendezvous after the run directory, so that two runs at one endpoint refuse each other instead of mixing."""
    run_id = hashlib.sha256(str(job.run_dir).encode()).hexdigest()[:12]
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", launch.rdzv_endpoint or SOMEWHERE]
    return ["--nnodes", str(launch.nodes), *place, "--rdzv-id", run_id]


def commands(job: Job) -> list[str]:
    """Return the command of each node, and what they amount to for each rank, one line each."""
    if not _meets(job.launch):
        return local.commands(job)
    additions = [f"{name}={shlex.quote(value)}" for name, value in local.additions(job).items()]
    line = " ".join([*additions, shlex.join(command(job))])
    return [line] * job.launch.nodes + local.rank_lines(job, "<node of rank 0>")
