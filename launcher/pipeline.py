"""+pipeline=NAME: stages one after another, each from what the one before has exported; the same command continues it.

All stages are checked before the first begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path

from launcher import chain, in_turn, local, plan
from launcher.config import Backend
from launcher.job import Job, frozen_text
from launcher.meshes import settled
from launcher.origin import shown
from launcher.progress import Progress, require_unchanged
from launcher.stage_checks import check
from launcher.stages import RECORD, Pipeline, Stage, command_words, key_of, names_of, read, read_record
from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig
from trainers.rundir.ending import Exit
from trainers.rundir.files import storage_says


def main(arguments: argparse.Namespace) -> int:
    """Run, plan or print the pipeline of a command line; returns the exit code."""
    try:
        require_alone(arguments)
        pipeline = read(arguments.overrides, arguments.config_dir)
        return begin(pipeline, arguments.config_dir)
    except KeyboardInterrupt:
        return Exit.interrupted
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.bad_input
    except OSError as error:
        if (said := storage_says(error, Path.cwd())) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return Exit.failed


def require_alone(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for Hydra's flags that are of one run, or of a sweep."""
    for flag in ("multirun", "cfg", "info", "resolve", "package"):
        if getattr(arguments, flag, None):
            remedy = "without it; mode=dry_run prints every stage's settings and commands"
            raise ConfigError(f"--{flag}", getattr(arguments, flag), "is of runs, and this command line names a pipeline", remedy)


def begin(pipeline: Pipeline, config_dir: str | None) -> int:
    """Check all stages, then do what the mode asks for; returns the exit code."""
    progress = Progress(pipeline, read_record(pipeline.folder).get("state", {}))
    require_place(pipeline)
    require_unchanged(progress)
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        stand_in = Path(folder) / pipeline.folder.name
        try:
            jobs = check(progress, stand_in, config_dir)
            if pipeline.mode == "plan":
                return plan_stages(jobs, stand_in)
            if on_slurm(jobs):
                planned = chain.planned(progress, with_a_model(jobs, stand_in))
        except ConfigError as error:  # of files that will be there
            raise ConfigError(*(str(part).replace(str(stand_in), str(pipeline.folder)) for part in _parts(error))) from error
    if on_slurm(jobs):
        made = [(stage, chain.in_place(job, like, stand_in, pipeline.folder)) for (stage, job), like in zip(jobs, planned, strict=True)]
        if pipeline.mode == "dry_run":
            print(chain.dry_run(pipeline, made))
            return Exit.done
        return chain.submit(progress, made)
    if pipeline.mode == "dry_run":
        print(dry_run(pipeline, jobs).replace(str(stand_in), str(pipeline.folder)))
        return Exit.done
    chain.require_nothing_queued(pipeline)
    return in_turn.run(progress, config_dir)


def on_slurm(jobs: list[tuple[Stage, Job]]) -> bool:
    """Tell whether the stages are jobs of a SLURM cluster: all are, or none."""
    return bool(jobs) and jobs[0][1].launch.backend is Backend.slurm


def require_place(pipeline: Pipeline) -> None:
    """Raise ConfigError where the pipeline's directory is something else."""
    folder = pipeline.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run_dir", str(folder), "is a file", f"run_dir={folder}-new")
    if folder.is_dir() and not (folder / RECORD).exists():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _names(pipeline))
        if others:
            reason = f"exists and is not the directory of a pipeline: it holds {', '.join(others[:5])}"
            raise ConfigError("run_dir", str(folder), reason, f"run_dir={folder}-new")
    if (known := read_record(folder).get("pipeline")) not in (None, pipeline.name):
        raise ConfigError(
            "run_dir", str(folder), f"is the directory of the pipeline `{known}`", f"run_dir={folder}-new, or +pipeline={known}"
        )


def _names(pipeline: Pipeline) -> set[str]:
    """Return the folders that a plan may have made."""
    return {stage.name for stage in pipeline.stages if stage.run}


def dry_run(pipeline: Pipeline, jobs: list[tuple[Stage, Job]]) -> str:
    """Return every stage's frozen config and commands, as text."""
    lines = [f"# pipeline {pipeline.name}, {shown(pipeline.file)}, in {pipeline.folder}"]
    of_stage = {stage.name: job for stage, job in jobs}
    for stage in pipeline.stages:
        lines += ["", f"# {pipeline.place(stage)}"]
        names = names_of(pipeline.stages, stage, pipeline.folder)
        for key in ("before", "run", "after"):
            if key == "run" and stage.run:
                job = of_stage[stage.name]
                lines += [f"# {job.config_path}", frozen_text(job.run), *local.commands(job)]
            elif key != "run":
                lines += [shlex.join(in_turn.line_of(command_words(command, names, key))) for command in getattr(stage, key)]
    return "\n".join(lines)


def plan_stages(jobs: list[tuple[Stage, Job]], stand_in: Path) -> int:
    """Plan every stage; returns the exit code, raises ConfigError where no stage has a run."""
    if not jobs:
        raise ConfigError("mode", "plan", "no stage of this pipeline has a run to plan", "mode=dry_run, which prints its commands")
    return plan.plan(settled(with_a_model(jobs, stand_in)))


def with_a_model(jobs: list[tuple[Stage, Job]], stand_in: Path) -> list[Job]:
    """Return the jobs of stages as they may be planned: those that begin with what an earlier one gives with the first one's model.

    It has the same shapes.
    """
    first: ModelConfig = jobs[0][1].run.model
    found = []
    for stage, job in jobs:
        is_last_export = "model.id" not in {key_of(text) for text in stage.run}
        is_made_here = job.run.model.id is not None and Path(job.run.model.id).is_relative_to(stand_in)
        model = first if is_last_export or is_made_here else job.run.model
        found.append(dataclasses.replace(job, run=dataclasses.replace(job.run, model=model)))
    return found


def _parts(error: ConfigError) -> tuple[str, object, str, str]:
    return error.path, error.value, error.reason, error.remedy
