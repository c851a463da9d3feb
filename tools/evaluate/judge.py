"""Scores of a run's answers next to its base's, by a model at any endpoint that speaks OpenAI's chat completions.

Each pair is judged twice, with the answers swapped, and scored by the mean of both: a judge that prefers the first answer likes both
equally. Where only one order came back there is no score.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any, TypeVar

import httpx

CRITERIA = ("instruction_following", "factual_accuracy", "format", "length", "no_hallucination")
PROMPT = Template(Path(__file__).with_name("judge.txt").read_text(encoding="utf-8"))  # a text put into it is not looked through again
TIMEOUT, UNREACHABLE, GARBAGE, NOT_ASKED = "timeout", "unreachable", "garbage", "not asked"
"""Failures, in addition to "HTTP 500" and its like."""
DOWN_AFTER = 10
"""Requests in a row without a reply, after which the endpoint is asked nothing more."""
LONGEST_WAIT_S = 60.0
"""Between two attempts. A server that wants a longer wait is not asked again."""

Scores = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Which model judges, and how it is asked. Its key is in the environment alone, so that nothing that shows a Judge shows it."""

    url: str
    """Up to the version, such as http://host:8000/v1."""
    model: str
    timeout_s: float = 60.0
    """Of one request, from connecting to the last byte."""
    attempts: int = 3
    at_once: int = 8
    backoff_s: float = 1.0
    """Wait before the second attempt, doubled before each further one up to LONGEST_WAIT_S; the server's Retry-After where longer."""
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
Of = TypeVar("Of")
Made = TypeVar("Made")
Read = TypeVar("Read")


