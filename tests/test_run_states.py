"""What a command makes of what is in its run directory: the table of docs/run-directory.md, each cell made on disk without training."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import freeze as freeze_module
from launcher.changes import TAKEN, TAKEN_UNDER_FSDP, differing, kept
from launcher.compose import compose
from launcher.config import JobConfig
from launcher.extend import set_aside
from launcher.fields import all_fields
from launcher.freeze import at_work, freeze, require_joinable
from launcher.job import Job, make_job, note_attempt
from trainers.config.checks import load
from trainers.config.errors import ConfigError
from trainers.config.schema import RlConfig, RunConfig
from trainers.rundir.attempt import Attempt, read_state
from trainers.rundir.base import fingerprint
from trainers.rundir.checkpoints import name_of, why_not_of

ROWS = 40
LONG_AGO_S = 3600


@functools.cache
def composed(overrides: tuple[str, ...]) -> JobConfig:
    """Hydra takes most of a test's time."""
    fixed = ("train.steps=6", "train.global_batch=4", "train.microbatch=2", "launch.processes=1")
    return compose(["+exp=quickstart_base", *fixed, "optim.schedule=constant", "optim.warmup_steps=0", "checkpoint.every=null", *overrides])


def job_at(run_dir: Path, *overrides: str) -> Job:
    return make_job(dataclasses.replace(copy.deepcopy(composed(overrides)), run_dir=str(run_dir)))


def manifest_of(run_dir: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())
    return known


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def age(run_dir: Path) -> None:
    then = time.time() - LONG_AGO_S
    os.utime(run_dir / "config.yaml", (then, then))


