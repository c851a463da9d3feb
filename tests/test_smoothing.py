"""Label smoothing is torch's: whole logits and a few at a time, any head, with weights, any split and both engines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Ranks
from tables import LR, blueprint_for, config_for, plain_adamw, ragged_table
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.batch import IGNORE, WEIGHT, Batch
from trainers.config.choices import EngineName
from trainers.config.schema import EngineConfig, ObjectiveConfig
from trainers.data.loader import Loader
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.engines.build import build_engine
from trainers.loop import train
from trainers.model.forward import forward
from trainers.model.head import Head
from trainers.objectives.next_token import NextToken
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import evaluations, read_rows, steps
from trainers.world import World

SMOOTHING = 0.2
HEADS: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8}, "phi": {}}


def batch_of() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 33, (3, 17), generator=generator) for _ in range(2))
    labels[:, :2], labels[0, 3:9], labels[2] = IGNORE, IGNORE, IGNORE
    batch = Batch.of(ids, labels, torch.cat([torch.arange(9), torch.arange(8)]).expand(3, -1))
    weights = torch.rand(3, 17, 1, generator=generator) * (labels != IGNORE)[..., None]
    return replace(batch, signals={WEIGHT: weights})


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_torchs(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({**TINY, "initializer_range": 0.2, "tie_word_embeddings": False} | HEADS[kind]))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    batch, objective = batch_of(), NextToken(SMOOTHING)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    losses = cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none", label_smoothing=SMOOTHING)
    wanted = (losses * batch.signals[WEIGHT].flatten()).sum()
    wanted.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    most = max(float(gradient.norm()) for gradient in gradients.values())
    near = 1e-5 if dtype is torch.float32 else 5e-2
    for tokens in (None, 1, 7):
        other = copy.deepcopy(model)
        other.zero_grad()
        loss = objective(forward(other, batch, objective.needs, head=Head(other, tokens) if tokens else None), batch)
        assert float(loss.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5 if dtype is torch.float32 else 5e-3)
        loss.total.backward()
        for name, p in other.named_parameters():
            if p.grad is not None:
                assert (p.grad.float() - gradients[name]).norm() <= near * (gradients[name].norm() + 0.1 * most), (tokens, name)


def weighted_table() -> TokenTable:
    table = ragged_table([5, 29, 11, 13, 40, 17, 8, 23, 6, 7, 19, 31], 48)
    weights = np.random.default_rng(1).choice([0.25, 1.0, 3.0], (int(table.supervised.sum()), 1)).astype(np.float32)
    return replace(table, signals={WEIGHT: weights})


def run_smoothed(world: World, run_dir: Path, model: Path, fields: dict[str, Any], engine: str) -> list[dict[str, Any]]:
    """Train with weights and smoothing through the real loop; return the rows of metrics.jsonl."""
    run_dir.mkdir(exist_ok=True)
    config = replace(config_for(run_dir, model, **fields), engine=EngineConfig(name=EngineName(engine)))
    config = replace(config, objective=ObjectiveConfig(label_smoothing=SMOOTHING))
    table = weighted_table()
    data = Prepared(path=run_dir, train=table, eval=table, report={}, reused=True)
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(config, world, Attempt(run_dir), build_engine(config, world, blueprint_for(model)), data, loader, 1.0)
    return read_rows(run_dir) if world.rank == 0 else []


def plain(model: Any, table: TokenTable, rows: list[int], smoothing: float) -> torch.Tensor:
    """Return sum(weight x smoothed cross-entropy) / sum(weight) over rows, one unpadded document at a time."""
    total, whole = torch.zeros(()), 0.0
    for document in table.documents_of(np.array(rows)).tolist():
        part = slice(int(table.offsets[document]), int(table.offsets[document + 1]))
        ids, marks = (torch.from_numpy(np.asarray(array[part]).astype(np.int64)) for array in (table.tokens, table.supervised))
        each = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none", label_smoothing=smoothing)
        of = torch.from_numpy(table.signals[WEIGHT][table.label_starts[document] : table.label_starts[document + 1], 0])
        total, whole = total + (each[marks[1:] > 0] * of).sum(), whole + float(of.sum())
    return total / whole


SPLITS = [pytest.param(1, 5, "fsdp", 0, marks=pytest.mark.slow), (2, 1, "zero3", 7), pytest.param(3, 1, "fsdp", 7, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("size", "microbatch", "engine", "chunk"), SPLITS)
def test_every_split_equals_a_smoothed_plain_loop(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, size: int, microbatch: int, engine: str, chunk: int
) -> None:
    table, fields = weighted_table(), {"steps": 3, "global_batch": 5, "microbatch": microbatch, "logits_chunk": chunk}
    rows = ranks(size).call(run_smoothed, tmp_path / "run", tiny_llama, fields, engine)[0]
    loader = Loader(table, config_for(tmp_path, tiny_llama, **fields).train, seed=0, rank=0, world_size=1, pad_id=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    update, everything = plain_adamw(model, LR, 3), list(range(len(table)))
    before, after = evaluations(rows)
    assert before["eval_loss"] == pytest.approx(float(plain(model, table, everything, SMOOTHING).detach()), rel=1e-5)
    assert before["eval_nll"] == pytest.approx(float(plain(model, table, everything, 0.0).detach()), rel=1e-5)
    for step, row in enumerate(steps(rows)):
        taken = loader.row_ids(step).tolist()
        loss = plain(model, table, taken, SMOOTHING)
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert row["nll"] == pytest.approx(float(plain(model, table, taken, 0.0).detach()), rel=1e-5)
        loss.backward()
        assert row["grad_norm"] == pytest.approx(update(), rel=1e-4)
    assert after["eval_loss"] == pytest.approx(float(plain(model, table, everything, SMOOTHING).detach()), rel=1e-4)
