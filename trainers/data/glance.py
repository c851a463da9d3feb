"""What rows look like before they are trained on, noted where they are tokenised: copies, openings of answers, lengths.

Each document leaves a mark of 80 bytes: digests of its text and of its first prompt, without regard to case and spaces, and a sketch
of its runs of five tokens. Sketches are one permutation's MinHash (Li, Owen and Zhang 2012, arXiv 1208.1259).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
RUN, BINS = 5, 16
"""Tokens of a run, and numbers of a sketch."""
NONE = 0xFFFFFFFF
WIDTH = 2 + BINS // 2
"""64-bit words of a mark: the text's digest, the first prompt's, and the sketch, two numbers a word."""
WORDS, CHARACTERS = 3, 40
"""Of an answer, at most, that are its opening."""
END = re.compile(r"<[^<>\s]+>\s*$")
MOST_OPENINGS = 4000
"""That are counted at a time. Rare ones are forgotten; none that begins one answer in a hundred is."""


@dataclass
class Glance:
    """What some rows look like."""

    texts: int = 0
    long: int = 0
    """Texts over `data.seq_len`."""
    answers: int = 0
    openings: Counter[str] = field(default_factory=Counter)
    """How often answers begin with the same words."""

    def update(self, other: Glance) -> None:
        """Add what other rows look like."""
        self.texts, self.long, self.answers = self.texts + other.texts, self.long + other.long, self.answers + other.answers
        self.openings.update(other.openings)
        if len(self.openings) > MOST_OPENINGS:
            self.openings = Counter(dict(self.openings.most_common(MOST_OPENINGS // 2)))

    def report(self, marks: Keys) -> dict[str, Any]:
        """Return it as numbers, with how many documents have the text, or the first prompt, of an earlier one."""
        copies, prompts = (len(column) - len(np.unique(column)) for column in (marks[:, 0], marks[marks[:, 1] > 0, 1]))
        opening = [{"text": text, "answers": count} for text, count in self.openings.most_common(5)]
        counts = {"texts": self.texts, "long": self.long, "answers": self.answers, "openings": opening}
        return {"documents": len(marks), "copies": copies, "same_prompt": prompts, **counts}


def opening_of(answer: str) -> str:
    """Return the first words of an answer, in small letters and without the token that ends it."""
    return " ".join(END.sub("", answer[:200]).split()[:WORDS])[:CHARACTERS].casefold()


def digest(text: str) -> int:
    """Return 64 bits that say whether two texts are the same but for spaces and capitals; 0 for no text."""
    text = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little") if text else 0


def marks_of(texts: Sequence[str], prompts: Sequence[int], places: NDArray[np.int64], sketched: NDArray[np.uint32]) -> Keys:
    """Return the marks of documents, (documents, WIDTH): `places` is the text of each, in rising order; pieces of one text differ."""
    piece = (np.arange(len(places)) - np.searchsorted(places, places)).astype(np.uint64)
    whole = np.array([digest(text) for text in texts], np.uint64)[places] + piece * MIX
    return np.column_stack([whole, np.array(prompts, np.uint64)[places], sketched.view(np.uint64)])


def runs(tokens: NDArray[np.int32], lengths: NDArray[np.int64], special: NDArray[np.bool_]) -> tuple[Keys, NDArray[np.int64]]:
    """Return a key of each run of RUN tokens within a document, and its document; runs with a token that is `special` are left out.

    `special` says it of each id, (vocabulary,). A key is the bin in its upper half and a number in its lower.
    """
    count = max(0, len(tokens) - RUN + 1)
    wide, rolled = tokens.astype(np.uint64), np.zeros(count, np.uint64)
    for at in range(RUN):
        rolled = rolled * FACTOR + wide[at : at + count]
    rolled = (rolled ^ (rolled >> np.uint64(29))) * MIX
    document = np.repeat(np.arange(len(lengths)), lengths)
    so_far = np.concatenate([[0], np.cumsum(special[tokens])])
    kept = (document[:count] == document[RUN - 1 :][:count]) & (so_far[RUN:][:count] == so_far[:count])
    rolled = rolled[kept]
    return ((rolled >> np.uint64(60)) << np.uint64(32)) | ((rolled >> np.uint64(20)) & np.uint64(NONE)), document[:count][kept]


def sketches(tokens: NDArray[np.int32], lengths: NDArray[np.int64], special: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Return the least number of each bin over a document's runs, NONE where a bin has none; (documents, BINS)."""
    keys, document = runs(tokens, lengths, special)
    found = np.full(len(lengths) * BINS, NONE, np.uint32)
    np.minimum.at(found, document * BINS + (keys >> np.uint64(32)).astype(np.int64), keys.astype(np.uint32))
    return found.reshape(-1, BINS)


FACTOR, MIX = np.uint64(0x100000001B3), np.uint64(0x9E3779B97F4A7C15)
