"""The parts of a row that a chat template is to write: tools, system text, reasoning and the like, and which of them it has left out.

A part is found by a mark: a character that occurs nowhere else, put into the middle of it. The marked row is rendered once
more. A part whose mark is missing was left out, however short it is, and whether or not the template trims or escapes it.
Where the rendering without its marks is not the row's own, a mark has changed what the template does: then the text is
searched for the parts themselves.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from trainers.data.formats import Message

KINDS = {
    "tools": "tools",
    "calls": "tool calls",
    "reasoning": "reasoning",
    "earlier": "reasoning of earlier turns",
    "documents": "documents",
    "system": "system text",
    "names": "names",
    "asked": "user text",
    "results": "tool results",
    "said": "text next to tool calls",
}
"""What a template may leave out, and how it is called in messages."""
CONTENT_KINDS = {"system": "system", "developer": "system", "user": "asked", "tool": "results"}
Path = tuple[str | int, ...]
PRIVATE_CODES = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd]")
"""The characters that marks are taken from. Classes of many single ones are slow to match."""


@dataclass(frozen=True)
class Part:
    """A stretch of a string somewhere in a row."""

    kind: str
    path: Path
    """Keys and indices that lead to the string, from {"messages": ..., "tools": ..., "documents": ...}."""
    text: str
    """The stretch, without blanks around it."""
    middle: int
    """Where in the string its mark goes, in characters."""
    is_anchor: bool = False
    """It is the content of a turn that is not the assistant's."""


@dataclass(frozen=True)
class MarkedRow:
    """A row with a mark in each of its parts."""

    messages: list[Message]
    tools: list[Any] | None
    documents: Any
    marks: dict[str, Part]


@dataclass
class LeftOut:
    """Of how many rows a template leaves a part out, by kind of part."""

    rows: Counter[str] = field(default_factory=Counter)
    """Rows that have such a part."""
    missing: Counter[str] = field(default_factory=Counter)
    """Rows of which one is left out."""
    first: dict[str, str] = field(default_factory=dict)
    """File and line of the first of these."""

    def add(self, kinds: dict[str, bool], place: str) -> None:
        """Count a row's kinds, each with whether a part of it is missing."""
        self.rows.update(kinds)
        for kind in (kind for kind, is_missing in kinds.items() if is_missing):
            self.missing[kind] += 1
            self.first.setdefault(kind, place)

    def update(self, other: LeftOut) -> None:
        """Add the counts of rows that come after these."""
        self.rows.update(other.rows)
        self.missing.update(other.missing)
        self.first = other.first | self.first


def parts_of(messages: list[Message], tools: list[Any] | None, documents: Any, trained: Collection[int]) -> list[Part]:
    """Return what a template should write of a row; of reasoning, only that of the `trained` turns (their numbers from 0).

    A model that answers sees no more of earlier reasoning than its template shows it, so nothing is lost where the turn is not trained.
    """
    found = [part for number, tool in enumerate(tools or []) for part in _of_tool(tool, number)]
    for path, text in _strings(documents, ("documents",)):
        found.extend(_part("documents", path, text))
    functions = {call["function"]["name"] for message in messages for call in message.get("tool_calls") or []}
    for number, message in enumerate(messages):
        here: Path = ("messages", number)
        name = message.get("name")
        if isinstance(name, str) and name != message["role"] and name not in functions:
            found.extend(_part("names", (*here, "name"), name))
        if message["role"] == "assistant":
            reasoning = None if number not in trained else "reasoning" if number == len(messages) - 1 else "earlier"
            found.extend(_of_assistant(message, here, reasoning))
        else:
            found.extend(_part(CONTENT_KINDS[message["role"]], (*here, "content"), message.get("content"), is_anchor=True))
    return found


def _of_tool(tool: Any, number: int) -> Iterator[Part]:
    function, here = (tool["function"], ("function",)) if isinstance(tool.get("function"), dict) else (tool, ())
    for key in ("name", "description"):
        yield from _part("tools", ("tools", number, *here, key), function.get(key))


def _of_assistant(message: Message, here: Path, reasoning: str | None) -> Iterator[Part]:
    content, calls = message.get("content") or "", message.get("tool_calls") or []
    if reasoning:
        yield from _part(reasoning, (*here, "reasoning_content"), message.get("reasoning_content"))
    if "</think>" in content:
        end = content.index("</think>")
        start = content.index("<think>") + len("<think>") if "<think>" in content[:end] else 0
        if reasoning:
            yield from _part(reasoning, (*here, "content"), content, start, end)
    elif calls:
        yield from _part("said", (*here, "content"), content)
    for number, call in enumerate(calls):
        function = (*here, "tool_calls", number, "function")
        yield from _part("calls", (*function, "name"), call["function"]["name"])
        for path, value in _strings(call["function"]["arguments"], (*function, "arguments")):
            yield from _part("calls", path, value)


def _strings(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(inside, (*path, key))


def _part(kind: str, path: Path, value: Any, start: int = 0, end: int | None = None, is_anchor: bool = False) -> Iterator[Part]:
    """Yield the part of a string that is not blank."""
    if isinstance(value, str) and value[start:end].strip():
        stretch = value[start:end]
        text = stretch.strip()
        begin = start + len(stretch) - len(stretch.lstrip())
        yield Part(kind, path, text, begin + (len(text) + 1) // 2, is_anchor)


def mark(messages: list[Message], tools: list[Any] | None, documents: Any, parts: list[Part], text: str) -> MarkedRow:
    """Return a copy of a row with a mark in each part; `text` is its rendering, which has none of the marks."""
    marks = dict(zip(unused_characters(text, len(parts)), parts, strict=True))
    row: Any = {"messages": messages, "tools": tools, "documents": documents}
    copied: set[Path] = set()
    for character, part in marks.items():
        holder = row
        for depth, key in enumerate(part.path[:-1], 1):
            if part.path[:depth] not in copied:  # only what leads to a part is copied
                copied.add(part.path[:depth])
                holder[key] = holder[key].copy()
            holder = holder[key]
        whole = holder[part.path[-1]]
        holder[part.path[-1]] = whole[: part.middle] + character + whole[part.middle :]
    return MarkedRow(row["messages"], row["tools"], row["documents"], marks)


def unmarked(text: str, marks: Collection[str]) -> str:
    """Return a text without these characters."""
    kept = set(marks)
    return PRIVATE.sub(lambda found: "" if found.group() in kept else found.group(), text)


def left_out(parts: Collection[Part], missing: Collection[Part]) -> dict[str, bool]:
    """Return for each kind that a row has whether a part of it is missing."""
    return {part.kind: False for part in parts} | {part.kind: True for part in missing}


def search(parts: list[Part], text: str) -> list[Part]:
    """Return the parts that a text has neither as they are, nor as JSON escapes them, nor with other blanks."""
    missing = [part for part in parts if part.text not in text and not any(form in text for form in _escaped(part.text))]
    squeezed = "".join(text.split()) if missing else ""
    return [part for part in missing if "".join(part.text.split()) not in squeezed]


def _escaped(text: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]


def unused_characters(text: str, count: int) -> list[str]:
    """Return characters for private use that a text does not have."""
    used, private = set(text), chain(*PRIVATE_CODES)
    return list(islice((chr(code) for code in private if chr(code) not in used), count))
