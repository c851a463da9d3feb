"""What is kept of a block for backward decides memory and time, and no number: loss and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Ranks, blueprint_for
from transformers import AutoConfig, AutoModelForCausalLM

from tools.bench.orders import engine_preset
from trainers.batch import Batch
from trainers.config.schema import (
    Activations,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    PeftMethod,
    Precision,
    Quantisation,
    RunConfig,
    TrainConfig,
)
from trainers.engines.build import build_engine
from trainers.objectives import NextToken
from trainers.step import take_step
from trainers.world import World, seed_step

STEPS, ROWS, LENGTH, BLOCKS = 5, 6, 24, 3
HOW = [how for how in Activations if how is not Activations.auto]
LORA: dict[str, Any] = {"method": PeftMethod.lora, "rank": 2, "dropout": 0.2, "targets": ["all-linear"]}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "dora": LORA | {"method": PeftMethod.dora},
    "qlora": LORA | {"quantise": Quantisation.nf4},
    "adalora": {"method": PeftMethod.adalora, "rank": 4, "target_rank": 2, "tinit": 1, "tfinal": 1, "targets": ["q_proj", "down_proj"]},
    "prompt": {"method": PeftMethod.prompt, "virtual_tokens": 3},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STYLES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gemma2": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128},
}
"""With dropout in attention where there is any, in residuals, too, in GPT-2's."""


def save_style(folder: Path, style: str) -> Path:
    torch.manual_seed(0)
    common = {key: value for key, value in TINY.items() if style != "gpt2" or not key.startswith(("hidden", "inter", "num", "max"))}
    config = AutoConfig.for_model(style, **(common | {"num_hidden_layers": BLOCKS, "initializer_range": 0.2} | STYLES[style]))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def batches_of(world: World, step: int, microbatch: int) -> list[Batch]:
    """This rank's microbatches: rows of two documents each."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 33, (ROWS, LENGTH), generator=generator)[world.rank :: world.size]
    positions = torch.arange(LENGTH) % (LENGTH * 2 // 3)
    return [Batch.of(part, part.roll(-1, 1), positions.expand(part.shape)) for part in ids.split(microbatch)]


def five_steps(world: World, folder: Path, engine: str, how: Activations, method: str, precision: Precision, **more: Any) -> dict[str, Any]:
    """Return losses and gradient norms of five steps, the start-up table, and how many inputs were on the host after a forward."""
    run_dir = folder.parent / f"run-{engine}"
    run_dir.mkdir(exist_ok=True)
    config = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder)),
        data=DataConfig(path="unused", packing=method != "prompt"),
        engine=EngineConfig(**(engine_preset(engine) | more)),
        peft=PeftConfig(lr=1e-2, **METHODS[method]) if METHODS[method] else PeftConfig(),
        optim=OptimConfig(full_lr=1e-2, clip=0.5),
        train=TrainConfig(steps=STEPS, global_batch=ROWS, precision=precision, activations=how),
    )
    built: Any = build_engine(config, world, blueprint_for(folder))
    counts, forward = [], built.forward

    def counted(*given: Any) -> Any:
        output = forward(*given)
        counts.append(sum(len(placed.tensors) for placed in built.tensors() if placed.kind == "activations"))
        return output

    built.forward = counted
    results = []
    for step in range(STEPS):
        seed_step(0, step, world.rank)
        if built.adaptation.update is not None:
            built.adaptation.update.at(step, STEPS)
        results.append(take_step(built, NextToken(), batches_of(world, step, 1), world, lr=1e-2, targets=ROWS * LENGTH))
    assert not [item for placed in built.tensors() if placed.kind == "activations" for item in placed.tensors], "all have come back"
    table = built.report()
    built.close()
    return {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], "table": table, "on_host": set(counts)}


def each_way(world: World, folder: Path, engine: str, method: str, precision: Precision, **more: Any) -> dict[str, dict[str, Any]]:
    hows = [how for how in HOW if method != "adalora" or how is not Activations.selective]  # refused
    return {str(how): five_steps(world, folder, engine, how, method, precision, **more) for how in hows}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("styles")
    return {style: save_style(made / style / "model", style) for style in STYLES}


def assert_same(found: dict[str, dict[str, Any]]) -> None:
    kept = found["keep"]
    for how, run in found.items():
        assert run["losses"] == kept["losses"], how
        assert run["norms"] == pytest.approx(kept["norms"], rel=1e-6), how
        assert run["on_host"] == ({BLOCKS} if how == "offload" else {0}), how


CASES = [
    (size, engine, style, method)
    for size, engine in ((1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (1, "zero3"), (2, "zero3"), (3, "zero3"))
    for style, method in [("llama", method) for method in METHODS] + [(style, "full") for style in STYLES if style != "llama"]
]
QUICK = [(1, "fsdp", "llama", "full"), (2, "fsdp", "llama", "lora"), (2, "fsdp", "qwen3_moe", "full"), (2, "zero3", "llama", "full")]


@pytest.mark.parametrize(
    ("size", "engine", "style", "method"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_what_is_kept_changes_no_number(
    ranks: Callable[[int], Ranks], folders: dict[str, Path], size: int, engine: str, style: str, method: str
) -> None:
    """Dropout draws the same numbers again, and a router sends each token to the same experts."""
    found = ranks(size).call(each_way, folders[style], engine, method, Precision.fp32)
    assert_same(found[0])
