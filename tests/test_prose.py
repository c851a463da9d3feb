"""Pages, docstrings and messages read easily: short sentences and paragraphs, and the field's own words.

Of pages, code blocks, tables, headings and pictures are left out. A sentence ends with a full stop, a paragraph or an item of a list,
and has at least three words. A word is whatever stands between spaces.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from command import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [file for folder in ("launcher", "trainers", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]
AVOIDED = re.compile(
    r"\b(?:figures?|beside|behind|stands?|lies in|(?:go|goes|going|went) on|cannot be had|(?<!there )(?:is|are) no(?! longer)|"
    r"(?<!there )is none|(?:holds?|held) (?:\w+ )?up|heeds?|wish(?:es)?|befalls?|befell|"
    r"(?:takes?|taken|brings?|brought) (?:\w+ )?along)\b",
    re.IGNORECASE,
)


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def text_of(page: Path) -> str:
    return "\n".join(line for line in without_code(page).splitlines() if not line.lstrip().startswith(("|", "#", "!", "<")))


def sentences(text: str) -> list[int]:
    """Return the words of each sentence."""
    return [len(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n|\n[-*] ", text) if len(part.split()) > 2]


@cache
def texts(file: Path) -> list[tuple[int, str, bool]]:
    """Return the line and text of each string of a module that has words, and whether it is a docstring, a field's included."""
    tree = ast.parse(file.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value]
    return [(node.lineno, node.value, id(node) in docs) for node in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_and_paragraphs_are_short(page: Path) -> None:
    lengths = sorted(sentences(text_of(page)))
    paragraphs = [len(part.split()) for part in re.split(r"\n\s*\n|\n[-*] ", text_of(page))]
    print(f"{page.name}: {sum(lengths) / len(lengths):.1f} words a sentence, 90 % below {lengths[int(0.9 * len(lengths))]}")
    assert sum(lengths) / len(lengths) <= 18
    assert lengths[int(0.9 * len(lengths))] <= 32
    assert max(paragraphs) <= 90


def test_the_readme_is_short() -> None:
    """All words of the file are counted, in tables and headings too, but not those in code blocks."""
    assert len(without_code(ROOT / "README.md").split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_code(page))
    assert [found.group() for found in AVOIDED.finditer(text)] == []


def test_docstrings_are_short() -> None:
    """Examples of commands and tables in them are left out: lines with several spaces in a row, or that begin with `python`."""
    lengths = []
    for file in SOURCES:
        for text in (text for _, text, is_doc in texts(file) if is_doc):
            lines = [line for line in text.splitlines() if not re.match(r"\s*(python|\||```)", line) and "   " not in line.strip()]
            lengths += sentences("\n".join(lines))
    lengths.sort()
    print(f"{len(lengths)} sentences, {sum(lengths) / len(lengths):.1f} words each, 90 % below {lengths[int(0.9 * len(lengths))]}")
    assert sum(lengths) / len(lengths) <= 18
    assert lengths[int(0.9 * len(lengths))] <= 32


def test_docstrings_and_messages_use_the_words_of_the_field() -> None:
    found = [(file, line, text) for file in SOURCES for line, text, _ in texts(file)]
    uses = [f"{file.relative_to(ROOT)}:{line}: {use.group()}" for file, line, text in found if (use := AVOIDED.search(without_names(text)))]
    assert uses == []


def without_names(text: str) -> str:
    """Return a text without the names that it quotes, and without Python's None."""
    return re.sub(r"`[^`\n]*`|\bNone\b", "", text)


def test_presets_and_the_help_text_use_the_words_of_the_field() -> None:
    found = [(file, number, line) for file in sorted((ROOT / "conf").rglob("*.yaml")) for number, line in enumerate(file.open(), 1)]
    assert [f"{file.relative_to(ROOT)}:{number}: {use.group()}" for file, number, line in found if (use := AVOIDED.search(line))] == []
