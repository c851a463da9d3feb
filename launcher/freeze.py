"""What a command makes of its run directory: a new run, or the one that is there as it is, changed, corrected, longer, moved, or copied."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from launcher.changes import differing, field_of, kept
from launcher.extend import continues_from, is_other_length, pass_rows, set_aside
from launcher.job import Job, code_version, command_line, frozen_text, holder, manifest, mark_submitted, publish
from launcher.queue import in_queue, record_of
from trainers.config.derived import length
from trainers.config.errors import ConfigError
from trainers.config.numerics import NUMERICS
from trainers.config.schema import RunConfig, read
from trainers.rundir import paths
from trainers.rundir.attempt import newest_attempt, read_state
from trainers.rundir.base import fingerprint
from trainers.rundir.beats import read_beats
from trainers.rundir.checkpoints import read_manifest, steps
from trainers.rundir.ending import State
from trainers.rundir.files import try_json, write_json
from trainers.rundir.rows import read_rows

OURS = {
    *(paths.CONFIG, paths.PLAN, paths.PLAN_PICTURE, paths.MANIFEST, paths.DIFF),
    *(paths.STATUS, paths.SLURM_RECORD, paths.SLURM, paths.CODE),
}
TAIL_BYTES = 1 << 16
STARTS_S = 60.0
"""From its config.yaml until a launcher holds the run's lock, or its job waits."""


