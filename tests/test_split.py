"""The same rows give the same run however they are split into ranks, microbatches and accumulation; packed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks, save_tiny
from tables import LENGTHS, LR, STEPS, blueprint_for, config_for, plain_adamw, ragged_table
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE, Batch
from trainers.config.derived import rows_words, scarcity
from trainers.config.errors import plural
from trainers.config.mesh import Mesh
from trainers.config.schema import TrainConfig
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.engines.build import build_engine
from trainers.engines.fsdp import state as sharded_state
from trainers.health.isolation import require_isolation
from trainers.loop import train
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows
from trainers.world import World


def run_split(world: World, run_dir: Path, model: Path, table: TokenTable, eval_table: TokenTable | None, **fields: Any) -> dict[str, Any]:
    """Train through the real loop; return the metrics rows, each step's whole gradients, and the whole weights."""
    run_dir.mkdir(exist_ok=True)
    config = config_for(run_dir, model, **fields)
    engine = build_engine(config, world, blueprint_for(model))
    gradients, plain_step = [], engine.step

    def step(lr: float, *accepts: Any) -> float:
        parameters = engine.model.named_parameters()
        gradients.append({name: sharded_state.whole(p.grad).clone() for name, p in parameters})
        return plain_step(lr, *accepts)

    engine.step = step  # what is seen is what the optimizer gets, before clipping
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    data = Prepared(path=run_dir, train=table, eval=eval_table, report={}, reused=True)
    outcome = train(config, world, Attempt(Path(config.run_dir)), engine, data, loader, 1.0)
    rows = read_rows(run_dir) if world.rank == 0 else []
    return {"rows": rows, "gradients": gradients, "weights": dict(engine.weights()), "outcome": outcome}


def steps_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "loss" in row]


def run_plainly(model_dir: Path, table: TokenTable) -> dict[str, Any]:
    """One process, plain transformers and torch, one unpadded row at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    plain_step = plain_adamw(model, LR, STEPS)
    losses, gradients = [], []
    for _ in range(STEPS):
        rows = list(plain_rows(table))
        targets = sum(int((labels != IGNORE).sum()) for _, labels in rows)
        total = 0.0
        for ids, labels in rows:
            logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            loss = torch.nn.functional.nll_loss(logps, labels, ignore_index=IGNORE, reduction="sum") / targets
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        plain_step()
    return {"losses": losses, "gradients": gradients, "weights": model.state_dict()}


def plain_rows(table: TokenTable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for document in range(len(table.offsets) - 1):
        part = slice(table.offsets[document], table.offsets[document + 1])
        ids = torch.from_numpy(table.tokens[part].astype(np.int64))
        labels = torch.full_like(ids, IGNORE)
        labels[:-1] = torch.where(torch.from_numpy(table.supervised[part][1:] > 0), ids[1:], IGNORE)
        yield ids, labels


def relative(got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, relative to the reference's norm."""
    difference, whole = (torch.cat([tensor.flatten() for tensor in tensors.values()]) for tensors in (minus(got, reference), reference))
    return float(difference.norm() / whole.norm())


def minus(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one[name] - other[name] for name in one}


SPLITS = [(1, 8, 1), (2, 4, 1), (2, 1, 4), (2, 2, 2), (1, 1, 8)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("untied") / "model", tied=False, initializer_range=0.05)


@pytest.fixture(scope="module")
def runs(
    ranks: Callable[[int], Ranks], untied: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int, int], dict[str, Any]]:
    table, folder = ragged_table(LENGTHS), tmp_path_factory.mktemp("splits")
    results = {}
    for size, microbatch, accumulation in SPLITS:
        assert size * microbatch * accumulation == len(LENGTHS)
        fields = {"steps": STEPS, "global_batch": len(LENGTHS), "microbatch": microbatch}
        run_dir = folder / f"{size}x{microbatch}x{accumulation}"
        results[size, microbatch, accumulation] = ranks(size).call(run_split_fields, run_dir, untied, table, None, fields)[0]
    return results


def run_split_fields(
    world: World, run_dir: Path, model: Path, table: TokenTable, held_out: TokenTable | None, fields: dict[str, Any]
) -> Any:
    return run_split(world, run_dir, model, table, held_out, **fields)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "x".join(map(str, split)))
