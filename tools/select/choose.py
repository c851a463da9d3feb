"""The best answers of each prompt, and pairs of the best with a worse one: pure functions. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is taken."""

    threshold: float | None = None
    """Least reward of an answer that is taken."""
    per_prompt: int = 1
    """Most answers of one prompt."""
    cap: int | None = None
    """Most answers of all, those with the highest rewards."""
    margin: float = 0.0
    """Two answers of a pair differ by more than this."""
    pairs_per_prompt: int = 1
    keep_cut: bool = False
    """Whether an answer that was cut at the longest length counts as any other."""


@dataclass
class Chosen:
    """Numbers of the answers that are taken, of those in pairs (preferred, other), and what became of the others."""

    best: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    """Answers that are not taken, by the reason."""
    prompts: int = 0
    without: int = 0
    """Prompts of which no answer is taken."""


def choose(rows: Sequence[Row], total: Sequence[float], limits: Limits) -> Chosen:
    """Return what is taken of answers with these rewards, NaN where there is none; of equal rewards the first answer goes first."""
    chosen = Chosen()
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(json.dumps([row["prompt"], row.get("tools")], sort_keys=True), []).append(number)
    chosen.prompts = len(groups)
    for members in groups.values():
        ranked = _ranked(rows, total, members, limits, chosen.left)
        good = [number for number in ranked if limits.threshold is None or total[number] >= limits.threshold]
        chosen.left["is below the threshold"] += len(ranked) - len(good)
        chosen.left["is not among the best of its prompt"] += len(good[limits.per_prompt :])
        chosen.best += good[: limits.per_prompt]
        chosen.pairs += _pairs(good, ranked, total, limits)
        chosen.without += not good
    if limits.cap is not None and len(chosen.best) > limits.cap:
        chosen.left["is over the cap"] += len(chosen.best) - limits.cap
        chosen.best = sorted(chosen.best, key=lambda number: (-total[number], number))[: limits.cap]
    chosen.best.sort()
    chosen.left = +chosen.left
    return chosen


def _ranked(rows: Sequence[Row], total: Sequence[float], members: list[int], limits: Limits, left: Counter[str]) -> list[int]:
    """Return the answers of a prompt that have a reward, the best first, each text once."""
    ranked: dict[str, int] = {}
    known = [number for number in members if not math.isnan(total[number])]  # NaN has no place in an order
    left["has no reward"] += len(members) - len(known)
    for number in sorted(known, key=lambda number: (-total[number], number)):
        text = str(rows[number]["answer"])
        if rows[number]["finish"] == "length" and not limits.keep_cut:
            left["was cut"] += 1
        elif not text.strip():
            left["is empty"] += 1
        elif text in ranked:
            left["is another's text"] += 1
        else:
            ranked[text] = number
    return list(ranked.values())


def _pairs(good: list[int], ranked: list[int], total: Sequence[float], limits: Limits) -> list[tuple[int, int]]:
    """Return the best with the worst, the second best with the second worst, and so on, each answer once."""
    found: list[tuple[int, int]] = []
    for preferred, other in zip(good, reversed(ranked), strict=False):
        if len(found) < limits.pairs_per_prompt and total[preferred] - total[other] > limits.margin:
            found.append((preferred, other))
    return found
