"""Intervals hold the true figure as often as they say, and nothing is told apart inside of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.evaluate.intervals import Estimate, difference, level_of_all, mean, ratio, share

TRIALS = 600
WITHIN = 3.3 * math.sqrt(0.95 * 0.05 / TRIALS)
"""Of a coverage of 0.95 that TRIALS trials measure: more than three standard errors are no chance."""


def covered(estimate: Estimate, truth: float) -> bool:
    return not estimate.excludes(truth)


@pytest.mark.parametrize("count", [30, 100])
def test_a_loss_a_token_of_skewed_documents_is_covered(count: int) -> None:
    rng = np.random.default_rng(count)
    hits = 0
    for _ in range(TRIALS):
        tokens = rng.geometric(0.02, count).astype(float)
        nats = tokens * rng.gamma(4.0, 0.5, count)  # 2 nats a token, whatever the length
        hits += covered(ratio(nats, tokens), 2.0)
    assert abs(hits / TRIALS - 0.95) < WITHIN + 0.01


@pytest.mark.parametrize(("chance", "count"), [(0.02, 100), (0.3, 40), (0.95, 200)])
def test_a_share_is_covered_also_near_none_and_all(chance: float, count: int) -> None:
    rng = np.random.default_rng(7)
    hits = sum(covered(mean((rng.random(count) < chance).astype(float)), chance) for _ in range(TRIALS))
    assert hits / TRIALS > 0.95 - WITHIN - 0.01


def test_scores_between_none_and_all_are_covered() -> None:
    rng = np.random.default_rng(3)
    hits = sum(covered(mean(rng.beta(0.5, 2.0, 60)), 0.2) for _ in range(TRIALS))
    assert abs(hits / TRIALS - 0.95) < WITHIN + 0.015


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_a_paired_difference_of_losses_is_covered_and_narrower_than_the_losses(level: float) -> None:
    rng = np.random.default_rng(5)
    hits, widths = 0, []
    for _ in range(TRIALS):
        tokens = rng.geometric(0.02, 80).astype(float)
        hard = rng.gamma(4.0, 0.5, 80)  # a document that is hard is so for both
        ours, theirs = tokens * (hard + rng.normal(-0.05, 0.1, 80)), tokens * hard
        apart = difference(ours, theirs, tokens, level)
        hits += covered(apart, -0.05)
        alone = ratio(ours, tokens, level)
        assert None not in (apart.low, apart.high, alone.low, alone.high)
        widths.append((apart.high - apart.low) / (alone.high - alone.low))  # type: ignore[operator]
    assert abs(hits / TRIALS - level) < WITHIN + 0.01
    assert np.median(widths) < 0.2


def test_a_paired_difference_of_shares_is_covered() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(TRIALS):
        hard = rng.random(150)
        ours, theirs = ((rng.random(150) < 0.5 * hard + more).astype(float) for more in (0.10, 0.05))
        hits += covered(difference(ours, theirs), 0.05)
    assert 0.95 - WITHIN - 0.01 < hits / TRIALS < 0.985


def test_nothing_is_found_where_nothing_is_more_often_than_the_level_says() -> None:
    """Twelve methods that are all the same: that one of them is called different is as rare as the level for all says."""
    rng = np.random.default_rng(13)
    level, false, trials = level_of_all(12), 0, 150
    for _ in range(trials):
        tokens = rng.geometric(0.05, 60).astype(float)
        hard = rng.gamma(4.0, 0.5, 60)
        models = [tokens * (hard + rng.normal(0, 0.2, 60)) for _ in range(13)]
        false += any(difference(model, models[0], tokens, level).excludes(0.0) for model in models[1:])
    assert false / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("share_of_different", [0.015, 0.03, 0.05, 0.1, 0.2])
def test_a_few_documents_that_differ_among_many_that_do_not_prove_nothing(share_of_different: float) -> None:
    rng, false = np.random.default_rng(17), 0
    for _ in range(TRIALS):
        apart = rng.choice([-1.0, 1.0], 200) * rng.random(200) * (rng.random(200) < share_of_different)
        false += difference(0.4 + apart, np.full(200, 0.4)).excludes(0.0)
    assert false / TRIALS < 0.05 + WITHIN
    three = np.zeros(200)
    three[:3] = 0.5
    assert difference(three, np.zeros(200) + 0.0).low is None
    assert ratio(0.3 + three, np.ones(200)).low is None


def test_identical_models_are_not_different() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.geometric(0.05, 50).astype(float)
    for same in (tokens * 2.5, (rng.random(50) < 0.5).astype(float)):
        apart = difference(same, same.copy(), tokens if same[0] > 1 else None)
        assert apart.value == 0.0
        assert not apart.excludes(0.0)


def test_closed_forms() -> None:
    assert share(0, 200).high == pytest.approx(1.96**2 / (200 + 1.96**2), abs=1e-4)  # Wilson at none
    assert share(0, 200).low == 0.0
    ten = share(10, 100)
    assert (ten.low, ten.high) == (pytest.approx(0.05523, abs=1e-4), pytest.approx(0.17437, abs=1e-4))  # Newcombe 1998's method 3
    many = np.random.default_rng(2).normal(1.0, 1.0, 20_000)
    normal = mean(many)
    assert normal.high - normal.low == pytest.approx(2 * 1.96 * many.std() / math.sqrt(20_000), rel=1e-3)  # type: ignore[operator]
    assert ratio(np.array([3.0]), np.array([2.0])) == Estimate(value=1.5, low=None, high=None, count=1)
    assert not ratio(np.array([3.0]), np.array([2.0])).excludes(99.0)


def test_the_same_rows_give_the_same_interval() -> None:
    values = np.random.default_rng(4).random(40)
    assert mean(values) == mean(values.copy())
