"""How sure a metric is: intervals over the documents that it was measured on, and what differs beyond them.

The documents are the sample: a metric is that of all documents like these. Another seed of training is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES, CHUNK = 2000, 200
SPARSE = 20
"""Documents that are not like the commonest of several, below which nothing is told: draws that hold none of them mislead."""
FEWEST = 20
"""Draws that must lie beyond a quantile for it to mean something."""
FEW, MANY = 8, 10_000
"""Documents below which nothing is told, and from which on the bootstrap's quantiles are those of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its interval, and how many documents it is of; the ends are None where they are too few to tell."""

    value: float
    low: float | None
    high: float | None
    count: int

    def excludes(self, value: float) -> bool:
        """Tell whether a value lies outside the interval; never where there is none."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def ratio(sums: Floats, weights: Floats, level: float = LEVEL) -> Estimate:
    """Return sum(sums) / sum(weights), as a loss in nats a token is, with its bootstrap-t interval; both (documents,).

    Documents are drawn anew with replacement, and each draw's ratio is taken in units of its own standard error, which is linearised
    (Efron and Tibshirani 1993, section 12.5; Cochran 1977, eq. 6.10): quantiles of ratios alone are too narrow for skewed documents.
    """
    count = len(sums)
    value = float(sums.sum() / weights.sum())
    error = float(_error(*_moments(np.ones((1, count)), sums, weights), count)[0])
    if count < FEW or not math.isfinite(error):
        return Estimate(value=value, low=None, high=None, count=count)
    if error == 0:
        return Estimate(value=value, low=value, high=value, count=count)
    alike = int(np.unique(sums / weights, return_counts=True)[1].max())
    if alike > 1 and count - alike < SPARSE:
        return Estimate(value=value, low=None, high=None, count=count)
    if count >= MANY:
        reach = NormalDist().inv_cdf((1 + level) / 2)
        return Estimate(value=value, low=value - reach * error, high=value + reach * error, count=count)
    low, high = _ends(np.concatenate([_scaled(draws, sums, weights, value) for draws in _draws(count)]), level)
    return Estimate(value=value, low=value - high * error, high=value - low * error, count=count)


def _scaled(draws: NDArray[np.uint8], sums: Floats, weights: Floats, value: float) -> Floats:
    """Return how far each draw's ratio is from the value, in units of its own error, (draws,)."""
    moments = _moments(draws.astype(np.float64), sums, weights)
    errors = _error(*moments, len(sums))
    return np.divide(moments[0] / moments[1] - value, errors, out=np.zeros_like(errors), where=errors > 0)


def _ends(scaled: Floats, level: float) -> tuple[float, float]:
    """Return the quantiles that a level leaves outside; where draws are too few to tell, nearer ones stretched as the normal's are."""
    normal, outside = NormalDist(), (1 - level) / 2
    told = max(outside, FEWEST / RESAMPLES)
    low, high = np.quantile(scaled, [told, 1 - told])
    stretch = normal.inv_cdf(outside) / normal.inv_cdf(told)
    return float(low) * stretch, float(high) * stretch


