"""Answers that are criticised and revised against written principles (Bai et al. 2022, arXiv 2212.08073)."""

from __future__ import annotations

from typing import Any

from tools.synthesise.methods.answers import Row, row_of
from tools.synthesise.sources import Begun, read_rows
from tools.synthesise.work import Reply, Work


def critique(work: Work) -> list[Row]:
    """Return rows with the last revision of each answer, or pairs of it and the first answer."""
    begun = read_rows(work.settings)[: work.settings.rows]
    principles = work.prompts.lines("principles", work.of.principles, "critique.principles")
    work.planned = len(begun) * ((work.of.initial == "model") + 2 * work.of.rounds)
    first, replies = _first(work, begun)
    live = {number: text for number, text in enumerate(first) if text}
    used: dict[int, list[str]] = {number: [] for number in live}
    for round_ in range(work.of.rounds):
        live = _revised(work, begun, live, principles, used, replies, round_)
    rows = []
    for number, text in live.items():
        last = replies[number][-1]
        if text == first[number]:
            work.remove("revision: the same as the first answer")
        elif work.passes(begun[number].instruction, Reply(last.number, text, last.finish), refusals=False):
            rows.append(_row(work, begun[number], first[number], text, {"principles": used[number]}, replies[number]))
    return rows


def _first(work: Work, begun: list[Begun]) -> tuple[list[str], list[list[Reply]]]:
    """Return each first answer, "" where there is none, and the replies that it is in."""
    if work.of.initial == "row":
        lacking = sum(not one.answer for one in begun)
        work.removed.update({"row: without an answer": lacking} if lacking else {})
        return [one.answer for one in begun], [[] for _ in begun]
    replies = work.ask([one.turns for one in begun], "first answers")
    return [reply.text.strip() if work.is_whole(reply, "first answer") else "" for reply in replies], [[reply] for reply in replies]


def _revised(
    work: Work,
    begun: list[Begun],
    live: dict[int, str],
    principles: list[str],
    used: dict[int, list[str]],
    replies: list[list[Reply]],
    round_: int,
) -> dict[int, str]:
    """Return the answers after one more critique and revision; one whose critique or revision was cut is removed."""
    values: dict[int, dict[str, Any]] = {}
    for number, text in live.items():
        unused = [principle for principle in principles if principle not in used[number]] or principles
        principle = work.draw("principle", round_, number).choice(unused)
        used[number].append(principle)
        values[number] = {"principle": principle, "request": begun[number].instruction, "answer": text}
    critiques = work.ask([work.prompts.fill("critique", **value) for value in values.values()], f"critiques, {round_ + 1}")
    whole = {number: reply for number, reply in zip(values, critiques, strict=True) if work.is_whole(reply, "critique")}
    asked = [work.prompts.fill("revise", critique=reply.text.strip(), **values[number]) for number, reply in whole.items()]
    found: dict[int, str] = {}
    for number, reply in zip(whole, work.ask(asked, f"revisions, {round_ + 1}"), strict=True):
        if work.is_whole(reply, "revision"):
            replies[number] += [whole[number], reply]
            found[number] = reply.text.strip()
    return found


def _row(work: Work, one: Begun, first: str, last: str, origin: dict[str, Any], replies: list[Reply]) -> Row:
    origin = {"row": one.place, "first": first} | origin
    if not work.of.pairs:
        return row_of(work, one.turns, last, origin, *replies)
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (last, first))
    return {"prompt": one.turns, "chosen": chosen, "rejected": rejected, "from": work.origin(*replies, **origin)}
