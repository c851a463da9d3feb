"""Where each assistant turn of a rendered row is, found in the template's own renderings and never in token ids.

A turn is found by rendering the conversation again with that turn replaced by one character that occurs nowhere
else: what the two renderings share at the start and at the end is the template's, and what lies
between is the turn's own. This needs nothing of a generation prompt, which for several templates is not a prefix of the
whole rendering.

That is a rendering a turn, and more for its end: at_once.py finds most turns of a long row in one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trainers.data.formats import BadRow, Message
from trainers.data.parts import unused_characters
from trainers.data.template import Span, Template, fill


@dataclass(frozen=True)
class Conversation:
    """A row, its template and its rendering."""

    template: Template
    messages: list[Message]
    tools: list[Any] | None
    text: str


@dataclass(frozen=True)
class Place:
    """Where a turn's own text is, and whether a generation prompt may have a part of it."""

    start: int
    end: int
    may_begin_earlier: bool


@dataclass(frozen=True)
class Turn:
    """Where an assistant turn's own text lies, and where the end-of-turn text after it ends (None: there is none)."""

    start: int
    text_end: int
    end: int | None


def find_turns(row: Conversation, numbers: list[int], found: dict[int, Place]) -> list[Turn]:
    """Return the assistant turns of these numbers, the places of some being `found` already.

    What the template puts before and after those is measured once for each way of turn, in the short row that ends with the first.
    """
    headers: dict[str, str] = {}
    tails: dict[tuple[bool, ...], tuple[str, str]] = {}
    turns = []
    for number in numbers:
        place = found[number] if number in found else own_text(row, number)
        start = place.start
        if place.may_begin_earlier:
            follows = row.messages[number - 1]["role"] if number and number in found else str(number)
            if follows not in headers:
                headers[follows] = _header(row, number)
            start = _after_header(row.text, headers[follows], start)
        if start >= place.end:
            raise BadRow(f"turn {number + 1} is left out by the chat template")
        turns.append(Turn(start, place.end, _end(row, number, place, tails if number in found else {})))
    return turns


def _end(row: Conversation, number: int, place: Place, tails: dict[tuple[bool, ...], tuple[str, str]]) -> int | None:
    """Return where a turn's end-of-turn text ends, by the tail of an earlier turn where it gives the same text."""
    message = row.messages[number]
    way = (bool(message.get("tool_calls")), bool(message.get("content")), place.may_begin_earlier)
    if way in tails and number < len(row.messages) - 1:
        tail, wanted = tails[way]
        end = _turn_end(row, place.end, tail)
        if row.text[place.end : end] == wanted:
            return end
    tail = _tail(row, number, place.end)
    end = _turn_end(row, place.end, tail)
    if end is not None:
        tails[way] = tail, row.text[place.end : end]
    return end


def own_text(row: Conversation, number: int) -> Place:
    """Find where the own text of assistant turn `number` is, by a rendering with a probe in its place, or two for a turn of tool calls."""
    probe = unused_characters(row.text, 1)[0]
    try:
        probed = fill(row.template, _replaced(row.messages, number, {"role": "assistant", "content": probe}), row.tools)
        start, text_end, is_exact = difference(row.text, probed, probe)
        return Place(start, text_end, not is_exact or has_thought(row.messages[number]))
    except BadRow:
        if not row.messages[number].get("tool_calls"):
            raise
        return Place(*own_text_of_call(row, number), False)


def difference(text: str, probed: str, probe: str) -> tuple[int, int, bool]:
    """Return start and end of what `text` has where `probed` has the probe, and whether the fronts agree up to the probe."""
    if probe not in probed:
        raise BadRow("has an assistant turn that the chat template leaves out")
    front, back = probed[: probed.index(probe)], probed[probed.rindex(probe) + 1 :]
    start = len(front) if text.startswith(front) else shared_length(text, front)
    shared = len(back) if text.endswith(back) else shared_length(text[::-1], back[::-1])
    return start, len(text) - shared, start == len(front)


