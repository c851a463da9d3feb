"""Rows that compare answers: the prompt, the answer that is preferred and the one that is not, from every layout in common use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from trainers.data.formats import BadRow, Message, Row, system_of, to_turns

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""Where a turn begins in a transcript (Bai et al. 2022, arXiv 2204.05862)."""
ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each a list of turns."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def to_preference(row: Row) -> Pair:
    """Return a row's prompt and its two answers; raises BadRow with the reason.

    `chosen` and `rejected` are texts or lists of turns, with a `prompt` (text or turns) or as two whole conversations, whose
    shared beginning is the prompt; whole conversations are also read from transcripts of "Human:" and "Assistant:".
    """
    if missing := [name for name in ANSWERS if row.get(name) is None]:
        raise BadRow(f"has no `{missing[0]}`")
    prompt = turns_of(row.get("prompt"), "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (turns_of(row[name], name, "assistant") for name in ANSWERS)
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        if not prompt:
            raise BadRow("has answers without a `prompt`")
        pair = Pair(prompt, chosen, rejected)
    else:
        pair = _divided(chosen, rejected)
        if prompt and prompt[-1] not in pair.prompt:
            raise BadRow("has a `prompt` that is not in the conversations of `chosen` and `rejected`")
    _check(pair)
    return Pair(with_system(row, pair.prompt), pair.chosen, pair.rejected)


def with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """Return a prompt with the system text that the row holds elsewhere."""
    system = system_of(row)
    return [{"role": "system", "content": system}, *prompt] if system and prompt[0]["role"] != "system" else prompt


def turns_of(value: Any, name: str, role: str) -> list[Message]:
    """Return a text as one turn of `role`, a transcript as its turns, and turns as they are."""
    if not isinstance(value, str):
        return to_turns(value, name)
    spoken = list(SPOKEN.finditer(value))
    if not spoken or value[: spoken[0].start()].strip():
        return to_turns([{"role": role, "content": value}], name)
    ends = [match.start() for match in spoken[1:]] + [len(value)]
    turns = [{"role": SPEAKERS[match[1]], "content": value[match.end() : end].strip()} for match, end in zip(spoken, ends, strict=True)]
    open_end = name == "prompt" and turns[-1] == {"role": "assistant", "content": ""}
    return to_turns(turns[:-1] if open_end else turns, name)


def _divided(chosen: list[Message], rejected: list[Message]) -> Pair:
    """Return two conversations as their shared beginning and what follows it in each."""
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    pair = Pair(chosen[:shared], chosen[shared:], rejected[shared:])
    if not shared:
        raise BadRow("has a `chosen` and a `rejected` that answer different prompts: no turn is shared")
    for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if turns and turns[0]["role"] != "assistant":
            raise BadRow(f"has a `chosen` and a `rejected` that answer different prompts: they differ in a turn of the {turns[0]['role']}")
        if not turns:
            raise BadRow(f"has an empty `{name}` answer: all its turns are in the other one" if chosen != rejected else EQUAL)
    return pair


EQUAL = "has two equal answers: nothing is preferred"


def _check(pair: Pair) -> None:
    if pair.chosen == pair.rejected:
        raise BadRow(EQUAL)
    for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"has a `{name}` that ends with a turn of the {turns[-1]['role']}, not with an answer")
