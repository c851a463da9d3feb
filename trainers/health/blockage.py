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
        waits = [f"; rank {beat.rank} waits in {beat.doing}" for beat in self.others[:1]]
        return "".join([said, *waits, f" ({rule})"])

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
