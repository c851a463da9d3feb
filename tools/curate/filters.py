"""Steps that remove a row for what it is by itself: each takes a row, what it says and its settings, and returns a reason or None."""

from __future__ import annotations

import ast
import json
import re
import tomllib
import warnings
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

from tools.curate import languages
from tools.curate.config import Boilerplate, Languages, Length, Provenance, Refusals, Repetition, Syntax, Truncated, Words
from tools.curate.rows import Item, View

FENCE = re.compile(r"^[ \t]*```([\w+\-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
CLOSING_FENCE = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)
FENCES = 8
"""Further ones up to which a block of code is read that does not parse."""
OPEN_FENCE = re.compile(r"^[ \t]*```[^`\n]*$", re.MULTILINE)
WORD = re.compile(r"\w+")
OPEN_END = re.compile(r"(?:[,(\[{]|(?<=[\w,] )(?:the|an|a|of|and|or|that|which|because))$")
"""A comma, an opening bracket or an English word that something must follow. A sentence may end with `to`, `with` or `is`."""
PROMPTED = re.compile(r"^[ \t]*(?:>>>|\.\.\.)(?: |$)")
NOTEBOOK = re.compile(r"^[ \t]*[!%].*$", re.MULTILINE)
"""Lines that a notebook hands to its shell or to itself."""
REFUSAL = re.compile(
    r"^\W*(?:(?:(?:i'?m|i am) )?(?:very |so )?sorry\b[^.\n]{0,120}?\b(?:can'?t|cannot|unable|not able|won'?t|must decline)\b"
    r"|i (?:can'?t|cannot|won'?t|will not|must decline to|(?:am|'m) (?:unable|not able) to) "
    r"(?:help|assist|provide|answer|fulfil|comply|create|write|generate|support|engage|discuss|do that|share)"
    r"|(?:죄송(?:하지만|합니다만|합니다[.,])|미안하지만|유감스럽지만)[^\n.]{0,80}?(?:수 없|못 합니다|못합니다|어렵습니다))",
    re.IGNORECASE,
)
"""Stricter than the count of tools.evaluate: an answer that says sorry may still answer."""
ABSENT = object()


def provenance(item: Item, found: View, settings: Provenance) -> str | None:
    """Remove rows whose fields hold other values than those that are allowed."""
    for path, allowed in settings.fields.items():
        value = field_of(item.row, path)
        if value is ABSENT:
            if settings.missing == "remove":
                return f"has no `{path}`"
        elif str(value).casefold() not in {str(name).casefold() for name in allowed}:
            return f"has `{path}` {value!r}"
    return None


def field_of(row: Any, path: str) -> Any:
    """Return a row's field by its path, such as meta.license; ABSENT where it is not there."""
    for name in path.split("."):
        if not isinstance(row, dict) or row.get(name) is None:
            return ABSENT
        row = row[name]
    return row


def length(item: Item, found: View, settings: Length) -> str | None:
    """Remove rows with a prompt or an answer that is too short or too long, in characters."""
    answers = [("answer", text, settings.answer_least, settings.answer_most) for text in found.answers]
    for name, text, least, most in [("prompt", found.prompt, settings.prompt_least, settings.prompt_most), *answers]:
        size = len(text.strip())
        if size < least or (most is not None and size > most):
            return f"has {'an' if name == 'answer' else 'a'} {name} of {size} characters"
    return None


def said(found: View) -> tuple[str, ...]:
    """Return what of a row is looked at: the answer, of a pair the chosen one, or the whole text."""
    return found.answers[:1] or (found.prompt,)


def repetition(item: Item, found: View, settings: Repetition) -> str | None:
    """Remove answers in which runs of words are there again and again (Rae et al. 2021, arXiv 2112.11446, table A1)."""
    for text in said(found):
        words = WORD.findall(text.casefold())
        if len(words) < settings.from_words:
            continue
        grams = list(zip(*(words[at:] for at in range(settings.words)), strict=False))
        share = 1 - len(set(grams)) / len(grams)
        if share > settings.most:
            return f"repeats {share:.0%} of its runs of {settings.words} words"
    return None


def truncated(item: Item, found: View, settings: Truncated) -> str | None:
    """Remove answers that end in the middle: in a block of code, with a comma, or with a word that something follows."""
    for text in said(found):
        if len(OPEN_FENCE.findall(text)) % 2:
            return "ends in a block of code"
        end = text.rstrip()[-40:]
        if len(text) >= settings.from_characters and (match := OPEN_END.search(end)):
            return f"ends with {match[0]!r}"
    return None


