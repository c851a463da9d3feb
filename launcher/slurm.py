"""One SLURM job, submitted through submitit: a task a rank, so that every rank gets the scheduler's signals."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from launcher import generators, local, queue
from launcher.changes import differences, field_of
from launcher.config import Backend, minutes, ranks_per_node, world_size
from launcher.ending import settle
from launcher.job import ROOT, Job, mark_failed, mark_submitted, next_attempt
from launcher.process import leftovers, say_leftovers
from launcher.report import print_new
from launcher.snapshot import take
from launcher.task import Task
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import plain
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt, read_state
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import write_json

LOOK_EVERY_S = 1.0
LOOK_S = 3.0
"""Time that squeue gets to report the state of a job that has just been submitted."""
OTHERS_S = 60
"""Ranks that still run so long after the first has ended are ended: their own watchdogs have had the time to."""
OURS_ALONE = ("wait", "force", "array_parallelism", "shutdown_s")
"""Fields of launch that a waiting job knows nothing of."""
HINTS = (
    ("account", "launch.account"),
    ("partition", "launch.partition"),
    ("qos", "launch.qos"),
    ("time limit|timelimit", "launch.time"),
    ("memory", "launch.memory"),
    ("reservation", "launch.reservation"),
    ("feature|constraint", "launch.constraint"),
    ("gres|gpu", "launch.gpus_per_node"),
    (
        "node count|more processors|configuration is not available",
        "launch.nodes, launch.generators, launch.gpus_per_node, launch.cpus_per_gpu, launch.memory",
    ),
)
"""Words in what sbatch says, and what to change."""


def submit(job: Job) -> int:
    """Hand a frozen job to SLURM unless it is there already; returns the launcher's exit code.

    Raises ConfigError with SLURM's own words where it refuses.
    """
    if state := states([job])[0]:
        record = queue.record_of(job.run_dir)
        require_same_launch(job, state)
        number = record["id"]
        print(f"job {number} of this run is {state}: nothing to submit\n  stop     scancel {number}", flush=True)
        if reason := queue.reason_in(state):
            print(f"  starts   {queue.remedy_of(reason, str(number))}", flush=True)
    else:
        if read_state(job.run_dir) == State.submitted and (said := queue.last_words(job.run_dir)):
            print(said, file=sys.stderr, flush=True)
        (record,) = hand_over([job], job.run_dir / paths.SLURM)
        size = f"{plural(job.launch.nodes + job.launch.generators, 'node')}, {plural(world_size(job.launch), 'rank')}"
        size += f", {plural(job.launch.generators, 'generator')}" if job.launch.generators else ""
        print(
            f"submitted as job {record['id']} ({size}): {job.run_dir}\n"
            f"  queue    squeue -j {record['id']}\n"
            f"  log      {record['log']}\n"
            f"  metrics  {job.run_dir / 'metrics.jsonl'}\n"
            f"  stop     scancel {record['id']}; scancel --signal=USR2 {record['id']} saves and queues it again",
            flush=True,
        )
        warn_where_stuck(str(record["id"]))
    return _follow(job, record) if job.launch.wait else Exit.done


def submit_array(jobs: list[Job], folder: Path, under_way: Sequence[Job] = ()) -> None:
    """Hand frozen jobs to SLURM as one array, with what submitit sends in `folder`/slurm; raises ConfigError where it refuses.

    Points that are `under_way` count among those that may run at once: where they are as many already, the array begins after them.
    """
    at_once = min(len(jobs), jobs[0].launch.array_parallelism - len(under_way))
    after = [] if at_once > 0 else [str(queue.record_of(job.run_dir)["id"]) for job in under_way]
    at_once = at_once if at_once > 0 else min(len(jobs), jobs[0].launch.array_parallelism)
    first = str(hand_over(jobs, folder / paths.SLURM, at_once, after)[0]["id"]).partition("_")[0]
    print(
        f"submitted as array {first} ({len(jobs)} points, {at_once} at once{', after those in the queue' if after else ''})\n"
        f"  queue    squeue -j {first}\n"
        f"  logs     {folder / 'slurm'}\n"
        f"  stop     scancel {first}; a single point scancel {first}_INDEX\n"
        "  again    the same command submits what is missing, has failed or was stopped",
        flush=True,
    )
    warn_where_stuck(first)


def require_free(job: Job) -> str:
    """Return SLURM's word for the run's job, empty where it neither waits nor runs.

    Raises ConfigError where the run was moved away from under it, or is to be started in another way all the same.
    """
    record = queue.record_of(job.run_dir)
    if not record:
        return ""
    is_ours = job.launch.backend is Backend.slurm
    number = str(record["id"])
    state = states([job])[0] if is_ours else (queue.in_queue(number) or {}).get(number, "")
    home = Path(record.get("run_dir", job.run_dir))
    if state and home != job.run_dir and not (home.exists() and home.samefile(job.run_dir)):
        if (home / paths.CONFIG).exists():  # a copy: that job is the original's
            return ""
        reason = f"job {number} of this run is {state}, and looks for it in {home}"
        raise ConfigError("run_dir", str(job.run_dir), reason, f"scancel {number}, then this command again")
    if state and not is_ours:
        reason = f"job {number} of this run is {state}"
        raise ConfigError("launch.backend", str(job.launch.backend), reason, f"launch=slurm, or scancel {number} first")
    return state


def require_same_launch(job: Job, state: str, record: dict[str, Any] | None = None) -> None:
    """Raise ConfigError where a job that waits or runs was submitted with other launch settings than these: it keeps its own.

    `record` is what was noted of it, where that is not in the run's directory.
    """
    record = record or queue.record_of(job.run_dir)
    changed = differences(record.get("launch", {}), plain(job.launch)) if "launch" in record else []
    changed = [line for line in changed if field_of(line) not in OURS_ALONE]
    if changed:
        lines = "\n".join(f"    launch.{line}" for line in changed)
        reason = f"job {record['id']} of this run is {state}, with other launch settings, and keeps them\n{lines}"
        raise ConfigError("launch.backend", "slurm", reason, f"scancel {record['id']}, then this command again: the run continues")


def warn_where_stuck(job_id: str) -> None:
    """Say so where SLURM has taken a job that it will not start: more nodes than there are, or for longer than they may be had."""
    words = queue.in_queue(job_id, timeout_s=LOOK_S) or {}
    for reason in sorted({queue.reason_in(word) for word in words.values()} - {""}):
        print(
            f"warning: SLURM does not start job {job_id} as it is: {reason}\n  remedy: {queue.remedy_of(reason, job_id)}",
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


def hand_over(jobs: list[Job], folder: Path, at_once: int = 1, after: Sequence[str] = (), how: str = "afterany") -> list[dict[str, Any]]:
    """Submit one job, or several as an array of which `at_once` run, once jobs `after` have ended; returns what each directory notes.

    `how` they must have ended is a word of sbatch's --dependency.
    """
    require_name(folder)
    for job in jobs:
        mark_submitted(job)
    try:
        records = send([Task(job) for job in jobs], jobs[0], folder, at_once, after, how)
    except ConfigError as refused:
        for job in jobs:
            mark_failed(next_attempt(job), message=str(refused), setting=refused.parts(), exit_code=Exit.bad_input)
        raise
    records = [record | {"run_dir": str(job.run_dir), "launch": plain(job.launch)} for job, record in zip(jobs, records, strict=True)]
    for job, record in zip(jobs, records, strict=True):
        write_json(job.run_dir / paths.SLURM_RECORD, record)
    return records


def require_name(folder: Path) -> None:
    """Raise ConfigError for a folder of logs whose name SLURM would read as a pattern."""
    if "%" in str(folder):
        raise ConfigError("run_dir", str(folder.parent), "SLURM would take the % for its own in names of logs", "a directory without %")


def send(
    tasks: Sequence[Callable[[], None]], job: Job, folder: Path, at_once: int = 1, after: Sequence[str] = (), how: str = "afterany"
) -> list[dict[str, Any]]:
    """Submit what each task of a job calls, of the size of `job`, or several as an array; returns `id`, `log` and `time` of each.

    Raises ConfigError with SLURM's own words where it refuses.
    """
    root = take(folder.parent) if job.launch.snapshot else ROOT
    try:
        with clean_environment():
            executor = SlurmExecutor(folder=folder)
            executor.update_parameters(**depending(parameters(job, root), after, how), array_parallelism=at_once)
            if len(tasks) == 1:
                submitted = [executor.submit(tasks[0])]
            else:
                with executor.batch():
                    submitted = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
        raise _refused(job, str(error)) from error
    return [{"id": done.job_id, "log": str(folder / f"{done.job_id}_0_log.out"), "time": time.time()} for done in submitted]


def depending(given: dict[str, Any], jobs: Sequence[str], how: str) -> dict[str, Any]:
    """Return submitit's parameters with the dependency on these jobs' ends, in addition to one that the settings have.

    A job that could never start, as one before it has failed, is ended by SLURM.
    """
    if not jobs:
        return given
    more = given["additional_parameters"]
    all_of = [text for text in (more.get("dependency"), f"{how}:{':'.join(jobs)}") if text]
    ended = {} if how == "afterany" else {"kill-on-invalid-dep": "yes"}
    return given | {"additional_parameters": more | {"dependency": ",".join(all_of)} | ended}


def text_of(job: Job, folder: Path, after: Sequence[str] = (), how: str = "afterany") -> str:
    """Return the text that sbatch gets for a job, with its srun line."""
    python = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    given = parameters(job, folder.parent / paths.CODE if job.launch.snapshot else ROOT)
    return str(_make_sbatch_string(command=python, folder=folder, **depending(given, after, how)))


def commands(job: Job) -> list[str]:
    """Return the text that sbatch gets, with its srun line, and what it amounts to for each rank."""
    return [text_of(job, job.run_dir / paths.SLURM), *local.rank_lines(job, "<first node of the job>"), *generators.lines(job.launch)]


def parameters(job: Job, root: Path) -> dict[str, Any]:
    """Return what submitit makes sbatch's text of; `root` holds the code."""
    launch, engine = job.launch, job.run.engine
    srun = ["--kill-on-bad-exit=0", f"--wait={OTHERS_S}", *generators.step_words(launch)]
    if engine.context * engine.tensor * engine.expert * engine.replicate > 1 and "distribution" not in launch.sbatch:
        srun.append("--distribution=block")  # ranks that share something are neighbours, whatever SLURM_DISTRIBUTION says
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
        "nodes": launch.nodes + launch.generators,
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
def clean_environment() -> Iterator[None]:
    """Hide an outer job's variables from the one that is submitted; where SLURM's configuration is must stay known."""
    say_leftovers()
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env(extra_names=leftovers()):
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
    try:
        while waiting:
            words = queue.states(waiting) or ["unknown"] * len(waiting)  # squeue may be busy: who follows, waits
            ended = [job for job, word in zip(waiting, words, strict=True) if not word]
            waiting = [job for job in waiting if job not in ended]
            for job in ended:
                codes.append(_say_ended(job))
            time.sleep(LOOK_EVERY_S if waiting else 0)
    except KeyboardInterrupt:
        left = sorted({str(queue.record_of(job.run_dir).get("id", "")) for job in waiting} - {""})
        print(
            f"{plural(len(left), 'job')} of the sweep still in the queue; scancel {' '.join(left)} ends them", file=sys.stderr, flush=True
        )
        raise
    return max(codes)


def _say_ended(job: Job) -> Exit:
    """Print how a point has ended, with the scheduler's last lines where no rank began; returns its part of the exit code."""
    state = read_state(job.run_dir)
    print(f"{state:>10}  {job.run_dir.name}", flush=True)
    if state == State.submitted:
        print(queue.last_words(job.run_dir), flush=True)
    return Exit.done if state == State.done else Exit.failed


def _follow(job: Job, record: dict[str, Any]) -> int:
    """Print what rank 0 prints until the job has left the queue; returns the launcher's exit code."""
    attempt, shown = Attempt(job.run_dir, sys.maxsize), 0
    try:
        while True:
            ended = queue.in_queue(str(record["id"])) == {}
            shown = print_new(Path(record["log"]), shown)
            if ended:
                code = Exit.done if read_state(job.run_dir) == State.done else Exit.failed
                return settle(job, attempt, code, None, queue.last_words(job.run_dir))
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        print(f"job {record['id']} continues; scancel {record['id']} ends it", file=sys.stderr)
        return Exit.interrupted
