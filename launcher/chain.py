"""A pipeline on SLURM: its runs, and the commands between them, are jobs of which each begins once the one before has succeeded."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import plan, queue, slurm
from launcher.chain_task import Commands
from launcher.config import LaunchConfig, ranks_per_node, world_size
from launcher.freeze import freeze, require_joinable
from launcher.in_turn import forget_wandb_id, place_of
from launcher.job import Job, frozen_text, only_launcher
from launcher.meshes import settled
from launcher.origin import shown
from launcher.progress import Progress, explained_by
from launcher.stages import Pipeline, Stage
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig, plain
from trainers.config.secrets import mask
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import try_json, write_json

JOBS = "jobs.json"
"""In a pipeline's directory: the job of each link that is made of commands, by its name."""
AFTER = "afterok"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One job of the chain."""

    name: str
    job: Job
    """A stage's run; of commands the size of their job."""
    parts: list[tuple[Stage, str]]
    """Stages, and which of their commands it does; empty for a run."""

    def is_done(self, progress: Progress) -> bool:
        """Tell whether there is nothing left to do."""
        if not self.parts:
            return read_state(self.job.run_dir) == State.done
        ended = [stage for stage, key in self.parts if key == "after"]
        return not any(progress.undone(*part) for part in self.parts) and all(progress.is_done(stage) for stage in ended)


def links(pipeline: Pipeline, jobs: Sequence[tuple[Stage, Job]]) -> list[Link]:
    """Return the chain: runs, and between two of them the commands after the one and before the other, as one job.

    The last notes the end of its stage also where it has no commands.
    """
    of_stage = {stage.name: job for stage, job in jobs}
    found: list[Link] = []
    parts: list[tuple[Stage, str]] = []
    for stage in pipeline.stages:
        if stage.before or not stage.run:
            parts.append((stage, "before"))
        if stage.run:
            found += _of_commands(parts, pipeline, jobs)
            found.append(Link(name=stage.name, job=of_stage[stage.name], parts=[]))
            parts = []
        parts.append((stage, "after"))
    return _without_dependency(found + _of_commands(parts, pipeline, jobs))


def _of_commands(parts: list[tuple[Stage, str]], pipeline: Pipeline, jobs: Sequence[tuple[Stage, Job]]) -> list[Link]:
    """Return the link of some commands, none where there are none: one task on one node of the first of these stages that has a run."""
    if not parts:
        return []
    names = list(dict.fromkeys(stage.name for stage, _ in parts))
    like = next((job for stage, job in jobs if stage.name in names), jobs[0][1])
    launch = like.launch
    cores = launch.cpus_per_gpu * ranks_per_node(launch) if launch.cpus_per_gpu else None
    launch = dataclasses.replace(launch, nodes=1, generators=0, processes=1, cpus_per_gpu=cores)
    words = ", ".join(dict.fromkeys(f"{key} {stage.name}" for stage, key in parts if getattr(stage, key) or key == "after"))
    run = dataclasses.replace(like.run, name=f"{pipeline.name}_{'_'.join(names)}_commands", engine=type(like.run.engine)())
    return [Link(name=words, job=dataclasses.replace(like, run=run, launch=launch, run_dir=pipeline.folder), parts=parts)]


def _without_dependency(found: list[Link]) -> list[Link]:
    """Return links of which the first alone waits for jobs that the settings name."""

    def freed(link: Link) -> Link:
        sbatch = {name: value for name, value in link.job.launch.sbatch.items() if name != "dependency"}
        return dataclasses.replace(link, job=dataclasses.replace(link.job, launch=dataclasses.replace(link.job.launch, sbatch=sbatch)))

    return [*found[:1], *map(freed, found[1:])]


def planned(progress: Progress, jobs: list[Job]) -> list[Job]:
    """Return the jobs of stages with their meshes; raises ConfigError where one that has not begun does not fit its GPUs.

    Each has a model of the shapes that it will begin with.
    """
    found = settled(jobs)
    if progress.pipeline.mode == "run":
        plan.require_fit([job for job in found if not job.config_path.exists()])
    return found


def in_place(job: Job, like: Job, stand_in: Path, folder: Path) -> Job:
    """Return a stage's job with the mesh that was planned, and the paths that it will find once the stages before it are done."""

    def moved(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **{item.name: moved(getattr(value, item.name)) for item in dataclasses.fields(value)})
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.replace(str(stand_in), str(folder)) if type(value) is str else value

    run: RunConfig = moved(dataclasses.replace(job.run, engine=like.run.engine))
    return dataclasses.replace(job, run=run, mesh=like.mesh)


