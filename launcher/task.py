"""One task of a SLURM job: it finds its place, runs its rank to the end, and the first one queues the job again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher import generators, local, process
from launcher.job import Job, mark_failed, next_attempt, note_attempt
from launcher.queue import ask, record_of
from launcher.silence import LOOK_EVERY_S, Silence
from launcher.topology import Topology, from_slurm
from trainers.config.errors import ConfigError
from trainers.processes import never_fail
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt, read_status
from trainers.rundir.checkpoints import newest_step
from trainers.rundir.ending import TOGETHER_S, Exit, State, killed_by
from trainers.rundir.files import write_json

ANSWER_S = 60.0
FRUITLESS = 3
EXCLUDED = 4
"""Nodes that failed last and are not taken again: over weeks more of them would leave none to start on."""
LATE_S = 15.0
"""For rank 0 to end once the run has failed: one that is stopped does not, and the others' tasks queue nothing again."""
HELD = (signal.SIGUSR2, signal.SIGTERM)
"""SLURM signals every process of a job, also a rank that has just begun."""


@dataclass(frozen=True)
class Task:
    """What submitit sends to every task of a job."""

    job: Job

    def __call__(self) -> None:
        """Run this task's rank; exits with its code, which SLURM shows as the job's."""
        never_fail()
        os.environ["FULLTUNE_SLURM_ATTEMPT"] = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        try:
            code = run(self.job)
        except ConfigError as error:
            mark_failed(
                next_attempt(self.job), message=str(error), setting=error.parts(), exit_code=Exit.bad_input, host=socket.gethostname()
            )
            print(error, file=sys.stderr, flush=True)
            code = Exit.bad_input
        if code:
            sys.exit(code)  # submitit would make an exception of its own of a result, and a job that is done of both

    def checkpoint(self) -> Any:
        """Let submitit queue the job again where its signal comes before the rank has started."""
        return submitted_again(self)


def submitted_again(called: Any) -> Any:
    """Return what submitit queues again where it gets a signal itself."""
    from submitit.helpers import DelayedSubmission

    return DelayedSubmission(called)


def run(job: Job) -> int:
    """Run this task's rank to its end; returns its exit code. Raises ConfigError where the job is not as the settings say."""
    from submitit.slurm.slurm import _parse_node_list

    hosts = all_hosts = _parse_node_list(os.environ.get("SLURM_JOB_NODELIST", ""))
    if job.launch.generators:
        hosts = _parse_node_list(os.environ.get("SLURM_STEP_NODELIST", ""))
    place = from_slurm(os.environ, job.launch, hosts)
    environment = _environment(job, place)
    if job.launch.generators:
        environment |= generators.variable(place.rank, generators.apart(job.launch, all_hosts, hosts))
    attempt = next_attempt(job)
    if place.rank == 0:
        note_attempt(job)
    is_lost = is_beyond_help(job, attempt) if place.rank == 0 else lambda: False
    code, signalled = process.run(
        [sys.executable, "-m", "trainers", str(job.config_path)], environment, job.launch.grace_s, is_lost=is_lost, hold=HELD
    )
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit would queue the job again once more
    if code < 0 and attempt.has_ended(State.done):
        code = Exit.done
    if code < 0:
        who, message = {"rank": place.rank, "host": socket.gethostname(), "exit_code": code}, f"rank {place.rank} {killed_by(code)}"
        attempt.record_failure(who | {"message": message}, time.time(), together_s=TOGETHER_S)  # others may have failed of it first
        code = Exit.failed
    if place.rank != 0:
        return code
    asked = signalled == signal.SIGUSR2 or (signalled is None and read_status(job.run_dir).get("signal") == "SIGUSR2")
    if code == Exit.stopped and asked:  # perhaps of another rank, which got the signal a moment earlier
        requeue(job, place, "stopped with a checkpoint")
    if code == Exit.failed and job.launch.requeue_on_failure and attempt.has_ended(State.failed) and signalled in (None, signal.SIGUSR2):
        requeue_elsewhere(job, place, all_hosts)
    return code


