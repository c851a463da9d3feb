"""KTO equals a plain loop with a frozen copy of the model and its baseline over the whole step, under any split and both engines."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import arguments, environment, launch, pids_of, started, tool, trace, wait_for_step
from conftest import WORDS, Ranks, save_tiny
from tables import blueprint_for, config_for, plain_adamw, ragged_table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.batch import IGNORE, Batch, Output, Sizes
from trainers.config.choices import EngineName, ObjectiveName
from trainers.config.derived import DESIRABLE
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, RunConfig
from trainers.data.loader import Loader
from trainers.data.mismatched import all_mismatched
from trainers.data.prepare import Prepared, open_prepared
from trainers.data.table import TokenTable
from trainers.engines.build import build_engine
from trainers.loop import train
from trainers.objectives import REFERENCE, make_objective
from trainers.reference import other_model, require_same_vocabulary, with_reference
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows, steps
from trainers.world import World

LENGTHS = [5, 29, 11, 13, 40, 17, 8, 23, 6, 7, 19, 31]
LR = 3e-3
KTO = ObjectiveConfig(name=ObjectiveName.kto, beta=0.2, desirable_weight=1.0, undesirable_weight=1.5)
WANTED = np.array([1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1], np.float32)


def judged_table(packed: int | None) -> TokenTable:
    table, partners = ragged_table(LENGTHS, packed), np.roll(np.arange(len(LENGTHS)), -1)
    return replace(table, signals={DESIRABLE: WANTED}, partners=partners)


def run_kto(world: World, run_dir: Path, model: Path, microbatch: int, packed: int | None, engine: str) -> list[dict[str, Any]]:
    """Train through the real reference, loader and loop, with the same rows held out; return what the metrics say."""
    run_dir.mkdir(exist_ok=True)
    table = judged_table(packed)
    config = config_for(run_dir, model, steps=3, global_batch=len(table), microbatch=microbatch, eval_every=3)
    data_config = DataConfig(path="unused", prepared_dir=str(run_dir.parent / "kept"))
    name, _, context = engine.partition(" ")
    shared = EngineConfig(name=EngineName(name), context=int(context or 1))
    config = replace(config, objective=KTO, engine=shared, data=data_config, optim=replace(config.optim, lr=LR))
    built = build_engine(config, world, blueprint_for(model))
    data = Prepared(path=run_dir, train=table, eval=table, report={}, reused=True)
    attempt = Attempt(run_dir)
    data = with_reference(config, world, attempt, built, data, {}, 0)
    loader = Loader(data.train, config.train, seed=0, pad_id=0, **built.mesh.share_of(world.rank))
    train(config, world, attempt, built, data, loader, 1.0)
    return read_rows(run_dir) if world.rank == 0 else []


def summed(model: Any, table: TokenTable, document: int) -> torch.Tensor:
    """Return the log-probability of a document's labels, one unpadded row at a time."""
    part = slice(table.offsets[document], table.offsets[document + 1])
    ids = torch.from_numpy(table.tokens[part].astype(np.int64))
    labels = torch.full_like(ids, IGNORE)
    labels[:-1] = torch.where(torch.from_numpy(table.supervised[part][1:] > 0), ids[1:], IGNORE)
    return -cross_entropy(model(input_ids=ids[None]).logits[0], labels, ignore_index=IGNORE, reduction="sum")


def baseline_of(model: Any, frozen: Any, other: TokenTable) -> float:
    with torch.no_grad():
        ratios = [float(summed(model, other, number) - summed(frozen, other, number)) for number in range(len(LENGTHS))]
    return max(0.0, sum(ratios) / len(ratios))