def dry_run(pipeline: Pipeline, jobs: Sequence[tuple[Stage, Job]]) -> str:
    """Return the jobs in order, with the text that sbatch gets for each, the frozen config of runs and the commands of others."""
    chain = links(pipeline, jobs)
    lines = [f"# pipeline {pipeline.name}, {shown(pipeline.file)}, in {pipeline.folder}", f"# {plural(len(chain), 'job')}, in this order"]
    for number, link in enumerate(chain, 1):
        after = [f"JOB_{number - 1}"] if number > 1 else []
        lines += ["", f"# job {number} of {len(chain)}, {link.name}"]
        lines += [f"# {link.job.config_path}", frozen_text(link.job.run)] if not link.parts else []
        lines += [f"# {stage.name}: {command}" for stage, key in link.parts for command in mask(getattr(stage, key))]
        lines.append(slurm.text_of(link.job, link.job.run_dir / paths.SLURM, after, AFTER))
    return "\n".join(lines)


def submit(progress: Progress, jobs: Sequence[tuple[Stage, Job]]) -> int:
    """Submit the links of the chain that are neither done nor in the queue; returns the launcher's exit code.

    All that follow the first that is missing are submitted anew: they would wait for what it no longer is.
    """
    pipeline = progress.pipeline
    slurm.require_name(pipeline.folder)
    forget_wandb_id()
    require_no_secrets(pipeline)
    chain = links(pipeline, jobs)
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    with only_launcher(place_of(pipeline)):
        known = records(pipeline, chain)
        words = in_queue(known)
        left = [link for link in chain if not link.is_done(progress)]
        first = next((number for number, link in enumerate(left) if not _is_under_way(words[link.name])), len(left))
        for link in left[:first]:
            require_same_launch(link, known[link.name], words[link.name])
        missing = left[first:]
        if missing:
            _require_none_running(left[first], [link for link in missing if words[link.name] == "RUNNING"], known)
            end([str(known[link.name]["id"]) for link in missing if words[link.name]])
            if not any(words[link.name] for link in left[:first]):
                progress.write()  # no job of it changes what is noted
            for link in missing:
                _prepare(progress, link)
            known = _send(progress, missing, known, [str(known[link.name]["id"]) for link in left[:first]][-1:])
            slurm.warn_where_stuck(str(known[missing[0].name]["id"]))
        print(table(pipeline, chain, known, {link.name: words[link.name] for link in left[:first]}, progress), flush=True)
    return follow(progress, chain, known) if any(link.job.launch.wait for link in chain) and left else Exit.done


def require_no_secrets(pipeline: Pipeline) -> None:
    """Raise ConfigError for a command with a secret: a job's commands are kept in a file until it starts."""
    for stage in pipeline.stages:
        for key in ("before", "after"):
            for number, command in enumerate(getattr(stage, key)):
                if mask(command) != command:
                    reason = "holds what looks like a secret, and commands of a job are kept in a file"
                    raise ConfigError(f"{pipeline.setting(stage, key)}[{number}]", mask(command), reason, "give it by a variable")


def records(pipeline: Pipeline, chain: Sequence[Link]) -> dict[str, dict[str, Any]]:
    """Return what is known of the last job of each link; empty where there was none."""
    kept = try_json(pipeline.folder / JOBS)
    return {link.name: dict(kept.get(link.name) or {}) if link.parts else queue.record_of(link.job.run_dir) for link in chain}


