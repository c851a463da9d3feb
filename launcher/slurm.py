"""One SLURM job, submitted through submitit: a task a rank, so that every rank gets the scheduler's signals."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from launcher import local, queue
from launcher.config import minutes, ranks_per_node, world_size
from launcher.ending import settle
from launcher.job import ROOT, Job, mark_submitted
from launcher.report import print_new
from launcher.snapshot import take
from launcher.task import Task
from trainers.config.errors import ConfigError
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt, read_state
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import write_json

LOOK_EVERY_S = 1.0
LOOK_S = 3.0
"""Time that squeue gets to report the state of a job that has just been submitted."""
OTHERS_S = 60
"""Ranks that still run so long after the first has ended are ended: their own watchdogs have had the time to."""
HINTS = (
    ("account", "launch.account"),
    ("partition", "launch.partition"),
    ("qos", "launch.qos"),
    ("time limit|timelimit", "launch.time"),
    ("memory", "launch.memory"),
    ("reservation", "launch.reservation"),
    ("feature|constraint", "launch.constraint"),
    ("gres|gpu", "launch.gpus_per_node"),
    ("node count|more processors|configuration is not available", "launch.nodes, launch.gpus_per_node, launch.cpus_per_gpu, launch.memory"),
)
"""Words in what sbatch says, and what to change."""


def submit(job: Job) -> int:
    """Hand a frozen job to SLURM unless it is there already; returns the launcher's exit code.

    Raises ConfigError with SLURM's own words where it refuses.
    """
    if state := states([job])[0]:
        record = queue.record_of(job.run_dir)
        print(f"job {record['id']} of this run is {state}: nothing to submit\n  stop     scancel {record['id']}")
    else:
        (record,) = hand_over([job], job.run_dir / paths.SLURM)
        print(
            f"submitted as job {record['id']} ({job.launch.nodes} node(s), {world_size(job.launch)} rank(s)): {job.run_dir}\n"
            f"  queue    squeue -j {record['id']}\n"
            f"  log      {record['log']}\n"
            f"  metrics  {job.run_dir / 'metrics.jsonl'}\n"
            f"  stop     scancel {record['id']}; scancel --signal=USR2 {record['id']} saves and queues it again",
            flush=True,
        )
        _warn_where_stuck(str(record["id"]))
    return _follow(job, record) if job.launch.wait else Exit.done


def submit_array(jobs: list[Job], folder: Path) -> None:
    """Hand frozen jobs to SLURM as one array, with what submitit sends in `folder`/slurm; raises ConfigError where it refuses."""
    first = str(hand_over(jobs, folder / paths.SLURM)[0]["id"]).partition("_")[0]
    print(
        f"submitted as array {first} ({len(jobs)} points, {min(len(jobs), jobs[0].launch.array_parallelism)} at once)\n"
        f"  queue    squeue -j {first}\n"
        f"  logs     {folder / 'slurm'}\n"
        f"  stop     scancel {first}; a single point scancel {first}_INDEX\n"
        "  again    the same command submits what is missing, has failed or was stopped",
        flush=True,
    )
    _warn_where_stuck(first)


def _warn_where_stuck(job_id: str) -> None:
    """Say so where SLURM has taken a job that it will not start: more nodes than there are, or for longer than they may be had."""
    words = queue.in_queue(job_id, timeout_s=LOOK_S) or {}
    for reason in sorted({queue.reason_in(word) for word in words.values()} - {""}):
        print(
            f"warning: SLURM does not start job {job_id} as it is: {reason}\n"
            f"  remedy: scancel {job_id}, and change launch.nodes, launch.time or launch.partition (sinfo lists what there is)",
            file=sys.stderr,
            flush=True,
        )


def states(jobs: list[Job]) -> list[str]:
    """Return SLURM's word for each run's job, empty where it neither waits nor runs; raises ConfigError where squeue does not answer."""
    found = queue.states(jobs)
    if found is None:
        reason = "squeue does not answer, and jobs of this run may be waiting or running"
        raise ConfigError("launch.backend", "slurm", reason, "a login node of the cluster, or the same command later")
    return found


def hand_over(jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """Submit one job, or several as an array; returns what is noted in each run directory: `id`, `log` and `time`."""
    if "%" in str(folder):
        raise ConfigError("run_dir", str(folder.parent), "SLURM would take the % for its own in names of logs", "a directory without %")
    root = take(folder.parent) if jobs[0].launch.snapshot else ROOT
    for job in jobs:
        mark_submitted(job)
    try:
        with _clean_environment():
            executor = SlurmExecutor(folder=folder)
            executor.update_parameters(**parameters(jobs[0], root), array_parallelism=jobs[0].launch.array_parallelism)
            if len(jobs) == 1:
                submitted = [executor.submit(Task(jobs[0]))]
            else:
                with executor.batch():
                    submitted = [executor.submit(Task(job)) for job in jobs]
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
        raise _refused(jobs[0], str(error)) from error
    records = [{"id": done.job_id, "log": str(folder / f"{done.job_id}_0_log.out"), "time": time.time()} for done in submitted]
    for job, record in zip(jobs, records, strict=True):
        write_json(job.run_dir / paths.SLURM_RECORD, record)
    return records


def commands(job: Job) -> list[str]:
    """Return the text that sbatch gets, with its srun line, and what it amounts to for each rank."""
    python = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(job.run_dir / 'slurm'))}"
    text = _make_sbatch_string(
        command=python, folder=job.run_dir / paths.SLURM, **parameters(job, job.run_dir / paths.CODE if job.launch.snapshot else ROOT)
    )
    return [text, *local.rank_lines(job, "<first node of the job>")]


def parameters(job: Job, root: Path) -> dict[str, Any]:
    """Return what submitit makes sbatch's text of; `root` holds the code."""
    launch = job.launch
    srun = ["--kill-on-bad-exit=0", f"--wait={OTHERS_S}"]
    srun += [f"--cpus-per-task={launch.cpus_per_gpu}"] if launch.cpus_per_gpu else []  # since SLURM 22.05 it does not come from sbatch
    srun += [f"--container-image={launch.container}"] if launch.container else []
    srun += [f"--container-mounts={launch.container_mounts}"] if launch.container_mounts else []
    setup = [f". {shlex.quote(os.path.abspath(Path(launch.env_file).expanduser()))}"] if launch.env_file else []
    setup += [
        *launch.setup,
        f"cd {shlex.quote(str(root))} || exit 1",
        f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    more = {"requeue": True, "reservation": launch.reservation} | {name.replace("_", "-"): value for name, value in launch.sbatch.items()}
    given = {
        "job_name": f"fulltune-{job.run.name}",
        "nodes": launch.nodes,
        "ntasks_per_node": ranks_per_node(launch),
        "gpus_per_node": launch.gpus_per_node or None,
        "cpus_per_task": launch.cpus_per_gpu,
        "mem": launch.memory,
        "time": minutes(launch.time) if launch.time else None,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
        "signal_delay_s": launch.grace_s,
        "wckey": None,
    }
    additional = {name: value for name, value in more.items() if value is not None}
    kept = {name: value for name, value in given.items() if value is not None or name in ("wckey", "time")}
    return kept | {"additional_parameters": additional, "srun_args": srun, "setup": setup, "stderr_to_stdout": True}


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide an outer job's variables from the one that is submitted; where SLURM's configuration is must stay known."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _refused(job: Job, said: str) -> ConfigError:
    """Return SLURM's refusal in its own words, with what to change."""
    words = [
        line.strip().removeprefix("sbatch: error: ") for line in said.splitlines() if "sbatch: error" in line
    ] or said.strip().splitlines()[-1:]
    text = "; ".join(words) or "sbatch refused it"
    if "srun" in said and "detect" in said:
        return ConfigError(
            "launch.backend", "slurm", "srun is not to be found: this machine belongs to no SLURM cluster", "a login node, or launch=local"
        )
    field = next((field for pattern, field in HINTS if re.search(pattern, text, re.IGNORECASE)), "launch")
    first = field.split(",")[0]
    value = getattr(job.launch, first.removeprefix("launch."), None) if first != "launch" else "slurm"
    return ConfigError(first, value, f"SLURM refuses the job: {text}", f"another {field}")


def follow_all(jobs: list[Job]) -> int:
    """Wait until all jobs have left the queue; returns the exit code of a sweep."""
    waiting, codes = list(jobs), [Exit.done]
    while waiting:
        words = queue.states(waiting) or ["unknown"] * len(waiting)  # squeue may be busy: who follows, waits
        ended = [job for job, word in zip(waiting, words, strict=True) if not word]
        waiting = [job for job in waiting if job not in ended]
        for job in ended:
            state = read_state(job.run_dir)
            codes.append(Exit.done if state == State.done else Exit.failed)
            print(f"{state:>10}  {job.run_dir.name}", flush=True)
        time.sleep(LOOK_EVERY_S if waiting else 0)
    return max(codes)


def _follow(job: Job, record: dict[str, Any]) -> int:
    """Print what rank 0 prints until the job has left the queue; returns the launcher's exit code."""
    attempt, shown = Attempt(job.run_dir, sys.maxsize), 0
    try:
        while True:
            ended = queue.in_queue(str(record["id"])) == {}
            shown = print_new(Path(record["log"]), shown)
            if ended:
                return settle(job, attempt, Exit.done if read_state(job.run_dir) == State.done else Exit.failed, None)
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        print(f"job {record['id']} continues; scancel {record['id']} ends it", file=sys.stderr)
        return Exit.interrupted
