"""Filters of single texts: each returns why a text is removed, or nothing."""

from __future__ import annotations

import re

from tools.curate import filters
from tools.curate.config import Refusals, Repetition, Truncated
from tools.curate.rows import Item, View
from tools.synthesise.config import Filters

NOTHING = Item(0, 0, b"")
NO_WORD = re.compile(r"[\W_]*")


def instruction_fault(text: str, settings: Filters) -> str:
    """Return why an instruction is removed: its length, no word in it, or a listed one; "" where it stays."""
    size = len(text.strip())
    if size < settings.instruction_least:
        return f"instruction: shorter than {settings.instruction_least} characters"
    if size > settings.instruction_most:
        return f"instruction: longer than {settings.instruction_most} characters"
    if NO_WORD.fullmatch(text):
        return "instruction: no word in it"
    found = listed_word(text, settings.words)
    return f"instruction: has a listed word, {found!r}" if found else ""


def listed_word(text: str, words: list[str]) -> str:
    """Return the first listed word that is in a text: whole words of ASCII, anything else anywhere; "" without one."""
    for word in words:
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word)
        if re.search(pattern, text, re.IGNORECASE):
            return word
    return ""


def answer_fault(prompt: str, text: str, settings: Filters, refusals: bool | None = None) -> str:
    """Return why an answer is removed; "" where it stays. `refusals` overrules the setting."""
    size = len(text.strip())
    if size < settings.answer_least:
        return f"answer: shorter than {settings.answer_least} characters"
    if size > settings.answer_most:
        return f"answer: longer than {settings.answer_most} characters"
    if NO_WORD.fullmatch(text):
        return "answer: no word in it"
    view = View(prompt, (text,))
    if filters.repetition(NOTHING, view, Repetition(most=settings.repetition)):
        return "answer: repeats itself"
    if settings.truncated and filters.truncated(NOTHING, view, Truncated()):
        return "answer: ends in the middle"
    return "answer: refuses" if (settings.refusals if refusals is None else refusals) and refuses(text) else ""


def refuses(text: str) -> bool:
    """Tell whether an answer begins as English and Korean refusals do."""
    return filters.refusals(NOTHING, View("", (text,)), Refusals()) is not None