def begun(run_dir: Path, *overrides: str, state: str = "preempted", steps: tuple[int, ...] = (2, 4), rows: bool = True) -> Job:
    """A run as its attempts leave it: rows, checkpoints and what ranks note."""
    job = job_at(run_dir, *overrides)
    freeze(job)
    change(run_dir / "manifest.json", data={"splits": {"train": {"rows": ROWS}}}, prepared="data-1")
    change(run_dir / "status.json", state=state, step=max(steps, default=0), attempt=1)
    Attempt(run_dir).claim()
    if rows:
        row = {"kind": "step", "step": 1, "loss": 1.0, "grad_norm": 1.0, "skipped": 0}
        (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for step in steps:
        folder = run_dir / "checkpoints" / name_of(step)
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(b"x")
        sums = {"sizes": {"a": 1}, "sha256": {"a": hashlib.sha256(b"x").hexdigest()}}
        change(folder / "manifest.json", run=manifest_of(run_dir)["wandb_id"], progress={"step": step}, **sums)
    if state == "done":
        (run_dir / "export").mkdir()
        change(run_dir / "summary.json", export=str(run_dir / "export"))
    age(run_dir)
    return job


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Another launcher of this machine runs it."""
    with (run_dir / f".launcher-{socket.gethostname()}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("1\n")
        lock.flush()
        yield


# What is there.


def nothing(run_dir: Path) -> None:
    assert not run_dir.exists()


def empty(run_dir: Path) -> None:
    run_dir.mkdir()


def other_files(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "thesis.tex").touch()


def just_made(run_dir: Path) -> None:
    freeze(job_at(run_dir))


def refused(run_dir: Path) -> None:
    """A setting was refused by the ranks, before or after the pre-flight."""
    begun(run_dir, state="failed", steps=(), rows=False)


def killed_early(run_dir: Path) -> None:
    """Its launcher was killed while it prepared data."""
    begun(run_dir, state="submitted", steps=(), rows=False)


def stopped(run_dir: Path) -> None:
    begun(run_dir)


def failed(run_dir: Path) -> None:
    begun(run_dir, state="failed")


def done(run_dir: Path) -> None:
    begun(run_dir, state="done", steps=(4, 6))


def moved(run_dir: Path) -> None:
    begun(run_dir.with_name("before"))
    run_dir.with_name("before").rename(run_dir)


def copied(run_dir: Path) -> None:
    begun(run_dir.with_name("original"))
    shutil.copytree(run_dir.with_name("original"), run_dir)


# What is asked for.
SAME: tuple[str, ...] = ()
TAKES = ("checkpoint.every=3", "name=mine", "train.microbatch=1", "log.tags=[a]")
LONGER = ("train.steps=9", "train.extend=true")
LONGER_UNSAID = ("train.steps=9",)
OTHER = ("optim.lr=0.5",)

NEW, SAME_RUN, CHANGED, CORRECTED, EXTENDED = "new", "same", "changed", "corrected", "extended"
TABLE: list[tuple[Callable[[Path], None], tuple[str, ...], str]] = [
    (nothing, SAME, NEW),
    (nothing, OTHER, NEW),
    (empty, SAME, NEW),
    (other_files, SAME, "not a run directory: it holds thesis.tex"),
    (just_made, SAME, SAME_RUN),
    (just_made, TAKES, CHANGED),
    (just_made, OTHER, "another command has made it"),
    (just_made, LONGER, "another command has made it"),
    (refused, SAME, SAME_RUN),
    (refused, TAKES, CHANGED),
    (refused, OTHER, CORRECTED),
    (refused, LONGER_UNSAID, CORRECTED),
    (killed_early, SAME, SAME_RUN),
    (killed_early, OTHER, CORRECTED),
    (stopped, SAME, SAME_RUN),
    (stopped, TAKES, CHANGED),
    (stopped, LONGER, EXTENDED),
    (stopped, LONGER_UNSAID, "train.extend=true"),
    (stopped, OTHER, "optim.lr: 0.005 -> 0.5"),
    (failed, SAME, SAME_RUN),
    (failed, TAKES, CHANGED),
    (failed, LONGER, EXTENDED),
    (failed, OTHER, "optim.lr: 0.005 -> 0.5"),
    (done, SAME, SAME_RUN),
    (done, TAKES, CHANGED),
    (done, LONGER, EXTENDED),
    (done, LONGER_UNSAID, "train.extend=true"),
    (done, ("train.steps=5", "train.extend=true"), "5 is not longer"),
    (done, OTHER, "optim.lr: 0.005 -> 0.5"),
    (moved, SAME, SAME_RUN),
    (moved, TAKES, CHANGED),
    (moved, OTHER, "optim.lr: 0.005 -> 0.5"),
    (copied, SAME, SAME_RUN),
    (copied, LONGER, EXTENDED),
    (copied, OTHER, "optim.lr: 0.005 -> 0.5"),
]


def _words(value: object) -> str:
    return (
        value
        if isinstance(value, str)
        else "+".join(value) or "same"
        if isinstance(value, tuple)
        else str(getattr(value, "__name__", value))
    )


SLOW = {(failed, SAME), (failed, TAKES), (failed, LONGER), (failed, OTHER), (done, TAKES), (done, OTHER), (moved, TAKES), (moved, OTHER)}
SLOW |= {(copied, OTHER), (killed_early, SAME), (refused, TAKES), (refused, LONGER_UNSAID), (just_made, LONGER), (nothing, OTHER)}
"""Cells that take the same way as another one."""
CELLS = [pytest.param(*cell, marks=pytest.mark.slow) if cell[:2] in SLOW else cell for cell in TABLE]


@pytest.mark.parametrize(("there", "asked", "becomes"), CELLS, ids=lambda value: _words(value))
def test_what_a_command_makes_of_what_is_there(
    there: Callable[[Path], None], asked: tuple[str, ...], becomes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    there(run_dir)
    job, before = job_at(run_dir, *asked), manifest_of(run_dir) if (run_dir / "manifest.json").exists() else {}
    if becomes not in (NEW, SAME_RUN, CHANGED, CORRECTED, EXTENDED):
        left = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError) as error:
            freeze(job)
        assert becomes in str(error.value)
        assert error.value.remedy
        with pytest.raises(ConfigError):
            require_joinable(job)
        assert left == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        return
    freeze(job)
    frozen = load(job.config_path)
    assert (frozen.run_dir, frozen.optim.lr, frozen.train.steps) == (str(run_dir), job.run.optim.lr, job.run.train.steps)
    now, changes = manifest_of(run_dir), manifest_of(run_dir).get("changes", [])
    assert (now["wandb_id"] == before.get("wandb_id")) == (becomes != NEW and there is not copied)
    assert ("prepared" in now) == ("prepared" in before and becomes != CORRECTED)
    if becomes == CHANGED:
        assert {line.partition(":")[0] for line in changes[-1]["settings"]} == {"checkpoint.every", "name", "train.microbatch", "log.tags"}
        assert changes[-1]["attempt"] == (1 if there in (just_made,) else 2)
        assert "checkpoint.every: null -> 3" in capsys.readouterr().err
    if becomes == EXTENDED:
        assert changes[-1]["continues_from"] == (6 if there is done else 4)
        assert read_state(run_dir) == "submitted"
        if there is done:
            freeze(job_at(run_dir, "train.steps=9"))  # the permission is no setting of the run


@pytest.mark.parametrize("asked", [OTHER, LONGER], ids=["other", "longer"])
def test_nobody_changes_what_is_trained_under_somebody_who_trains_it(asked: tuple[str, ...], tmp_path: Path) -> None:
    for there in (refused, stopped):
        run_dir = tmp_path / there.__name__
        there(run_dir)
        with held(run_dir), pytest.raises(ConfigError, match=r"process 1 of this machine is running it|is a run with other settings"):
            freeze(job_at(run_dir, *asked))


def test_a_run_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    job = begun(tmp_path / "run", state="running", steps=(), rows=False)
    assert not at_work(job)
    (job.run_dir / ".launcher-elsewhere.lock").touch()
    assert at_work(job) == "elsewhere may be running it"


def test_every_setting_that_is_taken_exists() -> None:
    known = set(all_fields())
    for name in (*TAKEN, *TAKEN_UNDER_FSDP):
        assert name in known or any(field.startswith(name) for field in known), name


@pytest.mark.parametrize(
    ("before", "asked", "word"),
    [
        (["train.on_spike=rollback", "checkpoint.every=2"], "checkpoint.every=3", "checkpoint.every"),
        (["train.eval_every=2", "train.patience=3"], "train.eval_every=3", "train.eval_every"),
        (["engine=zero3"], "engine.offload_optimizer=cpu", "engine.offload_optimizer"),
    ],
)
def test_a_setting_that_changes_what_is_trained_here_is_kept(before: list[str], asked: str, word: str, tmp_path: Path) -> None:
    begun(tmp_path / "run", *before)
    with pytest.raises(ConfigError, match=word):
        freeze(job_at(tmp_path / "run", *before, asked))


def test_servers_may_move_and_an_environment_may_have_other_processes() -> None:
    def run(*servers: str, processes: int = 1) -> RunConfig:
        return RunConfig(rl=RlConfig(servers=list(servers), environment_processes=processes, environment_timeout_s=9.0 * processes))

    before = run("http://a:1")
    for after, lines in ((run("http://b:1", "http://c:1", processes=2), 0), (run(), 1)):
        assert len(kept(differing(before, after), before, after)) == lines
        assert len(kept(differing(after, before), after, before)) == lines


def test_a_base_that_was_moved_is_the_same_base(tmp_path: Path) -> None:
    """By its weights: another one at the new path is refused."""

    def job_on(folder: Path) -> Job:
        job = job_at(run_dir)
        return dataclasses.replace(job, run=dataclasses.replace(job.run, model=dataclasses.replace(job.run.model, id=str(folder))))

    run_dir, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    for folder, content in ((moved, b"weights"), (other, b"weightz")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
    begun(run_dir)
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    settings["model"]["id"] = str(tmp_path / "before")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    change(run_dir / "manifest.json", base={"id": str(tmp_path / "before"), "weights": fingerprint(moved)})
    with pytest.raises(ConfigError, match=r"model\.id: "):
        freeze(job_on(other))
    freeze(job_on(moved))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["id"] == str(moved)


# Copies and moves.


def test_a_copy_is_a_run_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own id, which its checkpoints carry; the original's job is not its own, and the original stays to the byte."""
    original, copy = tmp_path / "original", tmp_path / "run"
    begun(original)
    change(original / "slurm.json", id="7", run_dir=str(original))
    shutil.copytree(original, copy)
    left = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    freeze(job_at(copy))
    assert left == {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    ours, theirs = manifest_of(copy), manifest_of(original)
    assert ours["wandb_id"] != theirs["wandb_id"]
    assert (ours["copied_from"]["run_dir"], ours["copied_from"]["wandb_id"]) == (str(original), theirs["wandb_id"])
    assert not (copy / "slurm.json").exists()
    for step in (2, 4):
        assert not why_not_of(ours["wandb_id"], copy / "checkpoints" / name_of(step))
    assert f"a copy of the run in {original}" in capsys.readouterr().err
    freeze(job_at(copy))
    assert manifest_of(copy) == ours
    freeze(job_at(original))
    assert manifest_of(original) == theirs


def test_a_copy_of_a_copy_and_a_moved_copy_are_told_apart(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    freeze(job_at(tmp_path / "b"))
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    freeze(job_at(tmp_path / "c"))
    (tmp_path / "b").rename(tmp_path / "d")
    freeze(job_at(tmp_path / "d"))
    ids = {name: manifest_of(tmp_path / name)["wandb_id"] for name in "acd"}
    assert len(set(ids.values())) == 3
    assert manifest_of(tmp_path / "c")["copied_from"]["wandb_id"] == ids["d"]


@pytest.mark.parametrize("after", ["write_json", "_replace_config"])
def test_a_launcher_that_was_killed_while_it_took_over_a_copy_is_followed(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    begun(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    plain, calls = freeze_module.write_json, []

    def once(path: Path, value: object) -> None:
        calls.append(path)
        (plain if len(calls) < 3 else die)(path, value)

    job = job_at(tmp_path / "b")
    monkeypatch.setattr(freeze_module, after, once if after == "write_json" else die)
    with pytest.raises(Killed):
        freeze(job)
    monkeypatch.undo()
    freeze(job)
    ours = manifest_of(tmp_path / "b")
    assert ours["copied_from"]["wandb_id"] == manifest_of(tmp_path / "a")["wandb_id"] != ours["wandb_id"]
    assert not any(why_not_of(ours["wandb_id"], path) for path in (tmp_path / "b" / "checkpoints").iterdir())


def test_a_run_under_another_name_of_its_directory_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    freeze(job_at(tmp_path / "link"))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert not capsys.readouterr().err


def test_a_rank_writes_where_its_config_is(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load(tmp_path / "b" / "config.yaml").run_dir == str(tmp_path / "b")


# Longer runs.

AHEAD = ("objective=grpo", "reward.right.kind=exact", "data.packing=false", "data.too_long=drop", "rl.group_size=2", "rl.max_new_tokens=8")


@pytest.mark.parametrize(
    ("before", "asked", "steps", "becomes"),
    [
        (["optim.warmup_steps=2"], ["train.steps=12"], (4, 6), 6),
        (["optim.warmup_fraction=0.5"], ["train.steps=12"], (4, 6), "other learning rates from step 1 on"),
        (["optim.schedule=wsd", "optim.decay_fraction=0.5"], ["train.steps=12"], (4, 6), 4),
        (["optim.schedule=wsd", "optim.decay_fraction=1"], ["train.steps=12"], (4, 6), "from step 2 on"),
        (["optim.schedule=cosine"], ["train.steps=12"], (4, 6), "other learning rates from step 2 on"),
        (["optim.schedule=linear"], ["train.steps=12"], (4, 6), "model.id="),
        ([*AHEAD, "rl.staleness=1"], ["train.steps=12"], (4, 6), "with rl.staleness=1 the weights"),
        (["peft=adalora", "peft.tinit=1", "peft.tfinal=1"], ["train.steps=12"], (4, 6), "run_dir="),
        (["train.eval_every=2", "train.patience=2"], ["train.steps=12"], (4, 6), "train.patience decides"),
        ([], ["train.steps=12"], (), 0),
        (["train.steps=null", "train.epochs=1"], ["train.epochs=2"], (8, 10), 10),
        (["train.steps=null", "train.epochs=1", "train.global_batch=16"], ["train.epochs=2"], (2, 3), 2),
        (["train.steps=null", "train.epochs=1", "train.global_batch=16"], ["train.epochs=null", "train.steps=9"], (2, 3), 2),
    ],
)
def test_a_longer_run_continues_from_where_both_lengths_are_the_same_run(
    before: list[str], asked: list[str], steps: tuple[int, ...], becomes: int | str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    begun(run_dir, *before, state="done", steps=steps)
    job = job_at(run_dir, *before, *asked, "train.extend=true")
    if isinstance(becomes, str):
        with pytest.raises(ConfigError) as error:
            freeze(job)
        assert becomes in str(error.value)
        assert f"run_dir={run_dir}-longer" in error.value.remedy
        return
    freeze(job)
    assert manifest_of(run_dir)["changes"][-1]["continues_from"] == becomes
    folders = sorted(path.name for path in (run_dir / "checkpoints").glob("*"))
    assert [name for name in folders if "of-" not in name] == [name_of(step) for step in steps if step <= becomes]
    assert len(folders) == len(steps)


def test_a_longer_run_trains_on_no_rollout_of_weights_that_it_never_has(tmp_path: Path) -> None:
    """Of two steps each: that of steps 3 and 4, of which the checkpoint has one, is the same with both lengths."""
    for first in (0, 2, 4):
        folder = tmp_path / "rollouts" / name_of(first + 1)
        folder.mkdir(parents=True)
        change(folder / "about.json", version=first)
    set_aside(tmp_path, 3, 6)
    found = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert found == ["step-000001", "step-000003", "step-000005.of-6-steps"]
    assert json.loads((tmp_path / "rollouts" / found[-1] / "about.json").read_text()) == {"version": 4}


# Attempts.


def test_an_attempt_notes_its_code_and_says_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_code(sha: str, diff: bytes) -> None:
        version = {"git_sha": sha, "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None, "untracked": []}
        monkeypatch.setattr("launcher.job.code_version", lambda: (version, diff))
        monkeypatch.setattr("launcher.freeze.code_version", lambda: (version, diff))

    of_code("abc", b"")
    job = job_at(tmp_path / "run")
    freeze(job)
    note_attempt(job)
    assert not capsys.readouterr().err
    Attempt(job.run_dir).claim()
    of_code("abc", b"edited")
    note_attempt(job)
    assert "since attempt 1 the code has changed: other uncommitted changes on commit abc" in capsys.readouterr().err
    assert (job.run_dir / "code.attempt-2.diff").read_bytes() == b"edited"
    Attempt(job.run_dir).claim()
    of_code("def", b"")
    note_attempt(job)
    note_attempt(job)  # the first start of it was stopped before its ranks had met
    assert "commit abc -> def" in capsys.readouterr().err
    known = manifest_of(job.run_dir)
    assert [(entry["number"], entry["code"]["git_sha"]) for entry in known["attempts"]] == [(1, "abc"), (2, "abc"), (3, "def")]
    assert known["code"]["git_sha"] == "abc"


def test_code_whose_arithmetic_has_changed_continues_no_run(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    change(tmp_path / "run" / "manifest.json", numerics=0)
    with pytest.raises(ConfigError, match="began with arithmetic 0 of the code"):
        freeze(job_at(tmp_path / "run"))
    refused(tmp_path / "early")
    change(tmp_path / "early" / "manifest.json", numerics=0)
    freeze(job_at(tmp_path / "early"))
