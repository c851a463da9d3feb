"""Where the assistant turns of a long row are, in one rendering for all where turns.py takes one and more for each.

All turns are replaced at once, and turns of others are marked, which says where these are in both renderings. Between two
marks is one turn, and what turns.py says of the whole holds there. Turns that do not fit are left to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from trainers.data.formats import BadRow, Message
from trainers.data.parts import PRIVATE, MarkedRow, unmarked, unused_characters
from trainers.data.template import try_fill
from trainers.data.turns import Conversation, Place, difference, has_thought, own_text_of_call

MANY = 3
"""Assistant turns from which this takes fewer renderings."""


def all_at_once(row: Conversation, numbers: list[int], marked: MarkedRow, text: str) -> dict[int, Place]:
    """Return what `own_text` would of the turns that are alone between two marks, from one rendering with all turns replaced.

    `text` is the rendering of `marked`. Turns that this cannot tell are left out.
    """
    probes = dict(zip(unused_characters(text + "".join(marked.marks), len(numbers)), numbers, strict=True))
    probed, calls = _fill_with_probes(row, marked, probes), []
    if probed is None:
        calls = [number for number in numbers if row.messages[number].get("tool_calls")]
        probed = _fill_with_probes(row, marked, {probe: number for probe, number in probes.items() if number not in calls})
    return {} if probed is None else _between_anchors(row, marked, text, probed, probes) | _calls(row, calls, marked, text)


def _fill_with_probes(row: Conversation, marked: MarkedRow, probes: dict[str, int]) -> str | None:
    messages = list(marked.messages)
    for probe, number in probes.items():
        messages[number] = {"role": "assistant", "content": probe}
    return try_fill(row.template, messages, marked.tools)


def _between_anchors(row: Conversation, marked: MarkedRow, text: str, probed: str, probes: dict[str, int]) -> dict[int, Place]:
    counts = [Counter(PRIVATE.findall(whole)) for whole in (text, probed)]
    anchors = {mark for mark, part in marked.marks.items() if part.is_anchor and all(count[mark] == 1 for count in counts)}
    others = marked.marks.keys() - anchors
    pieces, probed_pieces = _cut(unmarked(text, others), anchors), _cut(unmarked(probed, others), anchors)
    if [mark for mark, _ in pieces] != [mark for mark, _ in probed_pieces]:
        return {}
    found: dict[int, Place | None] = {}
    at = 0
    for (_, piece), (_, probed_piece) in zip(pieces, probed_pieces, strict=True):
        inside = set(probed_piece) & probes.keys()
        for probe in inside:
            number = probes[probe]
            is_alone = len(inside) == 1 and number not in found
            found[number] = _place_in(piece, probed_piece, probe, row.messages[number], at) if is_alone else None
        at += len(piece)
    return {number: place for number, place in found.items() if place is not None}


def _cut(text: str, anchors: set[str]) -> list[tuple[str, str]]:
    """Cut a text at each of these characters; return each piece with the one before it."""
    places = [found.start() for found in PRIVATE.finditer(text) if found.group() in anchors]
    bounds = zip([-1, *places], [*places, len(text)], strict=True)
    return [(text[start] if start >= 0 else "", text[start + 1 : end]) for start, end in bounds]


def _place_in(piece: str, probed: str, probe: str, message: Message, at: int) -> Place | None:
    """Return a turn's place from a piece of the row that begins `at`, and the same with the probe; None where more differs than the turn.

    What a call or a thought brings with it may differ too.
    """
    start, text_end, is_exact = difference(piece, probed, probe)
    is_plain = not message.get("tool_calls") and not has_thought(message)
    if start >= text_end or (is_plain and not (is_exact and piece.endswith(probed[probed.rindex(probe) + 1 :]))):
        return None
    return Place(at + start, at + text_end, not is_exact or has_thought(message))


@dataclass(frozen=True)
class Call:
    """A turn of tool calls between what opens it and what follows."""

    lead: str
    """From the turn's start to the name of its first function."""
    last: str
    """Its last character."""
    closing: str
    """From the turn's end to the result that follows."""


def _calls(row: Conversation, numbers: list[int], marked: MarkedRow, text: str) -> dict[int, Place]:
    """Return the places of tool calls that a template takes no plain turn for: they lie like the first of their kind.

    Of one kind are those that are followed by results and then by turns of one kind.
    """
    marks = [found for found in PRIVATE.finditer(text) if found.group() in marked.marks]
    written = [(found.start() - before, found.group()) for before, found in enumerate(marks)]
    counts = Counter(mark for _, mark in written)
    at = {marked.marks[mark].path: (position, marked.marks[mark]) for position, mark in written if counts[mark] == 1}
    firsts: dict[bool, Call | None] = {}
    found = {}
    for number in numbers:
        way = _way_on(row.messages[number + 1 :])
        name, result = at.get(("messages", number, "tool_calls", 0, "function", "name")), at.get(("messages", number + 1, "content"))
        if way is None or name is None or result is None:
            continue
        name_at, result_at = name[0] - name[1].middle, result[0] - (len(result[1].text) + 1) // 2
        if way not in firsts:
            firsts[way] = _measure(row, number, name_at, result_at)
        first = firsts[way]
        if first is not None:
            start, end = name_at - len(first.lead), result_at - len(first.closing)
            if start < end and row.text[start:name_at] == first.lead and row.text[end - 1 : result_at] == first.last + first.closing:
                found[number] = Place(start, end, False)
    return found


def _way_on(messages: list[Message]) -> bool | None:
    """Tell whether results are followed by more tool calls; None where they are not followed by an assistant turn."""
    after = next((message for message in messages if message["role"] != "tool"), None)
    if after is None or after is messages[0] or after["role"] != "assistant":
        return None
    return bool(after.get("tool_calls"))


def _measure(row: Conversation, number: int, name_at: int, result_at: int) -> Call | None:
    """Return a turn of tool calls as `own_text` finds it; None where that replaces it by a plain turn, or finds something else."""
    probe = unused_characters(row.text, 1)[0]
    messages = list(row.messages)
    messages[number] = {"role": "assistant", "content": probe}
    if try_fill(row.template, messages, row.tools) is not None:
        return None
    try:
        start, end = own_text_of_call(row, number, name_at)
    except BadRow:
        return None
    if not start <= name_at <= end <= result_at:
        return None
    return Call(row.text[start:name_at], row.text[end - 1 : end], row.text[end:result_at])
