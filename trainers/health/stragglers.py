"""Who slows all ranks down. In synchronous training all steps take equally long: what counts is what a rank does by itself."""

from __future__ import annotations

import logging
import socket
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.config.mesh import Mesh, words_of_group
from trainers.health.preflight import SLICE_S, Product, outliers
from trainers.world import World

log = logging.getLogger("fulltune")
EVERY = 10
"""Steps from one gathering to the next: one sum of two values a rank."""
WINDOW = 3
"""Of a rank's last measurements the median counts: two hiccups among them change nothing."""
IN_A_ROW = 3
"""Gatherings that have to agree before a rank is named, or no longer."""
PROBE_SHARE = 0.01
"""Of all ranks' time that probes may take: all probe in the same steps, short ones more rarely, or each would wait for another's."""
DATA_SHARE = 0.05
"""Of a step that a rank's data must keep the others waiting to count: three times nothing is nothing."""


@dataclass(frozen=True)
class Straggler:
    """What of a rank is slow (its device or its data), and by what factor."""

    what: str
    factor: float


def find_stragglers(data_s: list[float], product_s: list[float], step_s: float, slow: float, slice_s: float) -> dict[int, Straggler]:
    """Return the ranks of which data or device take more than `slow` x the median of all, in seconds by rank."""
    data = outliers(dict(enumerate(data_s)), slow, max(slice_s, DATA_SHARE * step_s))
    device = outliers(dict(enumerate(product_s)), slow, slice_s)
    found = {rank: Straggler("data", factor) for rank, factor in data.items()}
    return found | {rank: Straggler("device", factor) for rank, factor in device.items()}  # a slow device takes longer for data too


class Reported:
    """The ranks that are named: those that were slow, and have not been quick since, IN_A_ROW gatherings long."""

    def __init__(self) -> None:
        """Name nobody."""
        self.slow: dict[int, Straggler] = {}
        self.streaks: dict[int, int] = {}

    def update(self, found: Mapping[int, Straggler]) -> tuple[list[int], list[int]]:
        """Take what one gathering found; return the ranks that are named from now on, and those that are no longer."""
        differ = found.keys() ^ self.slow.keys()
        self.streaks = {rank: self.streaks.get(rank, 0) + 1 for rank in differ}
        changed = sorted(rank for rank in differ if self.streaks[rank] == IN_A_ROW)
        self.slow |= {rank: slow for rank, slow in found.items() if rank in self.slow or rank in changed}
        gone = [rank for rank in changed if rank not in found]
        for rank in gone:
            del self.slow[rank]
        for rank in changed:
            del self.streaks[rank]
        return [rank for rank in changed if rank in found], gone


class Stragglers:
    """Times what this rank does alone, and names, on rank 0, those that are slow at it; nothing where there is one rank."""

    def __init__(self, world: World, mesh: Mesh, slow: float) -> None:
        """Prepare the probe; collective."""
        self.world, self.mesh, self.slow, self.named = world, mesh, slow, Reported()
        self.data_s: deque[float] = deque(maxlen=WINDOW)
        self.product_s: deque[float] = deque(maxlen=WINDOW)
        self.probe_every, self.gathered_at = 1, 0
        if world.size > 1:
            self.product = Product(world.device)
            self.hosts = world.gather(socket.gethostname())

    def probe(self, step: int) -> None:
        """Time a small product on this rank's device, in the steps in which all ranks do."""
        if self.world.size > 1 and (not self.product_s or step % self.probe_every == 0):
            self.product_s.append(self.product.seconds())

    def gather(self, step: int, data_s: float, step_s: float) -> dict[str, Any]:
        """Take the seconds of a step until its first collective, and of the whole; every EVERY steps, compare. Collective.

        Not before there are WINDOW new probes. Returns, on rank 0 after a gathering, the ranks that are named.
        """
        self.data_s.append(data_s)
        if self.world.size == 1 or step % EVERY or step - self.gathered_at < WINDOW * self.probe_every:
            return {}
        size, figures = self.world.size, [0.0] * (2 * self.world.size + 1)
        figures[self.world.rank] = statistics.median(self.data_s)
        figures[size + self.world.rank] = statistics.median(self.product_s)
        figures[-1] = step_s / size
        *figures, mean_step_s = self.world.sum(figures)
        self.gathered_at = step
        self.probe_every = max(1, round(statistics.median(figures[size:]) / (PROBE_SHARE * max(mean_step_s, 1e-6))))
        if self.world.rank != 0:
            return {}
        slice_s = SLICE_S[self.world.device.type]
        new, gone = self.named.update(find_stragglers(figures[:size], figures[size:], step_s, self.slow, slice_s))
        for rank in new:
            slow = self.named.slow[rank]
            reason = f"its {slow.what} takes {slow.factor:.1f} x the median of all (limits.slow_node)"
            where = f"; it is in the {groups}" if (groups := self._groups_of(rank)) else ""
            log.warning("step %d: rank %d on %s slows all down: %s%s", step, rank, self.hosts[rank], reason, where)
        for rank in gone:
            log.warning("step %d: rank %d on %s slows nobody down any more", step, rank, self.hosts[rank])
        return self.entry()

    def entry(self) -> dict[str, Any]:
        """Return what metrics.jsonl and status.json say: nothing where nobody is named."""
        slow = sorted(self.named.slow.items())
        if not slow:
            return {}
        lists = {"what": [of.what for _, of in slow], "factors": [round(of.factor, 2) for _, of in slow]}
        groups = [self._groups_of(rank) for rank, _ in slow]
        lists |= {"groups": groups} if any(groups) else {}
        return {"stragglers": {"ranks": [rank for rank, _ in slow], "hosts": [self.hosts[rank] for rank, _ in slow]} | lists}

    def _groups_of(self, rank: int) -> str:
        """Say in which groups of the mesh ranks wait for one; empty where it has none but that of all."""
        return ", ".join(words_of_group(name, ranks) for name, ranks in self.mesh.groups_of(rank).items())
