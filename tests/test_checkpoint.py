"""A checkpoint is complete or absent, of its moment, of its run and of the newest attempt; what is damaged is skipped and said."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ranks, blueprint_for
from peft_cases import (
    batch_of,
    config_for,
    rows_of_steps,
)

from trainers import host
from trainers.checkpoint import Checkpointer, NoCheckpoint, Progress
from trainers.config.schema import CheckpointConfig
from trainers.engines.build import build_engine
from trainers.rundir.attempt import Attempt, Superseded, newest_attempt
from trainers.rundir.checkpoints import is_lowest
from trainers.rundir.ending import State
from trainers.world import World

SMALL = 3 << 20


class Said(logging.Handler):
    """What was logged, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Saving:
    """One attempt of a run of a real engine, and what it can be asked to do; each method is collective."""

    def __init__(self, world: World, folder: Path, run_dir: Path, case: str = "lora", engine: str = "fsdp", **settings: Any) -> None:
        self.world, self.engine = world, build_engine(config_for(folder, case, engine), world, blueprint_for(folder))
        self.attempt = Attempt(run_dir)
        self.attempt.begin(world.from_first(self.attempt.claim() if world.rank == 0 else 0))
        self.saver = Checkpointer(CheckpointConfig(**settings), self.attempt, world)
        self.said = Said()
        logging.getLogger("fulltune").addHandler(self.said)
        logging.getLogger("fulltune").setLevel(logging.DEBUG)

    def train(self, step: int) -> None:
        ids, labels = list(rows_of_steps())[step % 20]
        batch = batch_of(ids[self.world.rank :: self.world.size], labels[self.world.rank :: self.world.size])
        self.engine.backward(-self.engine.forward(batch).logps.sum() / 100, last=True)
        self.engine.step(1e-2)

    def weights(self) -> dict[str, Any]:
        return {name: tensor.numpy().copy() for name, tensor in self.engine.weights()}

    def end(self) -> list[str]:
        logging.getLogger("fulltune").removeHandler(self.said)
        return self.said.lines


def same(saving: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return all((saving[name] == tensor).all() for name, tensor in theirs.items())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"wandb_id": "thisrun"}))
    return folder


def save_while_training(world: World, folder: Path, run_dir: Path, engine: str) -> tuple[bool, bool, list[str]]:
    saving = Saving(world, folder, run_dir, engine=engine)
    saving.train(0)
    then = saving.weights()
    saving.saver.save(saving.engine, Progress(step=1, tokens=5))
    saving.train(1)  # changes the live tensors while they are written
    saving.saver.finish()
    again = Saving(world, folder, run_dir, engine=engine)
    progress = again.saver.restore(again.engine)
    first = same(again.weights(), then) and progress == Progress(step=1, tokens=5)
    again.train(1)
    return first, same(again.weights(), saving.weights()), saving.end() + again.end()