def test_every_split_equals_the_plain_loop(runs: dict[Any, Any], untied: Path, split: tuple[int, int, int]) -> None:
    result, reference = runs[split], run_plainly(untied, ragged_table(LENGTHS))
    assert [row["loss"] for row in steps_of(result)] == pytest.approx(reference["losses"], rel=1e-6)
    for mine, theirs in zip(result["gradients"], reference["gradients"], strict=True):
        assert relative(mine, theirs) < 1e-6
    for name, tensor in result["weights"].items():
        torch.testing.assert_close(tensor, reference["weights"][name], rtol=0, atol=1e-5, msg=name)


def test_the_learning_rate_trace_is_identical(runs: dict[Any, Any]) -> None:
    traces = {split: [row["lr"] for row in steps_of(result)] for split, result in runs.items()}
    assert len({tuple(trace) for trace in traces.values()}) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked(ranks: Callable[[int], Ranks], untied: Path, attention: str) -> None:
    packed, alone = ranks(1).call(loss_and_gradients, untied, attention)[0]
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    assert relative(packed[1], alone[1]) < 1e-5


def loss_and_gradients(world: World, model: Path, attention: str) -> list[tuple[float, dict[str, torch.Tensor]]]:
    results = []
    for table in (ragged_table(LENGTHS, packed=64), ragged_table(LENGTHS)):
        engine = build_engine(config_for(Path("unused"), model), world, blueprint_for(model, attention))
        batches = [make_batch(table, np.array([row]), 1, 0) for row in range(len(table))]
        total = 0.0
        for number, batch in enumerate(batches, 1):
            loss = -engine.forward(batch).logps.sum()
            engine.backward(loss, last=number == len(batches))
            total += loss.item()
        results.append((total, {name: sharded_state.whole(p.grad) for name, p in engine.model.named_parameters()}))
    return results


@pytest.mark.parametrize("style", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_document_leaves_log_probabilities_bit_identical(tmp_path: Path, style: str, attention: str) -> None:
    from conftest import TINY
    from transformers import AutoConfig

    more = {"sliding_window": 8} if style != "llama" else {}
    config = AutoConfig.for_model(style, **TINY, head_dim=8, initializer_range=0.2, **more)
    config._attn_implementation = attention
    if style == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 has no sdpa: its scores are capped")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    table = ragged_table(LENGTHS, packed=64)
    batch = make_batch(table, np.arange(len(table)), len(table), 0)
    changed = make_batch(table, np.arange(len(table)), len(table), 0)
    assert len(table) < len(LENGTHS), "nothing is packed"
    first = changed.position_ids.eq(0).cumsum(1).eq(1)  # each row's first document
    changed.input_ids[first] = (changed.input_ids[first] + 7) % 33
    from trainers.model.forward import forward

    with torch.no_grad():
        before, after = forward(model, batch).logps, forward(model, changed).logps
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])


def test_a_model_that_cannot_isolate_is_refused(ranks: Callable[[int], Ranks], untied: Path) -> None:
    assert ranks(2).call(isolation_of, untied, False) == ["", ""]
    assert all("packing" in message for message in ranks(2).call(isolation_of, untied, True))


def isolation_of(world: World, model: Path, leaky: bool) -> str:
    """Ask a model that, if `leaky`, takes each row for one document: what a backend blind to documents would do."""
    engine = build_engine(config_for(Path("unused"), model), world, blueprint_for(model))

    def logps_of(batch: Batch) -> torch.Tensor:
        one = Batch.of(batch.input_ids, batch.labels, torch.arange(batch.labels.shape[1]).expand_as(batch.labels))
        return engine.forward(one if leaky else batch).logps

    try:
        engine.train(False)
        require_isolation(logps_of, 33, 2)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size", [1, 3])
