"""Rewards as settings of a run: typed, kept as they are, refused by name, and the same code that `tools.select` asks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.compose import compose, unchecked
from launcher.help import fields
from tools.select.rewards import read
from trainers.config.choices import RewardKind
from trainers.config.errors import ConfigError
from trainers.config.rewards import FIELDS
from trainers.config.schema import RewardConfig, RunConfig, parse, plain, reward_of
from trainers.rewards.score import Rewards


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": text, "ids": [1], "reference": "#### 4", "row": {}} | more


def test_rewards_are_named_on_the_command_line_and_kept_as_they_are() -> None:
    words = ["reward.right=exact", "reward.short.kind=length", "reward.short.max=9", "reward.short.weight=0.5"]
    job = unchecked(["+exp=quickstart", *words])
    assert list(job.reward) == ["right", "short"]
    assert job.reward["right"].kind is RewardKind.exact
    assert (job.reward["short"].max, job.reward["short"].weight) == (9, 0.5)
    again = parse(yaml.safe_load(yaml.safe_dump(plain(RunConfig(reward=job.reward)))))
    assert again.reward == job.reward


@pytest.mark.parametrize(
    ("words", "field", "reason"),
    [
        ({"weight": 1}, "reward.a.kind", "one of exact, math"),
        ({"kind": "exakt"}, "reward.a.kind", "exakt"),
        ({"kind": "length", "maximum": 3}, "reward.a.maximum", "a reward has kind, weight"),
        (3, "reward.a", "is a reward, which has fields"),
    ],
)
def test_what_is_not_a_reward_is_named(words: Any, field: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        reward_of("a", words)
    assert refused.value.path == field


def test_a_run_that_learns_from_rows_asks_for_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compose(["+exp=quickstart_base", "reward.right=exact"])
    said = capsys.readouterr().err
    assert "`reward.right` = 'exact'" in said
    assert "command line: reward.right=exact" in said
    assert "objective=cpt learns from rows" in said


def test_each_setting_is_told_and_belongs_to_a_kind() -> None:
    told, of_kinds = fields(), {name for names in FIELDS.values() for name in names}
    own = [name for name in plain(RewardConfig()) if name not in ("kind", "weight")]
    assert set(own) == of_kinds
    assert set(FIELDS) == set(RewardKind)
    assert all(f"reward.NAME.{name}" in told for name in own)


def test_opened_rewards_are_asked_again_and_say_why_each_answer_has_none(tmp_path: Path) -> None:
    asked = {"right": reward_of("right", "exact"), "short": reward_of("short", {"kind": "length", "max": 2, "weight": -0.5})}
    assert read(["exact:name=right", "length:name=short,max=2,weight=-0.5"]) == asked
    with Rewards(asked, tmp_path) as rewards:
        for _ in range(2):
            found = rewards.score([answer("#### 4"), answer("#### 4", ids=[1] * 3), answer("x", ids=None), answer("x", reference="")])
            assert found.parts["right"][:3].tolist() == [1, 1, 0]
            assert found.total[:2].tolist() == [0.5, 1.0]
            assert [math.isnan(value) for value in found.total] == [False, False, True, True]
            assert found.reasons["short"] == ["", "", "the answer has no ids, whose number is its length", ""]
            assert found.failures["right"] == {"the row has no reference": 1}
