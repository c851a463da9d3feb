"""Environments that are there: `rl.environment=trainers.rl.environments:NAME`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.rewards.shapes import exact

AGAIN = "That is not right. Try again."


class TryAgain:
    """Says that an answer is wrong, and lets the model try again: 1 for a right answer at first, and half as much with each further try.

    An answer is right where it is the row's reference, as the reward `exact` says.
    """

    def __init__(self) -> None:
        """Begin with the whole reward."""
        self.row: Mapping[str, Any] = {}
        self.worth = 1.0

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Ask with the row's own messages."""
        self.row = row

    def step(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], float, bool]:
        """Compare the last turn with the reference; raises NoReward where the row has none."""
        if exact("auto")({**self.row, "answer": messages[-1]["content"]}):
            return [], self.worth, True
        self.worth /= 2
        return [{"role": "user", "content": AGAIN}], 0.0, False
