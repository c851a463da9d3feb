"""train.precision=fp16: the curve, the loss scales and the skipped steps of a plain loop with torch.amp's GradScaler, on any split."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from command import ROOT, arguments, environment, launch, rank_processes, read_rows, trace, wait_for_step
from conftest import Ranks, blueprint_for, save_tiny
from transformers import AutoModelForCausalLM

from tools.bench.orders import engine_preset
from trainers.batch import IGNORE, Batch, Sizes
from trainers.config.choices import OptimizerName, Precision
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainers.engines.build import build_engine
from trainers.engines.scaling import LossScale
from trainers.health.spikes import NO_LIMITS
from trainers.loop import Reports, Step
from trainers.objectives import NextToken
from trainers.rundir.rows import steps
from trainers.step import StepResult, take_step
from trainers.world import World

STEPS, ROWS, LENGTH, LR, CLIP = 12, 6, 24, 1e-2, 0.5
SCALE, EVERY = 2.0**12, 3
"""The first loss scale, at which gradients of this model are far from overflowing, and after how many steps it doubles."""
TIMES = {0: 4096, 1: 4096, 7: 4096}
"""What some steps' losses are multiplied by, so that their gradients overflow by far, however they are summed."""
REL = 2e-3
"""Relative rounding of float16 is 2^-11."""


def rows_of_steps() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Steps of rows (input_ids, labels) with very different numbers of labels."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(STEPS):
        rows = []
        for row in range(ROWS):
            ids = torch.randint(3, 33, (LENGTH,), generator=generator)
            labels = ids.roll(-1)
            labels[: row * 4] = labels[-1] = IGNORE
            rows.append((ids, labels))
        made.append(rows)
    return made


def config_for(folder: Path, engine: str, **train: Any) -> RunConfig:
    run_dir = folder.parent / f"run-{engine}"
    run_dir.mkdir(exist_ok=True)
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder)),
        data=DataConfig(path="unused"),
        engine=EngineConfig(**engine_preset(engine)),
        optim=OptimConfig(name=OptimizerName.sgd, lr=LR, clip=CLIP, weight_decay=0.0),
        train=TrainConfig(precision=Precision.fp16, loss_scale=SCALE, loss_scale_steps=EVERY, **train),
    )


def train_on_ranks(world: World, folder: Path, engine: str, microbatch: int, stop_at: int = 0) -> dict[str, Any]:
    """Train STEPS steps; with `stop_at` a checkpoint is written there, and another engine continues from it."""
    config = config_for(folder, engine)
    built = build_engine(config, world, blueprint_for(folder))
    said = built.report()
    losses, norms, scales = [], [], []
    for number, rows in enumerate(rows_of_steps()):
        if stop_at and number == stop_at:
            saved = folder.parent / f"saved-{engine}-{world.size}"
            dcp.save(built.state(), checkpoint_id=saved)
            built = build_engine(config, world, blueprint_for(folder))
            built.load(saved)
        assert built.scale is not None
        scales.append(built.scale.factor)
        mine = rows[world.rank :: world.size]
        batches = []
        for start in range(0, len(mine), microbatch):
            ids, labels = (torch.stack(column) for column in zip(*mine[start : start + microbatch], strict=True))
            batches.append(Batch.of(ids, labels, torch.arange(LENGTH).expand(ids.shape)))
        targets: Any = sum(int((labels != IGNORE).sum()) for _, labels in rows) / TIMES.get(number, 1)
        result = take_step(built, NextToken(), batches, world, lr=LR, targets=targets)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = {name: tensor.float().numpy() for name, tensor in built.weights()}
    return {"losses": losses, "norms": norms, "scales": scales, "weights": weights, "report": said}


