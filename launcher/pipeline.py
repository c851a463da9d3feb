"""+pipeline=NAME: stages one after another, each from what the one before has exported; the same command continues it.

All stages are checked before the first begins. What a later stage will find is stood in for by files of the same names.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from launcher import local, plan, process, slurm
from launcher.compose import UnknownSettingError, checked, message_of
from launcher.config import Backend, JobConfig, validate_machine
from launcher.errors import BAD_INPUT
from launcher.freeze import freeze, joining, require_joinable
from launcher.job import ROOT, Job, command_line, frozen_text, make_job, only_launcher
from launcher.meshes import settled
from launcher.origin import shown
from launcher.presets import CONF
from launcher.stages import (
    MADE_OF_TWO,
    RECORD,
    Pipeline,
    Stage,
    command_words,
    filled_override,
    key_of,
    names_of,
    outputs,
    read,
    read_record,
)
from trainers.config.derived import OF_THE_MODEL
from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig
from trainers.config.secrets import mask, masked
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import storage_says, try_json, write_json
from trainers.units import in_time

GATE = "gate.json"
"""In a run's evaluation: what `gate` has decided."""


@dataclass
class Progress:
    """What is known of a pipeline's stages, in its directory."""

    pipeline: Pipeline
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each stage that has begun, by name: when, for how many seconds it was at work, and which of its commands are done."""

    def of(self, stage: Stage) -> dict[str, Any]:
        """Return what is known of a stage, to be changed."""
        return self.state.setdefault(stage.name, {"began": time.time(), "seconds": 0.0, "before": [], "after": []})

    def is_done(self, stage: Stage) -> bool:
        """Tell whether a stage has ended and its run is still there."""
        known = self.state.get(stage.name, {})
        return "ended" in known and (not stage.run or read_state(self.pipeline.folder / stage.name) == State.done)

    def write(self) -> None:
        """Keep it."""
        about = {"pipeline": self.pipeline.name, "file": shown(self.pipeline.file), "command": command_line()}
        stages = [stage.as_json() for stage in self.pipeline.stages]
        write_json(self.pipeline.folder / RECORD, mask(about | {"stages": stages, "state": self.state}))


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
        except ConfigError as error:  # of files that will be there
            raise ConfigError(*(str(part).replace(str(stand_in), str(pipeline.folder)) for part in _parts(error))) from error
        if pipeline.mode == "dry_run":
            print(dry_run(pipeline, jobs).replace(str(stand_in), str(pipeline.folder)))
            return Exit.done
        if pipeline.mode == "plan":
            return plan_stages(pipeline, jobs, stand_in)
    return run(progress, config_dir)


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


def require_unchanged(progress: Progress) -> None:
    """Raise ConfigError where a stage that is done has other words now, or has to be done again under those after it.

    Forgets stages whose runs are gone.
    """
    pipeline = progress.pipeline
    folder = pipeline.folder
    known = {item["name"]: item for item in read_record(folder).get("stages", [])}
    begun = [name for name in known if name in progress.state]
    for number, name in enumerate(begun):
        now = pipeline.stages[number].name if number < len(pipeline.stages) else "nothing"
        if now != name:
            reason = f"stage {number + 1} was `{name}` when it began, and is `{now}` now"
            raise ConfigError("run_dir", str(folder), reason, f"the stages in their order, or run_dir={folder}-new")
    again = ""
    for stage in pipeline.stages:
        there = stage.run and (folder / stage.name / paths.CONFIG).exists()
        if again and stage.name in progress.state:
            if there:
                reason = f"stage `{again}` is to be done, and `{stage.name}` was made from what it gave before"
                raise ConfigError("run_dir", str(folder), reason, _removal(pipeline, stage))
            del progress.state[stage.name]
        elif progress.is_done(stage) and not stage.run and _is_free(progress, stage):
            again = stage.name
            del progress.state[stage.name]
        elif progress.is_done(stage):
            _require_same_words(pipeline, stage, known[stage.name], progress.state[stage.name])
        elif not again:
            again = stage.name
            if "ended" in progress.state.get(stage.name, {}) or (
                stage.run and not there and progress.state.get(stage.name, {}).get("after")
            ):
                del progress.state[stage.name]


def _require_same_words(pipeline: Pipeline, stage: Stage, known: dict[str, Any], done: dict[str, Any]) -> None:
    for key in ("before", "after"):
        was, now = mask(done[key]), mask(getattr(stage, key))  # as they are kept
        if was != now:
            lines = [f"    - {line}" for line in was if line not in now] + [f"    + {line}" for line in now if line not in was]
            reason = "\n".join([f"stage `{stage.name}` is done with other commands", *(lines or ["    in another order"])])
            raise ConfigError(pipeline.setting(stage, key), str(pipeline.folder), reason, _remedy(pipeline, stage))


def _remedy(pipeline: Pipeline, stage: Stage) -> str:
    removal = _removal(pipeline, stage)
    again = f", or {removal} to do it and what follows again" if removal else ""
    return f"what it was done with, or run_dir={pipeline.folder}-new{again}"


def _removal(pipeline: Pipeline, stage: Stage) -> str:
    """Return the command that removes what a stage and those after it have made and would not write over; empty where nothing is there.

    That is their runs, and answers: `sample` keeps those that another model has given.
    """
    following = pipeline.stages[pipeline.stages.index(stage) :]
    state = read_record(pipeline.folder).get("state", {})
    found = [pipeline.folder / other.name for other in following if other.run]
    for other in following:
        known, names = state.get(other.name, {}), names_of(pipeline.stages, other, pipeline.folder)
        for command in (*known.get("before", []), *known.get("after", []), *other.before, *other.after):
            with contextlib.suppress(ConfigError):  # of a stage that is gone
                words = command_words(command, names, "")
                answers = [Path(out) for out in outputs(words) if words[0] == "sample"]
                found += [Path(f"{out}{more}") for out in answers if out.is_relative_to(pipeline.folder) for more in ("", ".part")]
    there = [shlex.quote(str(path)) for path in dict.fromkeys(found) if path.exists()]
    return f"rm -r {' '.join(there)}" if there else ""


def _is_free(progress: Progress, stage: Stage) -> bool:
    """Tell whether a stage of commands alone has other words now, and no later run was made from what they gave."""
    pipeline, done = progress.pipeline, progress.state[stage.name]
    same = all(mask(done[key]) == mask(getattr(stage, key)) for key in ("before", "after"))
    later = pipeline.stages[pipeline.stages.index(stage) + 1 :]
    return not same and not any(other.run and (pipeline.folder / other.name / paths.CONFIG).exists() for other in later)


def check(progress: Progress, stand_in: Path, config_dir: str | None) -> list[tuple[Stage, Job]]:
    """Return the runs of all stages, composed and checked; what is not there yet is in `stand_in`. Raises ConfigError, or SystemExit(2).

    Commands are read by their tools' own parsers, in a process of its own, which may load more than a login node should.
    """
    pipeline, asked = progress.pipeline, []
    jobs: list[tuple[Stage, Job]] = []
    origin = ""
    for stage in pipeline.stages:
        done = progress.is_done(stage)
        then = names_of(pipeline.stages, stage, stand_in)
        names = names_of(pipeline.stages, stage, pipeline.folder) if done else then
        for key in ("before", "run", "after"):
            if key == "run" and stage.run:
                _require_model(pipeline, stage, jobs)
                job = compose_stage(pipeline, stage, names, config_dir)
                if done:
                    _require_same_run(pipeline, stage, job)
                origin = str(pipeline.folder / stage.name / paths.EXPORT) if done else origin or job.run.model.id or ""
                _stand_in_run(stand_in / stage.name, job, origin)
                jobs.append((stage, job))
            elif key != "run":
                for number, command in enumerate(getattr(stage, key)):
                    setting = f"{pipeline.setting(stage, key)}[{number}]"
                    words = command_words(command, then, setting)
                    if not done:
                        _require_inputs(words, stand_in, setting, command)
                        asked.append({"setting": setting, "command": command, "words": words})
                    _stand_in_outputs(words, stand_in)
    if asked:
        require_commands(asked)
    return jobs


def overrides_of(pipeline: Pipeline, stage: Stage, names: dict[str, str]) -> list[str]:
    """Return the overrides of a stage's run: from the second on it begins with the last export, unless it names a model."""
    keys = {key_of(text) for text in stage.run}
    given = [filled_override(text, names, pipeline.setting(stage, "run")) for text in stage.run]
    if "model" in names and "model.id" not in keys:
        given += [] if "model" in keys else ["model=hf"]
        given.append(filled_override("model.id={model}", names, pipeline.setting(stage, "run")))
    return given


