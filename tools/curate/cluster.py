"""Parts of a stage as tasks of a SLURM array, submitted through submitit; the command waits until they are done.

Parts that are there are not done again, so a task that reaches its time limit or loses its node continues where it was.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor

from launcher import queue
from launcher.job import ROOT
from launcher.slurm import clean_environment
from tools.curate.stages import RECORD, Tell, Work, do_part, open_of
from trainers.config.errors import ConfigError
from trainers.rundir.files import try_json, write_json

LOOK_EVERY_S = 1.0
ASK_EVERY_S = 5.0
"""Between two questions to squeue."""
SEEN_S = 20.0
"""For what a task has written to be seen here, through a network's file system, once it has left the queue."""
LAST_LINES = 8


@dataclass(frozen=True)
class Share:
    """What one task of an array does: some of a stage's parts, one after the other."""

    folder: Path
    stage: str
    work: Work
    parts: list[tuple[str, Any]]

    def __call__(self) -> None:
        """Do those that are not there yet."""
        for name, about in open_of(self.folder, self.stage, self.parts):
            do_part(self.folder, self.stage, name, self.work, about)

    def checkpoint(self) -> DelayedSubmission:
        """Let submitit queue the task again when SLURM stops it."""
        return DelayedSubmission(self)


class Cluster:
    """Does the parts of stages by arrays of at most `tasks` tasks; `logs` is where submitit writes, and `options` are sbatch's."""

    def __init__(self, tasks: int, logs: Path, options: Sequence[str]) -> None:
        if "%" in str(logs):
            raise ConfigError("--out", str(logs), "SLURM would take the % for its own in names of logs", "a directory without %")
        for option in options:
            if not option.partition("=")[0]:
                raise ConfigError("--sbatch", option, "names no option of sbatch", "--sbatch partition=cpu")
        self.tasks, self.logs, self.asked = tasks, logs, 0.0
        self.options = {name.lstrip("-"): value or True for name, _, value in (option.partition("=") for option in options)}
        self.record = logs.with_name(RECORD)

    def __enter__(self) -> Cluster:
        cancel(self.record)  # an array of this command when it was killed
        return self

    def __exit__(self, *_: object) -> None:
        cancel(self.record)

    def single(self) -> AbstractContextManager[Cluster]:
        """Return itself: a task is one process, and does its parts one after the other."""
        return nullcontext(self)

    def run(self, folder: Path, stage: str, work: Work, parts: Sequence[tuple[str, Any]], tell: Tell) -> None:
        """Do the parts of a stage that are not there yet, each into folder/stage/NAME; raises ConfigError, and OSError where some fail."""
        folder = folder.resolve()
        todo = open_of(folder, stage, parts)
        tell(stage, len(parts) - len(todo), len(parts))
        if not todo:
            return
        tasks = min(self.tasks, len(todo))
        number = self._submit([Share(folder, stage, work, todo[task::tasks]) for task in range(tasks)])
        left, ended = len(todo), 0.0
        while left:
            time.sleep(LOOK_EVERY_S)
            left = len(open_of(folder, stage, todo))
            tell(stage, len(parts) - left, len(parts))
            if left and ended and time.monotonic() - ended > SEEN_S:
                raise OSError(self._said(stage, left, number))
            ended = ended or self._end(number)
        until = time.monotonic() + SEEN_S
        while time.monotonic() < until and queue.in_queue(number) != {}:  # tasks write how they ended
            time.sleep(LOOK_EVERY_S)
        cancel(self.record)

    def _end(self, number: str) -> float:
        """Return the time if the array has left the queue, else 0; squeue may be busy, and is not asked all the time."""
        if time.monotonic() - self.asked < ASK_EVERY_S:
            return 0.0
        self.asked = time.monotonic()
        return self.asked if queue.in_queue(number) == {} else 0.0

    def _submit(self, shares: list[Share]) -> str:
        """Submit an array with a task for each share; returns its id. Raises ConfigError with SLURM's words where it refuses."""
        setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
        try:
            with clean_environment():
                executor = SlurmExecutor(folder=self.logs)
                executor.update_parameters(
                    job_name="fulltune-curate",
                    nodes=1,
                    ntasks_per_node=1,
                    time=None,
                    wckey=None,
                    stderr_to_stdout=True,
                    setup=setup,
                    array_parallelism=len(shares),
                    additional_parameters={"requeue": True} | self.options,
                )
                with executor.batch():
                    jobs = [executor.submit(share) for share in shares]
        except (FailedJobError, FailedSubmissionError) as error:
            words = [line.strip() for line in str(error).splitlines() if "sbatch: error" in line] or str(error).splitlines()[-1:]
            raise ConfigError(
                "--sbatch", self.options, f"SLURM refuses the array: {'; '.join(words)}", "--sbatch partition=NAME"
            ) from error
        except RuntimeError as error:  # submitit's where srun is not there
            raise ConfigError(
                "--slurm", self.tasks, f"this machine belongs to no SLURM cluster: {error}", "a login node, or --processes"
            ) from error
        number = str(jobs[0].job_id).partition("_")[0]
        self.asked = time.monotonic()
        write_json(self.record, {"id": number})
        return number

    def _said(self, stage: str, left: int, number: str) -> str:
        """Return what is missing, with the end of the log of a task that has not ended as it should."""
        logs = sorted(self.logs.glob(f"{number}_*_log.out"), key=lambda log: log.stat().st_mtime)
        failed = [log for log in logs if "completed successfully" not in log.read_text(errors="replace")] or logs
        lines = [line for line in failed[0].read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:] if failed else []
        about = "\n".join(f"    {line}" for line in lines)
        return f"array {number} has ended, and {left} parts of the stage {stage} are missing; the same command continues\n{about}"


def cancel(record: Path) -> None:
    """End the array that was submitted last by a command which left this record, where it is still in the queue."""
    if number := try_json(record).get("id"):
        queue.ask("scancel", "--quiet", str(number))
        record.unlink()
