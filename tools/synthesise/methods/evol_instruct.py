"""Instructions that become harder round by round (WizardLM; Xu et al. 2023, arXiv 2304.12244).

Each instruction takes one operation a round: it is made harder in depth, or a rarer one of its field is written (breadth). An evolution is
eliminated where it teaches nothing (section 3.2). Its instruction then waits, as it was, for the next round.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.synthesise.filters import NO_WORD
from tools.synthesise.methods.answers import Row, row_of, user
from tools.synthesise.similar import rouge_l
from tools.synthesise.sources import read_rows
from tools.synthesise.work import Reply, Work
from trainers.data.formats import Message

COPIED = ("new instruction", "given instruction", "#instruction", "rewritten instruction", "새 지시:", "주어진 지시")
"""Words of prompts that an evolved instruction does not have."""
EQUAL = ("equal", "같다", "같습니다", "같은")
UNCHANGED = 0.95
"""ROUGE-L from which an evolved instruction says what its own said."""
SORRY, SORRY_WORDS = ("sorry", "죄송"), 80


@dataclass(frozen=True)
class Evolved:
    """An instruction with what came before it in its conversation, where it is from, and what made it."""

    turns: list[Message]
    text: str
    place: dict[str, object]
    operations: list[str] = field(default_factory=list)
    parent: str = ""

    @property
    def asked(self) -> list[Message]:
        """Return the conversation that ends with the instruction."""
        return [*self.turns, *user(self.text)]


def evol_instruct(work: Work) -> list[Row]:
    """Return rows of all instructions that were evolved, round by round, and of those that they began with."""
    begun = [Evolved(one.turns[:-1], one.instruction, one.place) for one in read_rows(work.settings)]
    for one in begun:
        work.pool.add(one.text)
    work.planned = len(begun) * ((2 + work.of.compare) * work.of.rounds + work.of.originals)
    rows = _answered(work, begun, begun)[0] if work.of.originals else []
    live = begun
    for number in range(work.of.rounds):
        if work.is_full(rows):
            break
        evolved = _evolve(work, live, number)
        found, live = _answered(work, evolved, live)
        rows += found
    return rows[: work.settings.rows]


def _evolve(work: Work, live: list[Evolved], number: int) -> list[Evolved | None]:
    """Return what each instruction becomes, None where that was eliminated."""
    drawn = [work.draw("operation", number, at).choice(work.of.operations) for at in range(len(live))]
    asked = [work.prompts.fill(name, instruction=one.text) for name, one in zip(drawn, live, strict=True)]
    replies = work.ask(asked, f"evolutions of round {number + 1}")
    found: list[Evolved | None] = []
    for one, name, reply in zip(live, drawn, replies, strict=True):
        text = reply.text.strip()
        stays = work.is_whole(reply, "evolution") and not _fault(work, one, text, name) and work.takes(text)
        found.append(Evolved(one.turns, text, one.place, [*one.operations, name], one.text) if stays else None)
    return _unequal(work, live, found) if work.of.compare else found


def _fault(work: Work, one: Evolved, text: str, operation: str) -> bool:
    """Tell whether an evolution is eliminated for its text alone, and count why."""
    lower = text.lower()
    reason = ""
    if any(words in lower and words not in one.text.lower() for words in COPIED):
        reason = "has words of the prompt"
    elif operation != "breadth" and rouge_l(one.text, text) >= UNCHANGED:
        reason = "is what it was"
    if reason:
        work.remove(f"eliminated: {reason}")
    return bool(reason)


def _unequal(work: Work, live: list[Evolved], found: list[Evolved | None]) -> list[Evolved | None]:
    """Return the evolutions that ask for something else than their instructions, as the model itself says."""
    pairs = [(one, new) for one, new in zip(live, found, strict=True) if new is not None]
    asked = [work.prompts.fill("equal", first=one.text, second=new.text) for one, new in pairs]
    replies = iter(work.ask(asked, "comparisons", likeliest=True))
    kept: list[Evolved | None] = []
    for new in found:
        if new is not None and next(replies).text.strip().lower().lstrip("*\"' ").startswith(EQUAL):
            work.remove("eliminated: equal to its instruction, as the model says")
            new = None
        kept.append(new)
    return kept


def _answered(work: Work, evolved: list[Evolved] | list[Evolved | None], live: list[Evolved]) -> tuple[list[Row], list[Evolved]]:
    """Return the rows of a round, and the instructions of the next: those with a good answer, else what they were."""
    there = [one for one in evolved if one is not None]
    replies = iter(work.ask([one.asked for one in there], "answers"))
    rows, following = [], []
    for new, old in zip(evolved, live, strict=True):
        reply = None if new is None else next(replies)
        if new is None or reply is None or not _teaches(work, new, reply):
            following.append(old)
            continue
        following.append(new)
        origin = {"row": new.place, "operations": new.operations, "instruction": new.parent} if new.operations else {"row": new.place}
        rows.append(row_of(work, new.asked, reply.text.strip(), origin, reply))
    return rows, following


def _teaches(work: Work, one: Evolved, reply: Reply) -> bool:
    """Tell whether an answer is worth a row; else count why the evolution is eliminated."""
    text = reply.text.lower()
    reason = ""
    if NO_WORD.fullmatch(text) and not reply.failure:
        reason = "the answer has no word in it"
    elif any(word in text for word in SORRY) and len(text.split()) < SORRY_WORDS:
        reason = "the answer says sorry, and little more"
    if reason:
        work.remove(f"eliminated: {reason}")
    return not reason and work.passes(one.text, reply)
