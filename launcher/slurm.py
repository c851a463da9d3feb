"""One SLURM job, submitted through submitit: a task a rank, so that every rank gets the scheduler's signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from launcher import local
from launcher.config import minutes, ranks_per_node, world_size
from launcher.ending import INTERRUPTED, settle
from launcher.job import ROOT, Job, mark_submitted, read_status
from launcher.snapshot import take
from launcher.task import Task
from trainers.config import ConfigError

ANSWER_S = 20.0
"""For squeue and scontrol to answer."""
LOOK_EVERY_S = 1.0
OTHERS_S = 60
"""Ranks that still run so long after the first has ended are ended: their own watchdogs have had the time to."""
HINTS = (
    ("partition", "launch.partition"),
    ("account", "launch.account"),
    ("qos", "launch.qos"),
    ("time limit|timelimit", "launch.time"),
    ("node count|more processors|configuration is not available", "launch.nodes, launch.gpus_per_node, launch.cpus_per_gpu, launch.memory"),
    ("memory", "launch.memory"),
    ("reservation", "launch.reservation"),
    ("feature|constraint", "launch.constraint"),
    ("gres|gpu", "launch.gpus_per_node"),
)
"""Words in what sbatch says, and what to change."""


def submit(job: Job) -> int:
    """Hand a frozen job to SLURM unless it is there already; returns the launcher's exit code.

    Raises ConfigError with SLURM's own words where it refuses.
    """
    if (known := job_of(job.run_dir)) and (state := queue_state(known)):
        print(f"job {known} of this run is {state}: nothing to submit\n  stop it  scancel {known}")
        return _follow(job, known) if job.launch.wait else 0
    root = take(job.run_dir) if job.launch.snapshot else ROOT
    mark_submitted(job)
    try:
        with _clean_environment():
            executor = SlurmExecutor(folder=folder(job))
            executor.update_parameters(**parameters(job, root))
            job_id = executor.submit(Task(job)).job_id
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
        raise _refused(job, str(error)) from error
    (folder(job) / "job.json").write_text(json.dumps({"id": job_id, "time": time.time()}) + "\n")
    print(
        f"submitted as job {job_id} ({job.launch.nodes} node(s), {world_size(job.launch)} rank(s)): {job.run_dir}\n"
        f"  queue    squeue -j {job_id}\n"
        f"  log      {log_of(job, job_id)}\n"
        f"  figures  {job.run_dir / 'metrics.jsonl'}\n"
        f"  stop     scancel {job_id}; scancel --signal=USR2 {job_id} saves and queues it again",
        flush=True,
    )
    return _follow(job, job_id) if job.launch.wait else 0


def commands(job: Job) -> list[str]:
    """Return the text that sbatch gets, with its srun line, and what it amounts to for each rank."""
    python = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder(job)))}"
    text = _make_sbatch_string(command=python, folder=folder(job), **parameters(job, job.run_dir / "code" if job.launch.snapshot else ROOT))
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


def folder(job: Job) -> Path:
    """Return where submitit keeps what it sends and the tasks' output."""
    return job.run_dir / "slurm"


def log_of(job: Job, job_id: str) -> Path:
    """Return the file with what rank 0 prints."""
    return folder(job) / f"{job_id}_0_log.out"


def job_of(run_dir: Path) -> str:
    """Return the id of the job that was last submitted for a run; empty where there is none."""
    try:
        return str(json.loads((run_dir / "slurm" / "job.json").read_text())["id"])
    except (OSError, ValueError, KeyError):
        return ""


def queue_state(job_id: str) -> str:
    """Return SLURM's word for the state of a job that waits or runs; empty where it does not, or squeue cannot tell."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
        return done.stdout.strip().partition("\n")[0]
    return ""


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide an outer job's variables from the one that is submitted; where SLURM's configuration is must stay known."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _refused(job: Job, said: str) -> ConfigError:
    """Return SLURM's refusal in its own words, with what to change."""
    words = [line.strip().removeprefix("sbatch: ") for line in said.splitlines() if "sbatch: error" in line] or said.strip().splitlines()[
        -1:
    ]
    text = "; ".join(words) or "sbatch refused it"
    if "srun" in said and "detect" in said:
        return ConfigError(
            "launch.backend", "slurm", "srun is not to be found: this machine belongs to no SLURM cluster", "a login node, or launch=local"
        )
    field = next((field for pattern, field in HINTS if re.search(pattern, text, re.IGNORECASE)), "launch")
    first = field.split(",")[0]
    value = getattr(job.launch, first.removeprefix("launch."), None) if first != "launch" else "slurm"
    return ConfigError(first, value, f"SLURM refuses the job: {text}", f"another {field}")


def _follow(job: Job, job_id: str) -> int:
    """Print what rank 0 prints until the job has left the queue; returns the launcher's exit code."""
    log, shown = log_of(job, job_id), 0
    try:
        while True:
            ended = not queue_state(job_id)
            if log.is_file():
                with log.open("rb") as file:
                    file.seek(shown)
                    text = file.read()
                shown += len(text)
                sys.stdout.write(text.decode(errors="replace"))
                sys.stdout.flush()
            if ended:
                return settle(job, 0 if read_status(job.run_dir).get("state") == "done" else 1, None)
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        print(f"job {job_id} goes on; scancel {job_id} ends it", file=sys.stderr)
        return INTERRUPTED
