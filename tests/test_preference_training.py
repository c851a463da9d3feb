"""A run on pairs equals a plain loop with a frozen copy of the model, under any split and both engines; its reference is kept."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
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
from tables import blueprint_for, config_for, pair_table, plain_adamw
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.batch import IGNORE
from trainers.config.choices import EngineName, ObjectiveName, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ObjectiveConfig, PeftConfig
from trainers.data.loader import Loader
from trainers.data.prepare import Prepared, open_prepared
from trainers.data.table import TokenTable
from trainers.engines.build import build_engine
from trainers.loop import train
from trainers.objectives import REFERENCE
from trainers.reference import with_reference
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows, steps
from trainers.world import World

LENGTHS = [5, 29, 11, 13, 40, 17, 8, 23, 6, 7, 19, 31, 9, 12, 30, 22]
PAIRS = len(LENGTHS) // 2
BETA, LR = 0.1, 1e-3
OBJECTIVES = {
    "dpo": ObjectiveConfig(name=ObjectiveName.dpo, beta=BETA),
    "simpo": ObjectiveConfig(name=ObjectiveName.simpo, beta=2.0, margin=0.5),
    "orpo": ObjectiveConfig(name=ObjectiveName.orpo),
}


def run_pairs(
    world: World,
    run_dir: Path,
    model: Path,
    table: TokenTable,
    objective: str,
    fields: dict[str, Any],
    engine: str = "fsdp",
    peft: PeftConfig | None = None,
) -> tuple[list[dict[str, Any]], list[float]]:
    """Train on pairs through the real reference and loop; return the rows of the steps, and the reference of each document."""
    run_dir.mkdir(exist_ok=True)
    config = config_for(run_dir, model, **fields)
    data_config = DataConfig(path="unused", prepared_dir=str(run_dir.parent / "kept"))
    config = replace(
        config,
        objective=OBJECTIVES[objective],
        engine=EngineConfig(name=EngineName(engine)),
        data=data_config,
        optim=replace(config.optim, lr=LR),
        peft=peft or PeftConfig(),
    )
    built = build_engine(config, world, blueprint_for(model))
    data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
    attempt = Attempt(run_dir)
    if objective == "dpo":
        data = with_reference(config, world, attempt, built, data, {}, 0)
    loader = Loader(data.train, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(config, world, attempt, built, data, loader, 1.0)
    reference = data.train.signals.get(REFERENCE, np.zeros(0)).tolist()
    return (steps(read_rows(run_dir)) if world.rank == 0 else []), reference


def summed(model: Any, table: TokenTable, document: int) -> tuple[torch.Tensor, int]:
    """Return the log-probability of a document's labels, one unpadded row at a time, and their number."""
    part = slice(table.offsets[document], table.offsets[document + 1])
    ids = torch.from_numpy(table.tokens[part].astype(np.int64))
    labels = torch.full_like(ids, IGNORE)
    labels[:-1] = torch.where(torch.from_numpy(table.supervised[part][1:] > 0), ids[1:], IGNORE)
    return -cross_entropy(model(input_ids=ids[None]).logits[0], labels, ignore_index=IGNORE, reduction="sum"), int((labels != IGNORE).sum())