def refusals(item: Item, found: View, settings: Refusals) -> str | None:
    """Remove answers that begin as English and Korean refusals do."""
    refuses = any(REFUSAL.match(text.replace("’", "'")) for text in found.answers[:1])
    return "refuses" if refuses else None


def boilerplate(item: Item, found: View, settings: Boilerplate) -> str | None:
    """Remove answers that begin with one of the openings, without regard to case and marks before it."""
    for text in found.answers[:1]:
        start = text.lstrip(" \n\t\"'“").replace("’", "'").casefold()
        for opening in settings.openings:
            if start.startswith(opening.casefold()):
                return f"begins with {opening!r}"
    return None


def syntax(item: Item, found: View, settings: Syntax) -> str | None:
    """Remove answers with a block of code in one of the languages that is not valid in it."""
    for text in said(found):
        at = 0
        while "```" in text and (block := FENCE.search(text, at)):
            language, at = block[1], block.end()
            parse = PARSERS.get(language.casefold())
            if parse is None or language.casefold() not in settings.languages or not (wrong := _wrong(parse, block[2])):
                continue
            if (at := _end_of_longer(text, block, parse)) < 0:
                return f"has {language} that is not valid: {wrong}"
    return None


def _end_of_longer(text: str, block: re.Match[str], parse: Callable[[str], Any]) -> int:
    """Return where a block ends that has fences of its own, in a docstring; -1 where it is not valid up to any of the next ones."""
    for close in islice(CLOSING_FENCE.finditer(text, block.end()), FENCES):
        if not _wrong(parse, text[block.start(2) : close.start()]):
            return close.end()
    return -1


def _wrong(parse: Callable[[str], Any], code: str) -> str:
    """Return why a block is not valid, empty where it is: as it is or, of Python, by what of it was typed."""
    wrong = _error(parse, code)
    return wrong if wrong and (parse is not ast.parse or all(_error(parse, other) for other in typed(code))) else ""


def _error(parse: Callable[[str], Any], code: str) -> str:
    indent = len(code) - len(code.lstrip(" "))
    lines = [line[indent:] if not line[:indent].strip() else line for line in code.split("\n")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parse("\n".join(lines))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # tomllib's is a ValueError
        return str(error).split("(<")[0].strip() or type(error).__name__
    return ""


def typed(code: str) -> list[str]:
    """Return what may be the Python of a block: of a session what has prompts, or all without them; of a notebook what is Python."""
    lines = code.split("\n")
    begins = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    if not begins.lstrip().startswith(">>>"):
        return [NOTEBOOK.sub("", code)]
    return [
        "\n".join(PROMPTED.sub("", line) for line in lines if PROMPTED.match(line)),
        "\n".join(PROMPTED.sub("", line) for line in lines),
    ]


PARSERS: dict[str, Callable[[str], Any]] = {"json": json.loads, "python": ast.parse, "toml": tomllib.loads}


def words(item: Item, found: View, settings: Words) -> str | None:
    """Remove rows that hold words of a list: whole words in scripts that separate them by spaces and inflect little, else anywhere."""
    pattern = _pattern(tuple(settings.listed))
    matches = pattern.findall(found.text) if pattern else []
    return f"holds {len(matches)} listed words, such as {matches[0]!r}" if len(matches) > settings.most else None


@cache
def _pattern(listed: tuple[str, ...]) -> re.Pattern[str] | None:
    plain = [rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word) for word in sorted(listed, key=len, reverse=True)]
    return re.compile("|".join(plain), re.IGNORECASE) if plain else None


def language(item: Item, found: View, settings: Languages) -> str | None:
    """Remove rows whose language, or whose script, is not one that is kept."""
    name = languages.of(found.text, settings.by)
    if name in settings.keep or len(found.text) < settings.from_characters:
        return None
    return f"is {name}"


FILTERS: dict[str, Callable[[Item, View, Any], str | None]] = {
    "provenance": provenance,
    "length": length,
    "repetition": repetition,
    "truncated": truncated,
    "refusals": refusals,
    "boilerplate": boilerplate,
    "syntax": syntax,
    "words": words,
    "language": language,
}
"""In their order."""