def _moments(draws: Floats, sums: Floats, weights: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Return what a ratio and its error are made of, for each draw (draws, documents): (draws,) each."""
    columns = np.stack([sums, weights, sums * sums, sums * weights, weights * weights], axis=1)
    found = draws @ columns
    return found[:, 0], found[:, 1], found[:, 2], found[:, 3], found[:, 4]


def _error(sums: Floats, weights: Floats, sums2: Floats, both: Floats, weights2: Floats, count: int) -> Floats:
    """Return the linearised standard error of each ratio: of the residuals sums - ratio x weights."""
    ratios = sums / weights
    residuals = np.maximum(sums2 - 2 * ratios * both + ratios * ratios * weights2, 0.0)
    residuals[residuals < 1e-12 * np.maximum(sums2, 1e-300)] = 0.0  # rounding, where all documents agree
    return np.sqrt(residuals * count / max(count - 1, 1)) / weights


@lru_cache(maxsize=4)
def _draws(count: int) -> list[NDArray[np.uint8]]:
    """Return how often each document is in each draw, (CHUNK, count) apiece: the same draws for all models, so that they are paired."""
    generator = np.random.Generator(np.random.Philox(count))
    rows = count * np.arange(CHUNK)[:, None]
    places = (generator.integers(count, size=(CHUNK, count)) + rows for _ in range(RESAMPLES // CHUNK))
    return [np.bincount(part.ravel(), minlength=CHUNK * count).reshape(CHUNK, count).astype(np.uint8) for part in places]


def mean(values: Floats, level: float = LEVEL) -> Estimate:
    """Return the mean of scores (documents,) with its interval: Wilson's where all are 0 or 1, else the bootstrap's."""
    if len(values) and np.isin(values, (0.0, 1.0)).all():
        return share(int(values.sum()), len(values), level)
    return ratio(values, np.ones_like(values), level)


def share(hits: int, count: int, level: float = LEVEL) -> Estimate:
    """Return hits / count with Wilson's interval (1927), which 0 hits of 200 do not shrink to a point."""
    return wilson(hits / count, count, count, level)


def wilson(value: float, effective: float, count: int, level: float = LEVEL) -> Estimate:
    """Return a value from 0 to 1 of `count` documents with the interval of a share of `effective` ones."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre, scale = (value + z * z / (2 * effective)), 1 + z * z / effective
    reach = z * math.sqrt(value * (1 - value) / effective + z * z / (4 * effective * effective))
    low, high = max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)
    return Estimate(value=value, low=0.0 if value == 0 else low, high=1.0 if value == 1 else high, count=count)


def gaps(said: Floats, hits: Floats, groups: NDArray[np.int64], level: float = LEVEL) -> Estimate:
    """Return the sum over groups of |sum of probabilities said - hits| / documents, as a calibration error is; (documents,) each.

    It is above 0 by chance alone. Each group's gap is taken as normal, with the variance of its share of hits after Agresti and Coull
    (1998). The lower end is what would give a value as high by chance in half of what the level leaves outside, with all gaps so many
    times those that were found: 0 where gaps of nothing do. The upper end leaves chance in the value.
    """
    count, size = len(said), int(groups.max()) + 1
    documents, right, found = (np.bincount(groups, weights=values, minlength=size) for values in (np.ones(count), hits, said - hits))
    value, outside = float(np.abs(found).sum()) / count, (1 - level) / 2
    if count < FEW:
        return Estimate(value=value, low=None, high=None, count=count)
    share = (right + 1) / (documents + 2)
    errors = np.sqrt(documents * share * (1 - share))
    noise = errors * np.random.Generator(np.random.Philox(size)).standard_normal((RESAMPLES, size))
    low, above = 0.0, 1.0
    for _ in range(12):
        middle = (low + above) / 2
        as_high = float((np.abs(middle * found + noise).sum(1) / count >= value).mean())
        low, above = (middle, above) if as_high < outside else (low, middle)
    reach = NormalDist().inv_cdf(1 - outside) * math.sqrt(float((errors**2).sum())) / count
    return Estimate(value=value, low=low * value, high=min(1.0, value + reach), count=count)


def difference(ours: Floats, theirs: Floats, weights: Floats | None = None, level: float = LEVEL) -> Estimate:
    """Return the mean of ours - theirs over the same documents (a ratio where there are `weights`), with its interval.

    Shares of 0 and 1 take that of Agresti and Min (2005, section 2): half a document more in each of the four cells.
    """
    apart = ours - theirs
    if weights is not None:
        return ratio(apart, weights, level)
    if len(apart) and np.isin(np.concatenate([ours, theirs]), (0.0, 1.0)).all():
        return _shares_apart(int((apart > 0).sum()), int((apart < 0).sum()), len(apart), level)
    return ratio(apart, np.ones_like(apart), level)


def _shares_apart(more: int, less: int, count: int, level: float) -> Estimate:
    z, total, up, down = NormalDist().inv_cdf((1 + level) / 2), count + 2, more + 0.5, less + 0.5
    centre = (up - down) / total
    reach = z * math.sqrt(max(up + down - (up - down) ** 2 / total, 0.0)) / total
    return Estimate(value=(more - less) / count, low=max(-1.0, centre - reach), high=min(1.0, centre + reach), count=count)


def level_of_all(comparisons: int, level: float = LEVEL) -> float:
    """Return the level of each of several intervals at which all together hold with `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, comparisons)


def verdict(apart: Estimate | None, lower_is_better: bool) -> str:
    """Say what a difference with its interval allows to: `better`, `worse`, or `no difference` where 0 is inside; nothing without one."""
    if apart is None or apart.low is None:
        return ""
    if not apart.excludes(0.0):
        return "no difference"
    return "better" if (apart.value < 0) == lower_is_better else "worse"
