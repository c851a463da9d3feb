"""A LoRA run by the command a user types: what it leaves behind, how it continues, how another run takes its adapter up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, arguments, launch, stop_at_step, trace

RUN = ["peft.rank=4", "peft.alpha=8", "train.steps=20", "checkpoint.every=3", "train.eval_every=10"]


@pytest.fixture(scope="module")
def finished(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two ranks, by the command a user types."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    said = launch(cache, arguments(base, chats, run_dir, "peft=lora", *RUN))
    assert "export reopened with plain peft" in said
    assert "frozen weights" in said
    return run_dir


def test_a_run_leaves_an_adapter(finished: Path, base: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    sides = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert summary["trainable_parameters"] == 3 * sum(4 * (rows + columns) for rows, columns in sides)
    assert summary["parameters"] > summary["trainable_parameters"]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    names = {path.name for path in (finished / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    config = json.loads((finished / "export" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 8)
    said = subprocess.run(
        [sys.executable, "-m", "tools.export", str(finished), str(finished / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    assert "peft.method=lora" in said.stderr


@pytest.mark.slow
def test_a_run_beside_four_bits(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    said = launch(cache, arguments(base, chats, tmp_path / "run", "peft=qlora", "peft.rank=4", "train.precision=bf16"))
    assert "nf4, " in said
    assert "export reopened with plain peft" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    config = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(base: Path, chats: Path, cache: Path, finished: Path, tmp_path: Path) -> None:
    line = arguments(base, chats, tmp_path / "parts", "peft=lora", *RUN)
    stop_at_step(cache, line, tmp_path / "parts", 5)
    assert "continuing from" in launch(cache, line)
    assert trace(tmp_path / "parts") == trace(finished)
    same = [(run_dir / "export" / "adapter_model.safetensors").read_bytes() for run_dir in (tmp_path / "parts", finished)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_another_runs_adapter_is_trained_further(base: Path, chats: Path, cache: Path, finished: Path, tmp_path: Path) -> None:
    adapter = f"peft.adapter={finished}/export"
    launch(cache, arguments(base, chats, tmp_path / "run", "peft=lora", *RUN, adapter, "engine=zero3"))
    before, after = (json.loads((run / "summary.json").read_text()) for run in (finished, tmp_path / "run"))
    assert after["eval_loss_before"] == pytest.approx(before["eval_loss_after"], rel=1e-5)
    wrong = {
        "peft.alpha=16": "was made with lora_alpha=8",
        "peft.targets=[q_proj]": "which the run's has not",
        f"model.id={finished}/export": "is an adapter, not a model",
        "peft.init=gaussian": "`peft.init`",
    }
    for word, expected in wrong.items():
        line = arguments(base, chats, tmp_path / word.partition("=")[0], "peft=lora", *RUN, adapter, "launch.processes=1", word)
        said = launch(cache, line, expect=2)
        assert expected in said
        assert "Traceback" not in said
    other = tmp_path / "other"
    shutil.copytree(base, other)
    said = launch(cache, arguments(other, chats, tmp_path / "bad", "peft=lora", *RUN, adapter, "launch.processes=1"), expect=2)
    assert f"belongs to {base}" in said
