"""A step out of the ordinary is skipped, left behind with its rows, or ends the run; which one it is does not depend on outliers."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from command import arguments, launch, read_rows, trace
from conftest import WORDS, Ranks
from tables import blueprint_for, config_for, ragged_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.config.choices import OnSpike
from trainers.config.schema import CheckpointConfig
from trainers.data.loader import Loader
from trainers.data.prepare import Prepared
from trainers.engines.build import build_engine
from trainers.health.spikes import FEWEST, Guard, Spike, Spikes, limit
from trainers.loop import train
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import evaluations, rollbacks, steps
from trainers.world import World


def test_the_limit_is_robust() -> None:
    rng = random.Random(0)
    ordinary = [rng.gauss(2.0, 0.2) for _ in range(100)]
    assert limit(ordinary, 10) == pytest.approx(2.0 + 10 * 0.2, abs=0.5)  # the closed form of normal numbers
    assert limit([*ordinary[:90], *[1e6] * 10], 10) == pytest.approx(limit(ordinary, 10), abs=0.7)
    assert limit([2.0] * 100, 10) == pytest.approx(3.0)  # a flat curve: 5 % of the median
    assert limit(ordinary[: FEWEST - 1], 10) == math.inf


def test_a_window_forgets() -> None:
    spikes = Spikes(10)
    spikes.recall([(5.0, 50.0)] * 100)
    for _ in range(60):
        spikes.add(1.0, 1.0)
    assert spikes.limits().loss < 4
    assert spikes.limits().grad_norm < 40


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred answers that are learnt soon, and one, somewhere in the middle of the run's order, that is nothing like them."""
    path = tmp_path_factory.mktemp("poisoned") / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " ".join([WORDS[0]] * (5 + row % 3))}]}
        for row in range(200)
    ]
    rows[77]["messages"][1]["content"] = " ".join(WORDS[3:] * 3)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS = ("data.eval_fraction=0", "train.eval_every=null", "train.steps=100", "train.global_batch=2", "data.packing=false")
MORE = ("checkpoint.every=10", "optim.lr=3e-3", "train.spike_threshold=20")


@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.soak)])
def test_a_spike_is_skipped_or_left_behind(base: Path, poisoned: Path, cache: Path, tmp_path: Path, engine: str) -> None:
    said = {}
    for policy in ("none", "skip", "rollback"):
        line = arguments(base, poisoned, tmp_path / policy, *SETTINGS, *MORE, f"train.on_spike={policy}", f"engine={engine}")
        said[policy] = launch(cache, line)
    plain, skipped, back = ([row for row in read_rows(tmp_path / policy) if "loss" in row] for policy in ("none", "skip", "rollback"))
    at = max(range(25, 100), key=lambda step: plain[step]["loss"])
    assert [row["loss"] for row in skipped[: at + 1]] == [row["loss"] for row in plain[: at + 1]]
    assert [row["skipped"] for row in skipped] == [int(step >= at) for step in range(100)]
    assert skipped[at + 1]["loss"] < plain[at + 1]["loss"]  # the weights did not take the step
    assert f"step {at + 1} is skipped" in said["skip"]
    assert f"step {at + 1}:" in said["rollback"]
    begun = at // 10 * 10
    assert f"back to step {begun}" in said["rollback"]
    assert [row["step"] for row in back] == list(range(1, 101))
    assert [row["loss"] for row in back[:begun]] == [row["loss"] for row in plain[:begun]]
    assert max(row["loss"] for row in back[25:]) < plain[at]["loss"] / 2
    events = [row for row in read_rows(tmp_path / "rollback") if "rollback_from" in row]
    assert events == [{"kind": "rollback", "step": begun, "rollback_from": at + 1, "rows_left_out_steps": at + 1 - begun}]


def gone_back(world: World, run_dir: Path, model: Path) -> tuple[list[tuple[int, int]], bool, int]:
    """Leave out the rows of step 4, and be asked to stop while those that follow are waited for."""
    run_dir.mkdir(exist_ok=True)
    config = config_for(run_dir, model, steps=6, global_batch=2, microbatch=1, on_spike=OnSpike.rollback)
    config = replace(config, checkpoint=CheckpointConfig(every=2, asynchronous=False))
    waited, check = list[tuple[int, int]](), Guard.check

    class Waited(Loader):
        def make(self, step: int, ahead: int = 0) -> bool:
            waited.append((step, ahead))
            return False

    def spiked(self: Guard, step: int, *found: Any) -> bool:
        if step == 4:
            raise Spike("the loss is large")
        return check(self, step, *found)

    table = ragged_table([5, 9, 7, 6])
    data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
    loader = Waited(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    with patch.object(Guard, "check", spiked):
        outcome = train(config, world, Attempt(run_dir), build_engine(config, world, blueprint_for(model)), data, loader, 1.0)
    return waited, outcome.stopped, outcome.progress.step


def test_a_run_that_has_gone_back_waits_for_its_rows_where_a_signal_ends_that(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path
) -> None:
    assert ranks(2).call(gone_back, tmp_path / "run", tiny_llama)[0] == ([(2, 2)], True, 2)


def test_a_spike_stops_a_run_before_it_is_learnt(base: Path, poisoned: Path, cache: Path, tmp_path: Path) -> None:
    line = arguments(base, poisoned, tmp_path / "run", *SETTINGS, *MORE, "train.on_spike=stop", "launch.processes=1")
    said = launch(cache, line, expect=1)
    assert "was not taken: the" in said
    assert "would be ordinary" in said
    steps = [row["step"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps[-1]:06d}").is_dir()
    assert trace(tmp_path / "run")


@pytest.fixture(scope="module")
def overflowing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that learns as others do, and whose loss on the word "again" is infinite: its logit is -3e38 times a positive number."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("overflowing") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    embedding = model.get_input_embeddings().weight.detach()
    head = embedding.clone()
    embedding[:, 0], head[:, 0] = 1.0, 0.0
    head[AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("again")] = 0.0
    head[AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("again"), 0] = -3e38
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    return folder


def test_a_run_goes_back_after_an_evaluation_that_was_not_finite(overflowing: Path, poisoned: Path, cache: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": " ".join(["again"] * 40)}]}) + "\n"
    )
    more = [setting for setting in (*SETTINGS, *MORE) if setting != "train.eval_every=null"]
    more += [f"data.eval_path={held_out}", "train.eval_every=10", "train.patience=1000", "checkpoint.keep_best=1", "launch.processes=1"]
    said = launch(cache, arguments(overflowing, poisoned, tmp_path / "run", *more, "train.on_spike=rollback"))
    rows = read_rows(tmp_path / "run")
    assert rollbacks(rows)
    assert [row["eval_loss"] for row in evaluations(rows)] == [None] * 11
    assert [row["step"] for row in steps(rows)] == list(range(1, 101))
    assert "held-out loss inf" in said or "held-out loss nan" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss_after"] is None
