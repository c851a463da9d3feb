"""Prompts are drawn by how often they are answered rightly: a pure function of seed, place and what rollouts say."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trainers.config.schema import DataConfig, RlConfig, RunConfig
from trainers.rl.curriculum import Curriculum, order, rates_of, weights_of
from trainers.rl.groups import Group


def test_weights_are_the_variance_of_a_right_answer() -> None:
    rates = np.array([0.0, 0.25, 0.5, 1.0, math.nan])
    assert weights_of(rates, 0.2).tolist() == pytest.approx([0.2, 0.8, 1.0, 0.2, 1.0])
    assert weights_of(rates, 1.0).tolist() == pytest.approx([1.0] * 5)


def test_the_first_prompts_are_drawn_in_proportion_to_their_weights() -> None:
    """The first by weight; the second by weight among the others, over 4,000 rollouts; each prompt once."""
    weights = np.array([0.1, 0.4, 1.0, 0.5])
    orders = np.stack([order(3, begin, 0, weights) for begin in range(4000)])
    assert (np.sort(orders, 1) == np.arange(4)).all()
    first, second = (Counter(orders[:, at].tolist()) for at in (0, 1))
    shares = weights / weights.sum()
    for number in range(4):
        assert first[number] / 4000 == pytest.approx(shares[number], abs=0.03)
        then = sum(shares[other] * weights[number] / (weights.sum() - weights[other]) for other in range(4) if other != number)
        assert second[number] / 4000 == pytest.approx(then, abs=0.03)
    assert not np.array_equal(order(3, 0, 1, np.ones(50)), order(3, 0, 0, np.ones(50)))
    assert order(3, 7, 0, np.ones(6)).tolist() == [5, 0, 4, 2, 3, 1], "the same on every machine"


def test_rates_are_of_answers_that_have_a_reward() -> None:
    def group(number: int, rewards: list[float]) -> Group:
        more: dict[str, Any] = {"answers": [], "texts": [], "parts": {}, "reasons": {}}
        return Group(position=0, number=number, ids=[], rewards=np.array(rewards), **more)

    assert rates_of([group(4, [1.0, 0.0, math.nan, 2.0]), group(1, [math.nan])], 1.0) == {"4": 2 / 3}


def test_a_continued_run_draws_what_an_uninterrupted_one_does() -> None:
    """From what all rollouts before say, whether they were made now or are read again."""
    config = replace(RunConfig(data=DataConfig(path="rows.jsonl")), seed=5, rl=RlConfig(curriculum=0.1, steps_per_rollout=2))
    rollouts: dict[int, dict[str, float]] = {}
    read: list[int] = []

    def about(first: int, _what: str) -> dict[str, Any]:
        read.append(first)
        return {"rates": rollouts[first]}

    def draw(curriculum: Curriculum, first: int) -> list[int]:
        begin = 4 * first
        return [*curriculum.numbers(first, begin, range(begin, begin + 5)), *curriculum.numbers(first, begin, range(begin + 5, begin + 8))]

    whole, found = Curriculum(config, 6, about), {}
    for first in (0, 2, 4, 6):
        found[first] = draw(whole, first)
        assert len(set(found[first][:6])) == 6, "no prompt comes twice before all have come"
        rollouts[first] = {str(number): float(number % 2) / 2 for number in found[first][:4]}
    assert read == [0, 2, 4], "each is read once"
    assert draw(Curriculum(config, 6, about), 6) == found[6]
    assert whole.rates.tolist() == pytest.approx([0.0, 0.5, 0.0, 0.5, 0.0, 0.5], nan_ok=True)
