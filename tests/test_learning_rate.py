"""The learning rate is a pure function of the step, equal to closed forms."""

from __future__ import annotations

import math

import pytest

from trainers.config.choices import Schedule
from trainers.config.derived import learning_rate, peak_lr
from trainers.config.errors import ConfigError
from trainers.config.schema import OptimConfig, PeftConfig
from trainers.evaluation import stalled
from trainers.optim import require_warmup_ends


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warm_up_rises_linearly_to_the_peak(schedule: Schedule) -> None:
    optim = OptimConfig(warmup_steps=4, schedule=schedule)
    assert [learning_rate(optim, 2.0, step, 20) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(optim, 2.0, 4, 20) == 2.0


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_factor_multiplies_every_rate(schedule: Schedule) -> None:
    optim = OptimConfig(lr=2.0, lr_factor=3.0, warmup_steps=4, schedule=schedule, min_lr_fraction=0.1)
    peak = peak_lr(optim, PeftConfig()).value
    assert peak == 6.0
    for step in range(20):
        assert learning_rate(optim, peak, step, 20) == pytest.approx(3 * learning_rate(optim, 2.0, step, 20))


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_floor() -> None:
    optim = OptimConfig(schedule=Schedule.cosine, min_lr_fraction=0.1)
    rates = [learning_rate(optim, 1.0, step, 100) for step in range(101)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.55)
    assert rates[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[100] == pytest.approx(0.1)


def test_linear_falls_evenly_and_the_last_step_still_trains() -> None:
    optim = OptimConfig(schedule=Schedule.linear, warmup_steps=1)
    assert [learning_rate(optim, 1.0, step, 6) for step in range(1, 6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_linear_with_warm_up_equals_transformers_schedule() -> None:
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 20)
    optim = OptimConfig(schedule=Schedule.linear)
    for step in range(20):
        assert learning_rate(optim, 1.0, step, 20) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_wsd_stays_and_then_decays_over_its_share() -> None:
    optim = OptimConfig(schedule=Schedule.wsd, decay_fraction=0.2)
    rates = [learning_rate(optim, 1.0, step, 50) for step in range(50)]
    assert rates[:41] == [1.0] * 41
    assert rates[41:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_one_step_runs_are_trained_at_the_peak() -> None:
    for schedule in Schedule:
        assert learning_rate(OptimConfig(schedule=schedule, warmup_fraction=0.03), 1.0, 0, 1) == 1.0


def test_warm_up_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="the run has 7 steps"):
        require_warmup_ends(OptimConfig(warmup_steps=1000), 7)


def test_stalled_counts_evaluations_without_improvement() -> None:
    assert not stalled([3.0, 2.0, 2.5], patience=2, min_improvement=0.0)
    assert stalled([3.0, 2.0, 2.5, 2.0], patience=2, min_improvement=0.0)
    assert not stalled([3.0, 2.0, 2.5, 1.9], patience=2, min_improvement=0.0)
    assert stalled([3.0, 2.0, 1.99, 1.98], patience=2, min_improvement=0.1)
    assert not stalled([3.0] * 9, patience=None, min_improvement=0.0)
