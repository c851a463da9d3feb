"""A run whose ranks split layers, as a user starts it: stopped, continued on its own mesh and on others, exported again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import arguments, launch, read_rows, stop_at_step, tool, trace

SPLIT = ("engine.tensor=2", "train.global_batch=2")


def curve(run_dir: Path) -> list[float]:
    return [row[name] for row in read_rows(run_dir) for name in ("loss", "grad_norm", "eval_loss") if name in row]


def exported(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_continues_on_its_own_mesh_bit_for_bit_and_on_one_rank_as_one_curve(
    base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    said = launch(cache, arguments(base, chats, tmp_path / "whole", *SPLIT))
    assert "2 ranks split each layer" in said
    assert "on 2 ranks together" in said
    parts = arguments(base, chats, tmp_path / "parts", *SPLIT, "checkpoint.every=2")
    stop_at_step(cache, parts, tmp_path / "parts", 3)
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    assert "continuing from" in launch(cache, parts)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    assert exported(tmp_path / "parts" / "export") == exported(tmp_path / "whole" / "export")
    tool(cache, tmp_path / "parts", tmp_path / "again", name="export")
    assert exported(tmp_path / "again") == exported(tmp_path / "whole" / "export")
    launch(cache, arguments(base, chats, tmp_path / "one", SPLIT[1], "checkpoint.every=2", "launch.processes=1"))
    assert curve(tmp_path / "one") == pytest.approx(curve(tmp_path / "whole"), rel=2e-5)