class _Failed(Exception):
    """A request without scores: its kind, and for how many seconds the server wants no other (inf: asking again is of no use)."""

    def __init__(self, kind: str, wait_s: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.wait_s = kind, wait_s


def ask(questions: Sequence[Question], judge: Judge, known: Iterable[Verdict], took: Callable[[Verdict], None]) -> list[Verdict]:
    """Return both verdicts of each question: those `known` with scores as they are, all others asked for, the failed ones again.

    `took` gets each verdict in the calling thread as soon as it is there, but not those that were known or not asked.
    Ctrl-C, or an error of `took`, ends it at once. Raises httpx.InvalidURL.
    """
    verdicts = {(verdict.document, verdict.swapped): verdict for verdict in known if verdict.scores}
    asked = [(question, swapped) for question in questions for swapped in (False, True)]
    todo = [(question, swapped) for question, swapped in asked if (question.document, swapped) not in verdicts]

    # Not threads: one that waits for a reply cannot be stopped, and Python would wait for it before it exits.
    async def one(endpoint: _Endpoint, of: Asked) -> Verdict:
        if endpoint.down.is_set():
            return Verdict(document=of[0].document, swapped=of[1], failure=NOT_ASKED)
        took(verdict := await _verdict(endpoint, *of))
        return verdict

    verdicts |= {(verdict.document, verdict.swapped): verdict for verdict in asyncio.run(_ask_all(todo, judge, one))}
    return [verdicts[question.document, swapped] for question, swapped in asked]


def rate(prompts: Sequence[str], judge: Judge, known: Iterable[Rating], took: Callable[[Rating], None]) -> list[Rating]:
    """Return the rating of each prompt that asks for one object with the five scores: those `known` as they are, all others asked for.

    `took` gets each rating in the calling thread as soon as it is there, but not those that were known or not asked.
    """
    ratings = {rating.number: rating for rating in known}
    todo = [number for number in range(len(prompts)) if number not in ratings]

    async def one(endpoint: _Endpoint, number: int) -> Rating:
        if endpoint.down.is_set():
            return Rating(number=number, failure=NOT_ASKED)
        scores, failure, _ = await _asked(endpoint, prompts[number], read_rating)
        took(rating := Rating(number=number, scores=scores, failure=failure))
        return rating

    ratings |= {rating.number: rating for rating in asyncio.run(_ask_all(todo, judge, one))}
    return [ratings[number] for number in range(len(prompts))]


def check(judge: Judge) -> str:
    """Say why nothing can be asked there, by one request for its list of models, which it need not have; empty if it can."""
    url = _url(judge, "models")
    try:
        status = httpx.get(url, headers=_headers(), timeout=judge.timeout_s).status_code
    except httpx.TimeoutException:
        return f"{url} does not answer within {judge.timeout_s:g} s"
    except httpx.ConnectError as error:
        return f"{url} is unreachable: {error}"
    except httpx.LocalProtocolError:  # its message quotes the header
        return "the judge's key has characters that no HTTP header may have"
    except (httpx.RequestError, httpx.InvalidURL) as error:
        return f"{url} cannot be asked: {error}"
    if status in (401, 403):
        return f"{url} refuses the key (HTTP {status}): set FULLTUNE_JUDGE_KEY, or OPENAI_API_KEY, to one that it takes"
    return f"{url} answers with HTTP {status}" if status >= 500 else ""


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


@dataclass
class _Endpoint:
    """The client, and whether anything answers there."""

    judge: Judge
    client: httpx.AsyncClient
    silent: int = 0
    """Requests in a row without a reply."""
    down: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self, failure: str, is_last: bool = True) -> None:
        """Count a request. Garbage is a reply; who is told to wait a little is not refused, unless it is told so to the last."""
        if failure in ("", GARBAGE):
            self.silent = 0
        elif failure != "HTTP 429" or is_last:
            self.silent += 1
        if self.silent >= DOWN_AFTER:
            self.down.set()

    async def wait(self, seconds: float) -> bool:
        """Wait; tell whether the endpoint may still be asked."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.down.wait(), seconds)
        return not self.down.is_set()


async def _ask_all(todo: Sequence[Of], judge: Judge, one: Callable[[_Endpoint, Of], Awaitable[Made]]) -> list[Made]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=judge.at_once)
    async with httpx.AsyncClient(headers=_headers(), timeout=judge.timeout_s, limits=limits) as client:
        endpoint, queue = _Endpoint(judge, client), iter(todo)

        async def work() -> list[Made]:  # the queue is shared by all workers
            return [await one(endpoint, of) for of in queue]

        workers = [asyncio.create_task(work()) for _ in range(min(judge.at_once, len(todo)))]
        try:
            return [made for found in await asyncio.gather(*workers) for made in found]
        finally:
            for worker in workers:  # one has failed: else the others would take the closing of the client for the endpoint's doing
                worker.cancel()


async def _verdict(endpoint: _Endpoint, question: Question, swapped: bool) -> Verdict:
    found, failure, attempts = await _asked(endpoint, _prompt(question, swapped), read_scores)
    if found is None:
        return Verdict(document=question.document, swapped=swapped, failure=failure, attempts=attempts)
    scores, other = found[::-1] if swapped else found
    return Verdict(document=question.document, swapped=swapped, scores=scores, other=other, attempts=attempts)


async def _asked(endpoint: _Endpoint, prompt: str, read: Callable[[str], Read | None]) -> tuple[Read | None, str, int]:
    """Ask until there is an answer that can be read; return it, or None and the last failure, and the number of attempts."""
    judge, attempt, failure, may_ask = endpoint.judge, 0, "", True
    while may_ask:
        attempt += 1
        try:
            found = await _request(endpoint, prompt, read)
        except _Failed as failed:
            failure = failed.kind
            wait_s = max(failed.wait_s, min(judge.backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S))
            is_last = attempt >= judge.attempts or wait_s > LONGEST_WAIT_S
            endpoint.count(failure, is_last)
            may_ask = not is_last and await endpoint.wait(wait_s)
        else:
            endpoint.count("")
            return found, "", attempt
    return None, failure, attempt


async def _request(endpoint: _Endpoint, prompt: str, read: Callable[[str], Read | None]) -> Read:
    """Ask once; return what is read of the reply, or raise _Failed."""
    judge = endpoint.judge
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": 0,
        "max_tokens": judge.max_tokens,
    }
    try:
        async with asyncio.timeout(judge.timeout_s):  # httpx's own begins anew with each byte
            # httpx would not escape, and half a surrogate pair, which JSON may hold, has no UTF-8
            response = await endpoint.client.post(_url(judge, "chat/completions"), content=json.dumps(body))
    except (TimeoutError, httpx.TimeoutException):
        raise _Failed(TIMEOUT) from None
    except httpx.DecodingError:
        raise _Failed(GARBAGE) from None
    except httpx.RequestError:
        raise _Failed(UNREACHABLE) from None
    if not response.is_success:
        retried = response.status_code >= 500 or response.status_code in (408, 429)
        raise _Failed(f"HTTP {response.status_code}", _retry_after_s(response) if retried else float("inf"))
    found = read(_content(response))
    if found is None:
        raise _Failed(GARBAGE)
    return found


def _headers() -> dict[str, str]:
    """Return the header with the key. An empty FULLTUNE_JUDGE_KEY keeps OpenAI's from an endpoint that is not theirs."""
    key = os.environ.get("FULLTUNE_JUDGE_KEY", os.environ.get("OPENAI_API_KEY", "")).strip()
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _url(judge: Judge, path: str) -> str:
    return f"{judge.url.rstrip('/')}/{path}"


def _prompt(question: Question, swapped: bool) -> str:
    first, second = (question.other, question.answer) if swapped else (question.answer, question.other)
    return PROMPT.substitute(question=question.prompt, reference=question.reference, first=first, second=second)


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds that Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); 0 without one that can be read."""
    said = response.headers.get("Retry-After", "").strip()
    if said.replace(".", "", 1).isdecimal():
        return float(said)
    with contextlib.suppress(ValueError):
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    return 0.0


def _content(response: httpx.Response) -> str:
    """Return the text of a chat completion, empty where it has none."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


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