def in_queue(known: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return SLURM's word for each link's job, empty where it neither waits nor runs; raises ConfigError where squeue does not answer."""
    ids = {name: str(record.get("id", "")) for name, record in known.items()}
    found = queue.in_queue(*filter(None, ids.values())) if any(ids.values()) else {}
    if found is None:
        reason = "squeue does not answer, and jobs of this pipeline may be waiting or running"
        raise ConfigError("launch.backend", "slurm", reason, "a login node of the cluster, or the same command later")
    return {name: found.get(number, "") for name, number in ids.items()}


def _is_under_way(word: str) -> bool:
    """Tell a job that waits or runs from one that is gone, or waits for what has failed."""
    return bool(word) and queue.reason_in(word) != "DependencyNeverSatisfied"


def _require_none_running(missing: Link, running: Sequence[Link], known: dict[str, dict[str, Any]]) -> None:
    """Refuse to begin anew what a job that runs was made from."""
    if running:
        numbers = " ".join(str(known[link.name]["id"]) for link in running)
        reason = f"`{missing.name}` is to be done, and `{running[0].name}`, which follows it, runs as job {numbers}"
        raise ConfigError("launch.backend", "slurm", reason, f"wait for its end, or scancel {numbers}")


def require_nothing_queued(pipeline: Pipeline) -> None:
    """Raise ConfigError where a pipeline that is to run on this machine has jobs in the queue, as far as squeue says."""
    ids = [str(record["id"]) for record in try_json(pipeline.folder / JOBS).values()]
    if ids and (there := sorted(queue.in_queue(*ids) or {}, key=int)):
        reason = f"jobs of this pipeline are in the queue: {', '.join(there)}"
        raise ConfigError("launch.backend", "local", reason, f"launch=slurm, or scancel {' '.join(there)} first")


def require_same_launch(link: Link, record: dict[str, Any], word: str) -> None:
    """Raise ConfigError where a job in the queue was submitted with other launch settings than these: it keeps its own."""
    slurm.require_same_launch(link.job, word, record)


def end(numbers: Sequence[str]) -> None:
    """Take jobs out of the queue; raises ConfigError where SLURM refuses."""
    if numbers and (said := queue.ask("scancel", *numbers)):
        raise ConfigError("launch.backend", "slurm", f"jobs {' '.join(numbers)} could not be ended: {said}", "scancel them first")


def _prepare(progress: Progress, link: Link) -> None:
    """Make a run's directory, or join the run that is there; raises ConfigError as `freeze` does, with what helps a pipeline."""
    if not link.parts:
        stage = next(stage for stage in progress.pipeline.stages if stage.name == link.name)
        with explained_by(progress.pipeline, stage):
            require_joinable(link.job)
            freeze(link.job)


def _send(progress: Progress, missing: Sequence[Link], known: dict[str, dict[str, Any]], after: list[str]) -> dict[str, dict[str, Any]]:
    """Submit links in order, each after the one before; returns what is then known. Where one is refused, those before it are ended."""
    pipeline, found, sent = progress.pipeline, dict(known), []
    try:
        for link in missing:
            if link.parts:
                parts = [(mask(stage), key) for stage, key in link.parts]
                task = Commands(mask(pipeline), progress.command, parts, link.job, os.getcwd())
                [record] = slurm.send([task], link.job, pipeline.folder / paths.SLURM, after=after, how=AFTER)
                record |= {"run_dir": str(pipeline.folder), "launch": plain(link.job.launch)}
                write_json(pipeline.folder / JOBS, try_json(pipeline.folder / JOBS) | {link.name: record})
            else:
                [record] = slurm.hand_over([link.job], link.job.run_dir / paths.SLURM, after=after, how=AFTER)
            found[link.name], after = record, [str(record["id"])]
            sent += after
    except BaseException:
        if sent and (said := queue.ask("scancel", *sent)):
            print(f"warning: jobs {' '.join(sent)} stay in the queue: {said}", file=sys.stderr, flush=True)
        raise
    return found


def table(pipeline: Pipeline, chain: Sequence[Link], known: dict[str, dict[str, Any]], words: dict[str, str], progress: Progress) -> str:
    """Return the jobs in their order, and what may be done with them."""
    lines, before = [("job", "after", "what", "size", "state")], ""
    for link in chain:
        if link.is_done(progress):
            lines.append(("", "", link.name, "", "done"))
            continue
        number = str(known[link.name]["id"])
        lines.append((number, before, link.name, _size(link.job.launch), words.get(link.name) or "submitted"))
        before = number
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = ["  ".join([*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4]]) for line in lines]
    waiting = [line[0] for line in lines[1:] if line[0]]
    said = [f"pipeline {pipeline.name}, {plural(len(chain), 'job')}: {pipeline.folder}", *(f"  {line}" for line in text)]
    if waiting:
        said += [f"  queue    squeue -j {','.join(waiting)}", f"  logs     {pipeline.folder}/slurm and {pipeline.folder}/STAGE/slurm"]
        said += [
            f"  stop     scancel {' '.join(waiting)}",
            "  again    the same command submits what is missing, has failed or was stopped",
        ]
    return "\n".join(said)


def _size(launch: LaunchConfig) -> str:
    return f"{plural(launch.nodes + launch.generators, 'node')}, {plural(world_size(launch), 'rank')}"


def follow(progress: Progress, chain: Sequence[Link], known: dict[str, dict[str, Any]]) -> int:
    """Wait until all jobs have left the queue, and say how each ended; returns 0 where all are done, else 1."""
    waiting = [link for link in chain if not link.is_done(progress)]
    try:
        while waiting:
            words = queue.in_queue(*(str(known[link.name]["id"]) for link in waiting))
            gone = [link for link in waiting if words is not None and str(known[link.name]["id"]) not in words]
            waiting = [link for link in waiting if link not in gone]
            progress.read()
            for link in gone:
                how = "done" if link.is_done(progress) else queue.ended_as(str(known[link.name]["id"])).lower() or "not done"
                print(f"{how:>10}  {link.name}{'' if how == 'done' else '  ' + str(known[link.name]['log'])}", flush=True)
            time.sleep(slurm.LOOK_EVERY_S if waiting else 0)
    except KeyboardInterrupt:
        numbers = " ".join(str(known[link.name]["id"]) for link in waiting)
        print(f"{plural(len(waiting), 'job')} of the pipeline still in the queue; scancel {numbers} ends them", file=sys.stderr, flush=True)
        raise
    return Exit.done if all(link.is_done(progress) for link in chain) else Exit.failed
