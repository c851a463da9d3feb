"""A row on its way through the steps: where it came from, its line as it was, and what of it is text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.config.choices import Layout, PairsOf
from trainers.data.fields import READ
from trainers.data.formats import BadRow, Message, Row, strict_json, to_messages, to_text
from trainers.data.formats import first_prompt as first_user_turn
from trainers.data.preferences import to_preference
from trainers.data.ranked import to_pairs
from trainers.data.scored import LABEL, SCORE

STRUCTURE = ("role", "from", "type", "id", "tool_call_id", "name")
"""Keys whose values say what a text is, and are not text."""


@dataclass
class Item:
    """A row; `raw` is its JSON, to the byte as it was found until a step changes it."""

    file: int
    """Number of the input file."""
    line: int
    raw: bytes
    bad: str = ""
    """Why it could not be read; the row is None then."""
    row: Row = field(default_factory=dict)
    layout: Layout = Layout.auto

    def replace(self, row: Row) -> None:
        """Take a changed row."""
        self.row, self.raw = row, to_json(row)


@dataclass(frozen=True)
class View:
    """What a row says: the prompt with all that comes before the last answer, the answers, and everything."""

    prompt: str
    answers: tuple[str, ...]
    """The last assistant turn; of a pair, the chosen and the rejected one; of a ranked list, the best and the worst; of a text, none."""

    @property
    def text(self) -> str:
        """Return all of it."""
        return "\n".join((self.prompt, *self.answers))


def to_json(row: Any) -> bytes:
    """Return a row as one line of JSON; raises BadRow for what JSON has no word for."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"has half of a surrogate pair at character {error.start}, or a byte that is not UTF-8") from None
    except (TypeError, ValueError) as error:
        raise BadRow(f"holds what JSON has no word for: {error}") from None


def item_of(number: int, line: int, data: Any) -> Item:
    """Return a row of an input file as it was read: bytes of JSON, an object, or why it could not be read."""
    if isinstance(data, BadRow):
        return Item(number, line, b"", str(data))
    try:
        return Item(number, line, data.strip() if isinstance(data, bytes) else to_json(data))
    except BadRow as error:
        return Item(number, line, repr(data).encode(errors="replace").replace(b"\n", b" "), str(error))


def write_items(file: Path, items: Iterable[Item]) -> None:
    """Write rows between two stages: where each was found, its layout, what was wrong with it, and its JSON."""
    with file.open("wb") as stream:
        for item in items:
            bad = " ".join(item.bad.split()).encode(errors="replace")
            stream.write(b"%d\t%d\t%b\t%b\t%b\n" % (item.file, item.line, item.layout.encode(), bad, item.raw))


def read_items(file: Path) -> Iterator[Item]:
    """Yield the rows of `write_items`, not yet parsed."""
    with file.open("rb") as stream:
        for line in stream:
            number, at, layout, bad, raw = line.rstrip(b"\n").split(b"\t", 4)
            yield Item(int(number), int(at), raw, bad.decode(), layout=Layout(layout.decode()))


def parsed(item: Item) -> Item:
    """Return a row with its JSON read."""
    item.row = strict_json(item.raw.decode())
    return item


def view(row: Row, layout: Layout) -> View:
    """Return what a row says; raises BadRow where it has not the layout."""
    if layout is Layout.text:
        return View(to_text(row), ())
    if layout is Layout.preference:
        pair = to_preference(row)
        return View(_joined(pair.prompt), (_joined(pair.chosen), _joined(pair.rejected)))
    if layout is Layout.ranked:
        prompt, answers = to_pairs(row, PairsOf.best_worst)
        return View(_joined(prompt), tuple(map(_joined, answers)))
    messages = _conversation(row, layout)
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return View(_joined(messages), ()) if last is None else View(_joined(messages[:last]), (said(messages[last]),))


def _conversation(row: Row, layout: Layout) -> list[Message]:
    """Return the turns of a row; one with a label or a score needs no answer."""
    return to_messages(row, layout, answered=LABEL not in row and SCORE not in row)


def first_prompt(row: Row, layout: Layout) -> str:
    """Return what a conversation begins with, by which its continuations belong together; of a text, the text."""
    if layout is Layout.text:
        return to_text(row)
    if layout is Layout.ranked:
        return first_user_turn(to_pairs(row, PairsOf.best_worst)[0])
    return first_user_turn(to_preference(row).prompt if layout is Layout.preference else _conversation(row, layout))


def said(message: Message) -> str:
    """Return all that a turn says: reasoning, content and calls of tools."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return "\n".join(part for part in (message.get("reasoning_content", ""), message.get("content") or "", calls) if part)


def _joined(messages: list[Message]) -> str:
    if len(messages) == 1 and messages[0]["role"] in ("user", "assistant"):
        return said(messages[0])
    return "\n".join(f"{message['role']}: {said(message)}" for message in messages)


def map_text(row: Row, layout: Layout, change: Callable[[str], str], everywhere: bool = False) -> Row:
    """Return a row with `change` applied to its texts: those that the layout reads, or `everywhere` all of them."""
    return {key: _mapped(value, change) if everywhere or key in READ[layout] else value for key, value in row.items()}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(held, change) for held in value]
    if isinstance(value, dict):
        return {key: held if key in STRUCTURE else _mapped(held, change) for key, held in value.items()}
    return value
