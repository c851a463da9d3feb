"""What is done of a pipeline's stages, as its directory says, and what may not change under them."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.freeze import joining
from launcher.job import Job, command_line
from launcher.origin import shown
from launcher.stages import RECORD, Pipeline, Stage, command_words, names_of, outputs, read_record
from trainers.config.errors import ConfigError
from trainers.config.secrets import mask
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.ending import State
from trainers.rundir.files import write_json


@dataclass
class Progress:
    """What is known of a pipeline's stages, in its directory."""

    pipeline: Pipeline
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each stage that has begun, by name: when, for how many seconds it was at work, and which of its commands are done."""
    command: list[str] = field(default_factory=command_line)

    def of(self, stage: Stage) -> dict[str, Any]:
        """Return what is known of a stage, to be changed."""
        return self.state.setdefault(stage.name, {"began": time.time(), "seconds": 0.0, "before": [], "after": []})

    def is_done(self, stage: Stage) -> bool:
        """Tell whether a stage has ended and its run is still there."""
        known = self.state.get(stage.name, {})
        return "ended" in known and (not stage.run or read_state(self.pipeline.folder / stage.name) == State.done)

    def undone(self, stage: Stage, key: str) -> list[str]:
        """Return the commands that are not done; what follows one that has other words now is done again."""
        wanted, known = getattr(stage, key), self.state.get(stage.name, {}).get(key, [])
        pairs = zip(mask(wanted), mask(known), strict=False)  # as they are kept
        same = next((number for number, (now, was) in enumerate(pairs) if now != was), min(len(wanted), len(known)))
        return list(wanted[same:])

    def read(self) -> None:
        """Take what its directory says now: jobs of SLURM may have written it."""
        self.state = read_record(self.pipeline.folder).get("state", {})

    def write(self) -> None:
        """Keep it."""
        about = {"pipeline": self.pipeline.name, "file": shown(self.pipeline.file), "command": self.command}
        stages = [stage.as_json() for stage in self.pipeline.stages]
        write_json(self.pipeline.folder / RECORD, mask(about | {"stages": stages, "state": self.state}))


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
                raise ConfigError("run_dir", str(folder), reason, removal(pipeline, stage))
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
            raise ConfigError(pipeline.setting(stage, key), str(pipeline.folder), reason, remedy_of(pipeline, stage))


def require_same_run(pipeline: Pipeline, stage: Stage, job: Job) -> None:
    """Raise ConfigError where the settings of a run that is done are not those that it was done with."""
    try:
        found = joining(job)
    except ConfigError as error:
        raise ConfigError(
            pipeline.setting(stage, "run"), error.value, f"stage `{stage.name}` {error.reason}", remedy_of(pipeline, stage)
        ) from error
    if found.extended_from is not None:
        lines = "\n".join(f"    {line}" for line in found.changed)
        reason = f"stage `{stage.name}` is done, and would become longer\n{lines}"
        raise ConfigError(pipeline.setting(stage, "run"), str(job.run_dir), reason, remedy_of(pipeline, stage))


def _is_free(progress: Progress, stage: Stage) -> bool:
    """Tell whether a stage of commands alone has other words now, and no later run was made from what they gave."""
    pipeline, done = progress.pipeline, progress.state[stage.name]
    same = all(mask(done[key]) == mask(getattr(stage, key)) for key in ("before", "after"))
    later = pipeline.stages[pipeline.stages.index(stage) + 1 :]
    return not same and not any(other.run and (pipeline.folder / other.name / paths.CONFIG).exists() for other in later)


def remedy_of(pipeline: Pipeline, stage: Stage) -> str:
    """Return what to do where a stage that is done is asked for in another way."""
    again = f", or {found} to do it and what follows again" if (found := removal(pipeline, stage)) else ""
    return f"what it was done with, or run_dir={pipeline.folder}-new{again}"


def removal(pipeline: Pipeline, stage: Stage) -> str:
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


@contextlib.contextmanager
def explained_by(pipeline: Pipeline, stage: Stage) -> Iterator[None]:
    """Turn what is wrong with a run's directory into what helps a pipeline: it has no run_dir of a stage."""
    try:
        yield
    except ConfigError as error:
        remedy = remedy_of(pipeline, stage) if "run_dir=" in error.remedy else error.remedy
        path = pipeline.setting(stage, "run") if error.path == "run_dir" else error.path
        raise ConfigError(path, error.value, error.reason, remedy) from error
