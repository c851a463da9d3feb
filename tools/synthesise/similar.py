"""How alike two instructions are: ROUGE-L of their words, with all that are there at once.

ROUGE-L (Lin 2004) as an F1 value is 2 LCS / (a + b), with the longest common subsequence of the words and their numbers. That is
rapidfuzz's normalised Indel similarity. Each word becomes one character, so that its compiled code compares plain strings.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

from trainers.config.errors import ConfigError

WORD = re.compile(r"[^\W_]+")
SURROGATES, LETTERS = (0xD800, 0x800), 0x110000 - 0x800
CLOSE = 1e-9


def require_library() -> None:
    """Raise ConfigError where rapidfuzz is not installed."""
    if find_spec("rapidfuzz") is None:
        raise ConfigError("method", "rapidfuzz", "is not installed, and compares instructions", "pip install 'fulltune[synthesise]'")


class Pool:
    """Texts that a new one is compared with."""

    def __init__(self) -> None:
        """Begin with none."""
        self.letters: dict[str, str] = {}
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        """Take a text in."""
        self.texts.append(self._written(text))

    def reaches(self, text: str, limit: float) -> float | None:
        """Return the largest ROUGE-L with a text that is there, from 0 to 1, where it is `limit` or more; else None."""
        return _largest(self._written(text), self.texts, limit)

    def _written(self, text: str) -> str:
        """Return a character for each word."""
        return "".join(self.letters.setdefault(word, _letter(len(self.letters))) for word in WORD.findall(text.lower()))


def rouge_l(first: str, second: str) -> float:
    """Return the ROUGE-L of two texts, from 0 to 1."""
    pool = Pool()
    pool.add(first)
    return pool.reaches(second, 0.0) or 0.0


def _letter(number: int) -> str:
    """Return the character of a word; beyond a million words some share one, and seem more alike than they are."""
    code = number % LETTERS
    return chr(code if code < SURROGATES[0] else code + SURROGATES[1])


def _largest(text: str, texts: list[str], limit: float) -> float | None:
    from rapidfuzz import process
    from rapidfuzz.distance import Indel, LCSseq

    if not text:
        return None
    found = process.extractOne(text, texts, scorer=Indel.normalized_similarity, processor=None, score_cutoff=max(limit - CLOSE, 0.0))
    if found is None:
        return None
    other = found[0]
    exact: float = 2 * LCSseq.similarity(text, other) / (len(text) + len(other))
    return exact if exact >= limit else None
