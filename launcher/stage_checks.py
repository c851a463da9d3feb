"""What is checked of all stages before the first begins: settings, files and commands.

What a later stage will find is stood in for by files of the same names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from launcher import process
from launcher.compose import UnknownSettingError, checked, message_of
from launcher.config import Backend, JobConfig, validate_machine
from launcher.errors import BAD_INPUT
from launcher.job import ROOT, Job, frozen_text, make_job
from launcher.origin import shown
from launcher.presets import CONF
from launcher.progress import Progress, require_same_run
from launcher.stages import MADE_OF_TWO, Pipeline, Stage, command_words, filled_override, key_of, names_of, outputs
from trainers.config.derived import OF_THE_MODEL
from trainers.config.errors import ConfigError
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.ending import Exit


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
                job = compose_stage(pipeline, stage, names, config_dir, jobs[0][1].launch.backend if jobs else None)
                if done:
                    require_same_run(pipeline, stage, job)
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


def compose_stage(pipeline: Pipeline, stage: Stage, names: dict[str, str], config_dir: str | None, backend: Backend | None = None) -> Job:
    """Return the job of a stage, in its own directory; bad input prints one message that names the stage and raises SystemExit(2).

    `backend` is that of the stages before it.
    """
    overrides = overrides_of(pipeline, stage, names)
    searched = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    with explained(pipeline, stage, overrides, names["dir"], config_dir):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = checked(hydra.compose("config", [*overrides, *searched]))
        require_backend(config, backend)
        if pipeline.mode == "run":
            validate_machine(config.launch)
    given = {key_of(text) for text in stage.run}
    own_name = config.name if "name" in given else f"{pipeline.name}_{stage.name}"
    log = dataclasses.replace(config.log, group=config.log.group or pipeline.folder.name)
    config = dataclasses.replace(config, run_dir=str(pipeline.folder / stage.name), name=own_name, log=log)
    return make_job(config)


def require_backend(config: JobConfig, before: Backend | None) -> None:
    """Raise ConfigError for a backend that a pipeline does not run on, or that an earlier stage has not."""
    backend = config.launch.backend
    if backend is Backend.torchrun:
        reason = "a pipeline runs its stages on this machine, or as jobs of SLURM"
        raise ConfigError(
            "launch.backend",
            str(backend),
            reason,
            "launch=local or launch=slurm, or each stage as a run of its own with model.id=OLD/export",
        )
    if before is not None and backend is not before:
        reason = f"an earlier stage has {before}, and all stages of a pipeline have one backend"
        raise ConfigError("launch.backend", str(backend), reason, f"launch={before} for all stages, or another one for all")


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