def train_plainly(folder: Path) -> dict[str, Any]:
    """The reference: one process, float32 weights, a float16 copy of the model that computes, and torch's scaler."""
    masters = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = copy.deepcopy(masters).half()
    optimizer = torch.optim.SGD(masters.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=EVERY)
    losses, norms, scales = [], [], []
    for number, rows in enumerate(rows_of_steps()):
        scales.append(scaler.get_scale())
        ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        with torch.no_grad():
            for half, master in zip(model.parameters(), masters.parameters(), strict=True):
                half.copy_(master)
        logits = model(input_ids=ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE) * TIMES.get(number, 1)
        scaler.scale(loss).backward()
        for half, master in zip(model.parameters(), masters.parameters(), strict=True):
            master.grad, half.grad = half.grad.float(), None
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(masters.parameters(), CLIP).item())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "scales": scales, "weights": masters.state_dict()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny tied Llama, and what the plain loop makes of it."""
    folder = save_tiny(tmp_path_factory.mktemp("fp16") / "model", tied=True)
    return folder, train_plainly(folder)


def assert_same_run(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["scales"] == wanted["scales"]
    assert [math.isfinite(norm) for norm in got["norms"]] == [math.isfinite(norm) for norm in wanted["norms"]]
    assert got["losses"] == pytest.approx(wanted["losses"], rel=REL)
    both = [pair for pair in zip(got["norms"], wanted["norms"], strict=True) if math.isfinite(pair[0])]
    assert [mine for mine, _ in both] == pytest.approx([theirs for _, theirs in both], rel=2 * REL)
    for name, tensor in got["weights"].items():
        torch.testing.assert_close(torch.from_numpy(tensor), wanted["weights"][name], rtol=0, atol=REL * LR * STEPS, msg=name)


def test_the_plain_loop_overflows_and_recovers(reference: tuple[Path, dict[str, Any]]) -> None:
    """What the others are compared with has overflows in its first steps and after the scale grew, and steps that are taken."""
    assert [n for n, norm in enumerate(reference[1]["norms"]) if not math.isfinite(norm)] == sorted(TIMES)
    assert [scale / SCALE for scale in reference[1]["scales"]] == [1, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 2, *[1 / 4] * 3, 1 / 2]


SPLITS = [(2, "zero3", 1), (3, "fsdp", 1), (1, "fsdp", 2), (1, "zero3", 6), (2, "fsdp", 2), (3, "zero3", 2)]
MARKS = [(), *[pytest.mark.slow] * 2, *[pytest.mark.soak] * 3]


@pytest.mark.parametrize(
    ("size", "engine", "microbatch"), [pytest.param(*split, marks=mark) for split, mark in zip(SPLITS, MARKS, strict=True)]
)
def test_any_split_has_the_plain_loops_curve(
    ranks: Callable[[int], Ranks], reference: tuple[Path, dict[str, Any]], size: int, engine: str, microbatch: int
) -> None:
    folder, wanted = reference
    for got in ranks(size).call(train_on_ranks, folder, engine, microbatch):
        assert_same_run(got, wanted)
        assert got["report"]["loss scale"].startswith("4,096, halved where")
        assert got["report"]["storage"].startswith("float32")
        assert "float16" in got["report"]["compute"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_checkpoint_holds_the_scale(ranks: Callable[[int], Ranks], reference: tuple[Path, dict[str, Any]], engine: str) -> None:
    """Saved in the middle of a row of finite steps, so that their number counts, too."""
    folder, _ = reference
    through = ranks(2).call(train_on_ranks, folder, engine, 1)[0]
    finite = [math.isfinite(norm) for norm in through["norms"]]
    middle = next(n for n in range(2, STEPS) if finite[n - 1] and finite[n] and not finite[n - 2])
    continued = ranks(2).call(train_on_ranks, folder, engine, 1, middle)[0]
    assert continued["scales"] == through["scales"]
    assert continued["losses"] == through["losses"]
    for name, tensor in through["weights"].items():
        assert (continued["weights"][name] == tensor).all(), name


def test_the_scale_follows_torchs_rule() -> None:
    """Any row of finite and other steps gives GradScaler's factors."""
    mine, theirs = LossScale(factor=1024.0, interval=3), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    for finite in torch.rand(200, generator=torch.Generator().manual_seed(1)).gt(0.2).tolist():
        weight.grad = torch.full((1,), 1.0 if finite else math.inf)
        theirs.scale(torch.zeros(()))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        mine.after(finite)
        assert mine.factor == theirs.get_scale()
        again = LossScale(interval=3)
        again.load(mine.state())
        assert again == mine


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "overflowed"),
    [
        (2.0, math.inf, 65536.0, True),
        (2.0, math.nan, 65536.0, True),
        (2.0, 1.0, 65536.0, False),
        (math.nan, math.nan, 65536.0, False),  # of the rows, or of the weights
        (2.0, math.inf, 1.0, False),  # a smaller scale is no way out
        (2.0, math.inf, None, False),  # of another type than float16
    ],
)
def test_a_bad_batch_is_no_overflow(loss: float, norm: float, scale: float | None, overflowed: bool) -> None:
    reports = Reports(False, False, False, False, 0, 0)
    step = Step(StepResult(loss=loss, grad_norm=norm), reports, 0.1, NO_LIMITS, 1, Sizes(), np.arange(2), 1.0, 0.0, scale)
    assert step.overflowed is overflowed


@pytest.mark.slow
def test_a_killed_run_has_the_scales_of_one_that_was_not(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """More overflows in a row than train.max_skipped allows bad steps; kill -9 of a rank after the scale began to grow again."""
    more = ("train.precision=fp16", "train.loss_scale=4294967296", "train.loss_scale_steps=2", "train.steps=30", "checkpoint.every=3")
    launch(cache, arguments(base, chats, tmp_path / "whole", *more))
    whole = steps(read_rows(tmp_path / "whole"))
    scales, overflows = [row["loss_scale"] for row in whole], [row["overflows"] for row in whole]
    assert overflows[:4] == [1, 2, 3, 4]
    assert {row["skipped"] for row in whole} == {0}
    assert max(scales[20:]) > min(scales[:20])
    for row, after in pairwise(whole):
        assert (row["grad_norm"] is None) == (after["loss_scale"] == row["loss_scale"] / 2)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["overflow_steps"], summary["skipped_steps"], summary["loss_scale"]) == (overflows[-1], 0, scales[-1])
    line = arguments(base, chats, tmp_path / "parts", *more)
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(tmp_path / "parts", 20, process)
        os.kill(rank_processes(tmp_path / "parts")[-1], signal.SIGKILL)
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert "continuing from" in launch(cache, line)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    assert [row["loss_scale"] for row in steps(read_rows(tmp_path / "parts"))] == scales
    exports = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert exports[0] == exports[1]