def compose_stage(pipeline: Pipeline, stage: Stage, names: dict[str, str], config_dir: str | None) -> Job:
    """Return the job of a stage, in its own directory; bad input prints one message that names the stage and raises SystemExit(2)."""
    overrides = overrides_of(pipeline, stage, names)
    searched = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    with explained(pipeline, stage, overrides, names["dir"], config_dir):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = checked(hydra.compose("config", [*overrides, *searched]))
        require_local(config)
        if pipeline.mode == "run":
            validate_machine(config.launch)
    given = {key_of(text) for text in stage.run}
    own_name = config.name if "name" in given else f"{pipeline.name}_{stage.name}"
    log = dataclasses.replace(config.log, group=config.log.group or pipeline.folder.name)
    config = dataclasses.replace(config, run_dir=str(pipeline.folder / stage.name), name=own_name, log=log)
    return make_job(config)


def require_local(config: JobConfig) -> None:
    """Raise ConfigError for a backend that a pipeline does not run on."""
    if config.launch.backend is not Backend.local:
        reason = "a pipeline runs its stages one after another on this machine"
        raise ConfigError(
            "launch.backend", str(config.launch.backend), reason, "launch=local, or each stage as a run of its own with model.id=OLD/export"
        )


@contextlib.contextmanager
def explained(pipeline: Pipeline, stage: Stage, overrides: list[str], folder: str, config_dir: str | None) -> Iterator[None]:
    """Turn errors of a stage's settings into one message that names it, and exit code 2."""
    try:
        yield
    except (*BAD_INPUT, UnknownSettingError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        said = message_of(error, overrides, config_dir).replace(folder, str(pipeline.folder))
        said = said.replace("command line:", f"{shown(pipeline.file)}, stage {stage.name}, or the command line:")
        began = "" if folder == str(pipeline.folder) else "; nothing was started"
        print(f"{said}\n  in      {pipeline.place(stage)}{began}", file=sys.stderr)
        raise SystemExit(Exit.bad_input) from None


def _require_model(pipeline: Pipeline, stage: Stage, jobs: list[tuple[Stage, Job]]) -> None:
    """Refuse a stage that would begin with an adapter as if it were a model."""
    named = {key_of(text) for text in stage.run}
    if jobs and "model.id" not in named and jobs[-1][1].run.peft.method not in OF_THE_MODEL:
        before, job = jobs[-1]
        reason = f"begins with the export of `{before.name}`, which is an adapter (peft.method={job.run.peft.method})"
        remedy = f"before: ['merge {{{before.name}}}/export {{dir}}/{before.name}_merged'] and run: [model.id={{dir}}/{before.name}_merged]"
        raise ConfigError(pipeline.setting(stage, "run"), " ".join(stage.run), reason, remedy)


def _require_same_run(pipeline: Pipeline, stage: Stage, job: Job) -> None:
    """Raise ConfigError where the settings of a run that is done are not those that it was done with."""
    try:
        found = joining(job)
    except ConfigError as error:
        raise ConfigError(
            pipeline.setting(stage, "run"), error.value, f"stage `{stage.name}` {error.reason}", _remedy(pipeline, stage)
        ) from error
    if found.extended_from is not None:
        lines = "\n".join(f"    {line}" for line in found.changed)
        reason = f"stage `{stage.name}` is done, and would become longer\n{lines}"
        raise ConfigError(pipeline.setting(stage, "run"), str(job.run_dir), reason, _remedy(pipeline, stage))


def _stand_in_run(folder: Path, job: Job, origin: str) -> None:
    """Make what of a run a later stage's settings look for: its directory, with an export of the same architecture."""
    export = folder / paths.EXPORT
    export.mkdir(parents=True)
    config: dict[str, Any] = dict(job.run.model.architecture)
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(origin) / "config.json").read_text("utf-8"))
    (export / "config.json").write_text(json.dumps(config or {"model_type": "llama"}), "utf-8")
    (folder / paths.CONFIG).write_text(frozen_text(job.run), "utf-8")


