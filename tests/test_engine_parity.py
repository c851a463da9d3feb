"""The FSDP engine gives the curve of a plain one-process transformers loop, at any world size and for any architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Ranks, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.batch import IGNORE, Batch
from trainers.config import DataConfig, ModelConfig, OptimConfig, Precision, RunConfig, TrainConfig
from trainers.engines.base import build_engine
from trainers.model import Blueprint
from trainers.objectives import NextToken
from trainers.world import World

STEPS, ROWS, LENGTH = 4, 6, 24


def uneven_batches() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Steps of rows (input_ids, labels) with very different numbers of labels, one row with none."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
        rows = []
        for row in range(ROWS):
            ids = torch.randint(3, 33, (LENGTH,), generator=generator)
            labels = ids.roll(-1)
            labels[: row * 4] = IGNORE
            labels[-1] = IGNORE
            if row == 2:
                labels[:] = IGNORE
            rows.append((ids, labels))
        steps.append(rows)
    return steps


def config_for(folder: Path, precision: Precision = Precision.fp32, checkpointing: bool = False) -> RunConfig:
    return RunConfig(
        model=ModelConfig(id=str(folder)),
        data=DataConfig(path="unused"),
        optim=OptimConfig(lr=1e-2, clip=0.5, weight_decay=0.1),
        train=TrainConfig(precision=precision, activation_checkpointing=checkpointing),
    )


def blueprint_for(folder: Path) -> Blueprint:
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = None  # what the architecture has: sdpa, or eager for Gemma 2
    return Blueprint(config=config, folder=folder, revision=None, seed=0, trust_remote_code=False)


def train_on_ranks(world: World, folder: Path, microbatch: int, precision: str = "fp32", checkpointing: bool = False) -> dict[str, Any]:
    """Train STEPS steps with rows dealt to ranks; return losses, grad norms and the whole weights."""
    engine = build_engine(config_for(folder, Precision(precision), checkpointing), world, blueprint_for(folder))
    losses, norms = [], []
    for rows in uneven_batches():
        weight = sum(int((labels != IGNORE).sum()) for _, labels in rows)
        mine = rows[world.rank :: world.size]
        chunks = [mine[start : start + microbatch] for start in range(0, len(mine), microbatch)]
        local = 0.0
        for number, chunk in enumerate(chunks, 1):
            ids, labels = (torch.stack(column) for column in zip(*chunk, strict=True))
            positions = torch.arange(LENGTH).expand(ids.shape)
            batch = Batch(input_ids=ids, labels=labels, position_ids=positions, num_rows=len(chunk), num_tokens=ids.numel())
            loss = NextToken()(engine.token_logps(batch), batch).total
            engine.backward(loss / weight, last=number == len(chunks))
            local += loss.item()
        norms.append(engine.step(1e-2))
        losses.append(world.sum([local])[0] / weight)
    engine.report()
    return {"losses": losses, "norms": norms, "weights": {name: tensor.numpy() for name, tensor in engine.weights()}}


def train_plainly(folder: Path) -> dict[str, Any]:
    """The reference: one process, plain transformers and torch, all rows at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    losses, norms = [], []
    for rows in uneven_batches():
        ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def assert_same_run(got: dict[str, Any], reference: dict[str, Any], rel: float = 1e-5) -> None:
    assert got["losses"] == pytest.approx(reference["losses"], rel=rel)
    assert got["norms"] == pytest.approx(reference["norms"], rel=10 * rel)
    for name, tensor in got["weights"].items():
        torch.testing.assert_close(torch.from_numpy(tensor), reference["weights"][name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_llama_equals_the_plain_loop(ranks: Callable[[int], Ranks], tmp_path: Path, size: int, tied: bool) -> None:
    folder = save_tiny(tmp_path / "model", tied=tied)
    reference = train_plainly(folder)
    for result in ranks(size).call(train_on_ranks, folder, 1):
        assert_same_run(result, reference)
        assert ("lm_head.weight" in result["weights"]) is not tied


STYLES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("style", STYLES)
def test_other_architectures_equal_the_plain_loop(ranks: Callable[[int], Ranks], tmp_path: Path, style: str) -> None:
    torch.manual_seed(0)
    common = {key: value for key, value in TINY.items() if style != "gpt2" or not key.startswith(("hidden", "inter", "num", "max"))}
    config = AutoConfig.for_model(style, **(common | STYLES[style]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    reference = train_plainly(tmp_path / "model")
    assert_same_run(ranks(2).call(train_on_ranks, tmp_path / "model", 2)[0], reference, rel=2e-5)


def test_activation_checkpointing_changes_nothing(ranks: Callable[[int], Ranks], tiny_llama: Path) -> None:
    plain, checkpointed = (ranks(2).call(train_on_ranks, tiny_llama, 1, "fp32", on)[0] for on in (False, True))
    assert plain["losses"] == checkpointed["losses"]
    assert plain["norms"] == checkpointed["norms"]


def test_bf16_stays_near_and_keeps_float32_weights(ranks: Callable[[int], Ranks], tiny_llama: Path) -> None:
    reference = train_plainly(tiny_llama)
    result = ranks(2).call(train_on_ranks, tiny_llama, 1, "bf16")[0]
    assert result["losses"] == pytest.approx(reference["losses"], rel=2e-2)
    assert all(tensor.dtype == "float32" for tensor in result["weights"].values())


def skip_a_step(world: World, folder: Path) -> tuple[float, bool]:
    """Give rank 0 an infinite loss; return the norm and whether any weight moved."""
    engine = build_engine(config_for(folder), world, blueprint_for(folder))
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    ids, labels = (torch.stack(column) for column in zip(*uneven_batches()[0][:1], strict=True))
    batch = Batch(input_ids=ids, labels=labels, position_ids=torch.arange(LENGTH)[None], num_rows=1, num_tokens=LENGTH)
    scale = float("inf") if world.rank == 0 else 1.0
    engine.backward(engine.token_logps(batch).sum() * scale, last=True)
    norm = engine.step(1.0)
    return norm, any(not torch.equal(before[name], tensor) for name, tensor in engine.weights())


def test_non_finite_gradients_never_reach_the_weights(ranks: Callable[[int], Ranks], tiny_llama: Path) -> None:
    for norm, moved in ranks(2).call(skip_a_step, tiny_llama):
        assert not torch.tensor(norm).isfinite()
        assert not moved


def save_and_load(world: World, folder: Path, checkpoint: Path, saved: bool) -> dict[str, Any]:
    """Train one step and save, or load and report; then one more step."""
    engine = build_engine(config_for(folder), world, blueprint_for(folder))
    rows = uneven_batches()
    for number, step in enumerate(rows[:2]):
        if number == 1:
            engine.save(checkpoint) if saved else engine.load(checkpoint)
        elif not saved:
            continue
        ids, labels = (torch.stack(column) for column in zip(*step[world.rank :: world.size], strict=True))
        positions = torch.arange(LENGTH).expand(ids.shape)
        batch = Batch(input_ids=ids, labels=labels, position_ids=positions, num_rows=len(ids), num_tokens=ids.numel())
        engine.backward(-engine.token_logps(batch).sum() / 100, last=True)
        engine.step(1e-2)
    return {name: tensor.numpy() for name, tensor in engine.weights()}


def test_saving_before_the_first_step_changes_nothing(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    with_save, without = (ranks(2).call(train_after_saving, tiny_llama, folder)[0] for folder in (tmp_path / "step", None))
    assert all((with_save[name] == tensor).all() for name, tensor in without.items())


def train_after_saving(world: World, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    engine = build_engine(config_for(folder), world, blueprint_for(folder))
    if checkpoint is not None:
        engine.save(checkpoint)
    ids, labels = (torch.stack(column) for column in zip(*uneven_batches()[0][:2], strict=True))
    batch = Batch(input_ids=ids, labels=labels, position_ids=torch.arange(LENGTH).expand(2, -1), num_rows=2, num_tokens=2 * LENGTH)
    engine.backward(-engine.token_logps(batch).sum(), last=True)
    engine.step(0.1)
    return {name: tensor.numpy() for name, tensor in engine.weights()}


def test_a_checkpoint_continues_exactly_and_on_another_world_size(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    saved = ranks(2).call(save_and_load, tiny_llama, tmp_path / "step", True)[0]
    again = ranks(2).call(save_and_load, tiny_llama, tmp_path / "step", False)[0]
    alone = ranks(1).call(save_and_load, tiny_llama, tmp_path / "step", False)[0]
    for name, tensor in saved.items():
        assert (again[name] == tensor).all(), name
        torch.testing.assert_close(torch.from_numpy(alone[name]), torch.from_numpy(tensor), rtol=1e-5, atol=1e-6)