class Place(StrEnum):
    """How a run came to where it is."""

    here = "here"
    """It was made here, under whatever name of the directory."""
    moved = "moved"
    copied = "copied"
    """The run that it was copied from is still where that was."""


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What a command makes of the run that is in its directory."""

    place: Place
    home: Path
    """Where the run was."""
    changed: list[str]
    """Settings that it takes, as `field: old -> new`."""
    is_corrected: bool = False
    """Nothing has been trained: any setting may change."""
    extended_from: int | None = None
    """The step that a longer run continues from."""
    num_steps: int = 0
    """Its length until now, where it becomes longer."""


def freeze(job: Job) -> None:
    """Make the run directory and its config.yaml, or join the run that is there.

    Raises ConfigError where the directory cannot be written, holds other files, or is a run with other settings.
    Any number of machines may call this at once: the first config.yaml wins, the others compare.
    """
    with _explained(job, "written"):
        job.run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            job.run_dir.mkdir()
        except FileExistsError:
            _refuse_other_files(job.run_dir)
            _refuse_links(job.run_dir)
        if job.config_path.exists() or not publish(job.config_path, frozen_text(job.run)):
            _join(job, joining(job))
        if not (job.run_dir / paths.MANIFEST).exists():
            publish(job.run_dir / paths.MANIFEST, json.dumps(_new_manifest(job), indent=2) + "\n")
        publish(job.run_dir / paths.STATUS, json.dumps({"state": State.submitted, "step": 0, "attempt": 0}) + "\n")


def require_joinable(job: Job) -> None:
    """Raise ConfigError where `freeze` would: the directory holds other files, or a run with other settings. Writes nothing."""
    with _explained(job, "read"):
        if job.run_dir.exists():
            _refuse_other_files(job.run_dir)
            _refuse_links(job.run_dir)
        if job.config_path.exists():
            joining(job)


@contextlib.contextmanager
def _explained(job: Job, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot be {verb}: {error.strerror or error} ({error.filename or job.run_dir})"
        raise ConfigError("run_dir", str(job.run_dir), reason, "run_dir=DIR that you may write") from error


def joining(job: Job) -> Joining:
    """Return what a command makes of the run that is in its directory; raises ConfigError where it may not."""
    began, old = has_results(job.run_dir), None
    try:
        old = _frozen_run(job)
    except ConfigError:
        if began:
            raise
    home = job.run_dir if old is None else Path(old.run_dir)
    place, changed = _place(job.run_dir, home), ["config.yaml: could not be read"] if old is None else differing(old, job.run)
    here, left = Joining(place=place, home=home, changed=changed), changed if old is None else kept(changed, old, job.run)
    left = [line for line in left if not _is_moved_base(job, line)]
    if began:
        _require_same_numerics(job)
    if old is None or (left and not began):
        _require_nobody(job, left)
        return dataclasses.replace(here, is_corrected=True)
    if is_other_length(left):
        step = continues_from(job.run_dir, old, job.run)
        _require_nobody(job, left)
        return dataclasses.replace(here, extended_from=step, num_steps=_num_steps(job.run_dir, old))
    if left:
        raise _other_settings(job, left)
    return here


def _is_moved_base(job: Job, line: str) -> bool:
    """Tell whether a changed setting is another path to the weights that the run began with."""
    folder, known = Path(job.run.model.id or ""), (try_json(job.run_dir / paths.MANIFEST).get("base") or {}).get("weights")
    if field_of(line) != "model.id" or known is None or job.run.model.id is None:
        return False
    return folder.is_dir() and fingerprint(folder) == known


def _require_nobody(job: Job, left: list[str]) -> None:
    """Refuse to change what is trained under somebody who trains it."""
    if who := at_work(job):
        raise _other_settings(job, left, f"and {who}", f"wait for its end or stop it, or run_dir={job.run_dir}-new")


def has_results(run_dir: Path) -> bool:
    """Tell whether a run would lose something: it has a checkpoint, or a row in metrics.jsonl."""
    return bool(steps(run_dir / paths.CHECKPOINTS)) or bool(read_rows(run_dir, last_bytes=TAIL_BYTES))


def at_work(job: Job) -> str:
    """Say who waits for a run or is at it, so that nobody else may change it; nothing where nobody is known to."""
    if (pid := holder(job)) is not None:
        return f"process {pid} of this machine is running it"
    if read_state(job.run_dir) not in (State.submitted, State.running):
        return ""
    if number := str(record_of(job.run_dir).get("id", "")):
        queue = in_queue(number)
        if queue is None:
            return f"squeue does not answer, and job {number} of it may be waiting"
        return f"job {number} is {queue[number]}" if number in queue else ""
    hosts = {path.name.removeprefix(".launcher-").removesuffix(".lock") for path in job.run_dir.glob(".launcher-*.lock")}
    hosts |= {beat.host for beat in read_beats(job.run_dir).values()}
    if others := sorted(hosts - {socket.gethostname(), ""}):
        return f"{others[0]} may be running it"
    age_s = time.time() - (job.run_dir / paths.CONFIG).stat().st_mtime
    return f"another command has made it {age_s:.0f} s ago" if age_s < STARTS_S else ""


def _place(here: Path, home: Path) -> Place:
    """Tell how a run whose config.yaml names `home` came here; it is a copy where the run in `home` is the same."""
    if here == home or (home.exists() and here.samefile(home)):
        return Place.here
    ours, theirs = try_json(here / paths.MANIFEST), try_json(home / paths.MANIFEST)
    ids = {ours.get("wandb_id"), ours.get("copied_from", ours).get("wandb_id")}  # a launcher that was killed may have done half of it
    is_there = (home / paths.CONFIG).is_file() and theirs.get("wandb_id") in ids
    return Place.copied if is_there else Place.moved


def _join(job: Job, found: Joining) -> None:
    """Make of the run in the directory what `joining` has found."""
    if found.place is Place.copied:
        _become_own(job.run_dir, found.home)
    if found.extended_from is not None:
        set_aside(job.run_dir, found.extended_from, found.num_steps)
    if found.place is Place.here and not found.changed:
        return
    _replace_config(job)
    if found.is_corrected:
        known = try_json(job.run_dir / paths.MANIFEST)
        fresh = _new_manifest(job) | ({"wandb_id": known["wandb_id"]} if "wandb_id" in known else {})
        write_json(job.run_dir / paths.MANIFEST, fresh | {"copied_from": known["copied_from"]} if "copied_from" in known else fresh)
    else:
        _note_changes(job, found)
    _say(job, found)
    if found.extended_from is not None:
        mark_submitted(job)


def _say(job: Job, found: Joining) -> None:
    attempt = newest_attempt(job.run_dir) + 1
    if found.place is Place.moved:
        _tell(f"this run was in {found.home} before: it continues here")
    if found.place is Place.copied:
        _tell(f"this is a copy of the run in {found.home}: from here on a run of its own, with its own W&B id")
    if found.extended_from is not None:
        _tell(f"longer than {found.num_steps} steps: it continues from step {found.extended_from}, until which it is the same run")
    if found.changed and not found.is_corrected:
        _tell("\n    ".join([f"changed from attempt {attempt} on:", *found.changed]))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _replace_config(job: Job) -> None:
    temporary = job.run_dir / f".config.yaml.{socket.gethostname()}.{os.getpid()}"
    temporary.write_text(frozen_text(job.run), encoding="utf-8")
    temporary.replace(job.config_path)


def _note_changes(job: Job, found: Joining) -> None:
    """Add to manifest.json what changes from which attempt on, and the command that says all of it."""
    known = try_json(job.run_dir / paths.MANIFEST)
    entry: dict[str, Any] = {"attempt": newest_attempt(job.run_dir) + 1, "time": _now(), "settings": found.changed}
    entry |= {} if found.extended_from is None else {"continues_from": found.extended_from}
    entry |= {} if found.place is Place.here else {str(found.place): str(found.home)}
    changes = [*known.get("changes", []), entry]
    write_json(job.run_dir / paths.MANIFEST, known | {"command": command_line(), "changes": changes} | _why_mesh(job))


def _become_own(run_dir: Path, home: Path) -> None:
    """Give a copy its own id, which its checkpoints carry too; the job in SLURM's queue is the original's.

    Before config.yaml names the new place, so that a launcher that was killed is followed by one that ends what it began.
    """
    known = try_json(run_dir / paths.MANIFEST)
    if "copied_from" not in known or known["copied_from"]["run_dir"] != str(home):
        origin = {"run_dir": str(home), "wandb_id": known.get("wandb_id"), "attempt": newest_attempt(run_dir), "time": _now()}
        known |= {"wandb_id": secrets.token_hex(4), "copied_from": origin}
        write_json(run_dir / paths.MANIFEST, known)
    (run_dir / paths.SLURM_RECORD).unlink(missing_ok=True)
    for path in steps(run_dir / paths.CHECKPOINTS):
        with contextlib.suppress(OSError, ValueError):  # no checkpoint, as the rank that looks for one says
            content = read_manifest(path)
            if content.get("run") == known["copied_from"]["wandb_id"]:
                write_json(path / paths.MANIFEST, content | {"run": known["wandb_id"]})


def _new_manifest(job: Job) -> dict[str, Any]:
    version, diff = code_version()
    if diff:
        (job.run_dir / paths.DIFF).unlink(missing_ok=True)
        publish(job.run_dir / paths.DIFF, diff)
    return manifest(version) | _why_mesh(job)


def _why_mesh(job: Job) -> dict[str, str]:
    return {"mesh": job.mesh} if job.mesh else {}


WRITTEN = ("*", "logs/*", "logs/*/*", "ranks/*", "evaluation/*")
"""Where a run's own files are; W&B's folder has links to its logs elsewhere."""


def _refuse_links(run_dir: Path) -> None:
    """Raise ConfigError where a file of the run directory is a link that leaves it: what is written there would go elsewhere."""
    home = run_dir.resolve()
    for path in (path for pattern in WRITTEN for path in run_dir.glob(pattern)):
        if path.is_symlink() and not path.is_dir() and home not in path.resolve().parents:
            reason = f"{path.relative_to(run_dir)} is a link to {path.resolve()}, and a run writes into its own directory only"
            raise ConfigError("run_dir", str(run_dir), reason, f"rm {path}")


def _refuse_other_files(run_dir: Path) -> None:
    if (run_dir / paths.CONFIG).exists():
        return
    others = sorted(path.name for path in run_dir.iterdir() if path.name not in OURS and not path.name.startswith("."))
    if others:
        reason = f"exists and is not a run directory: it holds {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
        raise ConfigError("run_dir", str(run_dir), reason, f"run_dir={run_dir / 'run'}, or another that is new or empty")


def _require_same_numerics(job: Job) -> None:
    """Refuse to continue a run by code whose arithmetic has changed since: the rest would not be what it was going to be."""
    known = try_json(job.run_dir / paths.MANIFEST)
    began = known.get("numerics", NUMERICS)
    if began != NUMERICS:
        sha = (known.get("code") or {}).get("git_sha")
        reason = f"began with arithmetic {began} of the code, and this code's is {NUMERICS}: its steps would come out differently"
        remedy = (f"git checkout {sha}, " if sha else "") + f"or run_dir={job.run_dir}-new, which begins again"
        raise ConfigError("run_dir", str(job.run_dir), reason, remedy.removeprefix("or "))


def _num_steps(run_dir: Path, run: RunConfig) -> int:
    return length(run.train, pass_rows(run_dir) or 0)[1]


def _frozen_run(job: Job) -> RunConfig:
    """Return the run in the run directory, fields that are newer than its config.yaml at their defaults."""
    try:
        return read(job.config_path)
    except ConfigError as error:
        reason = f"its config.yaml does not fit this version: {error.path} {error.reason}"
        raise ConfigError("run_dir", str(job.run_dir), reason, f"run_dir={job.run_dir}-new, or another that is new") from error


def _other_settings(job: Job, changed: list[str], more: str = "", remedy: str = "") -> ConfigError:
    reason = "\n".join(["is a run with other settings", *(f"    {line}" for line in changed), *([more] if more else [])])
    return ConfigError("run_dir", str(job.run_dir), reason, remedy or f"run_dir={job.run_dir}-new, or the settings of this run")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
