"""A sweep: every point a run of its own in `hydra.sweep.dir`; one after another on this machine, or one SLURM array."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from launcher import local, plan, slurm
from launcher.compose import checked
from launcher.config import Backend, Mode
from launcher.fields import all_fields
from launcher.freeze import freeze, require_joinable
from launcher.job import Job, make_job
from launcher.meshes import settled
from launcher.report import read_summary
from trainers.config.derived import peak_lr
from trainers.config.errors import ConfigError, plural
from trainers.rundir.attempt import read_state
from trainers.rundir.ending import Exit, State

PLUGINS = Path(__file__).parent / "plugins"
LONGEST_NAME = 120

RECORD = "multirun.yaml"


@dataclass(frozen=True)
class Before:
    """What was in a sweep's place."""

    record: Path
    content: bytes | None
    missing: list[Path]
    """Folders that were not there, innermost first."""


before: list[Before] = []
codes: list[int] = []
"""Exit codes of the points that were run or submitted, over all batches of the sweeper."""


def prepare_hydra() -> None:
    """Let Hydra find our plug-in: it looks into each folder of sys.path for a package of this name."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))


class PointLoader:
    """Hydra's config loader, with a sweep's points composed once and copied: what takes Hydra 130 ms a point takes 3.

    A point differs from its neighbours in values mostly. Hydra sets these one by one once all files are merged, and so does this.
    What chooses other files, adds or removes keys, or is wrong, is left to Hydra.
    """

    def __init__(self, loader: Any, constant: set[str]) -> None:
        """Take Hydra's loader, and the keys that are the same for all points."""
        self.loader, self.constant = loader, constant
        self.parser = OverridesParser.create()
        self.parsed: dict[str, Override] = {}
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        """Return whatever else Hydra asks of a loader."""
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return a point's own config, without Hydra's; raises what Hydra raises."""
        overrides = [self._parse(text) for text in sweep_overrides]
        keys = [override.key_or_group for override in overrides]
        values = [override for override in overrides if override.key_or_group not in self.constant and _is_value(override, keys)]
        rest = tuple(text for text, override in zip(sweep_overrides, overrides, strict=True) if override not in values)
        try:
            if rest not in self.composed:
                self.composed[rest] = self._load(master_config, rest)
            point = copy.deepcopy(self.composed[rest])
            for override in values:
                OmegaConf.update(point, override.key_or_group, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException):
            return self._load(master_config, sweep_overrides)
        return point

    def _load(self, master_config: DictConfig, overrides: Iterable[str]) -> DictConfig:
        config: DictConfig = self.loader.load_sweep_config(master_config, list(overrides))
        with read_write(config), open_dict(config):
            del config["hydra"]
        return config

    def _parse(self, text: str) -> Override:
        if text not in self.parsed:
            self.parsed[text] = self.parser.parse_override(text)
        return self.parsed[text]


def _is_value(override: Override, keys: list[str]) -> bool:
    """Tell whether an override sets one field, and no other of `keys` has a say in it."""
    key = override.key_or_group
    if override.is_delete() or override.is_add() or override.is_force_add() or key not in all_fields():
        return False
    return keys.count(key) == 1 and not any(key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in keys)


def launch(points: Iterable[tuple[list[str], DictConfig]], folder: Path, constant: set[str]) -> list[JobReturn]:
    """Check all points, then run or submit those that are neither done nor under way; raises ConfigError before any has started.

    Each has its own folder in `folder`, named by those of its overrides whose keys are not `constant`.
    Returns each with its held-out loss (training loss where nothing is held out), once it is known.
    """
    try:
        return _launch(points, folder, constant)
    except ConfigError as error:
        raise _of_sweep(error, folder) from error


def _of_sweep(error: ConfigError, folder: Path) -> ConfigError:
    """Return an error with a remedy that a sweep takes: its points have no run_dir of their own."""
    if "run_dir=" not in error.remedy:
        return error
    return ConfigError(error.path, error.value, error.reason, f"hydra.sweep.dir={folder}-new, or what the points there began with")


def _launch(points: Iterable[tuple[list[str], DictConfig]], folder: Path, constant: set[str]) -> list[JobReturn]:
    overrides, jobs, modes = [], [], []
    for given, config in points:
        job, mode = _point(given, config, folder, constant)
        overrides.append(given)
        jobs.append(job)
        modes.append(mode)
    jobs = settled(jobs)
    _refuse_collisions(jobs, overrides)
    _require_one_launch(jobs)
    if modes[0] is Mode.dry_run:
        for job in jobs:
            commands = slurm.commands(job) if _on_slurm(job) else local.commands(job)
            print("\n".join([f"# {job.run_dir}", f"# peak learning rate {peak_lr(job.run.optim, job.run.peft)}", *commands, ""]))
        forget()
        return [JobReturn(_return_value=None, status=JobStatus.COMPLETED) for _ in jobs]
    if modes[0] is Mode.plan:
        codes.append(plan.plan(jobs))
        return [JobReturn(_return_value=None, status=JobStatus.COMPLETED) for _ in jobs]
    if _on_slurm(jobs[0]):
        rest = [job for job in jobs if read_state(job.run_dir) != State.done]
        plan.require_fit([job for job, word in zip(rest, slurm.states(rest), strict=True) if not word])
    if chosen := os.environ.pop("WANDB_RUN_ID", ""):
        print(f"WANDB_RUN_ID={chosen} is not used: each point of a sweep is a W&B run of its own", file=sys.stderr, flush=True)
    for job in jobs:
        require_joinable(job)
    for job in jobs:
        freeze(job)
    (slurm_array if _on_slurm(jobs[0]) else one_by_one)(jobs)
    return [
        JobReturn(overrides=given, _return_value=figure(job.run_dir), status=JobStatus.COMPLETED)
        for job, given in zip(jobs, overrides, strict=True)
    ]


def look(folder: Path) -> None:
    """Note what is in a sweep's place before Hydra makes its folder and multirun.yaml, which it does before it asks us."""
    record = folder / RECORD
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    before.append(Before(record, record.read_bytes() if record.is_file() else None, missing))