@pytest.mark.parametrize("engine", ["fsdp", "zero3", pytest.param("zero3_offload", marks=pytest.mark.cpu_adam)])
def test_a_save_is_of_its_moment_while_training_goes_on(
    ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path, engine: str
) -> None:
    for then, now, _ in ranks(2).call(save_while_training, tiny_llama, run_dir, engine):
        assert then
        assert now
    folder = run_dir / "checkpoints" / "step-000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["run"], manifest["attempt"]) == ("thisrun", 1)
    assert manifest["sha256"] == {name: digest for name, digest in digests(folder).items() if name != "manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]


def save_steps(world: World, folder: Path, run_dir: Path, losses: dict[int, float | None], settings: dict[str, Any]) -> list[str]:
    saving = Saving(world, folder, run_dir, **settings)
    for step, loss in losses.items():
        saving.train(step)
        saving.saver.save(saving.engine, Progress(step=step), loss)
    saving.saver.finish()
    return saving.end()


def restored(world: World, folder: Path, run_dir: Path) -> tuple[int | str, list[str]]:
    saving = Saving(world, folder, run_dir)
    try:
        found: int | str = saving.saver.restore(saving.engine).step
    except NoCheckpoint as error:
        found = str(error)
    return found, saving.end()


def test_a_loss_that_is_not_finite_is_never_the_lowest_and_hides_none() -> None:
    nan, inf = float("nan"), float("inf")
    assert [is_lowest(losses) for losses in ([3.0, 2.0], [nan, 2.0], [2.0, nan], [inf, inf], [nan, 2.0, 1.0], [1.0, nan, 2.0])] == [
        *(True, True, False, False, True, False)
    ]


def test_what_is_kept(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    other, nested = run_dir / "checkpoints" / "step-999999", run_dir / "checkpoints" / "step-000777"
    other.mkdir(parents=True)
    (other / "anything").write_text("of the user's")
    losses: dict[int, float | None] = {2: 3.0, 3: 1.0, 4: None, 5: 2.0, 6: float("nan"), 7: None}
    ranks(2).call(save_steps, tiny_llama, run_dir, losses, {"keep_last": 1, "keep_every": 4, "keep_best": 2})
    assert sorted(path.name for path in other.parent.iterdir()) == [*(f"step-{step:06d}" for step in (3, 4, 5, 7)), "step-999999"]
    shutil.copytree(run_dir / "checkpoints" / "step-000003", nested)
    elsewhere = run_dir / "checkpoints" / "step-000888"
    shutil.copytree(run_dir / "checkpoints" / "step-000007", elsewhere)
    manifest = json.loads((elsewhere / "manifest.json").read_text())
    (elsewhere / "manifest.json").write_text(json.dumps(manifest | {"run": "another", "progress": {"step": 888}}))
    before = {path.name: digests(path) for path in (other, nested, elsewhere)}
    step, said = ranks(2).call(restored, tiny_llama, run_dir)[0]
    assert step == 7
    for name, why in (("999999", "no manifest.json"), ("000777", "of step 3 under another name"), ("000888", "another run's")):
        assert any(name in line and why in line for line in said), said
    ranks(2).call(save_steps, tiny_llama, run_dir, {9: None, 10: None}, {"keep_last": 1})
    assert {path.name: digests(path) for path in (other, nested, elsewhere)} == before


def flip(folder: Path) -> Path:
    """Flip a bit in the middle of a checkpoint's largest file."""
    file = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def go_on(world: World, folder: Path, run_dir: Path) -> int:
    saving = Saving(world, folder, run_dir)
    begun = saving.saver.restore(saving.engine).step
    saving.train(1)
    saving.saver.save(saving.engine, Progress(step=begun + 1), wait=True)
    saving.end()
    return begun


def test_a_flipped_byte_is_found_and_the_older_one_continues(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    ranks(2).call(save_steps, tiny_llama, run_dir, {1: None, 2: None}, {})
    newest, older = (run_dir / "checkpoints" / f"step-00000{step}" for step in (2, 1))
    intact, file = digests(older), flip(newest)
    step, said = ranks(2).call(restored, tiny_llama, run_dir)[0]
    assert step == 1
    assert any(f"skipping {newest}: {file.name} holds other bytes than were written" in line for line in said), said
    assert ranks(2).call(go_on, tiny_llama, run_dir) == [1, 1]  # saves over what is complete by its size alone
    assert digests(older) == intact
    assert ranks(2).call(restored, tiny_llama, run_dir)[0][0] == 2
    for path in (newest, older):
        flip(path)
    assert "can be read; move them away" in str(ranks(2).call(restored, tiny_llama, run_dir)[0][0])


def test_a_run_whose_only_checkpoint_is_harmed_does_not_begin_anew(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    ranks(2).call(save_steps, tiny_llama, run_dir, {1: None}, {})
    only = run_dir / "checkpoints" / "step-000001"
    manifest = (only / "manifest.json").read_bytes()
    for harm in (
        lambda: (only / "manifest.json").write_bytes(manifest.replace(b"tokens", b"tok\xf6ns", 1)),
        lambda: (only / "manifest.json").write_bytes(manifest[:100]),
        lambda: (only / "manifest.json").unlink(),
        lambda: next(only.glob("*.distcp")).unlink(),
    ):
        harm()
        assert "can be read; move them away" in str(ranks(2).call(restored, tiny_llama, run_dir)[0][0])
        (only / "manifest.json").write_bytes(manifest)
    only.rename(run_dir / "moved")
    assert ranks(2).call(restored, tiny_llama, run_dir)[0][0] == 0


def plant(folder: Path, marker: Path) -> None:
    """Put code into a checkpoint's table of contents, and its hash into the manifest: what an attacker can write."""
    contents = folder / ".metadata"
    found = pickle.loads(contents.read_bytes())
    found.planner_data = Touch(marker)
    contents.write_bytes(pickle.dumps(found))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sizes"][contents.name] = contents.stat().st_size
    manifest["sha256"][contents.name] = hashlib.sha256(contents.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@dataclass
class Touch:
    """Makes a file where it is unpickled."""

    path: Path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_skipped_and_nothing_runs(
    ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path, tmp_path: Path
) -> None:
    ranks(2).call(save_steps, tiny_llama, run_dir, {1: None, 2: None}, {})
    newest, marker = run_dir / "checkpoints" / "step-000002", tmp_path / "ran"
    plant(newest, marker)
    step, said = ranks(2).call(restored, tiny_llama, run_dir)[0]
    assert step == 1
    assert any(f"skipping {newest}" in line and "names posix.mkdir" in line for line in said), said
    assert not marker.exists()
    pickle.loads((newest / ".metadata").read_bytes())
    assert marker.exists()  # the code was real


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "none", str(folder)]
    if os.geteuid() or subprocess.run(line, capture_output=True, check=False, timeout=20).returncode:
        pytest.skip("a small tmpfs cannot be mounted: not root, or not allowed to")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


def fill_and_save(world: World, folder: Path, run_dir: Path, disk: Path, first: bool, strict: bool) -> tuple[str, list[str], int]:
    """Save once where there is room (with `first`), take the room away behind the check's back, and save again."""
    saving = Saving(world, folder, run_dir, case="freeze", strict=strict)
    outcome = "went on"
    try:
        if first:
            saving.saver.save(saving.engine, Progress(step=1), wait=True)
        if world.rank == 0:
            (disk / "filler").write_bytes(bytes(SMALL - sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) - (1 << 16)))
        world.barrier()
        saving.train(1)
        saving.saver.save(saving.engine, Progress(step=2))
        saving.saver.finish()
        if world.rank == 0:
            (disk / "filler").unlink()
        saving.saver.failed_at -= 100
        assert saving.saver.requests()[1] is (world.rank == 0)
        saving.saver.save(saving.engine, Progress(step=3), wait=True)
    except NoCheckpoint as error:
        outcome = str(error)
    return outcome, saving.end(), saving.saver.all_failures


@pytest.mark.parametrize(("first", "strict"), [(True, False), (True, True), (False, False)])
def test_a_full_disk_ends_a_run_only_where_it_must(
    ranks: Callable[[int], Ranks], tiny_llama: Path, small_disk: Path, first: bool, strict: bool
) -> None:
    run_dir = small_disk / "run"
    run_dir.mkdir()
    (run_dir / "manifest.json").write_text("{}")
    for outcome, said, failures in ranks(2).call(fill_and_save, tiny_llama, run_dir, small_disk, first, strict):
        assert failures == 1
        kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        if first and not strict:
            assert outcome == "went on"
            assert kept == ["step-000001", "step-000003"]
            assert any("no checkpoint of step 2 (1 in a row)" in line and "free there" in line for line in said), said
        else:
            assert ("checkpoint.strict is set" if strict else "there is no older one") in outcome
            assert "bytes" in outcome
            assert kept == (["step-000001"] if first else [])


def save_late(world: World, folder: Path, run_dir: Path) -> str:
    saving = Saving(world, folder, run_dir)
    saving.train(0)
    saving.saver.save(saving.engine, Progress(step=1), wait=True)
    if world.rank == 0:
        assert Attempt(run_dir).claim() == saving.attempt.number + 1
        (run_dir / "checkpoints" / ".step-000009.attempt-2.tmp").mkdir()
        with pytest.raises(Superseded):
            saving.saver._rotate()
        saving.attempt.is_current = lambda at_once=False: True  # type: ignore[method-assign]  # stopped just behind its look
        saving.saver._rotate()
        del saving.attempt.is_current
    world.barrier()
    try:
        saving.saver.save(saving.engine, Progress(step=2), wait=True)
    except Superseded as error:
        return str(error)
    return "saved"


def test_an_older_attempt_saves_nothing(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    for said in ranks(2).call(save_late, tiny_llama, run_dir):
        assert "attempt 2 of this run has started since; attempt 1 writes nothing any more" in said
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [".step-000009.attempt-2.tmp", "step-000001"]
    (run_dir / "status.json").write_text("{}")
    late, current = Attempt(run_dir, 1), Attempt(run_dir, newest_attempt(run_dir))
    late.set_status(State.failed)
    assert json.loads((run_dir / "status.json").read_text()) == {}
    current.set_status(State.running)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "running"


def save_short(world: World, folder: Path, run_dir: Path) -> tuple[list[str], bool]:
    saving = Saving(world, folder, run_dir)
    truly = host.memory_available
    host.memory_available = (lambda: 4096) if world.rank == 1 else truly  # type: ignore[assignment]  # one node alone has no room
    try:
        saving.saver.save(saving.engine, Progress(step=1))
    finally:
        host.memory_available = truly
    return saving.end(), bool(saving.saver.copy.tensors)


def test_where_memory_is_short_training_waits(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    for said, copied in ranks(2).call(save_short, tiny_llama, run_dir):
        assert any("written while training waits" in line for line in said)
        assert not copied
    assert (run_dir / "checkpoints" / "step-000001").is_dir()


def test_files_ask_for_a_save_and_a_stop(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    saver = Checkpointer(CheckpointConfig(), Attempt(run_dir), World(rank=0, local_rank=0, size=1, device=torch.device("cpu")))
    assert saver.requests() == (False, False)
    (run_dir / "save_now").touch()
    (run_dir / "stop").touch()
    assert saver.requests() == (True, True)
    assert saver.requests() == (False, False)
    saver.config.every_minutes = 0.001
    saver.saved_at -= 1
    assert saver.requests() == (False, True)


def best_of(world: World, folder: Path, run_dir: Path, engine: str) -> list[Any]:
    """Save steps with held-out losses; return what is loaded, as it is, with the best damaged, where the last is best, and without any."""
    saving = Saving(world, folder, run_dir, engine=engine, keep_last=1, keep_best=2)
    weights = {}
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}.items():
        saving.train(step)
        weights[step] = saving.weights()
        saving.saver.save(saving.engine, Progress(step=step), loss, wait=True)
    found = []
    for damage in (None, "step-000002"):
        if damage and world.rank == 0:
            file = run_dir / "checkpoints" / damage / "__0_0.distcp"
            file.write_bytes(file.read_bytes()[:-1] + b"0")
        world.barrier()
        best = saving.saver.restore_best(saving.engine, 4)
        assert best is not None
        found.append((best, same(saving.weights(), weights[best[0]])))
    saving.saver.save(saving.engine, Progress(step=5), 0.5, wait=True)
    found.append((saving.saver.restore_best(saving.engine, 5), True))
    return [*found, saving.saver.saved_step, *saving.end()]


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_the_best_step_is_loaded_for_the_export(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path, engine: str) -> None:
    for whole, damaged, last, saved, *said in ranks(2).call(best_of, tiny_llama, run_dir, engine):
        assert whole == ((2, 1.0), True)
        assert damaged == ((3, 2.0), True)
        assert last == ((5, 0.5), True)
        assert saved == 5
        assert any("skipping" in line and "step-000002" in line for line in said)


def test_no_step_is_best_without_a_loss(ranks: Callable[[int], Ranks], tiny_llama: Path, run_dir: Path) -> None:
    ranks(1).call(save_steps, tiny_llama, run_dir, {1: None, 2: None}, {})
    assert ranks(1).call(best_or_none, tiny_llama, run_dir) == [None]


def best_or_none(world: World, folder: Path, run_dir: Path) -> tuple[int, float] | None:
    saving = Saving(world, folder, run_dir)
    saving.end()
    return saving.saver.restore_best(saving.engine, 2)
