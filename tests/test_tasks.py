"""Rows of reasoning-gym are the same on every machine, and what an answer is worth is what the task itself says."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command import arguments, launch, stop_at_step, trace

from launcher.named import require_named
from trainers.config.choices import DataSource, ObjectiveName, RewardKind
from trainers.config.derived import sources_of
from trainers.config.errors import ConfigError
from trainers.config.mix import validate_mix
from trainers.config.schema import DataConfig, RewardConfig, RunConfig, SourceConfig
from trainers.config.tasks import validate_tasks
from trainers.data import sources
from trainers.rewards.score import Rewards

needs_tasks = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not here: pip install 'fulltune[tasks]'")
TASKS: dict[str, Any] = {"chain_sum": {"max_terms": 3}, "leg_counting": {}}
GYM = DataSource.reasoning_gym


def data_of(**fields: Any) -> DataConfig:
    return DataConfig(**{"source": GYM, "tasks": TASKS, "task_rows": 7} | fields)


def rows_of(data: DataConfig) -> list[dict[str, Any]]:
    return [row.data for row in sources.rows(sources_of(data)[0], ObjectiveName.grpo)]


def refused(data: DataConfig) -> tuple[str, str]:
    with pytest.raises(ConfigError) as found:
        validate_mix(RunConfig(data=data)) if data.mix else validate_tasks(RunConfig(data=data))
    return found.value.path, str(found.value)


def test_tasks_are_refused_by_name_before_anything_is_made() -> None:
    mixed = {"one": SourceConfig(source=GYM), "other": SourceConfig(path="rows.jsonl")}
    for data, path, reason in [
        (data_of(tasks={}), "data.tasks", "such as {chain_sum: {max_terms: 3}}"),
        (data_of(path="rows.jsonl"), "data.path", "makes its rows"),
        (data_of(task_rows=1), "data.task_rows", "less than one row for each of 2 tasks"),
        (DataConfig(path="rows.jsonl", task_seed=3), "data.task_seed", "data=reasoning_gym"),
        (DataConfig(path="rows.jsonl", tasks=TASKS), "data.tasks", "data=reasoning_gym"),
        (DataConfig(mix=mixed), "data.mix.one.source", "a mixture takes no tasks"),
    ]:
        found = refused(data)
        assert found[0] == path
        assert reason in found[1]


def test_a_reward_of_tasks_asks_for_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainers.rewards.tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fulltune\[tasks\]'"):
        Rewards({"right": RewardConfig(kind=RewardKind.task)}, tmp_path)


def test_rows_of_tasks_ask_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'fulltune\[tasks\]'"):
        rows_of(data_of())


@needs_tasks
def test_a_task_that_is_not_there_is_refused_with_names_like_it() -> None:
    def refused(tasks: dict[str, Any]) -> tuple[str, str]:
        with pytest.raises(ConfigError) as found:
            require_named(RunConfig(data=data_of(tasks=tasks)))
        return found.value.path, str(found.value)

    assert "did you mean chain_sum?" in refused({"chain_sums": {}})[1]
    path, said = refused({"chain_sum": {"most_terms": 3}})
    assert path == "data.tasks.chain_sum"
    assert "most_terms" in said
    assert refused({"chain_sum": {"min_terms": 5, "max_terms": 2}})[0] == "data.tasks.chain_sum"
    assert "data.task_seed" in refused({"chain_sum": {"seed": 2}})[1]
    assert "is not settings of the task" in refused({"chain_sum": 3})[1]


@needs_tasks
def test_rows_are_a_function_of_settings_and_seed() -> None:
    rows = rows_of(data_of())
    assert [row["task"]["name"] for row in rows] == ["chain_sum", "leg_counting"] * 3 + ["chain_sum"]
    assert rows == rows_of(data_of())
    assert rows != rows_of(data_of(task_seed=1))
    assert len({row["question"] for row in rows}) == 7
    marks = [sources.fingerprint(sources_of(data)[0], ObjectiveName.grpo) for data in (data_of(), data_of(), data_of(task_seed=1))]
    assert marks[0] == marks[1] != marks[2]


@needs_tasks
def test_an_answer_is_worth_what_its_task_says(tmp_path: Path) -> None:
    """Also in tags and behind reasoning; a row of another version of the package has no reward, and nor has one of another file."""
    rows = rows_of(data_of())
    said = [row["answer"] for row in rows[:4]]
    said[1], said[2] = f"<think>legs</think> So: <answer>{said[1]}</answer>", "no number"
    answers = [{"answer": text, "row": row, "reference": row["answer"]} for text, row in zip(said, rows, strict=False)]
    answers += [{"answer": "1", "row": rows[0] | {"question": "Another?"}, "reference": ""}, {"answer": "1", "row": {}, "reference": ""}]
    rewards = Rewards({"right": RewardConfig(kind=RewardKind.task)}, tmp_path)
    with rewards:
        found = rewards.score(answers)
    assert found.total[[0, 1, 3]].tolist() == [1.0, 1.0, 1.0]
    assert found.total[2] < 0.1
    assert "another question" in found.reasons["right"][4]
    assert "the row has no `task`" in found.reasons["right"][5]


@needs_tasks
@pytest.mark.slow
def test_a_run_learns_from_tasks_and_continues_to_the_bit(base: Path, cache: Path, tmp_path: Path) -> None:
    """Prompts, rewards and held-out prompts are of the tasks; a stopped run continues with the same rows."""

    def line(name: str, *more: str) -> list[str]:
        made = ["data=reasoning_gym", "data.path=null", "+data.tasks.chain_sum.max_terms=2", "+data.tasks.gcd={}"]
        made += [
            "data.task_rows=40",
            "data.seq_len=128",
            "data.max_lost_fraction=0.9",
            "+reward.right.kind=task",
            "+reward.short.kind=length",
        ]
        made += ["reward.short.max=2", "reward.short.soft=6", "objective=grpo", "data.packing=false", "rl.batch=4", "checkpoint.every=1"]
        made += ["rl.group_size=4", "rl.max_new_tokens=8", "train.steps=3", "train.global_batch=8", "train.microbatch=2"]
        return [word for word in arguments(base, tmp_path, tmp_path / name, *made, *more) if not word.startswith("data=files")]

    launch(cache, line("whole"))
    stop_at_step(cache, line("parted"), tmp_path / "parted", 1)
    launch(cache, line("parted"))
    assert trace(tmp_path / "parted") == trace(tmp_path / "whole")
    answers = [json.loads(text) for file in sorted((tmp_path / "whole").glob("rollouts/*/answers.jsonl")) for text in file.open()]
    assert all(0 <= answer["reward/right"] <= 1 for answer in answers)
    assert len({answer["prompt"] for answer in answers}) > 4
