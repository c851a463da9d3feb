"""How well a model tells the preferred answer of a pair from the other one, from the scores and lengths of the answers alone. No torch.

A score is whatever orders answers: a log-probability a token, an objective's implicit reward, a reward model's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.evaluate import intervals
from tools.evaluate.intervals import LEVEL, Estimate, Floats
from trainers.config.choices import ObjectiveName
from trainers.config.derived import OF_REFERENCE, compares
from trainers.config.schema import ObjectiveConfig

OF_MEANS = (ObjectiveName.simpo, ObjectiveName.orpo)
"""Objectives whose reward is beta times nats a token; that of the others is beta times a sum."""
WITHOUT_REFERENCE = (*OF_MEANS, ObjectiveName.cpo)
BUCKETS = ("all", "longer", "shorter")
"""All pairs, and those whose preferred answer has more or fewer tokens than the other; pairs of equal lengths count in `all` alone."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is known of pairs of answers, each array (pairs, 2), the preferred answer first."""

    tokens: Floats
    logps: Floats | None = None
    """Summed log-probabilities in nats; None of a model that gives none."""
    rewards: Floats | None = None
    """The objective's rewards; None where it has none, or needs a reference that was not measured."""

    @classmethod
    def of_rows(cls, rows: Iterable[dict[str, Any]]) -> Pairs:
        """Return pairs from a row a document, {"tokens", "nats", "reward"}, the two of a pair one after the other."""
        found = list(rows)
        tokens, nats, rewards = (_column(found, name) for name in ("tokens", "nats", "reward"))
        assert tokens is not None
        return cls(tokens=tokens, logps=None if nats is None else -nats, rewards=rewards)

    @property
    def scores(self) -> Floats | None:
        """Return what the answers are ordered by: rewards where there are some, else log-probabilities a token."""
        return self.likelihoods if self.rewards is None else self.rewards

    @property
    def likelihoods(self) -> Floats | None:
        """Return log-probabilities in nats a token."""
        return None if self.logps is None else self.logps / self.tokens


def _column(rows: list[dict[str, Any]], name: str) -> Floats | None:
    """Return a field of all rows as pairs, (pairs, 2); None where a row lacks it."""
    values = [row.get(name) for row in rows]
    return None if None in values else np.array(values, np.float64).reshape(-1, 2)


def rewards_of(objective: ObjectiveConfig, logps: Floats, tokens: Floats, reference: Floats | None) -> Floats | None:
    """Return an objective's rewards of answers, all of one shape; None where it has none, or lacks the reference that it needs.

    As in `trainers.objectives.preference`; `reference` are summed log-probabilities under the model that training began with.
    """
    if not compares(objective.name) and objective.name not in OF_REFERENCE:
        return None
    if objective.name in OF_MEANS:
        return objective.beta * logps / tokens
    if objective.name not in WITHOUT_REFERENCE:
        if reference is None:
            return None
        logps = logps - reference
    return objective.beta * (logps / tokens if objective.length_normalised else logps)


def are_right(scores: Floats) -> Floats:
    """Return 1 for each pair whose preferred answer has the higher score, else 0, also where both are equal: (pairs, 2) -> (pairs,)."""
    return (scores[:, 0] > scores[:, 1]).astype(np.float64)


def accuracy(scores: Floats, tokens: Floats, bucket: str = "all", level: float = LEVEL) -> Estimate | None:
    """Return the share of a bucket's pairs that are in the right order, with Wilson's interval; None where it has no pair.

    A model that prefers long answers whatever they say is right where the preferred one is longer, and wrong where it is shorter.
    """
    right = are_right(scores)[members(tokens, bucket)]
    return intervals.share(int(right.sum()), len(right), level) if len(right) else None


def members(tokens: Floats, bucket: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which pairs are in a bucket, (pairs, 2) -> (pairs,)."""
    longer = tokens[:, 0] - tokens[:, 1]
    return {"all": np.ones(len(longer), bool), "longer": longer > 0, "shorter": longer < 0}[bucket]


def thirds(tokens: Floats) -> list[tuple[float, float, np.ndarray[Any, np.dtype[np.bool_]]]]:
    """Return pairs by length, the short, the middle and the long third: (fewest, most, which), in tokens an answer of each pair.

    A third is left out where no pair is in it, as where all are of one length.
    """
    lengths = tokens.mean(1)
    third = np.searchsorted(np.quantile(lengths, [1 / 3, 2 / 3]), lengths, side="left")
    kept = [third == number for number in range(3)]
    return [(float(lengths[which].min()), float(lengths[which].max()), which) for which in kept if which.any()]


def longer_wins(scores: Floats, tokens: Floats, level: float = LEVEL) -> Estimate | None:
    """Return the share of pairs whose longer answer scores higher; next to the share whose longer answer is preferred it shows a bias."""
    apart = (scores[:, 0] - scores[:, 1]) * (tokens[:, 0] - tokens[:, 1])
    return intervals.share(int((apart > 0).sum()), len(apart), level) if len(apart) else None


def margin(scores: Floats, level: float = LEVEL) -> Estimate | None:
    """Return the mean difference of the two scores of a pair; None where there are no pairs."""
    apart = scores[:, 0] - scores[:, 1]
    return intervals.ratio(apart, np.ones_like(apart), level) if len(apart) else None