def _require_inputs(words: list[str], stand_in: Path, setting: str, command: str) -> None:
    """Refuse a path below the pipeline's directory that nothing before has written."""
    for word in set(words) - set(outputs(words)):
        path = word.partition("=")[2] if word.startswith("--") else word
        if path.startswith(str(stand_in)) and not Path(path).exists():
            name = path.replace(str(stand_in), "{dir}")
            raise ConfigError(setting, command, f"nothing before it writes {name}", "what an earlier command has after --out")


def _stand_in_outputs(words: list[str], stand_in: Path) -> None:
    for path in map(Path, outputs(words)):
        if not path.is_relative_to(stand_in):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if words[0] == MADE_OF_TWO:
            path.mkdir(exist_ok=True)
            (path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
        else:
            path.touch()


def require_commands(asked: list[dict[str, Any]]) -> None:
    """Raise ConfigError for the first command whose tool would refuse its words."""
    line = [sys.executable, "-m", "tools.commands"]
    child = subprocess.Popen(
        line,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=prepare_child(),
    )
    try:
        said, _ = child.communicate(json.dumps(asked))
    finally:
        child.kill()
        child.wait()
    if child.returncode == Exit.bad_input:
        raise ConfigError(**json.loads(said))
    if child.returncode:
        raise RuntimeError(f"tools.commands ended with exit code {child.returncode}, as it says above")


def environment() -> dict[str, str]:
    """Return the environment of a command."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name not in process.leftovers()}
    return kept | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


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
                lines += [shlex.join(_line(command_words(command, names, key))) for command in getattr(stage, key)]
    return "\n".join(lines)


def _line(words: list[str]) -> list[str]:
    return [sys.executable, "-m", f"tools.{words[0]}", *words[1:]]


def plan_stages(pipeline: Pipeline, jobs: list[tuple[Stage, Job]], stand_in: Path) -> int:
    """Plan every stage: one that begins with what an earlier one gives with the first one's model, whose shapes that has.

    Returns the exit code; raises ConfigError where no stage has a run.
    """
    if not jobs:
        raise ConfigError("mode", "plan", "no stage of this pipeline has a run to plan", "mode=dry_run, which prints its commands")
    first: ModelConfig = jobs[0][1].run.model
    planned = []
    for stage, job in jobs:
        is_last_export = "model.id" not in {key_of(text) for text in stage.run}
        is_made_here = job.run.model.id is not None and Path(job.run.model.id).is_relative_to(stand_in)
        model = first if is_last_export or is_made_here else job.run.model
        planned.append(dataclasses.replace(job, run=dataclasses.replace(job.run, model=model)))
    return plan.plan(settled(planned))


def run(progress: Progress, config_dir: str | None) -> int:
    """Do the stages that are not done, in order; returns the exit code of the one that ends it, else 0."""
    pipeline = progress.pipeline
    if chosen := os.environ.pop("WANDB_RUN_ID", ""):
        print(f"WANDB_RUN_ID={chosen} is not used: each stage of a pipeline is a W&B run of its own", file=sys.stderr, flush=True)
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with only_launcher(_place_of(pipeline)) as lock:
        progress.write()
        for stage in pipeline.stages:
            if progress.is_done(stage):
                _say(f"{pipeline.place(stage)}: is done already, in {in_time(progress.state[stage.name]['seconds'])}")
                continue
            code = _do(progress, stage, config_dir, lock)
            if code != Exit.done:
                return code
    total = sum(known["seconds"] for known in progress.state.values())
    _say(f"pipeline {pipeline.name}: {len(pipeline.stages)} stages in {in_time(total)}, {in_time(time.monotonic() - began)} of it now")
    return Exit.done


def _place_of(pipeline: Pipeline) -> Job:
    """Return the pipeline's directory as what a launcher locks."""
    from launcher.config import LaunchConfig
    from trainers.config.schema import RunConfig

    return Job(RunConfig(), LaunchConfig(), pipeline.folder)


def _do(progress: Progress, stage: Stage, config_dir: str | None, lock: int) -> int:
    """Do what is left of a stage; returns 0, or the exit code that ends the pipeline here."""
    pipeline, verb = progress.pipeline, "continues" if stage.name in progress.state else "begins"
    known, began = progress.of(stage), time.monotonic()
    names = names_of(pipeline.stages, stage, pipeline.folder)
    spent = known["seconds"]

    def keep() -> None:
        known["seconds"] = spent + time.monotonic() - began
        progress.write()

    steps: list[tuple[str, Callable[[], int]]] = []
    for key in ("before", "run", "after"):
        if key == "run" and stage.run:
            steps.append(("run", lambda: _run(pipeline, stage, names, config_dir)))
        elif key != "run":
            steps += _commands(pipeline, stage, key, known, names, lock)
    _say(f"{pipeline.place(stage)}: {verb}")
    progress.write()
    for words, step in steps:
        _say(f"{pipeline.place(stage)}: {masked(words)}")
        try:
            verdict = _verdict(words, names)
            code = step()
        finally:
            keep()
        if code != Exit.done:
            _say(_ended(pipeline, stage, masked(words), code, _verdict(words, names) not in (verdict, None)))
            return code
    known["ended"] = time.time()
    keep()
    _say(f"{pipeline.place(stage)}: done in {in_time(known['seconds'])}")
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
    pipeline: Pipeline, stage: Stage, key: str, known: dict[str, Any], names: dict[str, str], lock: int
) -> list[tuple[str, Callable[[], int]]]:
    """Return the commands that are not done; what follows one that has other words now is done again."""
    wanted: list[str] = getattr(stage, key)
    pairs = zip(mask(wanted), mask(known[key]), strict=False)  # as they are kept
    same = next((number for number, (now, was) in enumerate(pairs) if now != was), None)
    done = min(len(wanted), len(known[key])) if same is None else same
    del known[key][done:]

    def step(command: str) -> Callable[[], int]:
        def call() -> int:
            words = command_words(command, names, pipeline.setting(stage, key))
            _make_room(pipeline, words)
            code = _call(words, lock)
            if code == Exit.done:
                known[key].append(command)
            return code

        return call

    return [(command, step(command)) for command in wanted[done:]]


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
            _say(f"{path}: is removed, since the merge that wrote it did not end, or is to be done again")
            shutil.rmtree(path)


