"""Answers of a teacher to prompts: for rows of the source, and for instructions that other methods write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.synthesise.sources import read_rows
from tools.synthesise.work import Reply, Work
from trainers.data.formats import Message

Row = dict[str, Any]
Asked = tuple[list[Message], dict[str, Any]]
"""A conversation that ends with the user, and what its row says of where it comes from."""


def answers(work: Work) -> list[Row]:
    """Return the prompts of the source with `n` answers of each; equal answers of a prompt count once."""
    begun = [one for one in read_rows(work.settings) for _ in range(work.of.n)][: work.settings.rows]
    work.planned = len(begun)
    return answered(work, [(one.turns, {"row": one.place}) for one in begun], work.of.system)


def answered(work: Work, asked: Sequence[Asked], system: str | None = None) -> list[Row]:
    """Return a row for each conversation whose answer passes the filters."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    replies = work.ask([[*opening, *turns] for turns, _ in asked], "answers")
    rows, seen = [], set()
    for (turns, origin), reply in zip(asked, replies, strict=True):
        text = reply.text.strip()
        if not work.passes(str(turns[-1]["content"]), reply):
            continue
        if (mark := (str(turns), text)) in seen:
            work.remove("answer: the same as another of its prompt")
            continue
        seen.add(mark)
        rows.append(row_of(work, turns, text, origin, reply))
    return rows


def row_of(work: Work, turns: Sequence[Message], answer: str, origin: dict[str, Any], *replies: Reply) -> Row:
    """Return a conversation with its answer, and in `from` where it comes from."""
    return {"messages": [*turns, {"role": "assistant", "content": answer}], "from": work.origin(*replies, **origin)}


def user(text: str) -> list[Message]:
    """Return a conversation of one turn."""
    return [{"role": "user", "content": text}]
