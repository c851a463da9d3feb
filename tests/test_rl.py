"""A run that learns from its own answers: a rollout is a function of weights and seed, kept as a file, whatever is killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from command import (
    arguments,
    environment,
    launch,
    pids_of,
    rank_processes,
    started,
    tool,
    trace,
    wait_for,
    wait_for_step,
    wait_until_gone,
)

from trainers.config.choices import Advantage, DataSource, ObjectiveName
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RlConfig, RunConfig, TrainConfig
from trainers.data.loader import make_batch
from trainers.data.table import open_table
from trainers.data.tokenizer import load_tokenizer
from trainers.generate.request import LENGTH, STOP, Answer
from trainers.health.spikes import TrainingFailed
from trainers.rl.groups import Group, figures_of, save_groups, teaches, why_unrewarded
from trainers.rl.held_out import effective, ks_of, pass_at, wilson
from trainers.rl.prompts import prepare_prompts, read_rows
from trainers.rl.rollouts import Rollouts, num_steps
from trainers.rl.sync import Mismatch, require_near
from trainers.rundir.rows import evaluations, last_step, steps
from trainers.rundir.rows import read_rows as rows_of

WORDS = ["cat", "two dogs", "hills home", "mat while the", "green", "far over", "ran ran ran ran ran ran", "sat on", "home", "again a"]


def group_of(number: int, rewards: list[float], lengths: list[int], finishes: list[str]) -> Group:
    answers = [
        Answer(key=at, ids=[7] * length, logps=[-0.5 - at] * length, finish=finish)
        for at, (length, finish) in enumerate(zip(lengths, finishes, strict=True))
    ]
    values = np.array(rewards)
    more: dict[str, Any] = {
        "rewards": values,
        "parts": {"right": values},
        "reasons": {"right": ["late" if math.isnan(r) else "" for r in rewards]},
    }
    return Group(position=number + 10, number=number, ids=[1, 2, 3], answers=answers, texts=["x"] * len(rewards), **more)


def config_of(**rl: Any) -> RunConfig:
    data, train = DataConfig(path="rows.jsonl", seq_len=64, packing=False), TrainConfig(global_batch=8)
    objective = ObjectiveConfig(name=ObjectiveName.grpo, advantage=Advantage.dr_grpo)
    return RunConfig(data=data, train=train, objective=objective, rl=RlConfig(**{"group_size": 4, "max_new_tokens": 8} | rl))


def test_groups_become_a_table_with_what_each_answer_is_worth(tmp_path: Path) -> None:
    """An answer without a reward, and a cut one where these are masked, have no labels; all others have the sampler's numbers."""
    groups = [
        group_of(0, [1.0, 0.0, 0.0, math.nan], [2, 3, 1, 2], [STOP, STOP, STOP, STOP]),
        group_of(1, [0.0, 0.0, 1.0, 1.0], [1, 1, 8, 1], [STOP, STOP, LENGTH, STOP]),
    ]
    save_groups(groups, config_of(mask_truncated=True), tmp_path)
    table = open_table(tmp_path)
    assert len(table) == 8
    assert np.diff(table.label_starts).tolist() == [2, 3, 1, 0, 1, 1, 0, 1]
    assert table.signals["advantage"].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, -0.5, -0.5, 0.5, 0.5])
    assert table.signals["sampled_logps"][:, 0].tolist() == [-0.5, -0.5, -1.5, -1.5, -1.5, -2.5, -0.5, -1.5, -3.5]
    batch = make_batch(table, np.array([1]), 1, 0)
    assert batch.labels[0, :6].tolist() == [-100, -100, 7, 7, 7, -100]
    assert batch.signals["sampled_logps"][0, 2:5, 0].tolist() == [-1.5, -1.5, -1.5]
    told = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert (told[3]["reward"], told[3]["why"]) == (None, {"right": "late"})
    assert (told[6]["position"], told[6]["sample"], told[6]["finish"], told[6]["reward/right"]) == (11, 2, LENGTH, 1.0)
    found = figures_of(groups, 1.0)
    assert found == pytest.approx(
        {"reward": 3 / 7, "pass@1": 3 / 8, "truncated": 1 / 8, "answer_tokens": 19 / 8, "unrewarded": 1 / 8, "reward/right": 3 / 7}
    )