def has_thought(message: Message) -> bool:
    """Tell whether a turn has reasoning, in a field of its own or in its content."""
    return bool(message.get("reasoning_content")) or "</think>" in message.get("content", "")


def _header(row: Conversation, number: int) -> str:
    """Return what the generation prompt of turn `number` adds; empty where the template refuses one there."""
    try:
        before, prompted = (fill(row.template, row.messages[:number], row.tools, add_generation_prompt=prompt) for prompt in (False, True))
    except BadRow:
        return ""
    return prompted[shared_length(before, prompted) :]


def _after_header(text: str, header: str, start: int) -> int:
    """Move `start` to where the generation prompt ends, so that an opening `<think>` of the row's own is trained."""
    anchor = header.splitlines(keepends=True)[0] if header else ""
    at = text.rfind(anchor, 0, start) if anchor else -1
    return start if at < 0 else min(start, at + shared_length(header, text[at : at + len(header)]))


def own_text_of_call(row: Conversation, number: int, name_at: int | None = None) -> Span:
    """Find a turn of tool calls where the template refuses a plain turn in its place.

    The turn is measured in the rendering that ends with it, and found in the whole one by the name of its first function, which is
    looked for where `name_at` does not say.
    """
    template, messages, tools, text = row.template, row.messages, row.tools, row.text
    probe = unused_characters(text, 1)[0]
    call = messages[number]["tool_calls"][0]
    renamed = {**call, "function": {**call["function"], "name": probe}}
    named = {**messages[number], "tool_calls": [renamed, *messages[number]["tool_calls"][1:]]}
    ending = messages[: number + 1]
    short = fill(template, ending, tools)
    start, text_end, _ = difference(short, fill(template, _replaced(ending, number, {"role": "assistant", "content": probe}), tools), probe)
    name_short, _, _ = difference(short, fill(template, _replaced(ending, number, named), tools), probe)
    if name_at is None:
        name_at, _, _ = difference(text, fill(template, _replaced(messages, number, named), tools), probe)
    found = name_at - (name_short - start)
    if text[found : found + text_end - start] != short[start:text_end]:
        raise BadRow(f"turn {number + 1} cannot be told apart in the chat template's rendering")
    return found, found + text_end - start


def _turn_end(row: Conversation, text_end: int, tail: str) -> int | None:
    """Return where the end-of-turn text after a turn ends: the first token of the tokenizer's own, else the first line.

    A token counts only where it also follows when the turn is the last one, in `tail`: what opens the next turn does not end this.
    """
    text = row.text
    found = _next_token(row.template, text, text_end)
    if found is not None and found.group() in text[found.start() : text_end] + tail:
        return found.end()
    after = text[text_end : text_end + len(tail)]
    shared = after[: shared_length(after, tail)]
    line = shared.lstrip().split("\n")[0].rstrip()
    is_whole = "\n" in shared.lstrip() or len(shared) in (len(text) - text_end, len(tail))
    return text_end + shared.index(line) + len(line) if line and is_whole else None


def _tail(row: Conversation, number: int, text_end: int) -> str:
    """Return what the template puts after turn `number` where it is the last one."""
    if number == len(row.messages) - 1:
        return row.text[text_end:]
    messages = row.messages[: number + 1]
    text = fill(row.template, messages, row.tools)
    probe = unused_characters(text, 1)[0]
    probed = fill(row.template, [*messages[:-1], {"role": "assistant", "content": probe}], row.tools)
    return text[difference(text, probed, probe)[1] :]


def _next_token(template: Template, text: str, text_end: int) -> re.Match[str] | None:
    """Return the first token that ends after `text_end` with only blanks between; it may begin before it."""
    if template.tokens is None:
        return None
    for found in template.tokens.finditer(text, max(0, text_end - 64)):
        if found.end() > text_end:
            return found if not text[text_end : found.start()].strip() else None
    return None


def _replaced(messages: list[Message], number: int, message: Message) -> list[Message]:
    return [*messages[:number], message, *messages[number + 1 :]]


def shared_length(one: str, other: str) -> int:
    """Return how many characters two strings have in common at the front."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[low:middle], low) else (low, middle - 1)
    return low
