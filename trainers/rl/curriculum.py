"""Which prompts come next: those that the model answers rightly about half the time are drawn more often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.config.schema import RunConfig
from trainers.data.loader import Ints
from trainers.rl.groups import Group


def weights_of(rates: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """Return how often prompts are drawn, (P,), from the share of right answers that each had last, NaN where it had none.

    4 p (1 - p), the variance of a right answer over its highest, lifted to `least`; 1 where nothing is known (Foster et al. 2025,
    arXiv 2502.12272, section 3: learnability).
    """
    known = least + (1 - least) * 4 * rates * (1 - rates)
    return np.where(np.isnan(rates), 1.0, known)


def order(seed: int, begin: int, turn: int, weights: NDArray[np.float64]) -> Ints:
    """Return all prompts, each once, in the order in which they are drawn by weight: a pure function.

    `begin` is the place of a rollout's first prompt in the run's stream, `turn` counts the passes over all prompts in this rollout.
    Without replacement, by exponential clocks (Efraimidis and Spirakis 2006, Inf. Process. Lett. 97:181), from raw Philox output, which
    numpy promises never to change.
    """
    key, counter = np.array([seed, begin], np.uint64), np.array([0, 0, 0, turn], np.uint64)
    shares = (np.random.Philox(key=key, counter=counter).random_raw(len(weights)) >> np.uint64(11)) * 2.0**-53
    return np.argsort(-np.log1p(-shares) / weights, kind="stable")


def rates_of(groups: Sequence[Group], pass_reward: float) -> dict[str, float]:
    """Return the share of right answers of each prompt by its number, as JSON has it; of answers with a reward, where there are some."""
    known = {group.number: group.rewards[~np.isnan(group.rewards)] for group in groups}
    return {str(number): float((rewards >= pass_reward).mean()) for number, rewards in known.items() if len(rewards)}


class Curriculum:
    """The share of right answers that each prompt had last, as the rollouts say that are there, and what is drawn by it."""

    def __init__(self, config: RunConfig, prompts: int, about: Callable[[int, str], Mapping[str, Any]]) -> None:
        """Know of no answer yet; `about` reads what is known of the rollout of a first step, and is told what for."""
        self.config, self.about = config, about
        self.rates = np.full(prompts, np.nan)
        self.heard_until = 0
        """The first step, counted from 0, whose rollout is not heard yet."""

    def numbers(self, first: int, begin: int, places: Sequence[int]) -> list[int]:
        """Return the prompts at places of the stream, of the rollout of a first step; `begin` is the place of its first prompt."""
        every = self.config.rl.steps_per_rollout
        for before in range(self.heard_until, first, every):
            for number, rate in self.about(before, "what was answered rightly")["rates"].items():
                self.rates[int(number)] = rate
        self.heard_until = first
        count, weights = len(self.rates), weights_of(self.rates, self.config.rl.curriculum or 1.0)
        orders = {turn: order(self.config.seed, begin, turn, weights) for turn in {(place - begin) // count for place in places}}
        return [int(orders[(place - begin) // count][(place - begin) % count]) for place in places]