def test_groups_of_one_reward_teach_nothing() -> None:
    kinds = {kind: ObjectiveConfig(name=ObjectiveName.grpo, advantage=kind) for kind in Advantage}
    same, none = group_of(0, [1.0, 1.0], [1, 1], [STOP, STOP]), group_of(0, [math.nan, 1.0], [1, 1], [STOP, STOP])
    assert not teaches(same, kinds[Advantage.grpo])
    assert not teaches(none, kinds[Advantage.rloo])
    assert teaches(group_of(0, [1.0, 0.0], [1, 1], [STOP, STOP]), kinds[Advantage.grpo])
    assert teaches(same, kinds[Advantage.reinforce_pp])  # which compares it with other groups
    assert teaches(same, ObjectiveConfig(name=ObjectiveName.ppo))
    assert not teaches(group_of(0, [math.nan], [1], [STOP]), ObjectiveConfig(name=ObjectiveName.ppo))


def test_answers_without_any_reward_end_the_run_by_the_reason() -> None:
    """And not later, as steps that update nothing."""
    groups = [group_of(number, [math.nan] * 4, [1] * 4, [STOP] * 4) for number in range(2)]
    groups[1].reasons["right"][:] = ["late", "wrong", "wrong", "wrong"]
    with pytest.raises(TrainingFailed, match=r"none of the answers of step-000001 has a reward: reward/right: late \(5 times\)"):
        Rollouts._save(cast(Any, None), groups, 2, {}, Path("step-000001"))
    assert not why_unrewarded([*groups, group_of(2, [math.nan, 0.0], [1] * 2, [STOP] * 2)])


