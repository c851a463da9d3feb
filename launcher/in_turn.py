"""The stages of a pipeline one after another on this machine: what is done already is left out."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher import local, process, slurm
from launcher.config import LaunchConfig
from launcher.freeze import freeze, require_joinable
from launcher.job import Job, only_launcher
from launcher.meshes import settled
from launcher.progress import Progress, explained_by, require_same_run
from launcher.stage_checks import compose_stage, environment
from launcher.stages import MADE_OF_TWO, Pipeline, Stage, command_words, names_of, outputs
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.config.secrets import masked
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import try_json
from trainers.units import in_time

GATE = "gate.json"
"""In a run's evaluation: what `gate` has decided."""


def run(progress: Progress, config_dir: str | None) -> int:
    """Do the stages that are not done, in order; returns the exit code of the one that ends it, else 0."""
    pipeline = progress.pipeline
    forget_wandb_id()
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with only_launcher(place_of(pipeline)) as lock:
        progress.write()
        for stage in pipeline.stages:
            if progress.is_done(stage):
                say(f"{pipeline.place(stage)}: is done already, in {in_time(progress.state[stage.name]['seconds'])}")
                continue
            code = do(
                progress,
                stage,
                ("before", "run", "after"),
                lambda words: _call(words, lock),
                functools.partial(_run, pipeline, stage, config_dir),
            )
            if code != Exit.done:
                return code
    total = sum(known["seconds"] for known in progress.state.values())
    say(f"pipeline {pipeline.name}: {len(pipeline.stages)} stages in {in_time(total)}, {in_time(time.monotonic() - began)} of it now")
    return Exit.done


def forget_wandb_id() -> None:
    """Drop a W&B id of one run from the environment, and say so."""
    if chosen := os.environ.pop("WANDB_RUN_ID", ""):
        print(f"WANDB_RUN_ID={chosen} is not used: each stage of a pipeline is a W&B run of its own", file=sys.stderr, flush=True)


def place_of(pipeline: Pipeline) -> Job:
    """Return the pipeline's directory as what a launcher locks."""
    return Job(RunConfig(), LaunchConfig(), pipeline.folder)


def do(
    progress: Progress, stage: Stage, keys: Sequence[str], call: Callable[[list[str]], int], train: Callable[[dict[str, str]], int]
) -> int:
    """Do what is left of a stage, of `keys` alone; returns 0, or the exit code that ends the pipeline here.

    `call` runs a tool by its words and `train` the stage's run, with what names in braces mean.
    """
    pipeline, verb = progress.pipeline, "continues" if stage.name in progress.state else "begins"
    known, began = progress.of(stage), time.monotonic()
    names = names_of(pipeline.stages, stage, pipeline.folder)
    spent = known["seconds"]

    def keep() -> None:
        known["seconds"] = spent + time.monotonic() - began
        progress.write()

    steps: list[tuple[str, Callable[[], int]]] = []
    for key in keys:
        if key == "run" and stage.run:
            steps.append(("run", lambda: train(names)))
        elif key != "run":
            steps += _commands(progress, stage, key, names, call)
    say(f"{pipeline.place(stage)}: {verb}")
    progress.write()
    for words, step in steps:
        say(f"{pipeline.place(stage)}: {masked(words)}")
        try:
            verdict = _verdict(words, names)
            code = step()
        finally:
            keep()
        if code != Exit.done:
            say(_ended(pipeline, stage, masked(words), code, _verdict(words, names) not in (verdict, None)))
            return code
    if "after" in keys:
        known["ended"] = time.time()
        keep()
        say(f"{pipeline.place(stage)}: done in {in_time(known['seconds'])}")
    return Exit.done


def _verdict(command: str, names: dict[str, str]) -> int | None:
    """Return when the run that a `gate` holds against rules was last refused, in ns; None where it was not, and for other commands."""
    if not command.startswith("gate "):
        return None
    for word in command_words(command, names, "gate")[1:]:
        file = Path(word) / paths.EVALUATION / GATE
        if try_json(file).get("passed") is False:
            return file.stat().st_mtime_ns
    return None


