"""Other words for the same: paraphrases, and translations there and back. The row's own answer stays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tools.synthesise.methods.answers import Row
from tools.synthesise.similar import Pool
from tools.synthesise.sources import Begun, read_rows
from tools.synthesise.work import Reply, Work

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LONGER, SLACK = 3, 40
"""A copy has at most three times the characters of its original, and 40 more; and at least a third."""

Copy = tuple[Reply, dict[str, object]]
"""A reply, and what its row says of it."""


def paraphrase(work: Work) -> list[Row]:
    """Return rows with the last turn of the user in other words, `copies` of each, and the rows themselves."""
    begun = _answered(work)
    work.planned = len(begun) * work.of.copies
    asked = [work.prompts.fill("paraphrase", text=one.instruction) for one in begun for _ in range(work.of.copies)]
    replies = work.ask(asked, "paraphrases")
    copies: list[Copy] = [(reply, {}) for reply in replies]
    return _rows(work, begun, copies, work.of.copies)


def back_translation(work: Work) -> list[Row]:
    """Return rows with the last turn of the user by way of each language, and the rows themselves."""
    begun, languages = _answered(work), work.of.languages
    pairs = [(one, language) for one in begun for language in languages]
    work.planned = 2 * len(pairs)
    asked = [work.prompts.fill("translate", text=one.instruction, language=language) for one, language in pairs]
    there = work.ask(asked, "translations")
    own = work.prompts.text("own_language.txt")
    back = iter(work.ask([work.prompts.fill("translate", text=reply.text, language=own) for reply in there if reply.text.strip()], "back"))
    both: list[Copy] = []
    for (_, language), reply in zip(pairs, there, strict=True):
        both.append((next(back) if reply.text.strip() else reply, {"language": language}))
    return _rows(work, begun, both, len(languages))


def _answered(work: Work) -> list[Begun]:
    """Return the rows of the source that have an answer, no more than there may be of all."""
    begun = read_rows(work.settings)
    found = [one for one in begun if one.answer.strip()]
    work.removed.update({"row: without an answer": len(begun) - len(found)} if len(found) < len(begun) else {})
    return found[: work.settings.rows]


def _rows(work: Work, begun: Sequence[Begun], copies: Sequence[Copy], each: int) -> list[Row]:
    """Return each row with those of its `each` copies that pass the filters."""
    rows: list[Row] = []
    for number, one in enumerate(begun):
        said = Pool()
        said.add(one.instruction)
        if work.of.originals:
            rows.append(_row(work, one, one.instruction, {"original": True}))
        for reply, more in copies[number * each : (number + 1) * each]:
            text = reply.text.strip()
            if not work.is_whole(reply, "copy"):
                continue
            if reason := _fault(work, one, text, said):
                work.remove(f"copy: {reason}")
                continue
            said.add(text)
            rows.append(_row(work, one, text, more, reply))
    return rows[: work.settings.rows]


def _fault(work: Work, one: Begun, text: str, said: Pool) -> str:
    """Return why a copy is removed: other numbers, a length that cannot be, or nearly the words that are there; "" where it stays."""
    if not text:
        return "no words"
    if work.of.numbers and Counter(NUMBER.findall(text)) != Counter(NUMBER.findall(one.instruction)):
        return "other numbers than the original"
    if not len(one.instruction) / LONGER <= len(text) <= len(one.instruction) * LONGER + SLACK:
        return "far longer or shorter than the original"
    return f"ROUGE-L of {work.of.most:g} or more" if said.reaches(text, work.of.most) is not None else ""


def _row(work: Work, one: Begun, text: str, more: dict[str, object], *replies: Reply) -> Row:
    """Return a row with a text in the place of its last turn of the user."""
    turns = [*one.turns[:-1], one.turns[-1] | {"content": text}, {"role": "assistant", "content": one.answer}]
    tools = {"tools": one.row["tools"]} if one.row.get("tools") else {}
    return {"messages": turns} | tools | {"from": work.origin(*replies, row=one.place, **more)}
