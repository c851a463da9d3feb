"""train.compile: blocks that are compiled give the losses and gradients of plain ones; once steps are alike nothing more is compiled."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command import arguments, launch, stop_at_step, trace
from conftest import Ranks, blueprint_for, save_tiny

from trainers.batch import IGNORE, NO_DOCUMENT, Batch, Output
from trainers.config.checks import validate
from trainers.config.choices import PeftMethod, Precision, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.engines import compiling
from trainers.engines.build import build_engine
from trainers.health.activity import FIRST_STEP, Activity
from trainers.objectives import NextToken
from trainers.plan.simulate import ranks as fake_ranks
from trainers.plan.simulate import simulate
from trainers.rundir.beats import Phase
from trainers.step import take_step
from trainers.world import World

LENGTHS = (16, 16, 24, 8, 32)
"""Tokens of the rows of each step."""
SEQ_LEN = 29


def config_for(folder: Path, compiled: bool, packing: bool = True, **peft: Any) -> RunConfig:
    train = TrainConfig(steps=8, precision=Precision.fp32, global_batch=4, microbatch=1, compile=compiled)
    data = DataConfig(path=str(folder), seq_len=SEQ_LEN, packing=packing)
    return RunConfig(
        model=ModelConfig(id=str(folder)), data=data, train=train, peft=PeftConfig(lr=1e-3, **peft), optim=OptimConfig(lr=1e-3, clip=0.5)
    )


def step_batches(step: int, num: int, documents: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    size, batches = LENGTHS[step % len(LENGTHS)], []
    for _ in range(num):
        ids = torch.randint(3, 33, (1, size), generator=generator)
        positions = torch.arange(size).remainder(size // documents)[None]
        batches.append(Batch.of(ids, ids.roll(-1, 1).where(positions != size // documents - 1, IGNORE), positions))
    return batches


def train(world: World, folder: Path, compiled: bool, packing: bool, backend: str = "aot_eager", **peft: Any) -> dict[str, Any]:
    """Take a step a length, and evaluate; return what came of it, and how much was compiled."""
    torch._dynamo.reset()
    compiling.BACKEND = backend
    built = build_engine(config_for(folder, compiled, packing, **peft), world, blueprint_for(folder))
    found: list[float] = []
    for step in range(len(LENGTHS)):
        batches = step_batches(step, 4)
        targets = sum(batch.sizes().labels for batch in batches)
        result = take_step(built, NextToken(), batches[world.rank :: world.size], world, lr=1e-3, targets=targets)
        found += [result.loss, result.grad_norm]
    said = built.report()
    built.train(False)
    with torch.no_grad():
        for step in range(len(LENGTHS)):
            logps = built.forward(step_batches(step, 1)[0]).logps
            assert logps.shape == (1, LENGTHS[step])
            found += world.sum([float(logps.sum())])
    built.train(True)
    counted = built.compiled
    built.close()
    return {"found": found, "graphs": counted and counted.graphs, "again": counted and counted.again, "said": said}


@pytest.mark.parametrize(
    ("size", "packing", "peft", "graphs"),
    [
        (1, True, {}, 2),  # with gradients, and without
        pytest.param(1, False, {}, 2, marks=pytest.mark.soak),  # lengths as symbols take longer
        (2, True, {}, 2),
        pytest.param(  # the first block's input needs no gradient
            1, True, {"method": PeftMethod.lora, "rank": 2, "targets": ["all-linear"]}, 3, marks=pytest.mark.slow
        ),
    ],
)
def test_losses_and_gradients_are_those_without_a_compiler(
    ranks: Any, tiny_llama: Path, size: int, packing: bool, peft: dict[str, Any], graphs: int
) -> None:
    group: Ranks = ranks(size)
    plain = group.call(_train, tiny_llama, False, packing, peft)[0]
    for compiled in group.call(_train, tiny_llama, True, packing, peft):
        assert compiled["found"] == pytest.approx(plain["found"], rel=1e-5)
        assert (compiled["graphs"], compiled["again"]) == (graphs, 0)
        assert compiled["said"]["compiled"].startswith("3 blocks, each by itself")
    assert "compiled" not in plain["said"]


def _train(world: World, folder: Path, compiled: bool, packing: bool, peft: dict[str, Any]) -> dict[str, Any]:
    return train(world, folder, compiled, packing, **peft)


def test_what_is_compiled_late_is_said_once_with_the_reason(ranks: Any, tiny_llama: Path) -> None:
    said, again = ranks(1).call(_train_with_other_shapes, tiny_llama)[0]
    assert again == 2
    assert len(said) == 1
    assert "after 3 steps" in said[0]
    assert "size mismatch at index 1" in said[0]


def _train_with_other_shapes(world: World, folder: Path) -> tuple[list[str], int]:
    torch._dynamo.reset()
    compiling.BACKEND = "aot_eager"
    built = build_engine(config_for(folder, True), world, blueprint_for(folder))
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("fulltune").addHandler(handler)
    try:
        for number, step in enumerate((0, 0, 0, 2, 2, 3)):
            batches = step_batches(step, 1, documents=1 if number == 5 else 2)
            built.compiled.length = (32, 32, 32, 48, 48, 8)[number]  # at the end one document without padding, so without a mask
            take_step(built, NextToken(), batches, world, lr=1e-3, targets=10)
    finally:
        logging.getLogger("fulltune").removeHandler(handler)
        built.close()
    return said, built.compiled.again


def test_rows_are_filled_up_with_padding() -> None:
    ids = torch.arange(10).view(2, 5)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    documents = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, NO_DOCUMENT]])
    whole = Batch.of(ids, ids, positions)
    batch = dataclasses.replace(whole, documents=documents, signals={"weight": torch.ones(2, 5), "reward": torch.ones(3)})
    wide = compiling.filled_up(batch, 8)
    assert wide.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert wide.documents[:, 5:].eq(NO_DOCUMENT).all()
    assert wide.labels[:, 5:].eq(IGNORE).all()
    assert wide.signals["weight"].shape == (2, 8)
    assert wide.signals["reward"].shape == (3,)
    assert wide.sizes() == batch.sizes()
    assert compiling.filled_up(batch, 5) is batch
    output = compiling.cut(Output(logps=torch.ones(2, 8), entropy=torch.ones(2, 8)), 5)
    assert output.logps.shape == (2, 5)
    assert output.entropy is not None
    assert output.entropy.shape == (2, 5)


def test_compiling_has_five_times_the_limit_of_its_phase() -> None:
    activity = Activity()
    activity.limits = {Phase.step: 10.0, Phase.evaluating: 20.0}
    activity.enter(Phase.step, 1)
    activity.enter(Phase.step, 2)
    assert activity.limit_s() == 10
    activity.compiling = True
    assert activity.limit_s() == 10 * FIRST_STEP
    activity.enter(Phase.evaluating)
    assert activity.limit_s() == 20 * FIRST_STEP


@pytest.mark.parametrize(
    ("peft", "reason"),
    [
        ({"method": PeftMethod.dora}, "peft.method=dora"),
        ({"method": PeftMethod.bottleneck}, "peft.method=bottleneck"),
        ({"method": PeftMethod.lora, "quantise": Quantisation.nf4}, "peft.quantise=nf4"),
    ],
)
def test_methods_of_many_graphs_are_refused(tiny_llama: Path, peft: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        validate(config_for(tiny_llama, True, **peft))
    assert caught.value.path == "train.compile"


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "mine"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler is not on PATH"):
        compiling.require_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"g\+\+ is not on PATH"):
        compiling.require_compiler()


def test_compiled_code_is_kept_where_nodes_share_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "named"))
    assert compiling.cache_folder() == str(tmp_path / "named")
    monkeypatch.delenv(compiling.CACHE)
    folder = compiling.cache_folder()
    assert folder.startswith(str(tmp_path / "ours" / "compiled" / "torch-"))
    assert os.environ[compiling.CACHE] == folder
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="cannot be kept"):
        compiling.cache_folder()


def test_the_plan_is_of_the_step_without_a_compiler(tiny_llama: Path) -> None:
    peaks = []
    for compiled in (False, True):
        with fake_ranks(2, 2) as world:
            peaks.append(simulate(config_for(tiny_llama, compiled), blueprint_for(tiny_llama), world, 32).peak.total)
    assert peaks[0] == peaks[1]


@pytest.mark.soak
def test_a_compiled_run_is_a_plain_one_and_continues_exactly(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Two ranks with torch's own compiler; what it has made is kept for the run after."""
    plain, straight, stopped = (tmp_path / name for name in ("plain", "straight", "stopped"))
    more = ("train.eval_every=null", "checkpoint.every=2", "train.sample_tokens=0")
    launch(cache, arguments(base, chats, plain, *more))
    said = launch(cache, arguments(base, chats, straight, *more, "train.compile=true"), timeout_s=280)
    assert "compiling the blocks" in said
    assert "each by itself; kept in" in " ".join(said.split())
    assert "compiled 1 graph in" in said
    assert "after" not in [line for line in said.splitlines() if "compiled" in line][-1]
    assert list((cache / "compiled").iterdir())
    for ours, theirs in zip(trace(straight), trace(plain), strict=True):
        assert [value for value in ours if isinstance(value, float)] == pytest.approx(
            [value for value in theirs if isinstance(value, float)], rel=1e-5
        )
    line = arguments(base, chats, stopped, *more, "train.compile=true")
    stop_at_step(cache, line, stopped, 3)
    launch(cache, line)
    assert trace(stopped) == trace(straight)


@pytest.mark.soak
def test_a_compiled_step_takes_no_more_memory_than_the_plan(ranks: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tied=True, num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    config = config_for(folder, True)
    config.data.seq_len = 128
    with fake_ranks(1, 1) as world:
        plan = simulate(config, blueprint_for(folder), world, 128)
    assert 0.3 * plan.peak.total < ranks(1).call(_peak, folder, config, timeout_s=280)[0] <= plan.peak.total


def _peak(world: World, folder: Path, config: RunConfig) -> float:
    """Return a step's highest bytes by torch's own count of allocations, with what was there before."""
    torch._dynamo.reset()
    compiling.BACKEND = "inductor"
    built = build_engine(config, world, blueprint_for(folder))
    ids = torch.arange(128)[None].remainder(33)
    batches = [Batch.of(ids, ids, torch.arange(128).remainder(64)[None]) for _ in range(2)]
    for _ in range(2):
        take_step(built, NextToken(), batches, world, lr=1e-3, targets=256)
    kept = sum(tensor.numel() * tensor.element_size() for placed in built.tensors() for tensor in map(local, placed.tensors))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        take_step(built, NextToken(), batches, world, lr=1e-3, targets=256)
    built.close()
    now = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return float(kept + highest)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
