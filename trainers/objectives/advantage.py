"""How much better than expected answers and their tokens are, from rewards and a critic's values: pure functions of numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainers.config.choices import KL, Advantage

Floats = NDArray[np.float64]
EPS = 1e-4
"""Added to standard deviations, as TRL does."""
VARIANCE_EPS = 1e-8
"""Added to the variance of advantages that are whitened, as TRL does."""


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


def divergence(log_ratios: Floats, kind: KL) -> Floats:
    """Return an estimate of KL(policy || reference) at each drawn token from log(policy / reference), in nats.

    Schulman 2020, "Approximating KL divergence": k1 is the log-ratio itself, k3 reference / policy - 1 + log(policy / reference).
    """
    estimates: Floats = log_ratios if kind is KL.k1 else np.expm1(-log_ratios) + log_ratios
    return estimates


def token_rewards(rewards: Floats, penalties: Floats, starts: NDArray[np.int64]) -> Floats:
    """Return each token's reward, (labels,): less its penalty, and at the last token of an answer what the answer is worth.

    `rewards` (answers,), `penalties` (labels,); answer a has the labels starts[a] to starts[a + 1] (Ouyang et al. 2022, arXiv 2203.02155,
    section 3.5: the model's reward less beta times the log-ratio).
    """
    found = -penalties
    has_labels = np.diff(starts) > 0
    found[starts[1:][has_labels] - 1] += rewards[has_labels]
    return found


def gae(rewards: Floats, values: Floats, starts: NDArray[np.int64], gamma: float, lam: float) -> Floats:
    """Return generalised advantages of tokens, (labels,), of answers one after the other (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    `values` (labels,) are what is expected before each token is drawn; after an answer's last token nothing comes.
    """
    found, counts = np.zeros(len(values)), np.diff(starts)
    for place in range(int(counts.max(initial=0)) - 1, -1, -1):
        here = starts[:-1][counts > place] + place
        is_last = counts[counts > place] == place + 1
        after = here + ~is_last
        errors = rewards[here] + gamma * np.where(is_last, 0.0, values[after]) - values[here]
        found[here] = errors + gamma * lam * np.where(is_last, 0.0, found[after])
    return found


def whitened(values: Floats) -> Floats:
    """Return numbers less their mean, over their standard deviation, of samples; one alone is 0."""
    centred = values - values.mean() if len(values) else values
    found: Floats = centred / np.sqrt((centred**2).sum() / max(len(values) - 1, 1) + VARIANCE_EPS)
    return found
