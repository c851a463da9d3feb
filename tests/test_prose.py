"""Pages read easily: short sentences and paragraphs, and the field's own words.

Code blocks, tables, headings and pictures are left out. A sentence ends with a full stop, a paragraph or an item of a list,
and has at least three words. A word is whatever stands between spaces.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def sentences(page: Path) -> list[int]:
    """Return the words of each sentence."""
    return [len(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n|\n[-*] ", text_of(page)) if len(part.split()) > 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_and_paragraphs_are_short(page: Path) -> None:
    lengths = sorted(sentences(page))
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