def plain_steps(model_dir: Path, num_steps: int) -> list[dict[str, float]]:
    """One process, plain transformers and torch, a second model as the reference: what each step of all rows reports."""
    table = judged_table(None)
    (other,) = all_mismatched(table)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    frozen = copy.deepcopy(model)
    plain_step = plain_adamw(model, LR, num_steps)
    found = []
    for _ in range(num_steps):
        z0, losses, rewards = baseline_of(model, frozen, other), [], []
        for number in range(len(LENGTHS)):
            with torch.no_grad():
                known = summed(frozen, table, number)
            above = summed(model, table, number) - known - z0
            rewards.append(KTO.beta * (above.item() + z0))
            loss = 1 - torch.sigmoid(KTO.beta * above) if WANTED[number] else 1.5 * (1 - torch.sigmoid(-KTO.beta * above))
            (loss / len(LENGTHS)).backward()
            losses.append(loss.item())
        norm = plain_step()
        kinds = {"reward_chosen": WANTED > 0, "reward_rejected": WANTED == 0}
        found.append({name: float(np.mean(np.array(rewards)[kind])) for name, kind in kinds.items()})
        found[-1] |= {"loss": sum(losses) / len(losses), "grad_norm": norm, "kl": z0}
    return found


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[dict[str, float]]:
    return plain_steps(tiny_llama, 3)


SPLITS = [(2, 1, 64, "zero3"), (3, 2, None, "fsdp")]
SLOW = [(1, 12, None, "fsdp"), (2, 3, None, "zero3"), (3, 1, 64, "zero3"), (2, 2, 64, "fsdp"), (1, 1, 64, "fsdp")]
SOAK = [(4, 2, 64, "fsdp 2"), (2, 3, None, "fsdp 2")]
"""Ranks that share rows."""