def _call(words: list[str], lock: int) -> int:
    """Run a tool to its end; returns its exit code, or that of the signal that stopped it."""
    sys.stdout.flush()
    code, signalled = process.run(_line(words), environment(), shutdown_s=60, keep_open=(lock,))
    if signalled is not None:
        return Exit.interrupted if signalled == signal.SIGINT else Exit.stopped
    return Exit.failed if code < 0 else code


def _run(pipeline: Pipeline, stage: Stage, names: dict[str, str], config_dir: str | None) -> int:
    """Start a stage's run or continue it; returns the exit code of a launcher."""
    [job] = settled([compose_stage(pipeline, stage, names, config_dir)])
    if read_state(job.run_dir) == State.done:
        _require_same_run(pipeline, stage, job)
        return Exit.done
    try:
        slurm.require_free(job)
        require_joinable(job)
        freeze(job)
        return local.submit(job)
    except ConfigError as error:
        remedy = _remedy(pipeline, stage) if "run_dir=" in error.remedy else error.remedy
        path = pipeline.setting(stage, "run") if error.path == "run_dir" else error.path
        print(f"error: {ConfigError(path, error.value, error.reason, remedy)}", file=sys.stderr, flush=True)
        return Exit.bad_input


def _parts(error: ConfigError) -> tuple[str, object, str, str]:
    return error.path, error.value, error.reason, error.remedy


def _say(text: str) -> None:
    print(text, flush=True)
