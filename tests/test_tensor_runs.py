"""A run whose ranks split layers, or deal out experts: stopped, continued on its own mesh and on others, exported again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import arguments, launch, read_rows, stop_at_step, tool, trace
from small_models import save_mixture

SPLIT = ("engine.tensor=2", "train.global_batch=2")
DEALT = ("engine.expert=2", "train.global_batch=2")


def curve(run_dir: Path, *names: str) -> list[float]:
    return [row[name] for row in read_rows(run_dir) for name in ("loss", "grad_norm", "eval_loss", *names) if name in row]


def exported(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("split", "words"),
    [
        pytest.param(SPLIT, ("2 ranks split each layer", "on 2 ranks together"), marks=pytest.mark.slow),
        pytest.param(DEALT, ("2 ranks deal out the experts", "on each of 2 ranks"), marks=pytest.mark.soak),
    ],
)
def test_a_run_continues_on_its_own_mesh_bit_for_bit_and_on_one_rank_as_one_curve(
    split: tuple[str, str], words: tuple[str, str], base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    base = base if split is SPLIT else save_mixture(base, tmp_path / "mixture")
    said = launch(cache, arguments(base, chats, tmp_path / "whole", *split))
    assert all(word in said for word in words)
    parts = arguments(base, chats, tmp_path / "parts", *split, "checkpoint.every=2")
    stop_at_step(cache, parts, tmp_path / "parts", 3)
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    assert "continuing from" in launch(cache, parts)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    assert exported(tmp_path / "parts" / "export") == exported(tmp_path / "whole" / "export")
    tool(cache, tmp_path / "parts", tmp_path / "again", name="export")
    assert exported(tmp_path / "again") == exported(tmp_path / "whole" / "export")
    launch(cache, arguments(base, chats, tmp_path / "one", split[1], "checkpoint.every=2", "launch.processes=1"))
    assert curve(tmp_path / "one") == pytest.approx(curve(tmp_path / "whole"), rel=2e-5)


@pytest.mark.soak
def test_a_run_of_pairs_measures_its_reference_on_split_layers(base: Path, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the cat {number}", "chosen": "sat on a mat", "rejected": f"far home {number}"} for number in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = ("objective=dpo", "train.steps=3", "train.eval_every=3")
    for name, more in {"split": (), "one": ("launch.processes=1", "engine.tensor=1")}.items():
        launch(tmp_path / name, arguments(base, file, tmp_path / f"{name}_run", *method, *SPLIT, *more))
    names = ("accuracy", "reward_margin")
    assert curve(tmp_path / "split_run", *names) == pytest.approx(curve(tmp_path / "one_run", *names), rel=2e-5)
