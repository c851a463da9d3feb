"""A run that is copied, made longer, moved and continued on another base, through the command line."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from command import ROOT, arguments, environment, launch, read_rows, status_of, trace

LEFTOVERS = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "GROUP_RANK": "1"}


def files_of(run_dir: Path) -> dict[str, str]:
    kept = [path for path in run_dir.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def line(base: Path, chats: Path, run_dir: Path, *more: str) -> list[str]:
    fixed = (
        "launch.processes=1",
        "train.steps=4",
        "checkpoint.every=2",
        "checkpoint.keep_every=2",
        "train.eval_every=2",
        "data.packing=false",
    )
    return arguments(base, chats, run_dir, *fixed, "train.sample_tokens=0", *more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "continues"), [(["optim.schedule=constant", "peft=lora"], 4), (["optim.schedule=wsd", "optim.decay_fraction=0.5"], 2)]
)
def test_a_copy_that_is_made_longer_is_a_run_that_was_planned_so_long(
    schedule: list[str], continues: int, base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    """Bit for bit; the original stays to the byte. A changed base is refused then, and a moved run continues on its own."""
    model = shutil.copytree(base, tmp_path / "base")
    original, copy, planned = (tmp_path / name for name in ("original", "copy", "planned"))
    launch(cache, line(model, chats, original, *schedule))
    left = files_of(original)
    shutil.copytree(original, copy)
    said = launch(cache, line(model, chats, copy, *schedule, "train.steps=8", "train.extend=true"))
    assert f"it continues from step {continues}" in said
    assert files_of(original) == left
    launch(cache, line(model, chats, planned, *schedule, "train.steps=8"))
    assert trace(copy) == trace(planned)
    name = "adapter_model.safetensors" if "peft=lora" in schedule else "model.safetensors"
    assert (copy / "export" / name).read_bytes() == (planned / "export" / name).read_bytes()
    assert json.loads((copy / "summary.json").read_text())["export"] == str(copy / "export")

    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    save_file({key: value * 1.01 for key, value in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})
    more = line(model, chats, tmp_path / "moved", *schedule, "train.steps=24", "train.extend=true")
    copy.rename(tmp_path / "moved")
    said = launch(cache, more, expect=2)
    assert "`model.id`" in said
    assert "weights have changed since this run began" in said
    shutil.copy(base / "model.safetensors", model / "model.safetensors")
    launch(cache, more)
    assert (status_of(tmp_path / "moved")["state"], read_rows(tmp_path / "moved")[-1]["step"]) == ("done", 24)


def test_what_another_job_left_in_the_environment_is_ignored_and_said(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    command = line(base, chats, tmp_path / "run", "train.steps=1", "data.eval_fraction=0", "train.eval_every=null")
    done = subprocess.run(command, cwd=ROOT, env=environment(cache) | LEFTOVERS, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "ignored, of another job: GROUP_RANK=1 LOCAL_RANK=3 MASTER_ADDR=127.0.0.1" in done.stderr