@pytest.mark.parametrize(
    ("size", "microbatch", "packed", "engine"),
    [
        *SPLITS,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in SOAK),
    ],
)
def test_every_split_equals_a_plain_loop_with_the_baseline_of_the_whole_step(
    ranks: Callable[[int], Ranks],
    tiny_llama: Path,
    expected: list[dict[str, float]],
    tmp_path: Path,
    size: int,
    microbatch: int,
    packed: int | None,
    engine: str,
) -> None:
    rows = ranks(size).call(run_kto, tmp_path / "run", tiny_llama, microbatch, packed, engine)[0]
    for row, plain in zip(steps(rows), expected, strict=True):
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
        for name in ("kl", "reward_chosen", "reward_rejected"):
            assert row[name] == pytest.approx(plain[name], rel=1e-4, abs=2e-5)
    assert expected[1]["kl"] > 0.01, "the baseline was never above 0"
    held_out = [row for row in rows if "eval_loss" in row]
    assert held_out[0]["eval_loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert held_out[-1]["eval_kl"] > expected[-1]["kl"]


# The objective by itself, word by word from the paper.


def test_the_objective_is_its_formula() -> None:
    sums, reference, wanted = [-3.0, -1.0, -2.5], [-4.0, -1.5, -2.0], [1.0, 0.0, 1.0]
    documents = torch.tensor([[0, 0, 1, 1, 2, 2]])
    labels = torch.tensor([[7, IGNORE, 7, IGNORE, 7, IGNORE]])
    logps = torch.tensor([[sums[0], 0, sums[1], 0, sums[2], 0]], requires_grad=True)
    signals = {REFERENCE: torch.tensor(reference), DESIRABLE: torch.tensor(wanted)}
    fields = {"num_rows": 1, "num_tokens": 6, "num_documents": 3}
    batch = Batch(input_ids=labels * 0, labels=labels, position_ids=labels * 0, documents=documents, signals=signals, **fields)
    objective = make_objective(KTO, signals)
    assert float(objective.measure(Output(logps=logps), batch).detach()) == pytest.approx(1.0)
    for mean, z0 in ((0.4, 0.4), (-3.0, 0.0)):
        loss = objective.given(mean)(Output(logps=logps), batch)
        value = 0.0
        for total, known, good in zip(sums, reference, wanted, strict=True):
            above = KTO.beta * ((total - known) - z0)
            weight, v = (1.0, 1 / (1 + math.exp(-above))) if good else (1.5, 1.5 / (1 + math.exp(above)))
            value += weight - v
        assert float(loss.total.detach()) == pytest.approx(value, rel=1e-6)
        assert float(loss.figures["kl"]) / 3 == pytest.approx(z0)
        assert float(loss.figures["reward_chosen"] / loss.counts["reward_chosen"]) == pytest.approx(KTO.beta * 0.25)
        assert float(loss.figures["reward_rejected"] / loss.counts["reward_rejected"]) == pytest.approx(KTO.beta * 0.5)
        assert float(loss.figures["nll_chosen"] / loss.counts["nll_chosen"]) == pytest.approx(2.75)
    assert objective.targets(Sizes(documents=3, labels=9)) == 3
    with pytest.raises(ConfigError, match="reads desirable"):
        make_objective(KTO, [REFERENCE])


# Another model as the reference.


def test_a_reference_of_another_vocabulary_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = RunConfig(model=ModelConfig(id=str(base)), objective=replace(KTO, reference=str(base)))
    require_same_vocabulary(other_model(config), tokenizer)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"dog"'))
    other = other_model(replace(config, objective=replace(KTO, reference=str(tmp_path))))
    with pytest.raises(ConfigError, match=r"'cat' is id .* of the run's and none of its own; 1 differ") as caught:
        require_same_vocabulary(other, tokenizer)
    assert caught.value.path == "objective.reference"
    file.unlink()
    with pytest.raises(ConfigError, match=r"objective\.reference"):
        require_same_vocabulary(other, tokenizer)


@pytest.mark.slow
def test_a_killed_run_against_another_model_continues_to_the_same_numbers(base: Path, cache: Path, tmp_path: Path) -> None:
    """The whole command: two ranks, adapters, a held-out share, a reference that is no start of this run; one rank is killed."""
    random = np.random.default_rng(0)
    rows = [
        {"prompt": f"the cat {number}", "completion": " ".join(random.choice(WORDS, 5 + number % 4)), "label": number % 3 > 0}
        for number in range(60)
    ]
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = save_tiny(tmp_path / "other", tied=True, seed=5, vocab_size=json.loads((base / "config.json").read_text())["vocab_size"])
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    more = ("objective=kto", f"objective.reference={other}", "peft=lora", "peft.rank=4", "train.steps=8", "checkpoint.every=2")
    lines = {name: arguments(base, file, tmp_path / name, *more) for name in ("whole", "killed")}
    launch(cache, lines["whole"])
    with started(lines["killed"], environment(cache)) as process:
        wait_for_step(tmp_path / "killed", 5, process)
        os.kill(pids_of(tmp_path / "killed", 1)[0], signal.SIGKILL)
        process.wait(100)
    launch(cache, lines["killed"])
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    for name in ("train", "train-mismatched", "eval", "eval-mismatched"):
        files = [(tmp_path / run / "reference" / f"{name}.npy").read_bytes() for run in lines]
        assert files[0] == files[1]
    require_reference_of(other, tmp_path / "whole", cache)
    run = tmp_path / "whole"
    tool(cache, run, "--rows", "0")
    figures, last = json.loads((run / "evaluation" / "run.json").read_text())["figures"], read_rows(run)[-1]
    assert figures["accuracy"]["value"] == pytest.approx(last["eval_accuracy"])
    assert figures["reward_baseline"] == pytest.approx(0.1 * last["eval_kl"], rel=1e-4, abs=1e-7)
    for kind, trained in (("wanted", "chosen"), ("unwanted", "rejected")):
        assert figures[f"reward_{kind}"]["value"] == pytest.approx(last[f"eval_reward_{trained}"], rel=1e-4, abs=1e-6)
    assert figures["held_out_loss"]["documents"] == figures["reward_wanted"]["documents"]


def require_reference_of(model_dir: Path, run_dir: Path, cache: Path) -> None:
    """The numbers in a run directory are those of plain transformers."""
    table = open_prepared(cache / "prepared" / json.loads((run_dir / "manifest.json").read_text())["prepared"]).train
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    (mismatched,) = all_mismatched(table)
    for name, part in (("train", table), ("train-mismatched", mismatched)):
        with torch.no_grad():
            plain = [float(summed(model, part, document)) for document in range(len(part.offsets) - 1)]
        assert np.load(run_dir / "reference" / f"{name}.npy").tolist() == pytest.approx(plain, rel=1e-5)
