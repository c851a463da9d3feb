"""What this rank does and how long it has: a phase lasts until the next begins, and each beat gives it its time anew. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from trainers.config.checks import value_at
from trainers.config.schema import RunConfig
from trainers.rundir.beats import Phase

T = TypeVar("T")
FIRST_STEP = 5.0
"""Times the limit of a phase while code is compiled, and train.step_timeout_s for the first step, which warms up and connects devices."""
CHECKING_S = 600.0
"""At most for nodes to try their devices and links, which takes seconds, and minutes to connect thousands: a broken link hangs."""
PROGRESS_BYTES = 64 << 20
"""Read or written, these count as progress outside of steps: downloads, weights, checkpoints."""
FIELDS = {
    Phase.preparing: "limits.prepare_s",
    Phase.connecting: "limits.prepare_s",
    Phase.checking: "limits.prepare_s",
    Phase.loading: "limits.load_s",
    Phase.step: "train.step_timeout_s",
    Phase.sampling: "limits.sample_s",
    Phase.evaluating: "limits.evaluate_s",
    Phase.saving: "limits.save_s",
    Phase.exporting: "limits.export_s",
}
"""The setting that limits each phase."""
BEFORE_STEPS = (Phase.preparing, Phase.connecting, Phase.checking, Phase.loading)
"""In these a rank that is asked to stop ends at once, and others may wait for it where no signal reaches them."""


class Activity:
    """A rank's phase and step, and when it last made progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with preparing, without limits."""
        self.clock = clock
        self.phase = Phase.preparing
        self.step: int | None = None
        self.has_stepped = False
        self.compiling = False  # code is being compiled, which shows no progress
        self.limits: dict[Phase, float | None] = {}
        # set when a phase begins: it is written at once, so that nothing older is said of a rank that falls silent
        self.changed = threading.Event()
        self.paused = 0.0  # seconds in which this whole process did not run: they do not count
        self.began = (clock(), 0.0)  # when it last made progress, and `paused` at that time
        self.io_bytes = 0
        self.aside: int | None = None  # the thread whose work is not the phase's, and how often it has made progress
        self.aside_beats = 0

    def limit(self, config: RunConfig) -> None:
        """Take each phase's limit from the settings."""
        self.limits = {phase: value_at(config, path) for phase, path in FIELDS.items()}
        self.limits[Phase.checking] = min(config.limits.prepare_s, CHECKING_S) if config.limits.prepare_s is not None else None

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Begin a phase, or the next step; it lasts until the next one begins."""
        self.has_stepped = self.has_stepped or (self.phase is Phase.step and (phase, step) != (self.phase, self.step))
        changed, self.phase, self.step = phase is not self.phase, phase, step
        self.beat()
        if changed:
            self.changed.set()

    def beat(self) -> None:
        """Note progress: the time of the phase begins anew, unless this is the thread whose work is not the phase's."""
        if threading.get_ident() == self.aside:
            self.aside_beats += 1
            return
        self.began = (self.clock(), self.paused)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, each a beat."""
        for item in items:
            self.beat()
            yield item

    def limit_s(self) -> float | None:
        """Return the seconds that the phase may go without a beat; None is for ever."""
        limit = self.limits.get(self.phase)
        longer = self.compiling or (self.phase is Phase.step and not self.has_stepped)
        return limit * FIRST_STEP if limit is not None and longer else limit

    def idle_s(self) -> float:
        """Return the seconds since the last beat in which this process ran."""
        at, paused = self.began
        return self.clock() - at - (self.paused - paused)

    def is_overdue(self) -> bool:
        """Tell whether it makes no progress for longer than its phase may."""
        limit = self.limit_s()
        return limit is not None and self.idle_s() > limit

    def count_io(self) -> None:
        """Count what is read and written as progress, in phases that are about files."""
        if self.phase in (Phase.step, Phase.sampling, Phase.evaluating):
            return
        try:
            lines = Path("/proc/self/io").read_text().split()
        except OSError:
            return
        done = int(lines[1]) + int(lines[3])
        if done - self.io_bytes >= PROGRESS_BYTES:
            self.io_bytes = done
            self.beat()


watch = Activity()
"""This rank's: like its log, a process has one."""
