"""How much better than expected each answer is, from the rewards of answers to the same prompt: pure functions of numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainers.config.choices import Advantage

Floats = NDArray[np.float64]
EPS = 1e-4
"""Added to standard deviations, as TRL does."""


def advantages(rewards: Floats, kind: Advantage) -> Floats:
    """Return the advantage of each answer, (groups, G), from the rewards of G >= 2 answers to each prompt, (groups, G).

    An answer without a reward, nan, counts nowhere and has advantage 0; so have the answers of a group with no other reward.

    grpo: (r - mean) / std of its group (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). dr_grpo: without the division (Liu et al.
    2025, arXiv 2503.20783, section 3). rloo: less the mean of the group's others (Ahmadian et al. 2024, arXiv 2402.14740, section 2).
    reinforce_pp: (r - mean) / std of all answers of the step; reinforce_pp_baseline: less the mean of its group before that (Hu 2025,
    arXiv 2501.03262). Standard deviations are of samples, over n - 1.
    """
    known = ~np.isnan(rewards)
    counts = known.sum(1, keepdims=True)
    sums = np.where(known, rewards, 0.0).sum(1, keepdims=True)
    centred: Floats = np.where(known, rewards - sums / np.maximum(counts, 1), 0.0)
    if kind is Advantage.dr_grpo:
        return centred
    if kind is Advantage.rloo:  # r - (sum - r) / (n - 1)
        centred *= counts / np.maximum(counts - 1, 1)
        return centred
    if kind is Advantage.grpo:
        return centred / (_deviation(centred, counts) + EPS)
    if kind is Advantage.reinforce_pp:
        centred = np.where(known, rewards - sums.sum() / max(counts.sum(), 1), 0.0)
    return centred / (_deviation(centred.reshape(1, -1), counts.sum(keepdims=True)) + EPS)


def _deviation(centred: Floats, counts: NDArray[np.int64]) -> Floats:
    """Return the standard deviation of each row, (rows, 1): its numbers less their mean, 0 where there is none, and how many there are."""
    deviations: Floats = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(counts - 1, 1))
    return deviations


def same_rewards(rewards: Floats) -> NDArray[np.bool_]:
    """Return which groups teach nothing, (groups,): all their answers have one reward, or fewer than two have any."""
    lowest, highest = (np.where(np.isnan(rewards), fill, rewards) for fill in (np.inf, -np.inf))
    same: NDArray[np.bool_] = ~(lowest.min(1) < highest.max(1))
    return same