def forget() -> None:
    """Undo what Hydra has made of a sweep that is refused or only printed: its record is again that of the points that are there."""
    for was in before:
        if was.content is not None:
            was.record.write_bytes(was.content)
        elif was.record.is_file() and not any(path.is_dir() for path in was.record.parent.iterdir()):
            was.record.unlink()
        with contextlib.suppress(OSError):  # there are points in it
            for path in was.missing:
                path.rmdir()


def one_by_one(jobs: list[Job]) -> None:
    """Run points on this machine; one that fails stops no other, Ctrl-C stops all."""
    for number, job in enumerate(jobs, 1):
        print(f"point {number} of {len(jobs)}: {job.run_dir}", flush=True)
        if read_state(job.run_dir) == State.done:
            print("is done already", flush=True)
            codes.append(Exit.done)
            continue
        try:
            codes.append(local.submit(job))
        except ConfigError as error:  # what only the ranks can find
            print(f"error: {_of_sweep(error, job.run_dir.parent)}", file=sys.stderr, flush=True)
            codes.append(Exit.failed)
        if codes[-1] == Exit.interrupted:
            raise KeyboardInterrupt


def slurm_array(jobs: list[Job]) -> None:
    """Submit the points that are neither done nor in SLURM's queue as one array."""
    done = [job for job in jobs if read_state(job.run_dir) == State.done]
    rest = [job for job in jobs if job not in done]
    words = slurm.states(rest)
    under_way = [job for job, word in zip(rest, words, strict=True) if word]
    missing = [job for job, word in zip(rest, words, strict=True) if not word]
    print(f"{plural(len(jobs), 'point')}: {len(done)} done, {len(under_way)} in the queue, {len(missing)} to submit", flush=True)
    for job, word in zip(rest, words, strict=True):
        if word:
            slurm.require_same_launch(job, word)
    if missing:
        slurm.submit_array(missing, missing[0].run_dir.parent, under_way)
    codes.append(slurm.follow_all(jobs) if jobs[0].launch.wait else Exit.done)


def figure(run_dir: Path) -> float | None:
    """Return what a sweeper minimises: the held-out loss at the end, else the training loss; None where a run is not done."""
    summary = read_summary(run_dir)
    losses = [summary.get("eval_loss_after"), summary.get("train_loss")]
    return next((float(loss) for loss in losses if loss is not None), None)


def worst(found: list[int]) -> int:
    """Return the exit code of a sweep: that of a failed point where there is one."""
    return max(found, key=lambda code: (code != Exit.done, code == Exit.failed), default=Exit.done)


def name_of(overrides: Sequence[str]) -> str:
    """Return a point's folder: its overrides, in characters that every shell and file system takes as they are."""
    kept = ",".join(sorted(text.lstrip("+") for text in overrides)) or "default"
    name = re.sub(r"[^A-Za-z0-9=.,_+-]", "_", kept)
    if name == kept and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(kept.encode()).hexdigest()[:8]}"


def _point(overrides: list[str], config: DictConfig, folder: Path, constant: set[str]) -> tuple[Job, Mode]:
    """Return a point's job: in its own folder, in the sweep's W&B group."""
    if given := [text for text in overrides if text.startswith("run_dir=")]:
        raise ConfigError("run_dir", given[0].partition("=")[2], "each point of a sweep has its own", "hydra.sweep.dir=DIR for all of them")
    own = [text for text in overrides if text.partition("=")[0].lstrip("+~") not in constant]
    job = checked(config)
    job = dataclasses.replace(job, run_dir=str(folder / name_of(own)), log=dataclasses.replace(job.log, group=job.log.group or folder.name))
    return make_job(job), job.mode


def _on_slurm(job: Job) -> bool:
    return job.launch.backend is Backend.slurm


def _refuse_collisions(jobs: list[Job], overrides: list[list[str]]) -> None:
    known: dict[Any, list[str]] = {}
    for job, given in zip(jobs, overrides, strict=True):
        if job.run_dir in known:
            reason = f"two points have this folder: {' '.join(known[job.run_dir])} and {' '.join(given)}"
            raise ConfigError("hydra.sweep.dir", str(job.run_dir), reason, "sweep over settings that change the run")
        known[job.run_dir] = given


def _require_one_launch(jobs: list[Job]) -> None:
    for job in jobs:
        if job.launch.backend is Backend.torchrun:
            raise ConfigError("launch.backend", "torchrun", "a sweep runs on one machine, or on SLURM", "launch=local or launch=slurm")
        if job.launch != jobs[0].launch:
            raise ConfigError("launch", str(job.run_dir.name), "the points of an array are jobs of one size", "one sweep for each launch")