def test_seven_rows_on_three_ranks_with_packing_and_evaluation(
    ranks: Callable[[int], Ranks], untied: Path, tmp_path: Path, size: int
) -> None:
    """Padding rows keep the ranks in step; every row and every token counts once, on both sides."""
    table = ragged_table(LENGTHS[:7], packed=44, masked=(2,))
    held_out = ragged_table([9, 4, 31, 12, 6, 20, 13], packed=None)
    fields = {"epochs": 2.0, "global_batch": 3, "microbatch": 1, "eval_every": 1}
    result = ranks(size).call(run_split_fields, tmp_path / "run", untied, table, held_out, fields)[0]
    labels = sum(int((labels != IGNORE).sum()) for _, labels in plain_rows(table))
    progress = result["outcome"].progress
    assert (progress.rows, progress.tokens) == (2 * len(table), 2 * labels)
    evaluations = [row for row in result["rows"] if "eval_loss" in row]
    expected = sum(int((labels != IGNORE).sum()) for _, labels in plain_rows(held_out))
    assert all(row["eval_tokens"] == expected for row in evaluations)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    with torch.no_grad():
        loss = sum(
            torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0], labels, ignore_index=IGNORE, reduction="sum")
            for ids, labels in plain_rows(held_out)
        )
    assert evaluations[0]["eval_loss"] == pytest.approx(float(loss) / expected, rel=1e-5)


def test_evaluation_does_not_depend_on_ranks_or_batch(ranks: Callable[[int], Ranks], untied: Path) -> None:
    losses = [ranks(size).call(evaluate_alone, untied, rows)[0] for size in (1, 2, 3) for rows in (1, 3, 8)]
    assert losses == pytest.approx([losses[0]] * 9, rel=1e-6)


def evaluate_alone(world: World, model: Path, rows: int) -> float:
    from trainers.data.loader import eval_batches
    from trainers.evaluation import evaluate
    from trainers.objectives import NextToken

    engine = build_engine(config_for(Path("unused"), model), world, blueprint_for(model))
    table = ragged_table(LENGTHS[:7])
    batches = eval_batches(table, rows, rank=world.rank, world_size=world.size, pad_id=0)
    return evaluate(engine, NextToken(), batches, world, table.sizes(np.arange(len(table))).labels).loss


def test_a_rank_with_nothing_to_learn_changes_nothing(ranks: Callable[[int], Ranks], untied: Path, tmp_path: Path) -> None:
    """A microbatch without labels contributes exactly 0: two ranks, one of them all masked, equal the other's rows alone."""
    table = ragged_table([12, 12], masked=(0,))
    fields = {"steps": 2, "global_batch": 2, "microbatch": 1}
    both = ranks(2).call(run_split_fields, tmp_path / "both", untied, table, None, fields)[0]
    alone = ranks(1).call(run_split_fields, tmp_path / "alone", untied, table, None, fields)[0]
    assert relative(both["gradients"][0], alone["gradients"][0]) < 1e-6
    assert all(tensor.isfinite().all() for tensor in both["weights"].values())


def test_a_whole_step_without_labels_is_skipped(ranks: Callable[[int], Ranks], untied: Path, tmp_path: Path) -> None:
    table = ragged_table([12, 12], masked=(0, 1))
    result = ranks(2).call(run_split_fields, tmp_path / "run", untied, table, None, {"steps": 2, "global_batch": 2, "microbatch": 1})[0]
    assert result["outcome"].progress.skipped == 2
    assert not result["gradients"]
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in result["weights"].items())


def test_data_with_fewer_rows_than_a_step_takes_say_so_with_a_remedy() -> None:
    settings = TrainConfig(global_batch=16, microbatch=2)
    assert scarcity(settings, True, 16, 40, 2) is None
    said = scarcity(settings, True, 7, 40, 2)
    assert said is not None
    assert "packed into 7 rows, and a step takes 16" in said
    assert "Try train.global_batch=4 or data.packing=false, which makes 40 rows" in said
    assert "Try more data" in str(scarcity(settings, False, 1, 1, 2))


def test_counts_agree_with_their_nouns() -> None:
    said = [plural(1, "rank"), plural(2, "rank"), plural(0, "process"), plural(1000, "microbatch")]
    assert said == ["1 rank", "2 ranks", "0 processes", "1,000 microbatches"]
    assert rows_words(TrainConfig(global_batch=4, microbatch=4), Mesh()) == "4 rows a step, 1 microbatch of 4 on one rank"
