"""Rows of several answers with what each is worth, and which of them are compared."""

from __future__ import annotations

import hashlib
import math
from itertools import combinations, pairwise
from typing import Any

from trainers.config.choices import PairsOf
from trainers.data.formats import SCORE_KEYS, BadRow, Message, Row, ranked_key
from trainers.data.preferences import turns_of, with_system

PROMPT_KEYS = ("prompt", "instruction", "question")
TEXT_KEYS = ("response", "answer", "completion", "content", "text", "output")
"""Of an answer that is an object."""


def to_pairs(row: Row, rule: PairsOf) -> tuple[list[Message], list[list[Message]]]:
    """Return a row's prompt and the answers that are compared, the better one of each pair first; raises BadRow with the reason.

    Pairs of one score or one text are left out.
    """
    name = next((key for key in PROMPT_KEYS if row.get(key) is not None), None)
    if name is None:
        raise BadRow("has no `prompt`")
    prompt = with_system(row, turns_of(row[name], name, "user"))
    answers, scores = _scored(row)
    order = sorted(range(len(answers)), key=lambda number: -scores[number])
    differ = [(one, other) for one, other in _places(order, scores, rule, str(row[name])) if scores[one] > scores[other]]
    return prompt, [answers[number] for pair in differ if answers[pair[0]] != answers[pair[1]] for number in pair]


def num_pairs(row: Row, rule: PairsOf) -> int:
    """Return how many pairs a row has by a rule, with those that are left out."""
    count = len(_answers(row)[1])
    return {PairsOf.all: math.comb(count, 2), PairsOf.neighbours: count - 1}.get(rule, 1)


def _places(order: list[int], scores: list[float], rule: PairsOf, prompt: str) -> list[tuple[int, int]]:
    """Return which answers are compared, of those in falling order of score."""
    if rule is PairsOf.all:
        return list(combinations(order, 2))
    if rule is PairsOf.neighbours:
        return list(pairwise(order))
    below = [number for number in order if scores[number] < scores[order[0]]]
    if rule is PairsOf.best_worst or not below:
        return [(order[0], order[-1])]
    drawn = int.from_bytes(hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest(), "little")
    return [(order[0], below[drawn % len(below)])]


def _answers(row: Row) -> tuple[str, list[Any]]:
    """Return the name of a row's list of answers, and the list."""
    key = ranked_key(row)
    if key is None:
        raise BadRow("has no list of answers with a score or a rank for each")
    return key, row[key]


def _scored(row: Row) -> tuple[list[list[Message]], list[float]]:
    """Return a row's answers, each a list of turns, and what each is worth: more is better."""
    key, given = _answers(row)
    if len(given) < 2:
        raise BadRow(f"has {len(given)} answer in `{key}`, and two are compared")
    beside = next((name for name in SCORE_KEYS if isinstance(row.get(name), list)), None)
    if beside is not None:
        values = row[beside]
        if len(values) != len(given):
            raise BadRow(f"has {len(given)} answers in `{key}` and {len(values)} numbers in `{beside}`")
        named = [(beside, value) for value in values]
    else:
        named = [_score_in(answer, number) for number, answer in enumerate(given, 1)]
    return [_turns(answer, number) for number, answer in enumerate(given, 1)], [
        _worth(*item, number) for number, item in enumerate(named, 1)
    ]


def _score_in(answer: Any, number: int) -> tuple[str, Any]:
    names = [name for name in SCORE_KEYS if isinstance(answer, dict) and answer.get(name) is not None]
    if not names:
        raise BadRow(f"answer {number} has no score: none of {', '.join(SCORE_KEYS)}")
    return names[0], answer[names[0]]


def _worth(name: str, value: Any, number: int) -> float:
    """Return a score as it is, and a rank, of which 1 is the best, with the other sign."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"answer {number} has a `{name.removesuffix('s')}` that is {value!r}, not a number")
    return -float(value) if name.startswith("rank") else float(value)


def _turns(answer: Any, number: int) -> list[Message]:
    if isinstance(answer, dict):
        text = next((answer[name] for name in TEXT_KEYS if answer.get(name) is not None), None)
        if text is None:
            raise BadRow(f"answer {number} has no text: none of {', '.join(TEXT_KEYS)}")
        answer = text
    turns = turns_of(answer, f"answer {number}", "assistant")
    if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        raise BadRow(f"answer {number} does not begin and end with a turn of the assistant")
    return turns
