"""Which ranks block the others: those that are silent, else those that have begun the fewest collectives. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainers.processes import HALTED, state_of
from trainers.rundir.beats import Beat


@dataclass(frozen=True)
class Blockage:
    """The ranks that block the others."""

    blockers: list[Beat]
    is_silent: bool
    """They do not write any more."""
    others: list[Beat]

    def left_s(self, now: float) -> float:
        """Return the seconds until all of them are past their limits: before, they may be at work on something long."""
        if self.is_silent and any(state_of(beat.host, beat.pid) in HALTED for beat in self.blockers):
            return 0.0
        return max(beat.left_s(now) for beat in self.blockers)

    def message(self, now: float, rule: str) -> str:
        """Say who did not arrive, and where; `rule` says after which time."""
        names = ", ".join(str(beat.rank) for beat in self.blockers)
        are = f"rank {names}" if len(self.blockers) == 1 else f"ranks {names}"
        first = self.blockers[0]
        it = "it" if len(self.blockers) == 1 else f"rank {first.rank}"
        if self.is_silent and not first.pid:
            said = f"{are} never began"
        elif self.is_silent:
            has = "has" if len(self.blockers) == 1 else "have"
            state = f" is {known}" if (known := state_of(first.host, first.pid)) else ""
            silence = f"{has} not been heard of for {now - first.written:.0f} s (process {first.pid} on {first.host}{state})"
            said = f"{are} {silence}: {it} was in {first.doing}"
        elif self.others:
            said = f"{are} did not arrive: {it} is in {first.doing}"
        elif len(self.blockers) == 1:
            said = f"{are} makes no progress: it is in {first.doing}"
        else:
            said = f"no rank makes progress: all {len(self.blockers)} are equally far, in {first.doing}"
        return f"{said}{self._waiting()} ({rule})"

    def _waiting(self) -> str:
        """Say where a rank waits for them, and in which group: of those of which that is known the least far, else the first of all."""
        if not self.others:
            return ""
        groups = {beat.rank: group for beat in self.others if (group := self._awaited(beat))}
        waiter = min(self.others, key=lambda beat: (beat.rank not in groups, beat.collectives if groups else 0, beat.rank))
        return f"; rank {waiter.rank} waits in {waiter.doing}" + (f", in the {groups[waiter.rank]}" if waiter.rank in groups else "")

    def _awaited(self, waiter: Beat) -> str:
        """Return the group in which a rank waits for one of the blockers; empty where counts do not tell, or there is one group only.

        It has begun more there than the blocker, and nobody has begun more than it: what others have left is not waited in. A rank that
        is silent has begun more than it has written, so that several groups may be left.
        """

        def is_awaited(name: str, begun: int) -> bool:
            waits = any(beat.groups.get(name, begun) < begun for beat in self.blockers)
            return waits and not any(beat.groups.get(name, begun) > begun for beat in self.others)

        found = [name for name, begun in waiter.groups.items() if is_awaited(name, begun)]
        return found[0] if len(found) == 1 and len(waiter.groups) > 1 else ""

    def error(self, now: float, rule: str) -> dict[str, Any]:
        """Return what status.json says of it: the first of them by number and its host, all of them, where it was, and its stack."""
        first, message = self.blockers[0], self.message(now, rule)
        lines = [f"rank {first.rank}, most recent call last:", *(f"  {frame}" for frame in first.stack), message]
        said = {"message": message} | ({"traceback": "\n".join(lines)} if first.stack else {})
        where = {"rank": first.rank, "host": first.host or None, "ranks": [beat.rank for beat in self.blockers]}
        return where | {"phase": first.phase, "step": first.step} | said


def find_blockage(beats: Mapping[int, Beat], silent: Iterable[int]) -> Blockage:
    """Name the ranks that the others wait for: those that are silent, else those with the fewest collectives, else all."""
    blockers = [beats[rank] for rank in sorted(silent)]
    if is_silent := bool(blockers):
        others = [beat for rank, beat in sorted(beats.items()) if beat not in blockers]
    else:
        least = min(beat.place for beat in beats.values())
        blockers = [beat for _, beat in sorted(beats.items()) if beat.place == least]
        others = [beat for _, beat in sorted(beats.items()) if beat.place != least]
    return Blockage(blockers, is_silent, others)
