"""SLURM's queue: which of our jobs are there, and asking for changes."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.job import Job
from trainers.rundir import paths
from trainers.rundir.beats import read_beats
from trainers.rundir.files import try_json

ANSWER_S = 20.0
"""For squeue, scancel and scontrol to answer."""
NOT_RUN = 127
"""A shell's exit code for what it cannot find."""
STUCK = re.compile(
    "Partition(Config|NodeLimit|TimeLimit|Down|Inactive)|BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    "|JobHeld(Admin|User)|ReservationDeleted|DependencyNeverSatisfied|(QOS|Assoc)Max.*Per(Job|Node).*"
)
"""Reasons for which a job waits until somebody changes it or the cluster: SLURM's "Job Reason Codes"."""


REMEDIES = (
    ("JobHeldUser", "scontrol release {id} starts it"),
    ("JobHeldAdmin", "the cluster's administrators hold it; ask them, or scancel {id}"),
    (".*Account.*", "scancel {id}, and another launch.account"),
    ("InvalidQOS|QOSNotAllowed", "scancel {id}, and another launch.qos"),
    ("BadConstraints", "scancel {id}, and another launch.constraint (sinfo --format=%f lists them)"),
    ("Reservation.*", "scancel {id}, and launch.reservation=null or another"),
    ("Dependency.*", "scancel {id}, and leave out launch.sbatch.dependency"),
    ("Partition(TimeLimit|Config)|.*Wall.*", "scancel {id}, and a shorter launch.time or another launch.partition (sinfo lists limits)"),
    ("Partition(Down|Inactive)", "wait until partition is up, or scancel {id}, and another launch.partition"),
    (".*", "scancel {id}, and fewer launch.nodes or another launch.partition (sinfo lists what there is)"),
)
"""Reasons for which a job does not start as it is, and what lets it start; the first that fits counts."""
LAST_LINES = 8


def remedy_of(reason: str, number: str) -> str:
    """Return what lets a job start that waits for this reason."""
    return next(text for pattern, text in REMEDIES if re.fullmatch(pattern, reason)).format(id=number)


def last_words(run_dir: Path) -> str:
    """Return how a run's job ended of which no rank began, with the last lines that the scheduler's shell has written; empty where one did.

    A checkout that was moved, a module that is not there, an image that cannot be fetched: no rank could say so.
    """
    record = record_of(run_dir)
    if not record or any(beat.written > record["time"] for beat in read_beats(run_dir).values()):
        return ""
    began = [path for path in (run_dir / paths.LOGS).glob("attempt-*") if path.stat().st_mtime > record["time"]]
    log = Path(record.get("log", ""))
    if began or not log.is_file():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
    how = f" as {end}" if (end := ended_as(str(record["id"]))) else ""
    said = f"job {record['id']} ended{how} before any rank began; {log} ends with"
    return "\n".join([said, *(f"    {line}" for line in lines)])


def record_of(run_dir: Path) -> dict[str, Any]:
    """Return `id`, `log`, `time`, `run_dir` and `launch` of the job that was last submitted for a run; empty where there is none."""
    return try_json(run_dir / paths.SLURM_RECORD)


def _run(*line: str, timeout_s: float = ANSWER_S) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM's; one that is not there or does not answer has failed with those words."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(line, NOT_RUN, "", str(error))


def in_queue(*ids: str, timeout_s: float = ANSWER_S) -> dict[str, str] | None:
    """Return SLURM's word for each job and element of an array that waits or runs, of all or of some; None where squeue does not answer.

    That of a job that does not start as it is has the reason with it: `PENDING (PartitionConfig)`.
    """
    only = [f"--jobs={','.join(ids)}"] if ids else []
    done = _run("squeue", "--noheader", "--array", "--format=%i|%T|%r", *only, timeout_s=timeout_s)
    if done.returncode and "Invalid job id" not in done.stderr:  # SLURM has forgotten all of them
        return None
    rows = [row.strip().split("|", 2) for row in done.stdout.splitlines() if row.count("|") >= 2]
    return {name: f"{state} ({reason})" if state == "PENDING" and STUCK.fullmatch(reason) else state for name, state, reason in rows}


def reason_in(word: str) -> str:
    """Return why a job does not start as it is, of SLURM's word for it; empty where nothing is in its way."""
    return word.partition(" (")[2].removesuffix(")")


def states(jobs: Sequence[Job]) -> list[str] | None:
    """Return SLURM's word for each run's job, empty where it neither waits nor runs; None where squeue does not answer."""
    ids = [str(record_of(job.run_dir).get("id", "")) for job in jobs]
    queue = in_queue(*filter(None, ids)) if any(ids) else {}
    return None if queue is None else [queue.get(name, "") for name in ids]


@functools.cache
def ended_as(name: str) -> str:
    """Return SLURM's word for how a job ended, such as OUT_OF_MEMORY; empty where neither scontrol nor accounting knows it any more."""
    for line, pattern in (
        (["scontrol", "--oneliner", "show", "job", name], r"\bJobState=(\w+)"),
        (["sacct", "--noheader", "--allocations", "--format=State%20", f"--jobs={name}"], r"^\s*(\w+)"),
    ):
        done = _run(*line)
        if done.returncode == 0 and (found := re.search(pattern, done.stdout)):
            return found[1]
    return ""


def ask(*line: str, timeout_s: float = ANSWER_S) -> str:
    """Run a command of SLURM's; returns what it says against it, empty where it was done."""
    done = _run(*line, timeout_s=timeout_s)
    return (done.stderr.strip() or f"{line[0]} ended with {done.returncode}") if done.returncode else ""
