"""An objective's signals, figures and denominator mean the same under any split, and reach metrics.jsonl under their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from command import read_rows
from conftest import Ranks, save_tiny
from tables import LENGTHS, blueprint_for, config_for, ragged_table
from transformers import AutoModelForCausalLM

from trainers import objectives
from trainers.batch import Batch, Needs, Output, Sizes, by_document
from trainers.config.choices import EngineName, ObjectiveName
from trainers.config.errors import ConfigError
from trainers.config.schema import EngineConfig
from trainers.data.loader import Loader, deal, make_batch
from trainers.data.prepare import Prepared
from trainers.engines.build import build_engine
from trainers.health.spikes import Limits
from trainers.loop import train
from trainers.objectives import Loss, NextToken, make_objective
from trainers.rundir.attempt import Attempt
from trainers.step import take_step
from trainers.world import World


class WeightedDocuments:
    """Minus each document's mean log-probability, times its weight; the number of documents divides."""

    needs = Needs(entropy=True)
    signals = frozenset({"weight", "scale"})

    def targets(self, sizes: Sizes) -> int:
        return sizes.documents

    def __call__(self, output: Output, batch: Batch) -> Loss:
        means = by_document(output.logps * batch.signals["scale"], batch) / by_document(torch.ones_like(output.logps), batch)
        weighted = means * batch.signals["weight"]
        return Loss(total=-weighted.sum(), figures={"weighted": weighted.sum(), "entropy": output.entropy.sum()})


class AroundTheMean:
    """Half the square of how far each document's mean log-probability is from that of all documents of the step."""

    needs = Needs()
    signals: frozenset[str] = frozenset()

    def __init__(self, mean: float | None = None) -> None:
        self.mean = mean

    def targets(self, sizes: Sizes) -> int:
        return sizes.documents

    def _means(self, output: Output, batch: Batch) -> torch.Tensor:
        return by_document(output.logps, batch) / by_document(torch.ones_like(output.logps), batch)

    def measure(self, output: Output, batch: Batch) -> torch.Tensor:
        return self._means(output, batch).sum()

    def given(self, statistic: float) -> AroundTheMean:
        return AroundTheMean(statistic)

    def __call__(self, output: Output, batch: Batch) -> Loss:
        assert self.mean is not None
        means = self._means(output, batch)
        above = (means > self.mean).float()
        figures = {"spread": (means - self.mean).square().detach().sum(), "above": (means * above).detach().sum()}
        return Loss(total=(means - self.mean).square().sum() / 2, figures=figures, counts={"above": above.sum()})


def weighted_table(packed: int | None = 44) -> Any:
    table = ragged_table(LENGTHS, packed=packed)
    scale = np.linspace(0.5, 1.5, len(table.tokens), dtype=np.float32)
    return dataclasses.replace(table, signals={"weight": np.linspace(1, 2, len(LENGTHS), dtype=np.float32), "scale": scale})


def run(world: World, run_dir: Path, model: Path, microbatch: int) -> None:
    objectives.CHOICES[ObjectiveName.sft] = lambda _: WeightedDocuments()
    try:
        table = weighted_table()
        run_dir.mkdir(exist_ok=True)
        config = config_for(run_dir, model, steps=3, global_batch=len(table), microbatch=microbatch, eval_every=1)
        engine = build_engine(config, world, blueprint_for(model))
        loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
        data = Prepared(path=run_dir, train=table, eval=table, report={}, reused=True)
        train(config, world, Attempt(run_dir), engine, data, loader, 1.0)
    finally:
        objectives.CHOICES[ObjectiveName.sft] = lambda _: NextToken()


def reference(model_dir: Path) -> tuple[float, float]:
    """The first step's loss and entropy figure, one document at a time, in plain transformers."""
    model, table = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), weighted_table()
    losses, entropies = [], []
    with torch.no_grad():
        for number in range(len(LENGTHS)):
            part = slice(int(table.offsets[number]), int(table.offsets[number + 1]))
            ids, labelled = torch.from_numpy(table.tokens[part].astype(np.int64)), torch.from_numpy(table.supervised[part] > 0)
            logits = model(input_ids=ids[None]).logits[0]
            logps = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0] * torch.from_numpy(table.signals["scale"][part])[:-1]
            losses.append(-float(logps[labelled[1:]].mean()) * float(table.signals["weight"][number]))
            entropies.append(float(torch.distributions.Categorical(logits=logits).entropy()[:-1][labelled[1:]].sum()))
    return sum(losses) / len(losses), sum(entropies) / len(entropies)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("step") / "model", tied=False, initializer_range=0.05)