def is_beyond_help(job: Job, attempt: Attempt) -> Callable[[], bool]:
    """Return what tells whether rank 0 is to be killed: it is silent for too long, or still there LATE_S after the run has failed."""
    silence, looked, failed = Silence(job, attempt), time.monotonic(), float("inf")

    def is_lost() -> bool:
        nonlocal looked, failed
        now = time.monotonic()
        if now - looked >= LOOK_EVERY_S:
            looked = now
            failed = min(failed, now) if attempt.has_ended(State.failed) else float("inf")
        return now - failed > LATE_S or silence.is_lost()

    return is_lost


def _environment(job: Job, place: Topology) -> dict[str, str]:
    """Return the environment of a rank; without FULLTUNE_LAUNCHER it prints its own errors, as nobody else waits for it."""
    ours = {"FULLTUNE_GRACE_S": str(job.launch.grace_s), "FULLTUNE_SLURM_ATTEMPT": os.environ["FULLTUNE_SLURM_ATTEMPT"]}
    environment = local.environment(job) | place.environment() | ours
    del environment["FULLTUNE_LAUNCHER"]
    if (cores := os.environ.get("SLURM_CPUS_PER_TASK")) and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = cores
    return environment


def requeue(job: Job, place: Topology, why: str, exclude: Sequence[str] = ()) -> None:
    """Put the job back into SLURM's queue, unless it has been there often enough; nodes in `exclude` are not for it any more."""
    if place.restarts >= job.launch.max_requeues:
        print(f"{why}; not queued again: it was {place.restarts} times (launch.max_requeues)", flush=True)
        return
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{index}" if array and index else str(place.job_id)
    print(f"{why}: job {name} goes back into the queue" + (f", without {','.join(exclude)}" if exclude else ""), flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM ends a job's processes before it queues the job again; KillWait is ours
    said = ask("scontrol", "requeue", name, timeout_s=ANSWER_S)
    if said:
        _complain(f"job {name} could not be queued again: {said}")
    elif exclude:  # SLURM takes this of a job that waits only
        kept = [job.launch.exclude] if job.launch.exclude else []
        if said := ask("scontrol", "update", f"JobId={name}", f"ExcNodeList={','.join([*kept, *exclude])}", timeout_s=ANSWER_S):
            _complain(f"job {name} may start on the same nodes again: {said}")


def requeue_elsewhere(job: Job, place: Topology, hosts: Sequence[str]) -> None:
    """Queue a job again whose run has failed, without the nodes that failed lately, where it is known that one of its `hosts` did.

    Not where it would fail again: of wrong settings, of the training itself, FRUITLESS times in a row without a new checkpoint.
    """
    error, record = read_status(job.run_dir).get("error", {}), record_of(job.run_dir)
    if "setting" in error or not error.get("of_node", True):
        return
    node = failed_node(error, hosts)
    failures = [
        *record.get("failures", []),
        {"step": newest_step(job.run_dir), "node": node, "message": error.get("message", "")},
    ]
    write_json(job.run_dir / paths.SLURM_RECORD, record | {"failures": failures})
    last = [failure["step"] for failure in failures[-FRUITLESS:]]
    if last == [last[0]] * FRUITLESS:
        print(f"failed {FRUITLESS} times in a row without a new checkpoint: not queued again", flush=True)
        return
    nodes = sorted({failure["node"] for failure in failures[-EXCLUDED:]} - {""})
    requeue(job, place, f"failed ({f'first on {node}' if node else 'on no node in particular'})", nodes)


def failed_node(error: dict[str, Any], hosts: Sequence[str]) -> str:
    """Return SLURM's name of the node that an error is of; empty where it names none, or ranks that may be of several."""
    if len(error.get("ranks", [])) > 1:
        return ""
    host = str(error.get("host") or "").partition(".")[0]
    return next((name for name in hosts if name.partition(".")[0] == host), "")


def _complain(what: str) -> None:
    print(f"error: {what}\n  the same launcher command submits it anew, and continues", file=sys.stderr, flush=True)
