"""Refusals of harmful requests, balanced by answers to harmless ones that look like them, so that a model does not refuse by words."""

from __future__ import annotations

from tools.synthesise.filters import refuses
from tools.synthesise.methods.answers import Asked, Row, row_of, user
from tools.synthesise.prompts import listed
from tools.synthesise.work import Work

KINDS = ("harmful", "harmless")


def safety(work: Work) -> list[Row]:
    """Return as many refusals as answers of each category."""
    categories = work.prompts.lines("categories", work.of.categories, "safety.categories")
    work.planned = len(categories) * 2 * (1 + work.of.requests)
    made = {kind: _requests(work, kind, categories) for kind in KINDS}
    refusals, answers = (_answered(work, made[kind], kind) for kind in KINDS)
    rows: list[Row] = []
    for category in categories:
        pairs = [[row for row in found if row["from"]["category"] == category] for found in (refusals, answers)]
        count = min(map(len, pairs))
        if left := sum(map(len, pairs)) - 2 * count:
            work.removed["balance: more of one kind than of the other"] += left
        for refusal, answer in zip(*pairs, strict=False):
            rows += [refusal, answer]
    most = work.settings.rows
    return rows if most is None else rows[: most - most % 2]


def _requests(work: Work, kind: str, categories: list[str]) -> list[Asked]:
    """Return the requests of a kind that pass the filters, with the category of each."""
    asked = [work.prompts.fill(kind, category=category, count=work.of.requests) for category in categories]
    found: list[Asked] = []
    for category, reply in zip(categories, work.ask(asked, f"{kind} requests"), strict=True):
        texts = listed(reply.text, work.of.requests)
        if not texts:
            work.remove(f"{kind}: no list in the reply")
        origin = {"kind": kind, "category": category, "request": reply.number}
        found += [(user(text), origin) for text in texts if work.takes(text)]
    return found


def _answered(work: Work, asked: list[Asked], kind: str) -> list[Row]:
    """Return rows whose answers are what their kind wants: a refusal, or anything but one."""
    texts = [str(turns[-1]["content"]) for turns, _ in asked]
    prompts = [work.prompts.fill("refuse", request=text) if kind == "harmful" else text for text in texts]
    rows = []
    for (turns, origin), reply in zip(asked, work.ask(prompts, f"answers, {kind}"), strict=True):
        text = reply.text.strip()
        if not work.passes(str(turns[-1]["content"]), reply, refusals=False):
            continue
        if refuses(text) != (kind == "harmful"):
            work.remove("harmful: the answer is not a refusal" if kind == "harmful" else "harmless: the answer refuses")
            continue
        rows.append(row_of(work, turns, text, origin, reply))
    return rows
