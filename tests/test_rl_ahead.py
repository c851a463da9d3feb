"""Rollouts that are given while others are trained on: jobs of a thread, which weights give which, and what proves these."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import save_tiny
from transformers import AutoModelForCausalLM

from trainers.config.mesh import Mesh
from trainers.config.schema import RlConfig, RunConfig
from trainers.generate.decode import decode, logps_of
from trainers.generate.elsewhere import SEAT
from trainers.generate.local import Broken
from trainers.generate.request import Request, Sampling
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.rl.ahead import Ahead
from trainers.rl.generators import Generators, GeneratorsLost
from trainers.rl.jobs import Jobs, Spent
from trainers.rl.prompts import table_of
from trainers.rl.sampler import Sampler
from trainers.rl.sync import Mismatch
from trainers.rl.versions import folder_of, note_said, remove_before, said_file
from trainers.rundir.attempt import Attempt
from trainers.rundir.checkpoints import steps


def test_jobs_are_done_in_order_and_one_that_is_stopped_is_the_last() -> None:
    jobs, done = Jobs(), list[int]()

    def ask(number: int, found: Spent | None) -> None:
        def job() -> Spent | None:
            done.append(number)
            return found

        jobs.ask(number, job)

    ask(1, {"sampling_seconds": 2.0})
    ask(2, None)
    ask(3, {})
    assert [jobs.has(number) for number in (1, 4)] == [True, False]
    first = jobs.take(1)
    assert first is not None
    assert first.keys() == {"sampling_seconds", "waiting_seconds"}
    assert (jobs.take(2), jobs.take(3), jobs.take(4), done) == (None, None, {}, [1, 2])
    jobs.close()
    assert not jobs.thread.is_alive()


def test_what_a_job_raises_is_raised_where_it_is_waited_for() -> None:
    jobs = Jobs()

    def fail() -> Spent:
        raise TrainingFailed("the generator is another")

    jobs.ask(1, fail)
    with pytest.raises(TrainingFailed, match="is another"):
        jobs.settle()
    jobs.ask(2, dict)
    assert jobs.take(2) is None
    jobs.close()


def test_a_stop_waits_for_no_job_whose_other_rank_has_failed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody takes what has failed: it is said."""
    monkeypatch.setattr("trainers.rl.jobs.LEAVE_S", 0.1)
    failed, waits, goes_on = Jobs(), Jobs(), threading.Event()

    def fail() -> Spent:
        raise TrainingFailed("the generator is another")

    def wait() -> None:
        goes_on.wait(20)

    failed.ask(1, fail)
    waits.ask(1, wait)
    failed.close()
    waits.close()
    assert waits.thread.is_alive()
    assert "has failed: the generator is another" in caplog.text
    assert "this rank ends without it" in caplog.text
    goes_on.set()
    waits.thread.join(20)


def test_a_job_makes_no_progress_of_a_step_but_of_waiting_for_it() -> None:
    jobs, goes_on = Jobs(), threading.Event()

    def job() -> Spent:
        watch.beat()
        goes_on.wait(20)
        watch.beat()
        return {}

    before, seen = watch.began, watch.aside_beats
    jobs.ask(1, job)
    while watch.aside_beats == seen:
        pass
    assert watch.began == before, "a step that hangs meanwhile is found"
    threading.Timer(0.1, goes_on.set).start()
    jobs.take(1)
    assert watch.began != before
    jobs.close()


