"""Scores of a run's answers next to its base's, by a model at any endpoint that speaks OpenAI's chat completions.

Each pair is judged twice, with the answers swapped, and scored by the mean of both: a judge that prefers the first answer likes both
equally. Where only one order came back there is no score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from trainers.generate.endpoint import NOT_ASKED, Endpoint, ask_all
from trainers.rewards.judged import CRITERIA, Judge, Scores, ask_judge, objects, scores_in

PROMPT = Template(Path(__file__).with_name("judge.txt").read_text(encoding="utf-8"))  # a text put into it is not looked through again


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


Asked = tuple[Question, bool]


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
    found, failure, attempts = await ask_judge(endpoint, judge, _prompt(question, swapped), read_scores)
    if found is None:
        return Verdict(document=question.document, swapped=swapped, failure=failure, attempts=attempts)
    scores, other = found[::-1] if swapped else found
    return Verdict(document=question.document, swapped=swapped, scores=scores, other=other, attempts=attempts)


def _prompt(question: Question, swapped: bool) -> str:
    first, second = (question.other, question.answer) if swapped else (question.answer, question.other)
    return PROMPT.substitute(question=question.prompt, reference=question.reference, first=first, second=second)


def read_scores(reply: str) -> tuple[Scores, Scores] | None:
    """Return both answers' scores from the last JSON object of a reply that has them, wherever it is; None without one."""
    for value in objects(reply):
        first, second = scores_in(value.get("1")), scores_in(value.get("2"))
        if first and second:
            return first, second
    return None
