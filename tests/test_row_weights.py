"""Weights of rows and turns: on the tokens that they are of, in the divisor, under any split and in every objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from preparing import TOKENIZER, prepared, write
from tables import LR, blueprint_for, config_for, plain_adamw, ragged_table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE, SOURCE, WEIGHT, Batch, Output, Sizes
from trainers.config.choices import DocumentOf, EngineName, ObjectiveName
from trainers.config.derived import DESIRABLE
from trainers.config.errors import ConfigError
from trainers.config.schema import EngineConfig, ObjectiveConfig
from trainers.data.loader import Loader
from trainers.data.mismatched import mismatched
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable, open_table, save_joined, save_table
from trainers.engines.build import build_engine
from trainers.loop import train
from trainers.objectives import REFERENCE, make_objective, per_target
from trainers.objectives.base import TEACHER_IDS, TEACHER_LOGPS, Measured
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import evaluations, read_rows, steps
from trainers.world import World

HI, BYE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def weighed(table: TokenTable) -> list[list[tuple[str, float]]]:
    """Return what is trained of each document: the text of each weight, in order."""
    found, weights = [], table.signals[WEIGHT]
    for number, (start, end) in enumerate(zip(table.offsets[:-1], table.offsets[1:], strict=True)):
        labels = np.flatnonzero(table.supervised[start:end]) + start
        first = table.label_starts[number]
        own = weights[first : first + len(labels), 0] if weights.ndim == 2 else np.repeat(weights[number], len(labels))
        edges = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist(), len(labels)]
        found.append([(TOKENIZER.decode(table.tokens[labels[one:two]]), float(own[one])) for one, two in pairwise(edges)])
    return found


ROWS = [
    {"messages": [HI, says("first", weight=0.5), BYE, says("second")], "weight": 3},
    {"messages": [HI, says("wrong", train=False), BYE, says("right", loss_weight=2)]},
    {"messages": [HI, says("plain")]},
    {"prompt": "Hi", "completion": "none of it", "sample_weight": 0},
]
TRAINED = [[("first<|im_end|>", 1.5), ("second<|im_end|>", 3.0)], [("right<|im_end|>", 2.0)], [("plain<|im_end|>", 1.0)]]


@pytest.mark.parametrize("packing", [True, False])
def test_weights_lie_on_the_tokens_of_their_turns(tmp_path: Path, packing: bool) -> None:
    """A turn's weight times its row's; a row of weight 0 is left out, and the rows are the same with any packing."""
    found = prepared(write(tmp_path / "rows.jsonl", [*ROWS[:3], ROWS[3] | {"messages": [HI, says("x")]}]), packing=packing)
    assert weighed(found.train) == TRAINED
    assert found.report["dropped"] == 1
    assert found.report["splits"]["train"]["weights"] == {"min": 1.0, "mean": pytest.approx(found.train.signals[WEIGHT].mean()), "max": 3.0}
    alone = [sum(weight * len(TOKENIZER.encode(text)) for text, weight in document) for document in TRAINED]
    assert found.train.weights is not None
    assert found.train.weights.tolist() == alone
    assert found.train.sizes(np.arange(len(found.train))).weight == sum(alone)


def test_a_chunk_of_plain_rows_before_and_after_has_weights_of_1(tmp_path: Path) -> None:
    plain = [{"prompt": f"Hi {number}", "completion": f"plain {number}"} for number in range(600)]
    found = prepared(write(tmp_path / "rows.jsonl", [*plain, {"prompt": "Hi", "completion": "heavy", "weight": 4}, *plain])).train
    documents = weighed(found)
    assert [weight for ((_, weight),) in documents] == [1.0] * 600 + [4.0] + [1.0] * 600
    assert documents[600] == [("heavy<|im_end|>", 4.0)]


def test_rows_that_all_weigh_1_have_no_weights(tmp_path: Path) -> None:
    found = prepared(write(tmp_path / "rows.jsonl", [{"messages": [HI, says("a", weight=1, train=True)], "weight": 1.0}]))
    assert found.train.signals == {}
    assert found.train.sizes(np.arange(1)).weight == 0


def test_each_turn_as_a_document_has_its_own_weight(tmp_path: Path) -> None:
    found = prepared(write(tmp_path / "rows.jsonl", ROWS[:2]), document=DocumentOf.turn).train
    assert weighed(found) == [TRAINED[0][:1], TRAINED[0][1:], TRAINED[1]]


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward", "classify"])
def test_whole_documents_have_the_weight_of_their_row(tmp_path: Path, objective: str) -> None:
    pairs = [{"prompt": f"{number}?", "chosen": f"yes {number}", "rejected": "no", "weight": number} for number in range(4)]
    classes = [{"text": f"text {number}", "label": number % 2, "weight": number} for number in range(4)]
    table = prepared(write(tmp_path / "rows.jsonl", classes if objective == "classify" else pairs), objective).train
    assert table.signals[WEIGHT].tolist() == [1, 2, 3] if objective == "classify" else [1, 1, 2, 2, 3, 3]


BAD = {
    "below 0": ({"prompt": "Hi", "completion": "x", "weight": -1}, r"`weight`, -1, which is not a number from 0 on"),
    "a list": ({"prompt": "Hi", "completion": "x", "weights": [0, 1]}, "data.ignore=\\[weights\\]"),
    "more than float32 has": ({"prompt": "Hi", "completion": "x", "weight": 1e39}, "not a number from 0 on"),
    "not finite": ({"messages": [HI, says("x", weight=float("inf"))]}, "turn 1|inf|not a number"),
    "two that differ": (
        {"prompt": "Hi", "completion": "x", "weight": 1, "loss_weight": 2},
        "weights that differ: weight = 1, loss_weight = 2",
    ),
    "a turn's two that differ": ({"messages": [HI, says("x", weight=2, loss_scale=3)]}, "contradict"),
    "a flag that is a number": ({"messages": [HI, says("x", train=0.5)]}, "`train` = 0.5, which is neither 0 nor 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_a_weight_is_refused_by_name(case: str, tmp_path: Path) -> None:
    row, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        prepared(write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_turns_weight_is_refused_where_whole_answers_are_compared(objective: str, tmp_path: Path) -> None:
    pair = {"prompt": [HI], "chosen": [says("yes", weight=0.5)], "rejected": [says("no")]}
    ranked = {"prompt": "Hi", "responses": [{"response": [says("yes", weight=0.5)], "score": 2}, {"response": "no", "score": 1}]}
    for row in (pair, *([ranked] if objective == "dpo" else [])):
        with pytest.raises(ConfigError, match="has a weight, and this objective takes whole answers"):
            prepared(write(tmp_path / "rows.jsonl", [row]), objective)


def test_sources_with_and_without_weights_are_one_table(tmp_path: Path) -> None:
    tables = {"plain": ragged_table([5, 9]), "heavy": weighted_table([7, 12, 6])}
    for name, table in tables.items():
        save_table(table, tmp_path / name)
    save_joined({name: open_table(tmp_path / name) for name in tables}, {name: f"../{name}" for name in tables}, tmp_path / "all")
    whole = open_table(tmp_path / "all")
    assert whole.weights is not None
    assert tables["heavy"].weights is not None
    assert whole.weights.tolist() == [*tables["plain"].label_starts[1:] - tables["plain"].label_starts[:-1], *tables["heavy"].weights]


def weighted_table(lengths: list[int], packed: int | None = None) -> TokenTable:
    table = ragged_table(lengths, packed)
    weights = np.random.default_rng(1).choice([0.25, 1.0, 3.0], (int(table.supervised.sum()), 1)).astype(np.float32)
    return replace(table, signals={WEIGHT: weights})


def run_weighted(world: World, run_dir: Path, model: Path, fields: dict[str, Any], engine: str) -> list[dict[str, Any]]:
    """Train on a packed table with weights through the real loop; return the rows of metrics.jsonl."""
    run_dir.mkdir(exist_ok=True)
    config = replace(config_for(run_dir, model, **fields), engine=EngineConfig(name=EngineName(engine)))
    table, held = weighted_table(LENGTHS, 48), weighted_table([9, 21, 6, 30])
    data = Prepared(path=run_dir, train=table, eval=held, report={}, reused=True)
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(config, world, Attempt(run_dir), build_engine(config, world, blueprint_for(model)), data, loader, 1.0)
    return read_rows(run_dir) if world.rank == 0 else []


LENGTHS = [5, 29, 11, 13, 40, 17, 8, 23, 6, 7, 19, 31, 9, 12, 30, 22]


def plain(model: Any, table: TokenTable, rows: list[int]) -> torch.Tensor:
    """Return sum(weight x cross-entropy) / sum(weight) over rows, one unpadded document at a time."""
    losses, weights = [], []
    for document in table.documents_of(np.array(rows)).tolist():
        part = slice(int(table.offsets[document]), int(table.offsets[document + 1]))
        ids, marks = (torch.from_numpy(np.asarray(array[part]).astype(np.int64)) for array in (table.tokens, table.supervised))
        each = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        losses.append(each[marks[1:] > 0])
        weights.append(torch.from_numpy(table.signals[WEIGHT][table.label_starts[document] : table.label_starts[document + 1], 0]))
    of = torch.cat(weights)
    return (torch.cat(losses) * of).sum() / of.sum()


SPLITS = [pytest.param(1, 6, "fsdp", marks=pytest.mark.slow), (2, 1, "zero3"), pytest.param(3, 1, "fsdp", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("size", "microbatch", "engine"), SPLITS)
def test_every_split_equals_a_weighted_plain_loop(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, size: int, microbatch: int, engine: str
) -> None:
    table, held = weighted_table(LENGTHS, 48), weighted_table([9, 21, 6, 30])
    fields = {"steps": 3, "global_batch": 6, "microbatch": microbatch}
    rows = ranks(size).call(run_weighted, tmp_path / "run", tiny_llama, fields, engine)[0]
    loader = Loader(table, config_for(tmp_path, tiny_llama, **fields).train, seed=0, rank=0, world_size=1, pad_id=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    update = plain_adamw(model, LR, 3)
    before, after = evaluations(rows)
    everything = list(range(len(held)))
    assert before["eval_loss"] == pytest.approx(float(plain(model, held, everything).detach()), rel=1e-5)
    for step, row in enumerate(steps(rows)):
        loss = plain(model, table, loader.row_ids(step).tolist())
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        assert row["grad_norm"] == pytest.approx(update(), rel=1e-4)
    assert after["eval_loss"] == pytest.approx(float(plain(model, held, everything).detach()), rel=1e-4)


OBJECTIVES = {
    "sft": {},
    "distil": {"ce_weight": 0.3},
    "dpo": {"nll_weight": 0.2},
    "cpo": {"nll_weight": 1.0},
    "simpo": {"beta": 2.0, "margin": 0.5},
    "orpo": {},
    "kto": {"undesirable_weight": 1.5},
    "reward": {"center": 0.1},
    "classify": {},
}
COUNTS = [2, 1, 3, 1]
"""How often each of four documents, or pairs, is there: as a weight, or repeated."""


def made(name: str, counts: list[int], weights: list[float] | None) -> tuple[Output, Batch, Sizes]:
    """Return documents (pairs for those that compare), each so often, with weights."""
    generator = torch.Generator().manual_seed(0)
    members = 2 if name in ("dpo", "cpo", "simpo", "orpo", "reward") else 1
    each = torch.repeat_interleave(torch.arange(len(counts) * members).view(len(counts), members), torch.tensor(counts), 0).flatten()

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(len(counts) * members, *shape, generator=generator)[each]

    labels = torch.randint(5, (len(counts) * members, 6), generator=generator)[each]
    labels[:, :2] = IGNORE
    logps, gathered = -drawn(6).abs().where(labels != IGNORE, 0.0), drawn(6, 4).log_softmax(-1)
    documents = torch.arange(len(each))[:, None].expand(-1, 6)
    signals = {REFERENCE: drawn(), DESIRABLE: (drawn() > 0).float(), SOURCE: torch.zeros(len(each))}
    signals |= {"label": drawn().gt(0).float()} if name == "classify" else {}
    signals |= {TEACHER_IDS: torch.zeros(len(each), 6, 3, dtype=torch.int32), TEACHER_LOGPS: drawn(6, 4).log_softmax(-1)}
    if weights is not None:
        of = torch.tensor(weights).repeat_interleave(members)
        signals[WEIGHT] = of[:, None, None].expand(-1, 6, 1) * (labels != IGNORE)[..., None] if name in ("sft", "distil") else of
    ids = torch.zeros_like(labels)
    about = {"num_rows": len(each), "num_tokens": each.numel() * 6, "num_documents": len(each)}
    batch = Batch(input_ids=ids, labels=labels, position_ids=ids, documents=documents.contiguous(), signals=signals, **about)
    units = len(each) // 2 if members == 2 else 0
    return Output(logps=logps, gathered=gathered, scores=drawn(3)), batch, replace(batch.sizes(), units=units)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_of_weight_2_counts_as_two_rows_in_every_objective(name: str) -> None:
    objective = make_objective(ObjectiveConfig(name=ObjectiveName(name), **OBJECTIVES[name]), None)
    found = []
    for counts, weights in ((COUNTS, None), ([1] * len(COUNTS), [float(count) for count in COUNTS])):
        output, batch, sizes = made(name, counts, weights)
        targets = objective.targets(sizes)
        given = objective
        if isinstance(objective, Measured):
            given = objective.given(float(objective.measure(output, batch)) / targets)
        loss = given(output, batch)
        sums = {key: float(value) for key, value in loss.sums().items()}
        each = None if loss.each is None else [float(values.sum()) for values in loss.each]
        found.append({"loss": float(loss.total) / targets, "each": each, "targets": targets, **per_target(sums, targets)})
        if name == "classify":
            found[-1] |= objective.summary(objective.tally(output, batch).tolist())  # type: ignore[attr-defined]
    repeated, weighted = found
    assert weighted.keys() == repeated.keys()
    for key, value in repeated.items():
        assert weighted[key] == (None if value is None else pytest.approx(value, rel=1e-5)), key


def test_ktos_baseline_has_the_weights_of_its_prompts() -> None:
    table = replace(ragged_table([5, 9, 7]), partners=np.array([1, 2, 0]), signals={WEIGHT: np.array([3, 1, 2], np.float32)})
    assert mismatched(table, np.array([2, 0]), 20).signals[WEIGHT].tolist() == [2, 3]