def test_figures_and_signals_are_the_same_under_any_split(ranks: Callable[[int], Ranks], model: Path, tmp_path: Path) -> None:
    rows = {}
    for size, microbatch in ((1, 1), (2, 1), (3, 1)):
        run_dir = tmp_path / f"{size}x{microbatch}"
        ranks(size).call(run, run_dir, model, microbatch)
        rows[size, microbatch] = read_rows(run_dir)
    loss, entropy = reference(model)
    for found in rows.values():
        steps = [row for row in found if "loss" in row]
        assert steps[0]["loss"] == pytest.approx(loss, rel=1e-5)
        assert steps[0]["entropy"] == pytest.approx(entropy, rel=1e-5)
        assert all(row["weighted"] == pytest.approx(-row["loss"], rel=1e-6) for row in steps)
        evaluations = [row for row in found if "eval_loss" in row]
        assert evaluations[0]["eval_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert [row["loss"] for row in steps] == pytest.approx([row["loss"] for row in rows[1, 1] if "loss" in row], rel=1e-6)


def test_signals_that_the_rows_do_not_carry_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives.CHOICES, ObjectiveName.sft, lambda _: WeightedDocuments())
    with pytest.raises(ConfigError, match="reads scale, which the rows"):
        make_objective(config_for(Path("unused"), Path("unused")).objective, {"weight"})


def counted_step(world: World, model: Path, limits: Limits) -> tuple[Any, dict[str, int], bool]:
    engine = build_engine(config_for(Path("unused"), model), world, blueprint_for(model))
    table = ragged_table(LENGTHS)
    batches = Loader(
        table, config_for(Path("unused"), model, global_batch=8).train, seed=0, rank=world.rank, world_size=world.size, pad_id=0
    ).step(0)
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    calls: dict[str, int] = {}
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list")}

    def counting(name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
            if tensor is None or tensor.dtype is torch.float64:
                calls[name] = calls.get(name, 0) + 1
            return plain[name](*args, **named)

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        targets = table.sizes(np.arange(len(LENGTHS))).labels
        report = [float(world.rank), -float(world.rank)]
        result = take_step(engine, NextToken(), batches, world, lr=1e-2, targets=targets, limits=limits, report=lambda: report)
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    changed = any(not torch.equal(before[name], tensor) for name, tensor in engine.weights())
    return result, calls, changed


def test_a_step_takes_two_small_collectives_and_carries_reports(ranks: Callable[[int], Ranks], model: Path) -> None:
    for result, calls, changed in ranks(2).call(counted_step, model, Limits()):
        assert sum(calls.values()) <= 2, calls
        assert result.reports == [1.0, 0.0]
        assert changed


@pytest.mark.parametrize("limits", [Limits(loss=1e-3), Limits(grad_norm=1e-6)], ids=["loss", "gradient norm"])
def test_a_step_above_a_limit_changes_nothing(ranks: Callable[[int], Ranks], model: Path, limits: Limits) -> None:
    for result, _, changed in ranks(2).call(counted_step, model, limits):
        assert not changed
        assert result.grad_norm > 1e-3
        assert limits.exceeded(result.loss, result.grad_norm)


def step_around_the_mean(world: World, run_dir: Path, model: Path, engine: str, microbatch: int, packed: int | None) -> Any:
    config = config_for(run_dir, model, global_batch=1)
    config = dataclasses.replace(config, engine=EngineConfig(name=EngineName(engine)))
    built, table = build_engine(config, world, blueprint_for(model)), ragged_table(LENGTHS, packed)
    shares = deal(np.arange(len(table)), microbatch, world.rank, world.size)
    batches = [make_batch(table, rows, microbatch, 0) for rows in shares]
    return take_step(built, AroundTheMean(), batches, world, lr=1e-2, targets=len(LENGTHS), first=batches)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_statistic_of_the_whole_step_is_known_before_its_loss(
    ranks: Callable[[int], Ranks], model: Path, tmp_path: Path, engine: str
) -> None:
    reader, table = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ragged_table(LENGTHS)
    means = torch.stack([mean_logp(reader, table, number) for number in range(len(LENGTHS))])
    loss = (means - means.detach().mean()).square().mean() / 2
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(reader.parameters(), 1e9))
    above = means[means > means.mean()].mean().item()
    for size, microbatch, packed in ((1, 3, None), (2, 1, 44), (3, 1, None)):
        for found in ranks(size).call(step_around_the_mean, tmp_path, model, engine, microbatch, packed):
            assert found.loss == pytest.approx(loss.item(), rel=1e-5)
            assert found.grad_norm == pytest.approx(norm, rel=1e-5)
            assert found.figures["spread"] == pytest.approx(2 * loss.item(), rel=1e-5)
            assert found.figures["above"] == pytest.approx(above, rel=1e-5)


def mean_logp(reader: Any, table: Any, number: int) -> torch.Tensor:
    """Return the mean log-probability of a document's labels, by plain transformers."""
    part = slice(int(table.offsets[number]), int(table.offsets[number + 1]))
    ids, labelled = torch.from_numpy(table.tokens[part].astype(np.int64)), torch.from_numpy(table.supervised[part] > 0)
    logps = reader(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return logps[labelled[1:]].mean()
