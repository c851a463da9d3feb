"""Questions and answers from documents: each quotes the passage that it comes from, which a program checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.synthesise.methods.answers import Row, row_of, user
from tools.synthesise.prompts import marked
from tools.synthesise.sources import Document, passages, read_documents
from tools.synthesise.work import Reply, Work
from trainers.generate.request import STOP

QUESTION, QUOTE, ANSWER = "Question|질문", "Quote|인용", "Answer|답|답변"
BEGINS = re.compile(r"^[ \t*#]*(?:\d+[.)][ \t]*)?[*]*(?:Question|질문)[^\n:：]{0,5}[:：]", re.MULTILINE | re.IGNORECASE)
LEAST = 8
"""Characters of a quote that shows anything."""


@dataclass(frozen=True)
class Found:
    """A question with its quote and answer, and the passage that it is from."""

    question: str
    quote: str
    answer: str
    passage: str
    number: int
    """Of the passage, among all."""
    reply: Reply


def documents(work: Work) -> list[Row]:
    """Return rows of the questions whose quotes are in their passages."""
    there = [(document, text) for document in read_documents(work.settings) for text in passages(document, work.of.characters)]
    work.planned = len(there)
    rows = []
    for one in questions(work, there)[: work.settings.rows]:
        prompt = work.prompts.fill("context", passage=one.passage, question=one.question) if work.of.context else one.question
        rows.append(row_of(work, user(prompt), one.answer, {"document": there[one.number][0].place, "quote": one.quote}, one.reply))
    return rows


def questions(work: Work, there: Sequence[tuple[Document, str]]) -> list[Found]:
    """Return the questions on passages whose quotes are in them."""
    asked = [work.prompts.fill("document", passage=text, count=work.of.questions) for _, text in there]
    found: list[Found] = []
    for number, reply in enumerate(work.ask(asked, "questions")):
        if reply.failure:
            work.remove("questions: failed")
            continue
        for block in _blocks(reply, work):
            if (one := _found(work, there[number][1], number, block, reply)) is not None:
                found.append(one)
    return found


def _blocks(reply: Reply, work: Work) -> list[str]:
    """Return the parts of a reply that begin with a question."""
    starts = [found.start() for found in BEGINS.finditer(reply.text)]
    if not starts:
        work.remove("questions: no question in the reply")
    ends = [*starts[1:], len(reply.text)]
    return [re.sub(r"^[ \t*#]*\d+[.)][ \t]*", "", reply.text[at:end]) for at, end in zip(starts, ends, strict=False)][: work.of.questions]


def _found(work: Work, passage: str, number: int, block: str, reply: Reply) -> Found | None:
    """Return the question of a part of a reply, None where a filter removes it."""
    is_last = reply.text.rstrip().endswith(block.rstrip())
    parts = marked(block, QUESTION, QUOTE, ANSWER)
    if parts is None:
        work.remove("questions: no quote or no answer")
        return None
    question, quote, answer = parts
    quote = quote.strip("\"'“”‘’「」")
    if not quoted(quote, passage):
        work.remove("questions: the quote is not in the passage")
        return None
    whole = Reply(reply.number, answer, reply.finish if is_last else STOP)
    if not work.passes(question, whole) or not work.takes(question):
        return None
    return Found(question, quote, answer, passage, number, reply)


def quoted(quote: str, passage: str) -> bool:
    """Tell whether a quote is in a passage, whatever its blanks; one that is too short shows nothing."""
    words = " ".join(quote.split())
    return len(words) >= LEAST and words in " ".join(passage.split())