def opened(model_dir: Path, adapter: Path | None) -> Any:
    """The model as transformers opens it, with an adapter as peft does."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def plain_losses(
    model_dir: Path, table: TokenTable, num_steps: int, objective: str, adapter: Path | None = None
) -> tuple[list[float], list[float]]:
    """One process, plain transformers and torch, a second model as the reference: the losses and gradient norms of all pairs a step."""
    model = opened(model_dir, adapter)
    frozen = copy.deepcopy(model)
    plain_step = plain_adamw(model, LR, num_steps)
    losses, norms = [], []
    for _ in range(num_steps):
        total = 0.0
        for first in range(0, len(table.offsets) - 1, 2):
            (chosen, c), (rejected, r) = (summed(model, table, first + number) for number in (0, 1))
            if objective == "dpo":
                with torch.no_grad():
                    known = [summed(frozen, table, first + number)[0] for number in (0, 1)]
                loss = -logsigmoid(BETA * ((chosen - known[0]) - (rejected - known[1])))
            elif objective == "simpo":
                loss = -logsigmoid(2.0 * chosen / c - 2.0 * rejected / r - 0.5)
            else:
                odds = [mean - torch.log1p(-torch.exp(mean)) for mean in (chosen / c, rejected / r)]
                loss = -chosen / c - 0.1 * logsigmoid(odds[0] - odds[1])
            (loss / PAIRS).backward()
            total += loss.item() / PAIRS
        losses.append(total)
        norms.append(plain_step())
    return losses, norms


SPLITS = [("dpo", 1, 8, None, "fsdp"), ("dpo", 2, 2, 64, "zero3"), ("dpo", 3, 1, 64, "fsdp"), ("simpo", 2, 4, 64, "fsdp")]
SLOW = [
    *(("dpo", 2, 1, None, "fsdp"), ("dpo", 2, 4, 64, "fsdp"), ("dpo", 3, 1, None, "zero3")),
    *(("simpo", 3, 1, 64, "zero3"), ("simpo", 1, 8, None, "fsdp"), ("orpo", 2, 1, None, "fsdp"), ("orpo", 3, 1, 64, "zero3")),
]


@pytest.mark.parametrize(
    ("objective", "size", "microbatch", "packed", "engine"), [*SPLITS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_split_equals_a_plain_loop_with_a_second_model(
    ranks: Callable[[int], Ranks],
    tiny_llama: Path,
    tmp_path: Path,
    objective: str,
    size: int,
    microbatch: int,
    packed: int | None,
    engine: str,
) -> None:
    table = pair_table(LENGTHS, packed)
    fields = {"steps": 3, "global_batch": len(table), "microbatch": microbatch}
    assert table.sizes(np.arange(len(table))).units == PAIRS
    rows, _ = ranks(size).call(run_pairs, tmp_path / "run", tiny_llama, table, objective, fields, engine)[0]
    losses, norms = plain_losses(tiny_llama, table, 3, objective)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)


def test_twenty_steps_of_dpo_equal_a_plain_loop(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    table = pair_table(LENGTHS, 64)
    fields = {"steps": 20, "global_batch": len(table), "microbatch": 2}
    rows, _ = ranks(2).call(run_pairs, tmp_path / "run", tiny_llama, table, "dpo", fields)[0]
    losses, _ = plain_losses(tiny_llama, table, 20, "dpo")
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0], "nothing was learnt"
    assert rows[-1]["accuracy"] == 1.0
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that peft made, and that changes what the base says: the reference of a run that begins with it is not the base."""
    import peft

    folder, settings = tmp_path_factory.mktemp("adapter"), {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(opened(tiny_llama, None), peft.LoraConfig(r=4, lora_alpha=8, **settings))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def lora(adapter: Path, dropout: float = 0.0) -> PeftConfig:
    return PeftConfig(method=PeftMethod.lora, rank=4, alpha=8.0, dropout=dropout, targets=["all-linear"], adapter=str(adapter))


@pytest.mark.parametrize(("size", "engine"), [(2, "fsdp"), pytest.param(3, "zero3", marks=pytest.mark.slow)])
def test_an_adapter_learns_as_in_a_plain_loop(
    ranks: Callable[[int], Ranks], tiny_llama: Path, adapter: Path, tmp_path: Path, size: int, engine: str
) -> None:
    table = pair_table(LENGTHS, 64)
    fields = {"steps": 4, "global_batch": len(table), "microbatch": 1}
    rows, reference = ranks(size).call(run_pairs, tmp_path / "run", tiny_llama, table, "dpo", fields, engine, lora(adapter))[0]
    losses, norms = plain_losses(tiny_llama, table, 4, "dpo", adapter)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
    of_base, of_adapter = (opened(tiny_llama, known).eval() for known in (None, adapter))
    with torch.no_grad():
        assert reference == pytest.approx([float(summed(of_adapter, table, number)[0]) for number in range(len(LENGTHS))], rel=1e-5)
        assert abs(float(summed(of_base, table, 0)[0]) - reference[0]) > 1e-2, "the adapter changes nothing"


def test_dropout_leaves_the_reference_alone(ranks: Callable[[int], Ranks], tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    table, fields = pair_table(LENGTHS, 64), {"steps": 2, "global_batch": 2, "microbatch": 1}
    rows, reference = ranks(2).call(run_pairs, tmp_path / "run", tiny_llama, table, "dpo", fields, "fsdp", lora(adapter, 0.5))[0]
    model = opened(tiny_llama, adapter).eval()
    with torch.no_grad():
        assert reference == pytest.approx([float(summed(model, table, number)[0]) for number in range(len(LENGTHS))], rel=1e-5)
    assert abs(rows[0]["reward_margin"]) > 1e-4, "dropout changes nothing while training"


def test_the_reference_is_measured_once_and_the_same_for_any_ranks(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    table, fields = pair_table(LENGTHS, 64), {"steps": 2, "global_batch": 2, "microbatch": 1}
    _, first = ranks(2).call(run_pairs, tmp_path / "run", tiny_llama, table, "dpo", fields)[0]
    _, again = ranks(3).call(run_pairs, tmp_path / "run", tiny_llama, table, "dpo", fields)[0]  # the model has moved since
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        assert first == pytest.approx([float(summed(model, table, document)[0]) for document in range(len(LENGTHS))], rel=1e-5)
    assert again == first
    _, other = ranks(1).call(run_pairs, tmp_path / "other", tiny_llama, table, "dpo", fields)[0]
    assert other == pytest.approx(first, rel=1e-5)


def refusal(world: World, *arguments: Any) -> str:
    try:
        run_pairs(world, *arguments)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_trained_run_without_its_reference_is_refused(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    table, fields = pair_table(LENGTHS, 64), {"steps": 2, "global_batch": 2, "microbatch": 1}
    ranks(2).call(run_pairs, tmp_path / "run", tiny_llama, table, "dpo", fields)
    file = next((tmp_path / "run" / "reference").glob("train.npy"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for kept in filter(Path.is_dir, (tmp_path / "kept").glob("reference-*")):
        kept.rename(tmp_path / "gone")
    said = ranks(2).call(refusal, tmp_path / "run", tiny_llama, table, "dpo", fields)
    assert all("train.npy has changed on its disk" in text and "run_dir=" in text for text in said)
    file.write_bytes(whole)
    assert ranks(2).call(refusal, tmp_path / "run", tiny_llama, table, "dpo", fields | {"steps": 3}) == ["", ""]


def write_pairs(file: Path) -> Path:
    random = np.random.default_rng(0)
    rows = [
        {"prompt": f"the cat {number}", "chosen": " ".join(random.choice(WORDS, 6)), "rejected": " ".join(random.choice(WORDS, 9))}
        for number in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_under_zero3_another_model_is_the_reference_of_training_and_of_evaluation(base: Path, cache: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    other, run = save_tiny(tmp_path / "other", tied=True, seed=5, vocab_size=vocabulary), tmp_path / "run"
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    launch(cache, arguments(base, pairs, run, "objective=dpo", f"objective.reference={other}", "engine=zero3"))
    table = open_prepared(cache / "prepared" / json.loads((run / "manifest.json").read_text())["prepared"]).train
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        plain = [float(summed(model, table, document)[0]) for document in range(len(table.offsets) - 1)]
    assert np.load(run / "reference" / "train.npy").tolist() == pytest.approx(plain, rel=1e-5)
    measured = [row for row in read_rows(run) if "eval_accuracy" in row]
    assert measured[0]["eval_loss"] != pytest.approx(math.log(2), abs=1e-3), "the reference is what training began with"
    tool(cache, run, "--rows", "0", "--no-base")
    figures = json.loads((run / "evaluation" / "run.json").read_text())["figures"]
    assert figures["preference_scores"] == "reward"
    assert figures["preference_accuracy"]["value"] == pytest.approx(measured[-1]["eval_accuracy"])
    assert figures["preference_margin"]["value"] == pytest.approx(measured[-1]["eval_reward_margin"], rel=1e-4)
    assert [third["documents"] for third in figures["preference_accuracy_by_length"]]
    tool(cache, run, "--rows", "0", "--no-base", "--path", shutil.copy(pairs, tmp_path / "others.jsonl"))
    assert json.loads((run / "evaluation" / "run.json").read_text())["figures"]["preference_scores"] == "likelihood"


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_numbers(base: Path, cache: Path, tmp_path: Path) -> None:
    """The whole command: two ranks, adapters, a held-out share; one rank is killed, and the same command goes to the end."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    more = ("objective=dpo", "peft=lora", "peft.rank=4", "train.steps=8", "checkpoint.every=2", "train.eval_every=4")
    lines = {name: arguments(base, pairs, tmp_path / name, *more) for name in ("whole", "killed")}
    launch(cache, lines["whole"])
    with started(lines["killed"], environment(cache)) as process:
        wait_for_step(tmp_path / "killed", 5, process)
        os.kill(pids_of(tmp_path / "killed", 1)[0], signal.SIGKILL)
        process.wait(100)
    launch(cache, lines["killed"])
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    files = [(tmp_path / name / "reference" / "train.npy").read_bytes() for name in lines]
    assert files[0] == files[1]
    measured = [row for row in read_rows(tmp_path / "whole") if "eval_accuracy" in row]
    assert [row["step"] for row in measured] == [0, 4, 8]
    assert measured[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
