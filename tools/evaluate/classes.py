"""How well a classifier finds the classes of documents, and how far its confidence can be believed. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.evaluate import intervals
from tools.evaluate.intervals import LEVEL, Estimate, Floats
from trainers.config.objectives import BINS

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What a classifier says of documents, (documents,) each."""

    labels: list[str]
    """The class of each document."""
    taken: list[str]
    """The most probable class."""
    confidence: Floats
    """Its probability."""

    @classmethod
    def of_rows(cls, rows: Iterable[dict[str, Any]]) -> Classes:
        """Return them from a row a document, {"label", "taken", "confidence"}."""
        found = list(rows)
        labels, taken = ([str(row[name]) for row in found] for name in ("label", "taken"))
        return cls(labels=labels, taken=taken, confidence=np.array([row["confidence"] for row in found], np.float64))

    @cached_property
    def names(self) -> list[str]:
        """Return the classes that some document has, sorted."""
        return sorted(set(self.labels))

    @cached_property
    def right(self) -> Floats:
        """Return 1 for each document whose class is found, else 0."""
        return np.array([label == taken for label, taken in zip(self.labels, self.taken, strict=True)], np.float64)

    def f1(self, name: str, level: float = LEVEL) -> Estimate:
        """Return F1 of one class."""
        return self._mean_f1([name], level)

    def macro_f1(self, level: float = LEVEL) -> Estimate:
        """Return the mean of F1 over the classes that some document has."""
        return self._mean_f1(self.names, level)

    def _mean_f1(self, names: list[str], level: float) -> Estimate:
        """Return the mean over classes of F1 = 2 TP / (documents of the class + documents taken for it).

        Its standard error is linearised (Takahashi et al. 2022, doi 10.1007/s10489-021-02635-5, section 3). The interval is Wilson's
        with the number of documents whose share would have that error, so that it does not end in a point at 1.
        """
        of_class, for_it = (np.array([[own == name for name in names] for own in many], np.float64) for many in (self.labels, self.taken))
        both, either = of_class * for_it, of_class + for_it
        totals = either.sum(0)
        scores = 2 * both.sum(0) / totals
        count, value = len(self.labels), float(scores.mean())
        pulls = ((2 * both - scores * either) / totals).mean(1)  # how far each document moves the mean
        variance = float((pulls**2).sum()) * count / max(count - 1, 1)
        alike = len(names) ** 2 / float((1 / of_class.sum(0)).sum())  # of shares that are the same in all classes
        return intervals.wilson(value, value * (1 - value) / variance if variance else alike, count, level)

    def calibration_error(self, level: float = LEVEL) -> Estimate:
        """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) with BINS bins of confidence, all as wide."""
        bins = np.minimum((self.confidence * BINS).astype(np.int64), BINS - 1)
        return intervals.gaps(self.confidence, self.right, bins, level)

    def overconfidence(self, level: float = LEVEL) -> Estimate:
        """Return the mean confidence less the accuracy: above 0 the model is surer than it is right."""
        return intervals.mean(self.confidence - self.right, level)