def _ended(pipeline: Pipeline, stage: Stage, words: str, code: int, is_refused: bool) -> str:
    """Say where a pipeline ended, and what continues it; `is_refused` of a model that a gate has just decided against."""
    where = pipeline.place(stage)
    if code in (Exit.stopped, Exit.interrupted):
        return f"{where}: stopped; the same command continues here"
    if is_refused and code == Exit.failed:
        return f"{where}: the gate lets the model go no further ({words}); pipeline {pipeline.name} ends here"
    return f"{where}: {words} failed with exit code {code}; the same command tries it again"


def _commands(
    progress: Progress, stage: Stage, key: str, names: dict[str, str], call: Callable[[list[str]], int]
) -> list[tuple[str, Callable[[], int]]]:
    """Return the commands that are not done; each is noted once it is."""
    pipeline, known = progress.pipeline, progress.of(stage)
    left = progress.undone(stage, key)
    del known[key][len(getattr(stage, key)) - len(left) :]

    def step(command: str) -> Callable[[], int]:
        def now() -> int:
            words = command_words(command, names, pipeline.setting(stage, key))
            _make_room(pipeline, words)
            code = call(words)
            if code == Exit.done:
                known[key].append(command)
            return code

        return now

    return [(command, step(command)) for command in left]


def _make_room(pipeline: Pipeline, words: list[str]) -> None:
    """Make the folders that a command writes to in the pipeline's directory, and remove there what a `merge` that was stopped has left.

    `merge` writes to an empty directory alone, and is not done before it has compared the models.
    """
    folder, written = pipeline.folder.resolve(), outputs(words)
    for path in (Path(name).resolve() for name in written):
        if path.is_relative_to(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
    if words[0] == MADE_OF_TWO and written:
        path, given = Path(written[-1]).resolve(), words[1:]
        given.remove(written[-1])
        exports = [folder / stage.name / paths.EXPORT for stage in pipeline.stages]
        kept = [folder, *exports, *(Path(part).resolve() for word in given for part in (word, word.rpartition("=")[0]) if part)]
        is_ours = path.is_relative_to(folder) and not any(path.is_relative_to(export) for export in exports)
        if is_ours and (path / "config.json").is_file() and not any(other.is_relative_to(path) for other in kept):
            say(f"{path}: is removed, since the merge that wrote it did not end, or is to be done again")
            shutil.rmtree(path)


def _call(words: list[str], lock: int) -> int:
    """Run a tool to its end; returns its exit code, or that of the signal that stopped it."""
    sys.stdout.flush()
    code, signalled = process.run(line_of(words), environment(), shutdown_s=60, keep_open=(lock,))
    return exit_code(code, signalled)


def exit_code(code: int, signalled: int | None) -> int:
    """Return the exit code of a tool that ended with `code`, or of the signal that stopped it."""
    if signalled is not None:
        return Exit.interrupted if signalled == signal.SIGINT else Exit.stopped
    return Exit.failed if code < 0 else code


def line_of(words: list[str]) -> list[str]:
    """Return the command line of a tool."""
    return [sys.executable, "-m", f"tools.{words[0]}", *words[1:]]


def _run(pipeline: Pipeline, stage: Stage, config_dir: str | None, names: dict[str, str]) -> int:
    """Start a stage's run or continue it; returns the exit code of a launcher."""
    [job] = settled([compose_stage(pipeline, stage, names, config_dir)])
    if read_state(job.run_dir) == State.done:
        require_same_run(pipeline, stage, job)
        return Exit.done
    try:
        with explained_by(pipeline, stage):
            slurm.require_free(job)
            require_joinable(job)
            freeze(job)
            return local.submit(job)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Exit.bad_input


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)
