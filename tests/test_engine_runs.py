"""The command a user types under every engine: one curve, exact continuation, and refusals that end all ranks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, arguments, damaged_bases, environment, launch, read_rows, save_in_bf16, stop_at_step, trace, wait_until_gone
from conftest import save_tiny

from trainers.config.errors import ConfigError
from trainers.engines.fsdp.groups import require_groups
from trainers.model.blueprint import find_blocks

OFFLOADS = ["zero3", "zero3_offload", "fsdp_offload"]


@pytest.mark.slow
@pytest.mark.cpu_adam
@pytest.mark.parametrize("engine", ["zero3", "fsdp_offload", pytest.param("zero3_offload", marks=pytest.mark.soak)])
def test_another_engine_gives_the_same_curve(base: Path, chats: Path, cache: Path, finished: Path, tmp_path: Path, engine: str) -> None:
    said = launch(cache, arguments(base, chats, tmp_path / "run", f"engine={engine}", "checkpoint.every=3"))
    for key in ("loss", "grad_norm", "eval_loss", "lr", "tokens"):
        expected = [row[key] for row in read_rows(finished) if key in row]
        assert [row[key] for row in read_rows(tmp_path / "run") if key in row] == pytest.approx(expected, rel=2e-5), key
    for word in ("storage", "compute", "gradient reduction", "optimizer state", "saved"):
        assert word in said
    assert ("in host memory" in said) is ("offload" in engine)
    assert ("offloading:" in said) is ("offload" in engine)
    assert (tmp_path / "run" / "deepspeed.json").is_file() is engine.startswith("zero3")
    assert "export reopened with plain transformers" in said


@pytest.mark.slow
@pytest.mark.cpu_adam
@pytest.mark.parametrize("engine", ["zero3_offload", pytest.param("fsdp_offload", marks=pytest.mark.soak)])
def test_a_stopped_run_continues_bit_for_bit(base: Path, chats: Path, cache: Path, tmp_path: Path, engine: str) -> None:
    whole = arguments(base, chats, tmp_path / "whole", f"engine={engine}", "train.steps=10")
    launch(cache, whole)
    parts = arguments(base, chats, tmp_path / "parts", f"engine={engine}", "train.steps=10", "checkpoint.every=2")
    stop_at_step(cache, parts, tmp_path / "parts", 3)
    assert "continuing from" in launch(cache, parts)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    exports = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert exports[0] == exports[1]


def refused(cache: Path, line: list[str], run_dir: Path, **variables: str) -> str:
    """Run to a refusal: exit code 2, no traceback, all ranks gone."""
    done = subprocess.run(line, cwd=ROOT, env=environment(cache) | variables, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    if (run_dir / "status.json").exists():
        assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
        wait_until_gone(run_dir, 10)
    return said


def test_a_truncated_file_under_zero3(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    folder, words = damaged_bases(base, tmp_path)["truncated"]
    said = refused(cache, arguments(folder, chats, tmp_path / "run", "engine=zero3"), tmp_path / "run")
    assert all(word in said for word in [*words, "model.id"]), said


def test_a_missing_shard_is_named(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    folder = save_in_bf16(base, tmp_path / "sharded")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    said = refused(cache, arguments(folder, chats, tmp_path / "run", "engine=zero3"), tmp_path / "run")
    assert lost.name in said
    assert "missing" in said


def test_an_architecture_without_a_causal_model(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(base, tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "t5", "architectures": ["T5Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(cache, arguments(folder, chats, tmp_path / "run"), tmp_path / "run")
    assert "`model.id`" in said
    assert "t5" in said.lower()


def test_too_little_host_memory_is_refused_with_the_numbers(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    line = arguments(base, chats, tmp_path / "run", "engine=fsdp_offload")
    said = refused(cache, line, tmp_path / "run", SLURM_MEM_PER_NODE="900")
    assert "`engine.offload_optimizer`" in said
    assert "0.88 GiB" in said or "0.9 GiB" in said, said
    assert "SLURM_MEM_PER_NODE" in said


def test_a_missing_nvme_folder_is_refused_before_anything_is_built(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    line = arguments(base, chats, tmp_path / "run", "engine=zero3_nvme", f"engine.nvme_path={tmp_path}/nowhere")
    said = refused(cache, line, tmp_path / "run", TORCH_EXTENSIONS_DIR=str(tmp_path / "ops"))
    assert "`engine.nvme_path`" in said
    assert "no such directory" in said
    assert not (tmp_path / "ops").exists()


@pytest.mark.slow
@pytest.mark.timeout(2600)
@pytest.mark.usefixtures("async_io")
@pytest.mark.cpu_adam
def test_nvme_gives_the_figures_of_host_memory_and_a_full_disk_is_refused(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Tensors of 1 MiB and more go to files: the model is larger than the other tests', so that they do. A stopped run continues."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    folder = save_tiny(tmp_path / "wide", tied=True, vocab_size=len(tokenizer), initializer_range=0.02, **wide)
    tokenizer.save_pretrained(folder)
    (tmp_path / "nvme").mkdir()
    launch(cache, arguments(folder, chats, tmp_path / "whole", "engine=zero3_offload", "optim.lr=1e-4"))
    cut = arguments(folder, chats, tmp_path / "cut", "engine=zero3_nvme", f"engine.nvme_path={tmp_path}/nvme", "optim.lr=1e-4")
    cut.append("checkpoint.every=2")
    stop_at_step(cache, cut, tmp_path / "cut", 3)
    launch(cache, cut)
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert list((tmp_path / "nvme").iterdir()) == []
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=False).returncode:
        return
    try:
        line = arguments(folder, chats, tmp_path / "full", "engine=zero3_nvme", f"engine.nvme_path={small}")
        said = refused(cache, line, tmp_path / "full")
    finally:
        subprocess.run(["umount", str(small)], check=False, timeout=10)
    assert "`engine.nvme_path`" in said
    assert "free" in said


def test_a_model_without_blocks_is_sent_to_zero3() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2))
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64, vocab_size=33))
    assert len(find_blocks(gpt2)) == 2  # its list is `h`, which the plan does not name
    blocks = find_blocks(model)
    assert len(blocks) == 2
    with pytest.raises(ConfigError, match="outside its blocks"):
        require_groups(model, blocks[:1])
    model.model.layers = None
    with pytest.raises(ConfigError, match="names no repeated blocks") as no_blocks:
        require_groups(model, find_blocks(model))
    assert "engine=zero3" in no_blocks.value.remedy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: would compare every engine's bf16 curve and place its state")
@pytest.mark.cpu_adam
def test_engines_agree_on_a_gpu(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Losses within 1 % of fsdp's in bf16, offloaded state on the host (the run asserts where its live tensors are)."""
    curves = {}
    for name, more in {name: [f"engine={name}"] for name in ["fsdp", *OFFLOADS]}.items() | {("visits", ["engine.offload_optimizer=cpu"])}:
        line = arguments(base, chats, tmp_path / name, "train.precision=bf16", "launch.processes=1", *more)
        launch(cache, [word.replace("optim.lr=1e-2", "optim.lr=1e-3") for word in line])
        curves[name] = [row["loss"] for row in read_rows(tmp_path / name) if "loss" in row]
    for name, losses in curves.items():
        assert losses == pytest.approx(curves["fsdp"], rel=1e-2), name
