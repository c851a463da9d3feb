"""Ranks on this machine: one as a plain process, several through torchrun."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path

from launcher import process
from launcher.config import is_plain, ranks_per_node, world_size
from launcher.ending import settle
from launcher.job import ROOT, Job, mark_submitted, next_attempt, note_attempt, only_launcher
from launcher.silence import Silence
from trainers import host
from trainers.processes import allocator_environment, kill_left

OF_A_RUN = ("FULLTUNE_AGENT", "FULLTUNE_GENERATOR", "FULLTUNE_SLURM_ATTEMPT")
SIGNALS = "SIGTERM,SIGINT,SIGUSR2"


def submit(job: Job) -> int:
    """Run a frozen job to its end; returns the launcher's exit code."""
    return start(job, command(job))


def command(job: Job) -> list[str]:
    """Return the command that starts every rank."""
    if is_plain(job.launch):
        return [sys.executable, "-m", "trainers", str(job.config_path)]
    return torchrun(job, ["--standalone"])


def commands(job: Job) -> list[str]:
    """Return the command, and what it amounts to for each rank, one line each."""
    if is_plain(job.launch):
        return [_line(job, command(job))]
    return [_line(job, command(job)), *rank_lines(job, "127.0.0.1")]


def start(job: Job, line: list[str]) -> int:
    """Run one command of this machine to its end, under the run directory's lock; returns the launcher's exit code."""
    process.say_leftovers()
    with only_launcher(job) as lock:
        mark_submitted(job)
        note_attempt(job)
        attempt, shutdown_s = next_attempt(job), job.launch.shutdown_s
        sys.stdout.flush()
        code, signalled = process.run(line, environment(job), shutdown_s, keep_open=(lock,), is_lost=Silence(job, attempt).is_lost)
        kill_left(job.config_path, os.getpid())
    return settle(job, attempt, code, signalled)


def torchrun(job: Job, meeting: list[str]) -> list[str]:
    """Return a torchrun command (trainers/agent.py is torchrun, less noisy); `meeting` says where its agents meet.

    Unless told otherwise, torchrun's agent dies of SIGUSR2 and does not end its workers, and it kills workers that save for
    more than 30 s. The flags for that are left out where the installed torch is too old to have them.
    """
    flags = ["--signals-to-handle", SIGNALS, "--shutdown-timeout", str(job.launch.shutdown_s)]
    known = _torchrun_source()
    kept = [item for name, value in zip(flags[::2], flags[1::2], strict=True) if name in known for item in (name, value)]
    processes = ["--nproc-per-node", str(ranks_per_node(job.launch))]
    return [sys.executable, "-m", "trainers.agent", *meeting, *processes, *kept, "-m", "trainers", str(job.config_path)]


def _torchrun_source() -> str:
    """Return the text of torchrun's program without importing torch; without torch, as if it had every flag."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "--signals-to-handle --shutdown-timeout"
    return (Path(spec.origin).parent / "distributed" / "run.py").read_text(encoding="utf-8")


def additions(job: Job) -> dict[str, str]:
    """Return the environment variables that ranks get besides the launcher's own."""
    at_work = ranks_per_node(job.launch) + (job.run.rl.staleness > 0 and not job.launch.generators)  # here, at the same time
    threads = os.environ.get("OMP_NUM_THREADS", str(host.threads_per_rank(at_work)))
    return {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
        "FULLTUNE_LAUNCHER": str(os.getpid()),
        "FULLTUNE_GRACE_S": str(job.launch.shutdown_s),
        **allocator_environment(os.environ),
        **({"CUDA_VISIBLE_DEVICES": ""} if job.launch.gpus_per_node == 0 else {}),
    }


def environment(job: Job) -> dict[str, str]:
    """Return the whole environment of the ranks, without what is of a run or a rank that this launcher was started in."""
    foreign = {*OF_A_RUN, *process.leftovers()}
    return {name: value for name, value in os.environ.items() if name not in foreign} | additions(job)


def rank_lines(job: Job, master: str) -> list[str]:
    """Return what torchrun makes of each rank, one line each; the port is free only once the run starts."""
    local, lines = ranks_per_node(job.launch), []
    for rank in range(world_size(job.launch)):
        place = f"RANK={rank} LOCAL_RANK={rank % local} WORLD_SIZE={world_size(job.launch)} MASTER_ADDR={master} MASTER_PORT=<free port>"
        lines.append(f"{place} {shlex.join([sys.executable, '-m', 'trainers', str(job.config_path)])}")
    return lines


def _line(job: Job, words: list[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in additions(job).items()), shlex.join(words)])
