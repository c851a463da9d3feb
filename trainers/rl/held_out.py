"""Held-out prompts while a run learns from its own answers: how often answers are right, and one of several is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainers.data.prepare import Prepared
from trainers.engines.base import Engine
from trainers.evaluation import Evaluation, HeldOut
from trainers.generate.request import Sampling
from trainers.health.activity import watch
from trainers.objectives import Objective
from trainers.rl.groups import Group, figures_of
from trainers.rl.prompts import read_rows
from trainers.rl.rollouts import ids_of
from trainers.rl.sampler import Sampler
from trainers.rundir.beats import Phase

Z = 1.959963984540054
"""Of 95 %."""


class HeldOutPrompts(HeldOut):
    """The held-out prompts of a run, and the losses so far: the mean reward, with the sign that makes less better."""

    def __init__(self, sampler: Sampler, data: Prepared, num_steps: int, pad_id: int) -> None:
        """Take no prompts at all where none are held out."""
        super().__init__(data.eval, sampler.config.train, num_steps, sampler.world, pad_id)
        self.sampler = sampler
        self.rows = read_rows(data.path, "eval") if data.eval is not None and sampler.world.rank == 0 else []

    def measure(self, engine: Engine, objective: Objective, step: int) -> Evaluation | None:
        """Answer each prompt with the weights after `step`, the same draws each time; None where a rank was asked to stop."""
        assert self.table is not None
        watch.enter(Phase.sampling, step)
        groups = self._answered(step)
        watch.enter(Phase.evaluating, step)
        if groups is None:
            return None
        figures = self.world.from_first(_figures(groups, self.sampler.rl.pass_reward) if self.world.rank == 0 else {})
        found = Evaluation(loss=-figures["reward"], figures={f"eval_{name}": value for name, value in figures.items()})
        self.losses.append(found.loss)
        self.at = step
        return found

    def _answered(self, step: int) -> list[Group] | None:
        """Return each prompt with its answers and rewards, on rank 0, and nothing on others; None where a rank was asked to stop."""
        assert self.table is not None
        self.sampler.sync(step)
        asked = [(number, number, ids_of(self.table, number)) for number in range(len(self.table))]
        rl = self.sampler.rl
        temperature = rl.temperature if rl.eval_temperature is None else rl.eval_temperature
        sampling = Sampling(max_new_tokens=rl.max_new_tokens, temperature=temperature)
        answers = self.sampler.answers(asked, self.rows, "eval", rl.eval_samples, sampling)
        if answers is None:
            return None
        groups = self.sampler.score(asked, self.rows, answers, rl.eval_samples) if self.world.rank == 0 else []
        return None if self.world.from_first(groups is None) else groups


def _figures(groups: Sequence[Group], pass_reward: float) -> dict[str, float]:
    """Return what is told of answers to held-out prompts; pass@k with the ends of its interval."""
    found = figures_of(groups, pass_reward)
    right = np.stack([group.rewards >= pass_reward for group in groups]).sum(1)
    samples = len(groups[0].answers)
    for k in ks_of(samples):
        each = pass_at(k, right, samples)
        share = float(each.mean())
        low, high = wilson(share, effective(each, samples // k))
        found |= {f"pass@{k}": share, f"pass@{k}_low": low, f"pass@{k}_high": high}
    return found


def ks_of(samples: int) -> list[int]:
    """Return the powers of two up to a number of answers, and this."""
    return sorted({samples, *(1 << at for at in range(samples.bit_length()))})


def pass_at(k: int, right: NDArray[np.int64], samples: int) -> NDArray[np.float64]:
    """Return unbiased estimates of how likely one of k answers to a prompt is right, (P,), where `right` (P,) of `samples` are.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return np.array([1 - math.comb(samples - int(count), k) / math.comb(samples, k) for count in right])


def effective(values: NDArray[np.float64], most: int) -> float:
    """Return of how many independent answers a mean of prompts' shares (P,) has the variance: from P, to `most` for each prompt.

    Kish's effective sample size (1965, "Survey Sampling", 8.2), which Wilson's interval takes for clusters (Franco et al. 2019,
    JSSAM 7:334).
    """
    count, share = len(values), float(values.mean())
    variance = float(values.var(ddof=1)) / count if count > 1 else 0.0
    found = share * (1 - share) / variance if variance else (count if share in (0.0, 1.0) else math.inf)
    return min(max(float(count), found), float(count * most))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a share, at 95 % (Wilson 1927, JASA 22:209)."""
    middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, (middle - spread) / (1 + Z**2 / count)), min(1.0, (middle + spread) / (1 + Z**2 / count))
