"""The stream of a mixture: which source each row comes from, and which of its rows, as a function of (seed, position) alone.

The stream is cut into blocks of BLOCK rows; where weights change, a block ends, however short. Of each block every source gets a
whole number of rows, such that the rows until its end are what the shares ask for, to a row. Within the block a source is spread
evenly: its n-th of N rows is somewhere in the n-th of N equal parts, where the seed says. A source's own rows come in the order that
they have in a run of that source alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from threading import Lock

import numpy as np

from trainers.config.choices import Exhausted, MixBy, MixChange
from trainers.config.errors import ConfigError
from trainers.config.mix import schedule
from trainers.config.schema import DataConfig, RunConfig, TrainConfig
from trainers.data.loader import Ints, row_order
from trainers.data.table import TokenTable

BLOCK = 1000
STREAM = np.array([0, 0, 0, 1], dtype=np.uint64)
"""Philox's counter for the order within blocks: row orders of epochs, which have the same keys, count from 0."""
KEPT_BLOCKS = 8


@dataclass(frozen=True)
class Content:
    """What a source has to train on."""

    name: str
    rows: int
    tokens: int


def contents(table: TokenTable) -> list[Content]:
    """Return the sources of a joined table, in order."""
    ends = np.cumsum([0, *table.sources.values()])
    tokens = np.diff(table.offsets[table.rows[ends]]).tolist()  # the documents of a source lie together
    return [Content(name, rows, int(count)) for (name, rows), count in zip(table.sources.items(), tokens, strict=True)]


def mixture_of(config: RunConfig, table: TokenTable) -> Mixture:
    """Return the stream of a run over a joined table."""
    return Mixture(config.data, config.train, contents(table), config.seed)


