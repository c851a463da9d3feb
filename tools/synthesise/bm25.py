"""Which passages are nearest to a question by their words: Okapi BM25 (Robertson et al. 1995), with Lucene's inverse document frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tools.synthesise.similar import WORD

K1, B = 1.5, 0.75
"""How fast a word's count saturates, and how much long passages lose."""


class Index:
    """Passages by their words."""

    def __init__(self, passages: Sequence[str]) -> None:
        """Count the words of each passage."""
        counts = [Counter(words_of(text)) for text in passages]
        sizes = np.array([found.total() for found in counts], np.float64)
        longer = K1 * (1 - B + B * sizes / max(sizes.mean(), 1e-9)) if len(sizes) else sizes
        places: dict[str, list[tuple[int, int]]] = {}
        for number, found in enumerate(counts):
            for word, count in found.items():
                places.setdefault(word, []).append((number, count))
        self.size = len(counts)
        self.weights: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        """By word: the passages that have it, and what it adds to the score of each."""
        for word, pairs in places.items():
            numbers, times = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], np.float64)
            rarity = np.log(1 + (self.size - len(pairs) + 0.5) / (len(pairs) + 0.5))
            self.weights[word] = numbers, rarity * times * (K1 + 1) / (times + longer[numbers])

    def scores(self, question: str) -> NDArray[np.float64]:
        """Return the score of each passage, (passages,); a word that a question repeats counts again."""
        found = np.zeros(self.size)
        for word in words_of(question):
            if word in self.weights:
                numbers, weights = self.weights[word]
                found[numbers] += weights
        return found


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())
