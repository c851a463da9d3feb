"""Questions among documents of which one answers them, and others that do not (RAFT; Zhang et al. 2024, arXiv 2403.10131).

The answer quotes the golden passage and reasons from it. Distractors are the passages that BM25 finds nearest to the question. In a share
of the rows the golden passage is left out, and the answer says so or is the plain answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.synthesise.bm25 import Index
from tools.synthesise.methods.answers import Row, row_of, user
from tools.synthesise.methods.documents import ANSWER, QUOTE, Found, questions, quoted
from tools.synthesise.prompts import marked
from tools.synthesise.sources import Document, passages, read_documents
from tools.synthesise.work import Reply, Work

REASONING = "Reasoning|추론"


@dataclass(frozen=True)
class Answered:
    """A question with the quote, the reasoning and the answer."""

    found: Found
    quote: str
    reasoning: str
    answer: str
    reply: Reply


def raft(work: Work) -> list[Row]:
    """Return a row for each question that has an answer with a quote of its passage; with `levels` one for each number of distractors.

    No question loses a part of its rows to the limit on rows.
    """
    there = [(document, text) for document in read_documents(work.settings) for text in passages(document, work.of.characters)]
    work.planned = len(there) * (1 + work.of.questions)
    found = questions(work, there)
    index = Index([text for _, text in there])
    rows: list[Row] = []
    for one in _answered(work, found):
        own = [_row(work, one, there, index, count) for count in _counts(work, one, there, index)]
        if work.settings.rows is not None and len(rows) + len(own) > work.settings.rows:
            break
        rows += own
    return rows


def _counts(work: Work, one: Answered, there: list[tuple[Document, str]], index: Index) -> Iterable[int]:
    """Return the numbers of distractors that a question is shown among: with `levels` each up to those that there are, once."""
    most = work.of.distractors
    return range(len(distractors(index, there, one, most)) + 1) if work.of.levels else [most]


def _answered(work: Work, found: list[Found]) -> list[Answered]:
    """Return the questions whose answers quote the passage, word for word."""
    asked = [work.prompts.fill("reasoned", passage=one.passage, question=one.question) for one in found]
    answered = []
    for one, reply in zip(found, work.ask(asked, "answers with reasons"), strict=True):
        if not work.is_whole(reply, "answer"):
            continue
        parts = marked(reply.text, QUOTE, REASONING, ANSWER)
        if parts is None or not parts[2]:
            work.remove("answer: no quote, no reasoning or no answer")
            continue
        quote = parts[0].strip("\"'“”‘’「」")
        if not quoted(quote, one.passage):
            work.remove("answer: the quote is not in the passage")
        elif work.passes(one.question, Reply(reply.number, parts[2], reply.finish)):
            answered.append(Answered(one, quote, parts[1], parts[2], reply))
    return answered


def _row(work: Work, one: Answered, there: list[tuple[Document, str]], index: Index, count: int) -> Row:
    """Return the row with so many distractors: its documents are drawn by the question alone, whatever other rows there are."""
    golden, question = one.found.number, one.found.question
    draw = work.draw("raft", there[golden][0].place, golden, question)
    is_there = draw.random() >= work.of.without or work.of.levels
    near = distractors(index, there, one, count + (not is_there))
    shown = [*near, golden] if is_there else near
    draw.shuffle(shown)
    texts = [work.prompts.fill("raft_document", number=at, text=there[number][1]) for at, number in enumerate(shown, 1)]
    prompt = work.prompts.fill("raft", documents="\n\n".join(texts), question=question)
    if is_there:
        values = {"quote": one.quote, "reasoning": one.reasoning, "answer": one.answer, "number": shown.index(golden) + 1}
        answer = work.prompts.fill("raft_answer", **values)
    else:
        answer = one.answer if work.of.absent == "answer" else work.prompts.text("raft_absent.txt")
    origin: dict[str, Any] = {
        "golden": shown.index(golden) + 1 if is_there else None,
        "document": there[golden][0].place,
        "quote": one.quote,
        "distractors": len(near),
    }
    origin |= {"documents": [_place(there, number) for number in shown], "answer": one.answer}
    return row_of(work, user(prompt), answer, origin, one.found.reply, one.reply)


def _place(there: list[tuple[Document, str]], number: int) -> dict[str, Any]:
    return there[number][0].place | {"passage": number}


def distractors(index: Index, there: list[tuple[Document, str]], one: Answered, count: int) -> list[int]:
    """Return the passages nearest to the question, the nearest first: none that has the quote, and of the same texts one."""
    scores = index.scores(one.found.question)
    found: list[int] = []
    texts = {one.found.passage}
    for number in np.argsort(-scores, kind="stable").tolist():
        if len(found) == count:
            break
        text = there[number][1]
        if text not in texts and not quoted(one.quote, text):
            texts.add(text)
            found.append(number)
    return found