class Mixture:
    """The stream of a run over several sources."""

    def __init__(self, data: DataConfig, train: TrainConfig, sources: Sequence[Content], seed: int) -> None:
        """Find where the stream ends; `data.mix` names the sources."""
        self.sources, self.seed, self.exhausted = sources, seed, data.mix_exhausted
        self.first = np.cumsum([0, *(source.rows for source in sources)]).tolist()
        self.per_row = [source.tokens / source.rows if data.mix_by is MixBy.tokens else 1.0 for source in sources]
        weights = schedule(data) or [(0, [source.rows * mean for source, mean in zip(sources, self.per_row, strict=True)])]
        self.batch = train.global_batch
        self.knots = [step * train.global_batch for step, _ in weights]
        """Positions at which weights are given, the first of them 0."""
        self.weights = [_normalised(_tempered(given, data.mix_temperature)) for _, given in weights]
        self.is_linear = data.mix_change is MixChange.linear
        self.first_block = [0, *accumulate(-(-(end - begin) // BLOCK) for begin, end in pairwise(self.knots))]
        self.limits = [max(1, round((data.mix[source.name].repeat or 1.0) * source.rows)) for source in sources]
        self.counts = [[0] * len(sources)]
        """Rows of each source before each block, and before the block that comes next."""
        self.owed = [0.0] * len(sources)
        self.total: int | None = None
        """Rows until every source has been dropped."""
        self.order = lru_cache(2 * len(sources))(row_order.__wrapped__)
        self.block = lru_cache(KEPT_BLOCKS)(self._block)
        self.lock = Lock()  # the loop asks for passes while a thread makes the next step
        self.pass_rows = sum(source.rows for source, *weights in zip(sources, *self.weights, strict=True) if any(weights))
        """Rows of one epoch: those of all sources of which something is trained."""
        self.num_rows = self._length(train)

    def shares(self, position: float) -> list[float]:
        """Return the share of the rows that each source has at a position of the stream."""
        part = bisect_right(self.knots, position) - 1
        wanted = self.weights[part]
        if self.is_linear and part + 1 < len(self.knots):
            done = (position - self.knots[part]) / (self.knots[part + 1] - self.knots[part])
            wanted = [one + (other - one) * done for one, other in zip(wanted, self.weights[part + 1], strict=True)]
        return _normalised([weight / mean for weight, mean in zip(wanted, self.per_row, strict=True)])

    def row_ids(self, positions: Ints) -> Ints:
        """Return the table's rows at positions of the stream."""
        return np.array([self._row_at(int(position)) for position in positions], dtype=np.int64)

    def passes(self, position: int) -> dict[str, float]:
        """Return how often the rows before a position have gone through those of each source."""
        counts = self.counts_before(position)
        return {source.name: count / source.rows for source, count in zip(self.sources, counts, strict=True)}

    def counts_before(self, position: int) -> list[int]:
        """Return the rows of each source before a position, which is at most the end of a stream that drops its sources."""
        number, inside = self._place(position)
        self._reach(number if inside else number - 1)
        more = np.bincount(self.block(number)[0][:inside], minlength=len(self.sources)) if inside else np.zeros(len(self.sources), np.int64)
        return [int(count + taken) for count, taken in zip(self.counts[number], more, strict=True)]

    def report(self) -> dict[str, dict[str, float]]:
        """Return what each source has, and its shares of the rows and tokens of the run."""
        counts, passes = self.counts_before(self.num_rows), self.passes(self.num_rows)
        tokens = [count * source.tokens / source.rows for count, source in zip(counts, self.sources, strict=True)]
        return {
            source.name: {
                "rows": source.rows,
                "tokens": source.tokens,
                "row_share": count / self.num_rows,
                "token_share": taken / sum(tokens),
                "passes": passes[source.name],
            }
            for source, count, taken in zip(self.sources, counts, tokens, strict=True)
        }

    def _row_at(self, position: int) -> int:
        turn, position = (0, position) if self.total is None else divmod(position, self.total)
        number, inside = self._place(position)
        of, places = self.block(number)
        source = int(of[inside])
        place = int(places[inside]) + turn * self.limits[source]
        epoch, within = divmod(place, self.sources[source].rows)
        return int(self.first[source] + self.order(self.seed, epoch, self.sources[source].rows)[within])

    def _place(self, position: int) -> tuple[int, int]:
        """Return the block that a position is in, and where in it."""
        part = bisect_right(self.knots, position) - 1
        number, inside = divmod(position - self.knots[part], BLOCK)
        return self.first_block[part] + number, inside

    def _begin(self, number: int) -> int:
        """Return the position at which a block begins."""
        part = bisect_right(self.first_block, number) - 1
        return self.knots[part] + (number - self.first_block[part]) * BLOCK

    def _block(self, number: int) -> tuple[Ints, Ints]:
        """Return the source of each row of a block, and which row of that source's own stream it is."""
        self._reach(number)
        before, after = self.counts[number], self.counts[number + 1]
        taken = np.subtract(after, before)
        of, places = np.repeat(np.arange(len(taken)), taken), np.zeros(int(taken.sum()), np.int64)
        key = np.array([self.seed, number], dtype=np.uint64)
        within = np.random.Philox(key=key, counter=STREAM).random_raw(len(of)) / 2.0**64
        strata = np.concatenate([np.arange(count) for count in taken])
        of = of[np.argsort((strata + within) / taken[of], kind="stable")]
        for source, (start, end) in enumerate(zip(before, after, strict=True)):
            places[of == source] = np.arange(start, end)
        return of, places

    def _reach(self, number: int) -> None:
        """Divide the blocks until block `number`, which comes after all before it."""
        with self.lock:
            while len(self.counts) < number + 2 and self.total is None:
                before = self.counts[-1]
                drops = self.exhausted is Exhausted.drop
                room = [limit - count for limit, count in zip(self.limits, before, strict=True)] if drops else None
                begin, end = (self._begin(len(self.counts) + more) for more in (-1, 0))
                taken, self.owed = divide(self.shares((begin + end) / 2), self.owed, end - begin, room)
                self.counts.append([count + more for count, more in zip(before, taken, strict=True)])
                if sum(taken) < end - begin:
                    self._require_no_later(begin, room or [])
                    self.total = sum(self.counts[-1])

    def _require_no_later(self, position: int, room: Sequence[int]) -> None:
        """Raise ConfigError where the stream would end before a source with rows has its first weight."""
        for knot, weights in zip(self.knots, self.weights, strict=True):
            waiting = [source.name for source, weight, left in zip(self.sources, weights, room, strict=True) if weight and left]
            if knot > position and waiting:
                reason = f"every source that has a weight before step {knot // self.batch:,} runs out before it, and {waiting[0]} waits"
                raise ConfigError("data.mix_exhausted", "drop", reason, "data.mix_exhausted=repeat, or an earlier step in data.mix_steps")

    def _length(self, train: TrainConfig) -> int:
        """Return the rows of the run: what is asked for, or until sources have run out."""
        wanted: int | None = max(1, round((train.epochs or 1.0) * self.pass_rows))
        if train.steps is not None:
            wanted = train.steps * train.global_batch
        elif train.epochs is None and self.exhausted is not Exhausted.repeat:
            wanted = None
        if self.exhausted is Exhausted.repeat:
            assert wanted is not None
            return wanted
        end = self._dropped_at() if self.exhausted is Exhausted.drop else self._stopped_at(wanted)
        return end if wanted is None else min(end, wanted)

    def _dropped_at(self) -> int:
        while self.total is None:
            self._reach(len(self.counts) - 1)
        return self.total

    def _stopped_at(self, wanted: int | None) -> int:
        """Return the position at which a source that has run out would be taken again; no further than `wanted`."""
        number = 0
        while True:
            self._reach(number)
            if any(count > limit for count, limit in zip(self.counts[number + 1], self.limits, strict=True)):
                of, places = self.block(number)
                return self._begin(number) + int(np.argmax(places >= np.array(self.limits)[of]))
            number += 1
            if wanted is not None and self._begin(number) >= wanted:
                return wanted


def divide(shares: Sequence[float], owed: Sequence[float], size: int, room: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
    """Return the rows of each source in a block of `size`, and what is owed to each after it: the exact amounts less the rows so far.

    `owed` is that before the block. Whole rows first, then the largest remainders. With `room` a source gets no more than that, and the
    others share what it leaves; fewer rows than `size` where all have run out.
    """
    taken, left = [0] * len(shares), list(owed)
    alive = [number for number, share in enumerate(shares) if share > 0 and (room is None or room[number] > 0)]
    while alive and size:
        scale = (size - sum(owed[number] for number in alive)) / sum(shares[number] for number in alive)
        exact = {number: owed[number] + shares[number] * scale for number in alive}
        given = _rounded(exact, size)
        full = {number: room[number] for number in alive if given[number] > room[number]} if room is not None else {}
        if not full:
            for number in alive:
                taken[number], left[number] = given[number], exact[number] - given[number]
            break
        for number, most in full.items():
            taken[number], left[number] = most, 0.0
            size -= most
        alive = [number for number in alive if number not in full]
    return taken, left


def _rounded(exact: dict[int, float], size: int) -> dict[int, int]:
    """Return whole numbers that add up to `size`, by largest remainder."""
    given = {number: max(0, math.floor(amount)) for number, amount in exact.items()}
    while (left := size - sum(given.values())) > 0:
        for number in sorted(given, key=lambda number: given[number] - exact[number])[:left]:
            given[number] += 1
    while sum(given.values()) > size:
        given[max((number for number in given if given[number]), key=lambda number: given[number] - exact[number])] -= 1
    return given


def _tempered(weights: Sequence[float], temperature: float) -> list[float]:
    """Return weights raised to 1 / temperature, as shares of the largest: powers of large ones would be no floats."""
    top = 1.0 if temperature == 1 else max(weights)
    return [(weight / top) ** (1 / temperature) if weight else 0.0 for weight in weights]


def _normalised(amounts: Sequence[float]) -> list[float]:
    whole = sum(amounts)
    return [amount / whole for amount in amounts]
