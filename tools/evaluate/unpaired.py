"""How well a model tells answers that are wanted from those that are not, each by itself. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tools.evaluate import intervals
from tools.evaluate.intervals import LEVEL, Estimate, Floats

KINDS = {"wanted": True, "unwanted": False}


@dataclass(frozen=True, kw_only=True)
class Unpaired:
    """What is known of answers by themselves: (answers,) each."""

    wanted: Floats
    """1 where an answer is wanted, else 0."""
    rewards: Floats | None
    """The objective's rewards; None where the reference was not measured."""
    mismatched: Floats | None
    """Those of prompts with the answers to others, whose mean is the baseline."""

    @classmethod
    def of_rows(cls, rows: Iterable[dict[str, Any]], mismatched: Iterable[dict[str, Any]]) -> Unpaired:
        """Return them from a row an answer, {"wanted", "reward"}, and a row a mismatched one, {"reward"}."""
        found = list(rows)
        wanted = np.array([row["wanted"] for row in found], np.float64)
        return cls(wanted=wanted, rewards=_rewards(found), mismatched=_rewards(list(mismatched)))

    @property
    def baseline(self) -> float | None:
        """Return what rewards are compared with, as in training: the mean of mismatched ones, at least 0."""
        return None if self.mismatched is None else max(0.0, float(self.mismatched.mean()))

    @cached_property
    def right(self) -> Floats | None:
        """Return 1 for each answer on the right side of the baseline, else 0; None where there are no rewards."""
        if self.rewards is None or self.baseline is None:
            return None
        found: Floats = ((self.rewards > self.baseline) == (self.wanted > 0)).astype(np.float64)
        return found

    def accuracy(self, kind: str, level: float = LEVEL) -> Estimate | None:
        """Return the share of answers of a kind (KINDS) that are on the right side; the baseline counts as known."""
        right = None if self.right is None else self.right[(self.wanted > 0) == KINDS[kind]]
        return None if right is None or not len(right) else intervals.mean(right, level)

    def reward(self, kind: str, level: float = LEVEL) -> Estimate | None:
        """Return the mean reward of answers of a kind."""
        found = None if self.rewards is None else self.rewards[(self.wanted > 0) == KINDS[kind]]
        return None if found is None or not len(found) else intervals.mean(found, level)


def _rewards(rows: list[dict[str, Any]]) -> Floats | None:
    values = [row.get("reward") for row in rows]
    return None if not rows or None in values else np.array(values, np.float64)
