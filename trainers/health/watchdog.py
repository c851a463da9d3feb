"""No run hangs for ever: a thread in each rank ends the run once a rank makes no progress for too long, and names that rank.

Each rank writes what it does to RUN_DIR/ranks, so that the others can name one that is silent. No torch: the launcher reads these
files too, for ranks without others.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from trainers.config.schema import RunConfig
from trainers.health.activity import BEFORE_STEPS, CHECKING_S, FIELDS, Activity, watch
from trainers.health.blockage import Blockage, find_blockage
from trainers.health.stacks import append_stacks, main_stack
from trainers.processes import HALTED, exit_after, send, state_of
from trainers.rundir.attempt import Attempt
from trainers.rundir.beats import Beat, Phase, beat_file, read_beats, write_beat
from trainers.rundir.ending import Exit, State
from trainers.rundir.paths import RANKS, log_file

log = logging.getLogger("fulltune")
TICK_S = 1.0
SILENT_BEATS = 8
"""Beats that a rank may miss once others have waited too long for it; a busy machine delays some."""
GRACE_S = 3.0
"""For ranks to end by themselves once the run has failed, which most do, and say why in their logs."""
LAST_RESORT_S = 45.0
"""For a rank that has given up, before it ends without having said so: the disk that it writes to may be what hangs."""


class Watchdog:
    """The thread that watches what this rank does."""

    def __init__(self, activity: Activity) -> None:
        """Watch nothing yet."""
        self.activity, self.clock = activity, activity.clock
        self.ticked, self.not_before = self.clock(), float("-inf")
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        self.beat_s, self.wrote = TICK_S, self.clock()
        self.log_file: Path | None = None
        self.opened: IO[str] | None = None
        self.writing = threading.Lock()
        self.collectives: Callable[[], dict[str, int]] = dict
        self.flight_record: Callable[[], bytes | None] = lambda: None
        # tells whether this rank has been asked to stop, also where Python cannot run
        self.is_asked: Callable[[], bool] = lambda: False

    def start(self, config: RunConfig, attempt: Attempt, rank: int, size: int, fail: Callable[[dict[str, Any]], object]) -> None:
        """Begin to watch this rank; `fail` gets the error when the run is to end."""
        self.run_dir, self.attempt, self.rank, self.size, self.fail = attempt.run_dir, attempt, rank, size, fail
        self.activity.limit(config)
        self.beat_s = max(TICK_S, size / 50)  # whatever the number of ranks, at most 50 small files a second
        self.log_file = log_file(attempt.folder, rank)
        beat_file(self.run_dir, rank).parent.mkdir(exist_ok=True)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self.first_written = self._write()
        self.ticked = self.wrote = self.clock()
        self.activity.beat()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def log_to(self, folder: Path) -> None:
        """Let stacks go to this rank's log in the attempt's folder. All ranks have met: none is taken for one of an older attempt."""
        self._write()
        self.log_file = log_file(folder, self.rank)
        self.opened = self.log_file.open("a")
        faulthandler.register(signal.SIGUSR1, file=self.opened, all_threads=True)

    def stop(self) -> None:
        """Watch no more: this rank has done its part, and nobody waits for it."""
        self.ended.set()
        self.activity.changed.set()
        if self.thread is not None:
            self.thread.join(TICK_S)
            for path in self.run_dir.glob(f"{RANKS}/*rank-{self.rank}.json*"):  # also what one of its number was killed at writing
                path.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self.ended.is_set():
            if self.activity.changed.wait(TICK_S):
                self.activity.changed.clear()
                self.wrote = float("-inf")
            try:
                self._tick()
            except Exception as error:  # no memory, no disk: what it watches continues, or ends of the same
                log.debug("the watchdog: %r", error)

    def _tick(self) -> None:
        now = self.clock()
        self.activity.paused += max(0.0, now - self.ticked - 2 * TICK_S)  # stopped and continued, or a machine that slept
        self.ticked = now
        self.activity.count_io()
        if now - self.wrote >= self.beat_s:
            self.wrote = now
            if not self.attempt.is_current():
                self._give_way()
            self._write()
            self._follow()
        if self.activity.phase in BEFORE_STEPS and self.is_asked():
            self._stop_late()
        if self.activity.is_overdue() and self.clock() >= self.not_before:
            self._ask_around()

    def own(self) -> Beat:
        """Return what this rank says of itself."""
        begun = self.collectives()
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=self.activity.phase,
            step=self.activity.step,
            idle_s=round(self.activity.idle_s(), 1),
            limit_s=self.activity.limit_s(),
            collectives=sum(begun.values()),
            groups=begun,
            stack=main_stack(),
        )

    def _write(self) -> float:
        """Write this rank's beat; returns its time on the file system."""
        with self.writing:  # both threads stage it under one name
            return write_beat(self.run_dir, self.own())

    def _follow(self) -> None:
        """End this rank where the run has failed, or was stopped before its first step, unless it ends by itself."""
        if self.attempt.has_ended(State.failed):
            how, code = "failed", Exit.failed
        elif self.activity.phase in BEFORE_STEPS and self.attempt.has_ended(State.preempted):
            how, code = "been stopped", Exit.stopped
        else:
            return
        exit_after(LAST_RESORT_S, code)
        if not self.ended.wait(GRACE_S):
            self._dump(f"the run has {how}, and this rank continues")
            os._exit(code)

    def _stop_late(self) -> None:
        """End this rank, which has been asked to stop with nothing to save, unless it ends by itself: its handler may wait for others."""
        if not self.ended.wait(GRACE_S) and self.activity.phase in BEFORE_STEPS:
            exit_after(LAST_RESORT_S, Exit.stopped)
            self.attempt.set_status(State.preempted)
            self._dump("this rank has been asked to stop, and waits where no signal reaches it")
            os._exit(Exit.stopped)

    def _give_way(self) -> None:
        """End this rank, whose place in RUN_DIR/ranks a newer attempt's has taken, unless its loop sees that soon and ends by itself."""
        if not self.ended.wait(LAST_RESORT_S):
            self._dump("a newer attempt has started, and this rank continues")
            os._exit(Exit.superseded)

    def _ask_around(self) -> None:
        """Find out which rank blocks the others, and end the run; nothing where this rank or the one it waits for gets on after all."""
        began, raised, until = self.activity.began, self._write(), self.clock() + SILENT_BEATS * self.beat_s
        while silent := self._silent_since(raised):
            halted = all(beat.rank not in silent or state_of(beat.host, beat.pid) in HALTED for beat in self._beats().values())
            if halted or self.clock() > until or self.ended.wait(TICK_S):
                break
            self.ticked = self.wrote = self.clock()
            self._write()
            self._follow()
        if self.activity.began != began or self.ended.is_set():
            return
        now, beats = self._write(), self._beats()
        blockage = find_blockage(beats, silent)
        left = blockage.left_s(now)
        if left > 0:
            self.not_before = self.clock() + min(left, 60.0)
            return
        self._end(blockage, now)

    def _beats(self) -> dict[int, Beat]:
        """Return every rank's beat of this attempt; a rank that never wrote one has never begun."""
        known = {rank: beat for rank, beat in read_beats(self.run_dir).items() if beat.written >= self.first_written}
        limit = self.activity.limits[Phase.preparing]
        return {rank: known.get(rank, Beat(rank=rank, limit_s=limit, written=self.first_written)) for rank in range(self.size)}

    def _silent_since(self, raised: float) -> list[int]:
        return [rank for rank, beat in self._beats().items() if rank != self.rank and beat.written <= raised]

    def _end(self, blockage: Blockage, now: float) -> None:
        """Mark the run failed, let every rank write its stacks, and end."""
        exit_after(LAST_RESORT_S, Exit.failed)
        assert self.log_file is not None
        limit, field = self.activity.limit_s(), FIELDS[self.activity.phase]
        if self.activity.phase is Phase.checking and limit == CHECKING_S:
            field = "more than nodes need to try their devices and links"
        error = blockage.error(now, f"nothing for {limit:g} s: {field}; stacks in {self.log_file.parent}")
        self.fail(error)
        self._dump(error["message"])
        if blockage.is_silent:
            for beat in blockage.blockers:  # SIGUSR1 writes stacks also where Python does not run; a stopped process needs SIGCONT for it
                send(beat.host, beat.pid, self.run_dir, signal.SIGUSR1, signal.SIGCONT)
        time.sleep(2 * self.beat_s + GRACE_S)
        os._exit(Exit.failed)

    def _dump(self, why: str) -> None:
        """Append the stacks of all threads to this rank's log, and write NCCL's flight record next to it."""
        assert self.log_file is not None
        append_stacks(self.log_file, why)
        record = threading.Thread(target=self._write_flight_record, daemon=True)  # may wait for what hangs
        record.start()
        record.join(GRACE_S)

    def _write_flight_record(self) -> None:
        assert self.log_file is not None
        if record := self.flight_record():
            self.log_file.with_name(f"nccl-rank-{self.rank}.pickle").write_bytes(record)


watchdog = Watchdog(watch)
"""This rank's: like its log, a process has one."""