def test_pass_rates_have_wilsons_interval() -> None:
    """Of 8 of 20, by hand; and the ends of none and all."""
    assert wilson(0.4, 20) == pytest.approx((0.2188, 0.6134), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(1.0, 10)[1] == pytest.approx(1.0, abs=1e-12)


def test_pass_at_k_is_what_drawing_k_of_the_answers_finds() -> None:
    """Of every choice of k of n answers, the share that has a right one; and the metrics' names."""
    for right in range(6):
        marks = [True] * right + [False] * (5 - right)
        for k in range(1, 6):
            found = [any(some) for some in itertools.combinations(marks, k)]
            assert pass_at(k, np.array([right]), 5)[0] == pytest.approx(sum(found) / len(found))
    assert [ks_of(count) for count in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_interval_of_pass_at_k_holds_for_prompts_that_differ() -> None:
    """The truth is inside as often as is said, whether prompts are alike or each is always or never right; Wilson's for one answer."""
    rng, prompts, samples = np.random.default_rng(5), 40, 8
    for spread in (0.05, 1.0, 20.0):
        inside = {1: 0, 4: 0}
        for _ in range(400):
            rates = rng.beta(0.6 * spread, 0.4 * spread, prompts)
            right = rng.binomial(samples, rates)
            for k in inside:
                each = pass_at(k, right, samples)
                truth = 1 - np.prod([(0.4 * spread + at) / (spread + at) for at in range(k)])
                low, high = wilson(float(each.mean()), effective(each, samples // k))
                inside[k] += low <= truth <= high
        assert min(inside.values()) >= 0.93 * 400, (spread, inside)
    one = (rng.random(30) < 0.4).astype(float)
    assert effective(one, 1) == 30
    assert effective(np.zeros(30), 8) == effective(np.ones(30), 8) == 30


def test_a_generator_with_other_weights_ends_the_run() -> None:
    require_near(Mismatch(mean=9e-4, largest=0.3), 1e-3, 4)
    for wrong in (Mismatch(mean=2e-3, largest=0.3), Mismatch(mean=math.nan, largest=0.0)):
        with pytest.raises(TrainingFailed, match=r"step 4: the generator gives .* other weights than are trained"):
            require_near(wrong, 1e-3, 4)


def test_passes_over_the_prompts_are_whole_rollouts() -> None:
    config = config_of(steps_per_rollout=3)
    assert num_steps(config, 13) == 9  # 2 prompts a step, 6 a rollout
    assert num_steps(replace(config, train=replace(config.train, steps=6)), 13) == 6


def write_prompts(path: Path, copies: int = 2) -> Path:
    path.write_text(
        "".join(json.dumps({"question": words, "answer": words[:3], "id": at}) + "\n" for at, words in enumerate(WORDS * copies))
    )
    return path


def test_equal_prompts_are_on_one_side_and_long_ones_are_refused(base: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl")
    data = DataConfig(
        source=DataSource.files, path=str(path), eval_fraction=0.3, seq_len=24, packing=False, prepared_dir=str(tmp_path / "made")
    )
    config = replace(config_of(), model=ModelConfig(id=str(base)), data=replace(data, template="chatml"))
    tokenizer = load_tokenizer(config)
    found = prepare_prompts(config, tokenizer)
    sides = {split: read_rows(found.path, split) for split in ("train", "eval")}
    assert {split: len(rows) for split, rows in sides.items()} == {"train": 14, "eval": 6}
    asked = {split: {row["prompt"][0]["content"] for row in rows} for split, rows in sides.items()}
    assert not asked["train"] & asked["eval"]
    assert sides["train"][0]["row"]["answer"] == sides["train"][0]["reference"]
    assert prepare_prompts(config, tokenizer).reused
    short = replace(config, data=replace(config.data, seq_len=17))
    with pytest.raises(ConfigError, match=r"have more than 9 tokens, which is data.seq_len less rl.max_new_tokens") as refused:
        prepare_prompts(short, tokenizer)
    assert refused.value.path == "data.seq_len"


def line(base: Path, prompts: Path, run_dir: Path, *more: str) -> list[str]:
    asked = ("objective=grpo", "reward.short.kind=length", "reward.short.max=2", "reward.short.soft=6", "reward.cat.kind=format")
    asked += ("'reward.cat.pattern=\".*(cat|home|far).*\"'".strip("'"), "reward.cat.weight=0.5", "data.packing=false", "rl.batch=6")
    batch = ("train.global_batch=8", "train.microbatch=2", "rl.group_size=4", "rl.max_new_tokens=8", "checkpoint.every=2")
    return arguments(base, prompts, run_dir, *asked, *batch, "train.sample_tokens=4", "optim.lr=3e-3", *more)


def generators_of(launcher: int) -> list[int]:
    """Return the generators of a launcher's ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ours = f"FULLTUNE_LAUNCHER={launcher}".encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours and b"trainers.generate.worker" in words:
            found.append(int(folder.name))
    return found


TOLD = (
    "reward",
    "reward/short",
    "reward/cat",
    "entropy",
    "mismatch",
    "mismatch_largest",
    "prompts_drawn",
    "eval_reward",
    "eval_pass@1",
    "eval_pass@3_low",
)


def told(run_dir: Path) -> list[tuple[Any, ...]]:
    """What of a run must be the same to the bit: its trace, rewards and answers."""
    numbers = [tuple(row.get(key) for key in TOLD) for row in rows_of(run_dir)]
    return [*trace(run_dir), *numbers, *((folder.name, (folder / "answers.jsonl").read_bytes()) for folder in rollouts(run_dir))]


def rollouts(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "rollouts").glob("step-*"))


def answers_of(run_dir: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(row) for folder in rollouts(run_dir) for row in (folder / "answers.jsonl").read_text().splitlines()]
    return [(row["position"], row["sample"], row["answer"], row["reward"]) for row in lines]


@pytest.mark.slow
def test_what_is_killed_changes_nothing(base: Path, cache: Path, tmp_path: Path) -> None:
    """A generator that is killed is replaced; a launcher that is killed leaves no process, and the same command continues to the bit.

    One rank gives the same answers as two.
    """
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    said = launch(cache, line(base, prompts, tmp_path / "whole", "rl.eval_samples=3"))
    assert "eval_pass@1" in said
    assert all(row["eval_pass@1"] <= row["eval_pass@2"] <= row["eval_pass@3"] for row in evaluations(rows_of(tmp_path / "whole")))
    whole = steps(rows_of(tmp_path / "whole"))
    assert all(row["mismatch"] < 1e-4 for row in whole)
    assert all(
        {"sync_seconds", "sampling_seconds", "scoring_seconds", "truncated", "clip_share", "mismatch_kl"} <= row.keys() for row in whole
    )
    assert len(evaluations(rows_of(tmp_path / "whole"))) == 3
    assert [folder.name for folder in rollouts(tmp_path / "whole")] == [f"step-{step:06d}" for step in range(1, 9)]

    shown = tool(cache, "--rollout", tmp_path / "whole" / "rollouts" / "step-000002", name="show_batch")
    assert shown.count("reward ") == 3

    cut = tmp_path / "cut"
    with started(line(base, prompts, cut, "rl.eval_samples=3"), environment(cache)) as process:
        wait_for_step(cut, 2, process)
        [generator] = generators_of(process.pid)
        os.kill(generator, signal.SIGKILL)
        wait_for_step(cut, 5, process)
        [other] = generators_of(process.pid)
        assert other != generator
        process.kill()
        process.wait(20)
        wait_until_gone(cut)
        wait_until_none(process.pid)
    launch(cache, line(base, prompts, cut, "rl.eval_samples=3"))
    assert told(cut) == told(tmp_path / "whole")
    assert any("is replaced" in log.read_text() for log in (cut / "logs").glob("attempt-1/rank-0.log"))

    one = tmp_path / "one"
    launch(cache, line(base, prompts, one, "launch.processes=1"))
    assert answers_of(one) == answers_of(tmp_path / "whole")
    losses = [[row["loss"] for row in steps(rows_of(run))] for run in (one, tmp_path / "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_adapters_and_several_steps_a_rollout_and_a_wrong_generator(base: Path, cache: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    run = tmp_path / "lora"
    launch(
        cache,
        line(
            base,
            prompts,
            run,
            "peft=lora",
            "optim.lr=1e-2",
            "rl.steps_per_rollout=2",
            "rl.temperature=0.7",
            "train.steps=4",
            "data.eval_fraction=0",
            "train.eval_every=null",
        ),
    )
    assert [folder.name for folder in rollouts(run)] == ["step-000001", "step-000003"]
    found = steps(rows_of(run))
    assert ["mismatch" in row for row in found] == [True, False, True, False]
    assert all(row["mismatch"] < 1e-4 for row in found[::2]), "both at the temperature"
    assert found[1]["ratio"] != 1.0  # of the weights before the rollout's first step
    assert (run / "export" / "adapter_config.json").is_file()
    said = launch(cache, line(base, prompts, tmp_path / "wrong", "rl.mismatch=1e-12"), expect=1)
    assert "other log-probabilities than the trainer does" in said


@pytest.mark.slow
def test_what_is_measured_of_a_rollout_is_kept(base: Path, cache: Path, tmp_path: Path) -> None:
    """The reference, which the policy leaves, and the trainer before the first of two steps.

    A launcher that is killed changes nothing, also where it continues in the middle of a rollout, of which a row has told already.
    """
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    asked = ("objective.kl_weight=0.1", "objective.importance_cap=2", "rl.steps_per_rollout=2", "train.steps=6", "data.eval_fraction=0")
    more = (*asked, "train.eval_every=null", "rl.curriculum=0.3", "checkpoint.every=3", "checkpoint.asynchronous=false")
    launch(cache, line(base, prompts, tmp_path / "whole", *more))
    found = steps(rows_of(tmp_path / "whole"))
    assert found[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert found[-1]["kl"] > 1e-6
    assert [row["ratio"] == pytest.approx(1.0, abs=1e-6) for row in found] == [True, False] * 3
    assert all(row["mismatch_kl"] < 1e-6 for row in found), "of the sampler and the trainer before the rollout's first step"
    assert ["measuring_seconds" in row for row in found] == [True, False] * 3
    cut = tmp_path / "cut"
    with started(line(base, prompts, cut, *more), environment(cache)) as process:
        wait_for_step(cut, 4, process)
        process.kill()
        process.wait(20)
        wait_until_gone(cut)
        wait_until_none(process.pid)
    for folder in (cut / "checkpoints").glob("step-*"):
        if folder.name > "step-000003":
            shutil.rmtree(folder)
    said = launch(cache, line(base, prompts, cut, *more))
    assert "step 4/6" in said
    assert [*told(cut), *kept(cut)] == [*told(tmp_path / "whole"), *kept(tmp_path / "whole")]


def kept(run_dir: Path) -> list[bytes]:
    return [(folder / "signals" / f"{name}_logps.npy").read_bytes() for folder in rollouts(run_dir) for name in ("old", "reference")]


@pytest.mark.slow
def test_rollouts_that_are_ahead_are_neither_lost_nor_used_twice(base: Path, cache: Path, tmp_path: Path) -> None:
    """Each step trains on answers of the weights two steps before it, whatever is killed: generator, rank and launcher; to the bit."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    asked = ("rl.staleness=2", "train.steps=8", "checkpoint.every=3", "objective.importance_cap=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch(cache, line(base, prompts, whole, *asked))
    about = [json.loads((folder / "about.json").read_text()) for folder in rollouts(whole)]
    assert [each["version"] for each in about] == [0, 0, 0, 1, 2, 3, 4, 5]
    assert [each["begin"] for each in about] == [0, *(each["position"] for each in about[:-1])]
    assert len(set(answers_of(whole))) == 8 * 8
    found = steps(rows_of(whole))
    assert [row["staleness"] for row in found] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert all(row["mismatch"] < 1e-4 for row in [found[0], *found[3:]]), "what generators say of answers with weights of an earlier step"
    assert found[4]["mismatch_kl"] > 1e-6, "between the sampler and the trainer of now"
    assert all({"waiting_seconds", "opening_seconds", "sampling_seconds", "scoring_seconds"} <= row.keys() for row in found)
    assert not (whole / "rollouts" / "weights").exists()

    with started(line(base, prompts, cut, *asked), environment(cache)) as process:
        wait_for_step(cut, 1, process)
        os.kill(generators_of(process.pid)[0], signal.SIGKILL)
        wait_for_step(cut, 4, process)
        os.kill(rank_processes(cut)[-1], signal.SIGKILL)
        process.communicate(timeout=100)
        wait_until_none(process.pid)
    with started(line(base, prompts, cut, *asked), environment(cache)) as process:
        wait_for_step(cut, 5, process)
        process.kill()
        process.wait(20)
        wait_until_gone(cut)
        wait_until_none(process.pid)
    launch(cache, line(base, prompts, cut, *asked))
    assert told(cut) == told(whole)


SMALL = ("train.global_batch=4", "rl.group_size=2", "rl.max_new_tokens=4")
SMALL += ("data.eval_fraction=0", "train.eval_every=null", "rl.timeout_s=20", "rl.restarts=9")
OF_PPO = ("objective.critic_lr=1e-2", "rl.group_size=1", "rl.steps_per_rollout=2")
AHEAD = ("objective.importance_cap=2", "checkpoint.every=3")
CASES = {"now": [], "one ahead": [*AHEAD, "rl.staleness=1"], "two ahead": [*AHEAD, "rl.staleness=2"], "ppo": ["objective=ppo", *OF_PPO]}
NUM_STEPS = dict.fromkeys(CASES, 12) | {"ppo": 24}
"""Twelve rollouts, so that no run ends before ten moments."""
FOLDERS = {"a rollout": ("rollouts", "step-*"), "weights": ("rollouts", "weights*/*"), "a checkpoint": ("checkpoints", "*")}
"""Whose entries, finished or staged, come and go at a moment; a fourth one is that of a new row of metrics.jsonl."""
KILLS = ["launcher", "launcher", "asked", "asked", "rank 0", "rank 1", "generator", "generator", "generator", "stopped"]


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("case", CASES)
def test_ten_kills_at_random_moments(case: str, base: Path, cache: Path, tmp_path: Path) -> None:
    """Of a rank, a generator or the launcher; a generator that is stopped is replaced, and a launcher that is asked to stop saves.

    The moments are of what the run has written last, and drawn by lot. The same command continues, to the bit.
    """
    prompts, rng, whole, cut = write_prompts(tmp_path / "prompts.jsonl", 3), random.Random(case), tmp_path / "whole", tmp_path / "cut"
    more = (*SMALL, f"train.steps={NUM_STEPS[case]}", *CASES[case])

    def words(run_dir: Path) -> list[str]:
        found = line(base, prompts, run_dir, *more)
        return [word for word in found if word != "objective=grpo" or case != "ppo"]

    launch(cache, words(whole), timeout_s=600)
    kills, hits = rng.sample(KILLS, len(KILLS)), list[str]()
    code: int | None = None
    while code != 0:
        with started(words(cut), environment(cache)) as process:
            is_ended = False
            while kills and process.poll() is None and not is_ended:
                moment = rng.choice(["a step", *FOLDERS])
                wait_for_more(process, cut, moment)
                if hit(kills[-1], process, cut):
                    hits.append(f"{kills.pop()} at {moment} after {last_step(rows_of(cut))} steps")
                    is_ended = hits[-1].startswith(("launcher", "asked", "rank"))
            said = process.communicate(timeout=200)[0]
        code = process.returncode
        assert code == 0 or is_ended, (hits, code, said)
        wait_until_gone(cut)
        wait_until_none(process.pid)
    print(hits)
    assert not kills, "the run was shorter"
    assert told(cut) == told(whole)
    for run_dir in (whole, cut):
        require_each_once(run_dir, NUM_STEPS[case])


def require_each_once(run_dir: Path, count: int) -> None:
    """Require that each prompt of the stream is in one rollout, which is trained on once, and that nothing is left half-written."""
    about = [json.loads((folder / "about.json").read_text()) for folder in rollouts(run_dir)]
    assert [each["begin"] for each in about] == [0, *(each["position"] for each in about[:-1])]
    for folder, each in zip(rollouts(run_dir), about, strict=True):
        found = {json.loads(row)["position"] for row in (folder / "answers.jsonl").read_text().splitlines()}
        assert found <= set(range(each["begin"], each["position"]))
    assert [row["step"] for row in steps(rows_of(run_dir))] == list(range(1, count + 1))
    assert {path.name.partition("-")[0] for path in (run_dir / "rollouts").iterdir()} <= {"step", "judged"}
    assert not list(run_dir.rglob("*.tmp"))


def inode(path: Path) -> int:
    with suppress(FileNotFoundError):  # removed just now
        return path.stat().st_ino
    return 0


def wait_for_more(process: subprocess.Popen[str], run_dir: Path, moment: str) -> None:
    """Wait until a run has written, or begun to write, something more of a kind, or has ended."""

    def there() -> object:
        if moment == "a step":
            return len(rows_of(run_dir))
        folder, names = FOLDERS[moment]
        return {(path.name, inode(path)) for path in (run_dir / folder).glob(names)}

    before = there()
    wait_for(lambda: process.poll() is not None or there() != before, 100)


def wait_until_none(launcher: int) -> None:
    wait_for(lambda: not generators_of(launcher), 20)


def hit(kind: str, process: subprocess.Popen[str], run_dir: Path) -> bool:
    """Kill one of a run's processes, stop its generator, or ask its launcher to stop; tells whether there was one."""
    if process.poll() is not None:
        return False
    if kind in ("launcher", "asked"):
        process.send_signal(signal.SIGKILL if kind == "launcher" else signal.SIGTERM)
        return True
    found = pids_of(run_dir, int(kind[-1])) if kind.startswith("rank") else generators_of(process.pid)
    for pid in found[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
            return True
    return False
