"""The commands of a pipeline between two of its runs, as one job of SLURM: what it has done stays done when it is queued again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import process, task
from launcher.in_turn import do, exit_code, line_of
from launcher.job import Job
from launcher.progress import Progress
from launcher.stage_checks import environment
from launcher.stages import Pipeline, Stage, read_record
from launcher.topology import Topology, from_slurm
from trainers.config.errors import ConfigError
from trainers.processes import never_fail
from trainers.rundir import paths
from trainers.rundir.ending import Exit
from trainers.rundir.files import try_json

SHUTDOWN_S = 20
"""For a tool to end after a signal: SLURM kills it soon after."""


@dataclass(frozen=True)
class Commands:
    """What submitit sends to the job."""

    pipeline: Pipeline
    command: list[str]
    """The launcher's own, as pipeline.json keeps it."""
    parts: list[tuple[Stage, str]]
    """Stages, and which of their commands: `before` or `after` the run."""
    job: Job
    """Its size, and how often it may be queued again."""
    directory: str
    """Where the launcher was started: paths of commands may begin there."""

    def __call__(self) -> None:
        """Do the commands that are not done; exits with the code of the one that failed, which SLURM shows as the job's."""
        never_fail()
        os.chdir(self.directory)
        try:
            code = run(self)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = Exit.bad_input
        if code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """Let submitit queue the job again where its signal comes between two commands."""
        return task.submitted_again(self)


def run(commands: Commands) -> int:
    """Do what is left of the parts, in order; returns the exit code. Queues the job again where its time is over."""
    place = from_slurm(os.environ, commands.job.launch, [os.environ.get("SLURMD_NODENAME", "")])
    progress = Progress(commands.pipeline, read_record(commands.pipeline.folder).get("state", {}), commands.command)
    signals: list[int] = []

    def call(words: list[str]) -> int:
        sys.stdout.flush()
        code, number = process.run(line_of(words), environment(), SHUTDOWN_S)
        signals.extend([] if number is None else [number])
        return exit_code(code, number)

    for stage, keys in grouped(commands.parts):
        if "after" in keys and stage.run:
            note_run(progress, stage)
        code = do(progress, stage, keys, call, lambda names: Exit.done)
        if code != Exit.done:
            _queue_again(commands.job, place, signals)
            return code
    return Exit.done


def _queue_again(job: Job, place: Topology, signals: Sequence[int]) -> None:
    if signal.SIGUSR2 in signals:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit would queue the job again once more
        task.requeue(job, place, "stopped; what is done of its commands is kept")


def grouped(parts: Sequence[tuple[Stage, str]]) -> list[tuple[Stage, list[str]]]:
    """Return each stage with its keys, in order."""
    found: list[tuple[Stage, list[str]]] = []
    for stage, key in parts:
        if found and found[-1][0].name == stage.name:
            found[-1][1].append(key)
        else:
            found.append((stage, [key]))
    return found


def note_run(progress: Progress, stage: Stage) -> None:
    """Count the time of a stage's run, which was a job of its own, once."""
    known = progress.of(stage)
    summary = try_json(Path(progress.pipeline.folder) / stage.name / paths.SUMMARY)
    if "run_seconds" not in known:
        known["run_seconds"] = float(summary.get("wall_seconds", 0.0))
        known["seconds"] += known["run_seconds"]