def test_weights_give_the_rollout_so_many_after_them_and_stay_until_then(tmp_path: Path) -> None:
    sampler: Any = SimpleNamespace(rl=RlConfig(staleness=2, steps_per_rollout=3))
    ahead = Ahead(sampler, cast(Any, None), 30, 0, 1.0, cast(Any, None))
    assert [ahead.version(first) for first in range(0, 18, 3)] == [0, 0, 0, 3, 6, 9]
    for step in (0, 3, 6):
        folder_of(tmp_path, step).mkdir()
        said_file(folder_of(tmp_path, step)).touch()
    remove_before(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000006.json"]


def test_held_out_evaluations_keep_no_weights_beyond_those_of_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K + 1 versions at most, with an evaluation after each of the three steps of a rollout, and in the end none of an earlier step."""
    there = list[int]()

    def put(_engine: Any, _blueprint: Any, _tokenizer: Any, folder: Path, *_: Any) -> None:
        folder.mkdir(parents=True)
        there.append(len(steps(folder.parent)))

    def write(first: int, _version: int, _told: Any) -> Spent:
        sampler.rollout(first).mkdir()
        return {}

    monkeypatch.setattr("trainers.rl.sampler.write_weights", put)
    monkeypatch.setattr("trainers.rl.ahead.open_rollout", lambda *_: None)
    monkeypatch.setattr("trainers.rl.versions.note_said", lambda *_: None)
    monkeypatch.setattr("trainers.rl.versions.compare_said", lambda *_: Mismatch(mean=0.0, largest=0.0))
    world: Any = SimpleNamespace(rank=0, from_first=lambda value: value)
    fakes: Any = {"engine": None, "blueprint": None, "tokenizer": None, "rewards": None}
    fakes["generators"] = SimpleNamespace(among=world, renew=lambda _place: None)
    config = RunConfig(rl=RlConfig(staleness=2, steps_per_rollout=3))
    sampler = Sampler(config=config, world=world, attempt=Attempt(tmp_path), jobs=Jobs(), **fakes)
    assert sampler.jobs is not None
    ahead = Ahead(sampler, sampler.jobs, 18, 0, 1.0, write)
    for step in range(18):
        if step % 3 == 0:
            assert ahead.have(step, step, None) is not None
        sampler.sync(step + 1)
    sampler.jobs.close()
    assert max(there) <= 3
    assert [path.name for path in steps(sampler.folder)] == ["step-000018"]
    assert len(steps(tmp_path / "rollouts")) == 6


def test_weights_that_say_what_is_no_number_end_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    engine: Any = SimpleNamespace(mesh=Mesh())
    monkeypatch.setattr("trainers.rl.versions.label_logps", lambda *_: np.array([-1.0, np.nan], np.float32))
    table = table_of([[5, 6, 7]], [[False, True, True]])
    with pytest.raises(TrainingFailed, match=r"after step 6, 1 of 2 tokens of answers .* not a finite number"):
        note_said(folder_of(tmp_path, 6), engine, table, nothing, 1, 0, nothing)


def test_a_generator_says_of_an_answer_what_it_said_when_it_wrote_it(tmp_path: Path) -> None:
    """Of logits that are divided by the temperature too."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, tied=True), dtype=torch.float32)
    prompt = [5, 9, 11]
    [(_, found)] = decode(model, {0: prompt}, 1, Sampling(max_new_tokens=6), [], 0, {0: 3})
    assert logps_of(model, [*prompt, *found.ids], len(found.ids), 1.0) == pytest.approx(found.logps, abs=1e-5)
    assert logps_of(model, prompt, 0, 1.0) == []
    logits = model(torch.tensor([prompt])).logits[0, 1] / 0.5
    assert logps_of(model, prompt, 1, 0.5) == pytest.approx([float(logits.log_softmax(-1)[11])], abs=1e-5)


def test_rows_are_asked_of_all_generators_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of two machines with two ranks each; one that is asked to stop stops all."""
    rows = [([number, number], 1) for number in range(5)]
    theirs: dict[int, Any] = {}

    def of(rank: int) -> Generators:
        world: Any = SimpleNamespace(rank=rank, local_rank=rank % 2, local_size=2, signalled=None)
        world.gather = lambda value: [True, False, True, False] if isinstance(value, bool) else list((theirs | {rank: value}).values())
        return Generators(RunConfig(rl=RlConfig()), world, Path("weights"))

    def said(self: Generators, _ask: Any) -> list[list[float]]:
        return [[float(ids[0])] for ids, _ in rows[self.leads.index(self.world.rank) :: 2]]

    monkeypatch.setattr(Generators, "_tried", said)
    theirs = {0: [], 1: [], 2: [[1.0], [3.0]], 3: []}
    assert of(0).score(rows) == [[float(number)] for number in range(5)]
    theirs[2] = None
    assert of(0).score(rows) is None


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_generator_that_ends_with_its_job_is_not_lost(is_stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM signals ranks and generators, which may end first: then the run is stopped, also where none may be lost."""
    world: Any = SimpleNamespace(rank=0, local_rank=0, local_size=1, signalled=None, gather=lambda value: [value])
    local: Any = SimpleNamespace()

    def ask(*_: object, **__: object) -> None:
        if is_stopped:  # a moment later
            threading.Timer(0.1, setattr, (world, "signalled", 15)).start()
        raise Broken("it has ended")

    local.ask, local.close = ask, lambda: None
    monkeypatch.setattr(Generators, "_opened", lambda self: setattr(self, "local", local) or local)
    generators = Generators(RunConfig(rl=RlConfig(restarts=0)), world, Path("weights"))
    requests = [Request(key=0, seed=0, ids=[7])]
    if is_stopped:
        assert generators.ask(requests) is None
    else:
        with pytest.raises(GeneratorsLost, match=r"1 generators on .* were lost over one batch: it has ended") as lost:
            generators.ask(requests)
        assert lost.value.where == {"host": generators.host}
    assert generators.local is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_generators_on_machines_of_their_own_are_asked_the_batches_of_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks the first ones ask one each, and each of them a whole batch at a time."""
    requests = [Request(key=key, seed=0, ids=[7] * length) for key, length in enumerate([3, 5, 5, 2, 9, 1, 4])]
    asked: list[list[int]] = []
    monkeypatch.setattr(
        Generators, "_answers", lambda _self, requests, _: asked.append([r.key for r in requests] if requests else []) or []
    )
    for rank in range(3):
        monkeypatch.setenv(SEAT, json.dumps({"host": "there", "words": ["srun"]} if rank < count else {}))
        world: Any = SimpleNamespace(rank=rank, local_rank=rank, local_size=3, signalled=None)
        world.gather = lambda value: [at < count for at in range(3)] if isinstance(value, bool) else [value]
        generators = Generators(RunConfig(rl=RlConfig(batch=2)), world, Path("weights"))
        assert generators.host == "there" if rank < count else generators.seat is None
        generators.ask(requests)
    assert sorted(keys for keys in asked if keys) == [[0, 3], [2, 6], [4, 1], [5]]
