"""A step waits for its device once; the next step's rows are made meanwhile."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from tables import LENGTHS, blueprint_for, config_for, ragged_table
from torch.utils._python_dispatch import TorchDispatchMode

from trainers import step as step_module
from trainers.data.loader import Ints, Loader, Prefetch
from trainers.engines.build import build_engine
from trainers.objectives import NextToken
from trainers.step import take_step
from trainers.world import World

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")
"""Operators of which the host reads a result of the device."""


class Waits(TorchDispatchMode):
    """Who makes the host wait: the file outside of torch that is nearest to each operator that does, but for `read`."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []
        self.reads = 0

    def read(self, values: Any) -> list[float]:
        self.reads += 1
        return [float(value.detach().numpy()) for value in values]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in WAITS:
            files = [frame.filename for frame in traceback.extract_stack()[:-1]]
            self.callers.append(next(file for file in reversed(files) if "/site-packages/torch/" not in file))
        return func(*args, **(kwargs or {}))


def waits_of_a_step(world: World, run_dir: Path, model: Path, packed: int | None) -> tuple[list[str], int, float]:
    table = ragged_table(LENGTHS, packed=packed)
    config = config_for(run_dir, model, steps=2, global_batch=len(table), microbatch=2)
    engine = build_engine(config, world, blueprint_for(model, "sdpa"))
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    batches, waits, plain = loader.step(0), Waits(), step_module.read
    step_module.read = waits.read
    try:
        with waits:
            targets = table.sizes(loader.row_ids(0)).labels
            result = take_step(engine, NextToken(), batches, world, lr=1e-2, targets=targets, report=lambda: [0.0])
    finally:
        step_module.read = plain
    return waits.callers, waits.reads, result.grad_norm


@pytest.mark.parametrize("packed", [None, 44], ids=["padded", "packed"])
def test_a_step_waits_once(ranks: Any, tiny_llama: Path, tmp_path: Path, packed: int | None) -> None:
    group: Ranks = ranks(2)
    for callers, reads, norm in group.call(waits_of_a_step, tmp_path, tiny_llama, packed):
        assert reads == 1
        assert norm > 0
        assert {file for file in callers if not file.endswith("transformers/masking_utils.py")} == set(), "what its masks ask is its own"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: would let torch raise where a step waits for it twice")
def test_a_step_waits_for_a_gpu_once(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.from_environment()
    world.connect()
    table = ragged_table(LENGTHS)
    config = config_for(tmp_path, tiny_llama, steps=3, global_batch=len(table), microbatch=2)
    engine = build_engine(config, world, blueprint_for(tiny_llama, "sdpa"))
    loader, plain, reads = Loader(table, config.train, seed=0, rank=0, world_size=1, pad_id=0), step_module.read, []

    def read(values: Any) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        reads.append(plain(values))
        torch.cuda.set_sync_debug_mode("error")
        return reads[-1]

    monkeypatch.setattr(step_module, "read", read)
    targets = table.sizes(loader.row_ids(0)).labels
    try:
        with Prefetch(loader, world.device) as prefetch:
            for number in range(3):
                batches = prefetch.take(number, 0).batches
                torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step makes what is kept
                take_step(engine, NextToken(), batches, world, lr=1e-2, targets=targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        world.disconnect()
    assert len(reads) == 3


class Watched(Loader):
    """Notes which thread makes which step, and fails where it is told to."""

    fails_at = -1

    def batches(self, step: int, row_ids: Ints) -> list[Any]:
        self.made.append((step, threading.current_thread().name.startswith("prefetch")))
        if step == self.fails_at:
            raise OSError("the disk is gone")
        return super().batches(step, row_ids)


def watched(num_steps: int) -> Watched:
    config = config_for(Path("unused"), Path("unused"), steps=num_steps, global_batch=3, microbatch=2).train
    rows = Watched(ragged_table(LENGTHS), config, seed=0, rank=0, world_size=1, pad_id=0)
    rows.made = []
    return rows


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_rows_are_those_of_the_loader_and_made_ahead() -> None:
    """Also where the loop goes back and past rows: what was made for another place in the stream is dropped."""
    rows, plain = watched(5), watched(5)
    with Prefetch(rows, torch.device("cpu")) as prefetch:
        for step, ahead in [(0, 0), (1, 0), (2, 0), (1, 2), (2, 2), (3, 2), (4, 2)]:
            dealt = prefetch.take(step, ahead)
            expected = plain.batches(step, plain.row_ids(step, ahead))
            assert np.array_equal(dealt.row_ids, plain.row_ids(step, ahead))
            assert dealt.sizes == plain.rows.sizes(dealt.row_ids)
            assert len(dealt.batches) == len(expected) > 0
            for batch, other in zip(dealt.batches, expected, strict=True):
                for item in dataclasses.fields(batch):
                    mine, theirs = getattr(batch, item.name), getattr(other, item.name)
                    assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert sorted(rows.made) == [(0, False), (1, False), (1, True), (2, True), (2, True), (3, True), (3, True), (4, True)]
    assert prefetching() == []


def test_an_error_reaches_the_loop_at_its_step() -> None:
    rows = watched(4)
    rows.fails_at = 2
    with Prefetch(rows, torch.device("cpu")) as prefetch:
        prefetch.take(0, 0)
        prefetch.take(1, 0)  # the rows of step 2 fail meanwhile
        with pytest.raises(OSError, match="the disk is gone"):
            prefetch.take(2, 0)
    assert prefetching() == []


def test_the_thread_ends_with_the_loop_that_fails() -> None:
    def loop() -> None:
        with Prefetch(watched(4), torch.device("cpu")) as prefetch:
            prefetch.take(0, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert prefetching() == []
