"""Questions and answers from documents: each quotes the passage that it comes from, which a program checks."""

from __future__ import annotations

import re

from tools.synthesise.methods.answers import Row, row_of, user
from tools.synthesise.prompts import marked
from tools.synthesise.sources import Document, passages, read_documents
from tools.synthesise.work import Reply, Work

QUESTION, QUOTE, ANSWER = "Question|질문", "Quote|인용", "Answer|답|답변"
BEGINS = re.compile(r"^[ \t*#]*(?:\d+[.)][ \t]*)?[*]*(?:Question|질문)[^\n:：]{0,5}[:：]", re.MULTILINE | re.IGNORECASE)
LEAST = 8
"""Characters of a quote that shows anything."""


def documents(work: Work) -> list[Row]:
    """Return rows of the questions whose quotes are in their passages."""
    found = [(document, text) for document in read_documents(work.settings) for text in passages(document, work.of.characters)]
    work.planned = len(found)
    asked = [work.prompts.fill("document", passage=text, count=work.of.questions) for _, text in found]
    rows: list[Row] = []
    for (document, text), reply in zip(found, work.ask(asked, "questions"), strict=True):
        if reply.failure:
            work.remove("questions: failed")
            continue
        for block in _blocks(reply, work):
            if not work.is_full(rows) and (row := _row(work, document, text, block, reply)):
                rows.append(row)
    return rows


def _blocks(reply: Reply, work: Work) -> list[str]:
    """Return the parts of a reply that begin with a question."""
    starts = [found.start() for found in BEGINS.finditer(reply.text)]
    if not starts:
        work.remove("questions: no question in the reply")
    ends = [*starts[1:], len(reply.text)]
    return [re.sub(r"^[ \t*#]*\d+[.)][ \t]*", "", reply.text[at:end]) for at, end in zip(starts, ends, strict=False)][: work.of.questions]


def _row(work: Work, document: Document, passage: str, block: str, reply: Reply) -> Row | None:
    """Return the row of a question, None where a filter removes it."""
    is_last = reply.text.endswith(block) or reply.text.rstrip().endswith(block.rstrip())
    found = marked(block, QUESTION, QUOTE, ANSWER)
    if found is None:
        work.remove("questions: no quote or no answer")
        return None
    question, quote, answer = found
    quote = quote.strip("\"'“”‘’「」")
    if not quoted(quote, passage):
        work.remove("questions: the quote is not in the passage")
        return None
    whole = Reply(reply.number, answer, reply.finish if is_last else "stop")
    if not work.passes(question, whole) or not work.takes(question):
        return None
    prompt = work.prompts.fill("context", passage=passage, question=question) if work.of.context else question
    return row_of(work, user(prompt), answer, {"document": document.place, "quote": quote}, reply)


def quoted(quote: str, passage: str) -> bool:
    """Tell whether a quote is in a passage, whatever its blanks; one that is too short shows nothing."""
    words = " ".join(quote.split())
    return len(words) >= LEAST and words in " ".join(passage.split())
