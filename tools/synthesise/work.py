"""A synthesis at work: what is asked, kept and counted.

A method is a pure function of its settings and of the replies. Requests are numbered in the order in which they are asked for, and each
reply is kept under its number as it comes. A command that continues runs the method from its start, and takes the replies that are kept.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from tools.sample import progress, seed_of
from tools.synthesise.checks import sampling_of
from tools.synthesise.config import Settings
from tools.synthesise.filters import answer_fault, instruction_fault
from tools.synthesise.prompts import Prompts
from tools.synthesise.similar import Pool
from tools.synthesise.writer import Writer
from trainers.cache import content_key
from trainers.config.errors import ConfigError
from trainers.data.formats import Message
from trainers.generate.kept import Kept
from trainers.generate.request import LENGTH, Answer, Request

SAID_EVERY_S = 30.0
"""Between two lines of progress where there is no terminal."""
SLICE = 4
"""Requests for each that may be in flight, after which the money is looked at, where there is a limit to it."""
Asked = str | Sequence[Message] | list[int]
"""A turn of the user, a conversation, or ids that are continued."""


class Unanswered(Exception):
    """Replies are missing, or the money is spent: why, and what continues."""


class Shown(Exception):
    """The costs were shown, and nothing is asked."""


@dataclass(frozen=True)
class Reply:
    """What came of a request."""

    number: int
    text: str
    finish: str
    failure: str = ""


class Spent:
    """Tokens and money, of this attempt and those before it."""

    def __init__(self, settings: Settings) -> None:
        """Begin at nothing."""
        self.cost, self.prompt, self.answer, self.requests = settings.cost, 0, 0, 0

    def add(self, tokens: Sequence[int]) -> None:
        """Count a request's tokens: of its prompt and of its answer."""
        self.prompt, self.answer, self.requests = self.prompt + tokens[0], self.answer + tokens[1], self.requests + 1

    @property
    def money(self) -> float:
        """Return what it costs, in the currency."""
        return (self.prompt * self.cost.prompt + self.answer * self.cost.answer) / 1000

    def said(self) -> str:
        """Return it for people."""
        text = f"{self.prompt:,} + {self.answer:,} tokens"
        return f"{text}, {self.money:,.4f} {self.cost.currency}" if self.cost.prompt or self.cost.answer else text


