"""What a text is worth against its reference: pure functions of strings, the same for every model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from trainers.config.choices import Metric
from trainers.data.reasoning import answer_of
from trainers.rewards.matches import exact_match

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A word of letters and digits; each Chinese or Japanese character is one, since nothing separates them."""
REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am) (?:very )?(?:sorry|unable|not able)|sorry,|i (?:can'?t|cannot|won'?t|will not|must decline)|as an ai\b)",
    re.IGNORECASE,
)
"""How English refusals begin; others are not counted."""


def rouge_l(answer: str, reference: str) -> float:
    """Return the F measure of the longest common subsequence of words, in [0, 1] (Lin 2004, section 3.1, with beta = 1).

    Words of any script, without case, not stemmed; the rouge-score package knows a to z and digits alone, hence not it.
    """
    ours, theirs = (WORD.findall(text.casefold()) for text in (answer, reference))
    if not ours or not theirs:
        return float(not ours and not theirs)
    return 2 * common_length(ours, theirs) / (len(ours) + len(theirs))


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the longest common subsequence, a row of the table as the bits of one number (Hyyrö 2004)."""
    places: dict[object, int] = {}
    for at, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << at
    row, everything = (1 << len(one)) - 1, (1 << len(one)) - 1
    for item in other:
        matched = row & places.get(item, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(one) - row.bit_count()


def is_json(answer: str) -> float:
    """Return 1.0 where an answer is a JSON object or list as it is, without anything around it."""
    try:
        return float(isinstance(json.loads(answer.strip()), dict | list))
    except (ValueError, RecursionError):
        return 0.0


def score(metric: Metric, answer: str, reference: str, how: str) -> float | None:
    """Return an answer's score in [0, 1], without reasoning before it; None where the reference says nothing about it."""
    answer, reference = answer_of(answer), answer_of(reference)
    if metric is Metric.exact_match:
        return exact_match(answer, reference, how)
    return rouge_l(answer, reference) if metric is Metric.rouge_l else is_json(answer)


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """Return the share of runs of `size` tokens that have been there before (seq-rep-n of Welleck et al. 2020); 0.0 for short answers."""
    grams = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(answer: str) -> bool:
    """Tell whether an answer, after its reasoning, begins as English refusals do."""
    return REFUSAL.match(answer_of(answer).replace("’", "'")) is not None
