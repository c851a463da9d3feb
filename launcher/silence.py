"""Notice that nobody speaks for a run any more: its only rank is stopped, or all are. Ranks that have others are watched by those."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from launcher.job import Job, mark_failed
from trainers.health.blockage import find_blockage
from trainers.processes import send
from trainers.rundir.attempt import Attempt, read_state
from trainers.rundir.beats import Beat, read_beats
from trainers.rundir.ending import State

LOOK_EVERY_S = 1.0
LATER_S = 10.0
"""Than the ranks themselves would have ended the run."""
ENDED_S = 90.0
"""For ranks that have said how the run ended, and their agent, to end: a stopped agent never does."""
STACKS_S = 2.0
"""For stopped ranks to write their stacks before they are killed."""


class Silence:
    """How long the ranks of one attempt have written nothing about themselves."""

    def __init__(self, job: Job, attempt: Attempt, clock: Callable[[], float] = time.monotonic) -> None:
        """Take what is there for an older attempt's."""
        self.job, self.attempt, self.clock = job, attempt, clock
        self.looked = clock()
        self.silent_s = 0.0
        self.old = {rank: beat.written for rank, beat in read_beats(job.run_dir).items()}
        self.beats: dict[int, Beat] = {}

    def is_lost(self) -> bool:
        """Tell whether nothing was heard for longer than what the ranks do may take; the run is then marked failed, unless it has ended.

        Not once a newer attempt has started, whose silence does not concern this launcher.
        """
        passed = self.clock() - self.looked
        if passed < LOOK_EVERY_S:
            return False
        self.looked = self.clock()
        self.silent_s += min(passed, 2 * LOOK_EVERY_S)  # no longer while this process was stopped too
        beats = {rank: beat for rank, beat in read_beats(self.job.run_dir).items() if beat.written != self.old.get(rank)}
        if any(beat != self.beats.get(rank) for rank, beat in beats.items()):
            self.beats |= beats
            self.silent_s = 0.0
        if read_state(self.job.run_dir) in (State.done, State.preempted):
            return self.silent_s > ENDED_S
        if self.silent_s <= self._limit_s():
            return False
        if not self.attempt.is_current(at_once=True):
            return False
        self._record()
        return True

    def _limit_s(self) -> float:
        if not self.beats:
            return (self.job.run.limits.prepare_s or float("inf")) + LATER_S
        return max(beat.left_s(beat.written) for beat in self.beats.values()) + LATER_S

    def _record(self) -> None:
        if read_state(self.job.run_dir) == State.failed:
            return
        if not self.beats:
            mark_failed(self.attempt, message=f"no rank began in {self.silent_s:.0f} s (limits.prepare_s)")
            return
        blockage = find_blockage(self.beats, self.beats)
        now = blockage.blockers[0].written + self.silent_s
        mark_failed(self.attempt, **blockage.error(now, "no rank is left to speak; stacks in logs"))
        for beat in blockage.blockers:
            send(beat.host, beat.pid, self.job.run_dir, signal.SIGUSR1, signal.SIGCONT)
        time.sleep(STACKS_S)