class Work:
    """What a method works with."""

    def __init__(self, settings: Settings, writer: Writer, kept: Kept, prompts: Prompts, dry_run: bool = False) -> None:
        """Take the parts; nothing is asked yet."""
        self.settings, self.writer, self.kept, self.prompts, self.dry_run = settings, writer, kept, prompts, dry_run
        self.of: Any = settings.of_method
        self.removed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.pool = Pool()
        """Instructions that are there."""
        self.spent, self.next = Spent(settings), 0
        self.planned = 0
        """Requests that a method expects where nothing is removed; set by it before it asks."""
        self.bar: Progress | None = None
        self.task: Any = None
        self.told_at = time.monotonic()

    def __enter__(self) -> Work:
        """Show the bar, where there is a terminal."""
        self.bar = progress()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the replies for the next attempt, and end the model."""
        if self.bar is not None:
            self.bar.stop()
        self.kept.close()
        self.writer.close()

    def draw(self, *place: object) -> random.Random:
        """Return random numbers that depend on the seed and the place alone."""
        return random.Random(" ".join(map(str, (self.settings.seed, *place))))

    def ask(self, asked: Sequence[Asked], what: str, likeliest: bool = False, whole: bool = False) -> list[Reply]:
        """Return a reply to each; a failure of the request itself is counted, and a reply without text.

        `likeliest` takes the likeliest tokens. `whole` keeps special tokens in the text. Raises Unanswered, Shown, ConfigError, Broken.
        """
        requests = [self._request(one, self.next + number) for number, one in enumerate(asked)]
        self.next += len(asked)
        sampling = sampling_of(self.settings, 0.0 if likeliest else None)
        marks = {
            request.key: content_key(request.ids, request.messages, request.seed, vars(sampling), whole, what)[:16] for request in requests
        }
        self._begin(requests, what)
        todo = []
        for request in requests:
            row = self.kept.rows.get(request.key)
            if row is None:
                todo.append(request)
            elif row["asked"] != marks[request.key]:
                remedy = "another --out, or remove it"
                raise ConfigError("--out", str(self.kept.part), f"holds another request {request.key}: a library has changed", remedy)
            else:
                self._count(row, what)
        missing: Counter[str] = Counter()
        lengths = {request.key: _tokens_of(request) for request in todo}

        def took(answer: Answer) -> None:
            row = self._row(answer, lengths[answer.key], whole)
            if "failure" in row and row["failure"] not in self.writer.final:
                missing[row["failure"]] += 1
                return
            self.kept.add({"number": answer.key, "asked": marks[answer.key], "of": what} | row)
            self._count(row, what)

        slice_ = max(len(todo), 1) if self.settings.cost.most is None else SLICE * self.settings.model.at_once
        for at in range(0, len(todo), slice_):
            self._require_money()
            self.writer.ask(todo[at : at + slice_], sampling, took)
            if missing:
                break
        if left := sum(request.key not in self.kept.rows for request in requests):
            why = ", ".join(f"{kind} ({count})" for kind, count in missing.most_common()) or "the server answers no more"
            raise Unanswered(f"{left} replies of {what} are missing: {why}. {self.kept.part} has the others; the same command continues")
        return [self._reply(request.key) for request in requests]

    def _request(self, asked: Asked, number: int) -> Request:
        seed = seed_of(self.settings.seed, number)
        if isinstance(asked, str):
            return self.writer.request([{"role": "user", "content": asked}], number, seed)
        if asked and isinstance(asked[0], int):
            return Request(key=number, seed=seed, ids=list(asked))  # type: ignore[arg-type]
        return self.writer.request(asked, number, seed)  # type: ignore[arg-type]

    def _row(self, answer: Answer, prompt_tokens: int, whole: bool) -> dict[str, Any]:
        """Return what is kept of an answer."""
        if answer.failure:
            return {"failure": answer.failure, "tokens": [0, 0]}
        if answer.ids is not None:
            own = [prompt_tokens, len(answer.ids)]
        else:
            own = list(answer.usage or (prompt_tokens, _tokens_about(answer.text or "")))
        return {"answer": self.writer.text(answer, whole), "finish": answer.finish, "tokens": own}

    def _reply(self, number: int) -> Reply:
        row = self.kept.rows[number]
        if "failure" in row:
            return Reply(number, "", "", row["failure"])
        return Reply(number, row["answer"], row["finish"])

    def _count(self, row: dict[str, Any], what: str) -> None:
        self.spent.add(row["tokens"])
        if "failure" in row:
            self.failed[f"{what}: {row['failure']}"] += 1
        self._advance(what)

    def _require_money(self) -> None:
        """Raise Unanswered once the money is spent."""
        most = self.settings.cost.most
        if most is not None and self.spent.money >= most:
            raise Unanswered(
                f"{self.spent.said()} are spent, and cost.most is {most:g}; {self.kept.part} has the replies, "
                "and the same command with a larger cost.most continues"
            )

    def _begin(self, requests: Sequence[Request], what: str) -> None:
        """Before the first request, say what all will cost where nothing is removed."""
        if requests and requests[0].key == 0:
            print(self._estimate(requests), flush=True)
            if self.dry_run:
                shown = requests[0].messages or self.writer.tokenizer.decode(requests[0].ids)
                print(f"the first request, for {what}:\n{shown if isinstance(shown, str) else shown[-1]['content']}")
                raise Shown

    def _estimate(self, requests: Sequence[Request]) -> str:
        sizes = [_tokens_of(request) for request in requests]
        count = max(self.planned, len(requests))
        prompt, answer = round(count * sum(sizes) / len(sizes)), count * self.settings.model.max_new_tokens
        money = (prompt * self.settings.cost.prompt + answer * self.settings.cost.answer) / 1000
        price = f": at most about {money:,.2f} {self.settings.cost.currency}" if money else ""
        return f"about {count:,} requests, {prompt:,} prompt tokens and at most {answer:,} answer tokens{price}"

    def _advance(self, what: str) -> None:
        if self.bar is None:
            return
        if self.task is None:
            self.task = self.bar.add_task("", total=max(self.planned, 1))
        total = max(self.planned, self.next, 1)
        self.bar.update(self.task, completed=self.spent.requests, total=total, description=f"{what}; {self.spent.said()}")
        if self.bar.disable and time.monotonic() - self.told_at > SAID_EVERY_S:
            self.told_at = time.monotonic()
            print(f"{self.spent.requests:,}/{total:,} requests, {what}; {self.spent.said()}", file=sys.stderr, flush=True)

    def remove(self, reason: str) -> None:
        """Count a text that a filter removes, by its reason."""
        self.removed[reason] += 1

    def takes(self, instruction: str) -> bool:
        """Tell whether an instruction passes the filters, and take it into the pool; else count why not."""
        reason = instruction_fault(instruction, self.settings.filters)
        if not reason and self.pool.reaches(instruction, self.settings.filters.similar) is not None:
            reason = f"instruction: ROUGE-L of {self.settings.filters.similar:g} or more with one that is there"
        if reason:
            self.remove(reason)
            return False
        self.pool.add(instruction)
        return True

    def passes(self, prompt: str, reply: Reply, refusals: bool | None = None) -> bool:
        """Tell whether an answer passes the filters; else count why not. `refusals` overrules the filter's setting."""
        if not self.is_whole(reply, "answer"):
            return False
        reason = answer_fault(prompt, reply.text, self.settings.filters, refusals)
        if reason:
            self.remove(reason)
        return not reason

    def is_whole(self, reply: Reply, what: str) -> bool:
        """Tell whether there is a text that was not cut; else count why not."""
        reason = "failed" if reply.failure else "cut" if reply.finish == LENGTH and self.settings.filters.cut else ""
        if reason:
            self.remove(f"{what}: {reason}")
        return not reason

    def origin(self, *requests: Reply, **more: object) -> dict[str, Any]:
        """Return where a row comes from."""
        return {"method": self.settings.method, "model": self.writer.name, "requests": [reply.number for reply in requests]} | more

    def is_full(self, rows: Sequence[object]) -> bool:
        """Tell whether so many rows are there as were asked for."""
        return self.settings.rows is not None and len(rows) >= self.settings.rows


def _tokens_of(request: Request) -> int:
    """Return the tokens of a prompt, about so many where no tokenizer is known: four more for each turn."""
    return len(request.ids) or sum(4 + _tokens_about(str(turn.get("content", ""))) for turn in request.messages)


def _tokens_about(text: str) -> int:
    """Return about how many tokens a text has: four characters of ASCII make one, and any other character makes one."""
    plain = sum(map(str.isascii, text))
    return plain // 4 + len(text) - plain
