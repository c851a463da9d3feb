"""What a judge says of texts: any endpoint that speaks OpenAI's chat completions, asked for five scores. No torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainers.generate.endpoint import DOWN_AFTER, GARBAGE, NOT_ASKED, REFUSALS, Endpoint, Server, ask_all
from trainers.generate.served import read_text
from trainers.health.activity import watch

CRITERIA = ("instruction_following", "factual_accuracy", "format", "length", "no_hallucination")
PROMPT = Template(Path(__file__).with_name("judged.txt").read_text(encoding="utf-8"))  # a text put into it is not looked through again

Scores = dict[str, int]
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Judge(Server):
    """Which model judges, and how it is asked."""

    key_name: str = "FULLTUNE_JUDGE_KEY"
    max_tokens: int = 512
    """Of one reply; a judge that reasons before it answers needs more."""


@dataclass(frozen=True, kw_only=True)
class Rating:
    """What the judge made of one text by itself, or why there is nothing."""

    number: int
    """Of the text among those that were asked about."""
    scores: Scores | None = None
    """By criterion, 1 to 5."""
    failure: str = ""
    """Of the last attempt; empty where there are scores."""


def rate(
    prompts: Sequence[str], judge: Judge, known: Iterable[Rating], took: Callable[[Rating], None], look: Callable[[], None] | None = None
) -> list[Rating]:
    """Return the rating of each prompt that asks for one object with the five scores: those `known` as they are, all others asked for.

    `took` gets each rating in the calling thread as soon as it is there, but not those that were known or not asked. `look` is called now
    and then; what it raises ends all at once.
    """
    ratings = {rating.number: rating for rating in known}
    todo = [number for number in range(len(prompts)) if number not in ratings]

    async def one(endpoint: Endpoint, number: int) -> Rating:
        if endpoint.down.is_set():
            return Rating(number=number, failure=NOT_ASKED)
        scores, failure, _ = await ask_judge(endpoint, judge, prompts[number], read_rating)
        took(rating := Rating(number=number, scores=scores, failure=failure))
        return rating

    ratings |= {rating.number: rating for rating in ask_all(todo, judge, one, look)}
    return [ratings[number] for number in range(len(prompts))]


def mean_scores(texts: Sequence[tuple[str, str]], judge: Judge, replies: Path) -> NDArray[np.float64]:
    """Return the mean over the criteria of each (question, answer), 1 to 5; replies are kept as they come.

    A reply that cannot be read, or a request that is refused for what it holds, leaves a text without a score (NaN). Raises OSError where
    the endpoint answers no more: the rest is asked by the next attempt.
    """
    ratings = kept_ratings(texts, judge, replies)
    if left := [rating for rating in ratings if is_open(rating)]:
        raise OSError(f"{judge.url} gave no score for {len(left)} rows: {left[0].failure}; the same command asks for them again")
    return np.array([mean_of(rating) for rating in ratings], np.float64)


def known_scores(
    texts: Sequence[tuple[str, str]], judge: Judge, replies: Path, look: Callable[[], None] | None = None
) -> tuple[NDArray[np.float64], list[str]]:
    """Return the mean scores that a judge gives, NaN for a text without one, and why it has none, else an empty text.

    Raises OSError where the endpoint is down: it was asked no more, or gave none of several texts a reply.
    """
    ratings = kept_ratings(texts, judge, replies, look)
    left = [rating for rating in ratings if is_open(rating)]
    if any(rating.failure == NOT_ASKED for rating in left) or len(left) == len(ratings) > 1:
        why = next((rating.failure for rating in left if rating.failure != NOT_ASKED), NOT_ASKED)
        raise OSError(
            f"{judge.url} is down: {len(left)} of {len(ratings)} texts got no reply ({why}); after {DOWN_AFTER} requests in a row without "
            "one it is asked no more; the same command continues"
        )
    reasons = ["" if rating.scores else f"the judge gave no score: {rating.failure}" for rating in ratings]
    return np.array([mean_of(rating) for rating in ratings], np.float64), reasons


def kept_ratings(texts: Sequence[tuple[str, str]], judge: Judge, replies: Path, look: Callable[[], None] | None = None) -> list[Rating]:
    """Return the rating of each (question, answer); what is in the file `replies` is not asked again, and what is asked is added to it."""
    written = replies.read_bytes() if replies.exists() else b""
    replies.write_bytes(whole := written[: written.rfind(b"\n") + 1])  # a full disk may have cut the last line
    known = [Rating(**json.loads(line)) for line in whole.splitlines()]
    prompts = [PROMPT.substitute(question=question, answer=answer) for question, answer in texts]
    with replies.open("a", encoding="utf-8") as stream:

        def took(rating: Rating) -> None:
            stream.write(json.dumps(vars(rating)) + "\n")
            stream.flush()
            watch.beat()

        return rate(prompts, judge, [rating for rating in known if not is_open(rating)], took, look)


def mean_of(rating: Rating) -> float:
    """Return the mean over the criteria; NaN without scores."""
    return float(np.mean(list(rating.scores.values()))) if rating.scores else math.nan


def is_open(rating: Rating) -> bool:
    """Tell whether a text is to be asked about again: it is not where it was the text's own doing."""
    return rating.scores is None and rating.failure not in (GARBAGE, *REFUSALS)


async def ask_judge(endpoint: Endpoint, judge: Judge, prompt: str, read: Callable[[str], Read | None]) -> tuple[Read | None, str, int]:
    """Ask until there is an answer that can be read; return it, or None and the last failure, and the number of attempts."""
    body: dict[str, Any] = {"model": judge.model, "messages": [{"role": "user", "content": prompt}]}
    body |= {"temperature": 0, "seed": 0, "max_tokens": judge.max_tokens}

    def of_reply(reply: Any) -> Read | None:
        found = read_text(reply)
        return None if found is None else read(found["text"])

    return await endpoint.ask("chat/completions", body, of_reply)


def read_rating(reply: str) -> Scores | None:
    """Return the five scores from the last JSON object of a reply that has them, wherever it is; None without one."""
    return next((scores for value in objects(reply) if (scores := scores_in(value))), None)


def objects(reply: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a text, the last to begin first."""
    decoder, at = json.JSONDecoder(), reply.rfind("{")
    while at >= 0:
        with contextlib.suppress(ValueError, RecursionError):
            yield decoder.raw_decode(reply, at)[0]
        at = reply.rfind("{", 0, at)


def scores_in(value: object) -> Scores | None:
    """Return the five scores alone; None where one is missing, no integer, or not from 1 to 5."""
    found = {criterion: value.get(criterion) for criterion in CRITERIA} if isinstance(value, dict) else {}
    scores = {criterion: score for criterion, score in found.items() if type(score) is int and 1 <= score <= 5}  # True is an int
    return scores if len(scores) == len(CRITERIA) else None
