"""Scores of a run's answers next to its base's, by a model at any endpoint that speaks OpenAI's chat completions.

Each pair is judged twice, with the answers swapped, and scored by the mean of both: a judge that prefers the first answer likes both
equally. Where only one order came back there is no score.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any, TypeVar

from trainers.generate.endpoint import NOT_ASKED, Endpoint, Server, ask_all
from trainers.generate.served import read_text

CRITERIA = ("instruction_following", "factual_accuracy", "format", "length", "no_hallucination")
PROMPT = Template(Path(__file__).with_name("judge.txt").read_text(encoding="utf-8"))  # a text put into it is not looked through again

Scores = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Judge(Server):
    """Which model judges, and how it is asked."""

    key_name: str = "FULLTUNE_JUDGE_KEY"
    max_tokens: int = 512
    """Of one reply; a judge that reasons before it answers needs more."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One held-out document with both answers to its prompt."""

    document: int
    """Its number, which no other question has."""
    prompt: str
    reference: str
    answer: str
    """The run's."""
    other: str
    """Its base's."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge made of one question in one order, or why there is nothing."""

    document: int
    swapped: bool
    """The base's answer stood first."""
    scores: Scores | None = None
    """Of the run's answer, by criterion, 1 to 5."""
    other: Scores | None = None
    """Of the base's."""
    failure: str = ""
    """Of the last attempt; empty where there are scores."""
    attempts: int = 0

    def as_row(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Verdict:
        """Return what as_row() was made of; raises TypeError where the fields are others."""
        return cls(**row)


@dataclass(frozen=True, kw_only=True)
class Rating:
    """What the judge made of one text by itself, or why there is nothing."""

    number: int
    """Of the text among those that were asked about."""
    scores: Scores | None = None
    """By criterion, 1 to 5."""
    failure: str = ""
    """Of the last attempt; empty where there are scores."""


Asked = tuple[Question, bool]
Read = TypeVar("Read")


def ask(questions: Sequence[Question], judge: Judge, known: Iterable[Verdict], took: Callable[[Verdict], None]) -> list[Verdict]:
    """Return both verdicts of each question: those `known` with scores as they are, all others asked for, the failed ones again.

    `took` gets each verdict in the calling thread as soon as it is there, but not those that were known or not asked.
    Ctrl-C, or an error of `took`, ends it at once. Raises httpx.InvalidURL.
    """
    verdicts = {(verdict.document, verdict.swapped): verdict for verdict in known if verdict.scores}
    asked = [(question, swapped) for question in questions for swapped in (False, True)]
    todo = [(question, swapped) for question, swapped in asked if (question.document, swapped) not in verdicts]

    async def one(endpoint: Endpoint, of: Asked) -> Verdict:
        if endpoint.down.is_set():
            return Verdict(document=of[0].document, swapped=of[1], failure=NOT_ASKED)
        took(verdict := await _verdict(endpoint, judge, *of))
        return verdict

    verdicts |= {(verdict.document, verdict.swapped): verdict for verdict in ask_all(todo, judge, one)}
    return [verdicts[question.document, swapped] for question, swapped in asked]


def rate(prompts: Sequence[str], judge: Judge, known: Iterable[Rating], took: Callable[[Rating], None]) -> list[Rating]:
    """Return the rating of each prompt that asks for one object with the five scores: those `known` as they are, all others asked for.

    `took` gets each rating in the calling thread as soon as it is there, but not those that were known or not asked.
    """
    ratings = {rating.number: rating for rating in known}
    todo = [number for number in range(len(prompts)) if number not in ratings]

    async def one(endpoint: Endpoint, number: int) -> Rating:
        if endpoint.down.is_set():
            return Rating(number=number, failure=NOT_ASKED)
        scores, failure, _ = await _asked(endpoint, judge, prompts[number], read_rating)
        took(rating := Rating(number=number, scores=scores, failure=failure))
        return rating

    ratings |= {rating.number: rating for rating in ask_all(todo, judge, one)}
    return [ratings[number] for number in range(len(prompts))]


def tally(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Return scores by row and what the judge was worth, of verdicts in any order; one with scores goes before others of its place.

    `documents`: rows with both orders; `run` and `base`: criterion or `overall` -> for each of these the mean over both orders.
    `position_bias`: by how much the first answer has the better overall score, None without scored rows.
    `rows` = `scored` + `one_order` + `none`; `failures` are verdicts by kind, `retries` requests.
    """
    last = {(verdict.document, verdict.swapped): verdict for verdict in sorted(verdicts, key=lambda verdict: verdict.scores is not None)}
    rows = sorted({document for document, _ in last})
    had = {
        document: [verdict for swapped in (False, True) if (verdict := last.get((document, swapped))) and verdict.scores]
        for document in rows
    }
    pairs = {document: orders for document, orders in had.items() if len(orders) == 2}
    run = _means([[verdict.scores or {} for verdict in orders] for orders in pairs.values()])
    base = _means([[verdict.other or {} for verdict in orders] for orders in pairs.values()])
    leads = [ours - theirs for ours, theirs in zip(run["overall"], base["overall"], strict=True)]
    return {
        "documents": list(pairs),
        "run": run,
        "base": base,
        "wins": sum(lead > 0 for lead in leads),
        "ties": sum(lead == 0 for lead in leads),
        "losses": sum(lead < 0 for lead in leads),
        "position_bias": fmean(_lead_of_first(verdict) for orders in pairs.values() for verdict in orders) if pairs else None,
        "rows": len(rows),
        "scored": len(pairs),
        "one_order": sum(len(orders) == 1 for orders in had.values()),
        "none": sum(not orders for orders in had.values()),
        "failures": dict(Counter(verdict.failure for verdict in last.values() if verdict.failure)),
        "retries": sum(max(verdict.attempts - 1, 0) for verdict in last.values()),
    }


def _means(rows: list[list[Scores]]) -> dict[str, list[float]]:
    """Return the mean over the orders of each row, by criterion and overall; one division of integers, so that ties are exact."""
    means = {criterion: [fmean(scores[criterion] for scores in orders) for orders in rows] for criterion in CRITERIA}
    return means | {"overall": [fmean(score for scores in orders for score in scores.values()) for orders in rows]}


def _lead_of_first(verdict: Verdict) -> float:
    lead = fmean((verdict.scores or {}).values()) - fmean((verdict.other or {}).values())
    return -lead if verdict.swapped else lead


async def _verdict(endpoint: Endpoint, judge: Judge, question: Question, swapped: bool) -> Verdict:
    found, failure, attempts = await _asked(endpoint, judge, _prompt(question, swapped), read_scores)
    if found is None:
        return Verdict(document=question.document, swapped=swapped, failure=failure, attempts=attempts)
    scores, other = found[::-1] if swapped else found
    return Verdict(document=question.document, swapped=swapped, scores=scores, other=other, attempts=attempts)


async def _asked(endpoint: Endpoint, judge: Judge, prompt: str, read: Callable[[str], Read | None]) -> tuple[Read | None, str, int]:
    """Ask until there is an answer that can be read; return it, or None and the last failure, and the number of attempts."""
    body: dict[str, Any] = {"model": judge.model, "messages": [{"role": "user", "content": prompt}]}
    body |= {"temperature": 0, "seed": 0, "max_tokens": judge.max_tokens}

    def of_reply(reply: Any) -> Read | None:
        found = read_text(reply)
        return None if found is None else read(found["text"])

    return await endpoint.ask("chat/completions", body, of_reply)


def _prompt(question: Question, swapped: bool) -> str:
    first, second = (question.other, question.answer) if swapped else (question.answer, question.other)
    return PROMPT.substitute(question=question.prompt, reference=question.reference, first=first, second=second)


def read_scores(reply: str) -> tuple[Scores, Scores] | None:
    """Return both answers' scores from the last JSON object of a reply that has them, wherever it is; None without one."""
    for value in _objects(reply):
        first, second = _scores(value.get("1")), _scores(value.get("2"))
        if first and second:
            return first, second
    return None


def read_rating(reply: str) -> Scores | None:
    """Return the five scores from the last JSON object of a reply that has them, wherever it is; None without one."""
    return next((scores for value in _objects(reply) if (scores := _scores(value))), None)


def _objects(reply: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a text, the last to begin first."""
    decoder, at = json.JSONDecoder(), reply.rfind("{")
    while at >= 0:
        with contextlib.suppress(ValueError, RecursionError):
            yield decoder.raw_decode(reply, at)[0]
        at = reply.rfind("{", 0, at)


def _scores(value: object) -> Scores | None:
    """Return the five scores alone; None where one is missing, no integer, or not from 1 to 5."""
    found = {criterion: value.get(criterion) for criterion in CRITERIA} if isinstance(value, dict) else {}
    scores = {criterion: score for criterion, score in found.items() if type(score) is int and 1 <= score <= 5}  # True is an int
    return scores if len(scores) == len(CRITERIA) else None
