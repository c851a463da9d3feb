"""No run hangs for ever: in each rank a thread that knows what the rank does and how long it may, and names who blocks the others.

Each rank writes what it does to RUN_DIR/ranks/rank-R.json, so that the others can name one that cannot speak any more. No torch:
the launcher reads these files too, for ranks that have nobody else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

from trainers.config.checks import value_at
from trainers.config.schema import RunConfig
from trainers.rundir.attempt import Attempt
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import write_json

T = TypeVar("T")
log = logging.getLogger("fulltune")
ROOT = Path(__file__).resolve().parents[2]
TICK_S = 1.0
SILENT_BEATS = 8
"""Beats that a rank may miss once others have waited too long for it; a busy machine delays some."""
STATES = {"T": "stopped", "t": "stopped", "Z": "dead", "D": "waiting for a disk or a device"}
"""Of a process in /proc; others are alive."""
HALTED = ("stopped", "dead", "gone")
GRACE_S = 3.0
"""For ranks to end by themselves once the run has failed, which most do, and say why in their logs."""
LAST_RESORT_S = 45.0
"""For a rank that has given up, before it ends without having said so: the disk that it writes to may be what hangs."""
FIRST_STEP = 5.0
"""Times train.step_timeout_s for the first step of an attempt, which compiles, warms up and connects the devices."""
CHECKING_S = 600.0
"""At most for nodes to try their devices and links, which takes seconds, and minutes to connect thousands: a broken link hangs."""
PROGRESS_BYTES = 64 << 20
"""Read or written, these count as progress outside of steps: downloads, weights, checkpoints."""


class Phase(StrEnum):
    """What a rank is doing, as it is said in messages."""

    preparing = "preparing data"
    connecting = "connecting"
    checking = "checking nodes"
    loading = "loading"
    step = "step"
    evaluating = "evaluating"
    saving = "saving"
    exporting = "exporting"


FIELDS = {
    Phase.preparing: "limits.prepare_s",
    Phase.connecting: "limits.prepare_s",
    Phase.checking: "limits.prepare_s",
    Phase.loading: "limits.load_s",
    Phase.step: "train.step_timeout_s",
    Phase.evaluating: "limits.evaluate_s",
    Phase.saving: "limits.save_s",
    Phase.exporting: "limits.export_s",
}


BEFORE_STEPS = (Phase.preparing, Phase.connecting, Phase.checking, Phase.loading)
"""In these a rank that is asked to stop ends at once, and others may wait for it where no signal reaches them."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last wrote about itself."""

    rank: int
    host: str = ""
    pid: int = 0
    phase: str = "starting"
    step: int | None = None
    idle_s: float = 0.0
    """Seconds since it began its step, or last got on with what it does."""
    limit_s: float | None = None
    collectives: int = 0
    """Begun so far: a rank that has begun fewer than others is the one that they wait for."""
    stack: tuple[str, ...] = ()
    """Of its main thread, innermost last, as `file:line in function`."""
    written: float = 0.0
    """Modification time of the file, by the file system's one clock."""

    @property
    def place(self) -> tuple[int, bool]:
        """How far it has come: the least of all ranks is waited for."""
        return self.collectives, self.phase not in ("starting", Phase.preparing)

    @property
    def doing(self) -> str:
        """Say phase, step and line."""
        ours = next((frame for frame in reversed(self.stack) if frame.startswith("trainers/")), self.stack[-1] if self.stack else "")
        return f"{self.phase}{f' {self.step}' if self.step is not None else ''}" + (f", at {ours}" if ours else "")

    def left_s(self, now: float) -> float:
        """Return the seconds that it has left at file system time `now`."""
        return float("inf") if self.limit_s is None else self.limit_s - self.idle_s - (now - self.written)


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """Return what each rank last wrote about itself, of whatever attempt."""
    beats = {}
    for path in (run_dir / "ranks").glob("rank-*.json"):
        try:
            with path.open(encoding="utf-8") as file:  # opened first: a network file system then has the newest time of it
                fields, written = json.load(file), os.fstat(file.fileno()).st_mtime
            beats[int(fields["rank"])] = Beat(**fields | {"stack": tuple(fields["stack"]), "written": written})
        except (OSError, ValueError, KeyError, TypeError):  # removed just now
            continue
    return beats


@dataclass(frozen=True)
class Verdict:
    """The ranks that block the others."""

    culprits: list[Beat]
    silent: bool
    """They do not write any more."""
    others: list[Beat]

    def left_s(self, now: float) -> float:
        """Return the seconds until all of them are past their limits: before, they may be at work on something long."""
        if self.silent and any(state_of(beat) in HALTED for beat in self.culprits):
            return 0.0
        return max(beat.left_s(now) for beat in self.culprits)

    def message(self, now: float, rule: str) -> str:
        """Say who did not arrive, and where; `rule` says after which time."""
        names = ", ".join(str(beat.rank) for beat in self.culprits)
        are = f"rank {names}" if len(self.culprits) == 1 else f"ranks {names}"
        first = self.culprits[0]
        it = "it" if len(self.culprits) == 1 else f"rank {first.rank}"
        if self.silent and not first.pid:
            said = f"{are} never began"
        elif self.silent:
            has = "has" if len(self.culprits) == 1 else "have"
            state = f" is {state_of(first)}" if state_of(first) else ""
            silence = f"{has} not been heard of for {now - first.written:.0f} s (process {first.pid} on {first.host}{state})"
            said = f"{are} {silence}: {it} was in {first.doing}"
        elif self.others:
            said = f"{are} did not arrive: {it} is in {first.doing}"
        elif len(self.culprits) == 1:
            said = f"{are} makes no progress: it is in {first.doing}"
        else:
            said = f"no rank makes progress: all {len(self.culprits)} are equally far, in {first.doing}"
        waits = [f"; rank {beat.rank} waits in {beat.doing}" for beat in self.others[:1]]
        return "".join([said, *waits, f" ({rule})"])

    def error(self, now: float, rule: str) -> dict[str, Any]:
        """Return what status.json says of it: the first of them by number and its host, all of them, where it was, and its stack."""
        first, message = self.culprits[0], self.message(now, rule)
        lines = [f"rank {first.rank}, most recent call last:", *(f"  {frame}" for frame in first.stack), message]
        said = {"message": message} | ({"traceback": "\n".join(lines)} if first.stack else {})
        where = {"rank": first.rank, "host": first.host or None, "ranks": [beat.rank for beat in self.culprits]}
        return where | {"phase": first.phase, "step": first.step} | said


def judge(beats: Mapping[int, Beat], silent: Iterable[int]) -> Verdict:
    """Name the ranks that the others wait for: those that are silent, else those with the fewest collectives, else all."""
    culprits = [beats[rank] for rank in sorted(silent)]
    if quiet := bool(culprits):
        others = [beat for rank, beat in sorted(beats.items()) if beat not in culprits]
    else:
        least = min(beat.place for beat in beats.values())
        culprits = [beat for _, beat in sorted(beats.items()) if beat.place == least]
        others = [beat for _, beat in sorted(beats.items()) if beat.place != least]
    return Verdict(culprits, quiet, others)


def state_of(beat: Beat) -> str:
    """Say what the system knows about a rank's process; empty where it is of another machine."""
    if beat.host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return ""
    try:
        return STATES.get(Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0], "alive")
    except OSError:
        return "gone"


def send(beats: Iterable[Beat], run_dir: Path, *numbers: signal.Signals) -> None:
    """Send signals to ranks of this machine.

    SIGUSR1 lets a rank write its stacks, also where Python does not run any more; a stopped one needs SIGCONT for it.
    """
    for beat in beats:
        if beat.host != socket.gethostname():
            continue
        with contextlib.suppress(OSError):
            if str(run_dir).encode() in Path(f"/proc/{beat.pid}/cmdline").read_bytes():  # and not another process by now
                for number in numbers:
                    os.kill(beat.pid, number)


def exit_after(seconds: float, code: int) -> None:
    """End this process with `code` if it is still there then."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


class Watchdog:
    """What this rank does, since when, and the thread that ends it if it does so for too long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Watch nothing yet; `enter` and `beat` do no harm."""
        self.clock = clock
        self.phase = Phase.preparing
        self.step: int | None = None
        self.stepped = False
        self.paused = 0.0
        """Seconds in which this whole process did not run: they are not held against it."""
        self.began = (clock(), 0.0)
        """When what it does began or last got on, and `paused` at that time."""
        self.ticked, self.not_before = clock(), float("-inf")
        self.io_bytes = 0
        self.limits: dict[Phase, float | None] = {}
        self.thread: threading.Thread | None = None
        self.ended, self.changed = threading.Event(), threading.Event()
        self.beat_s, self.wrote = TICK_S, clock()
        self.log_file: Path | None = None
        self.opened: IO[str] | None = None
        self.collectives: Callable[[], int] = lambda: 0
        self.flight_record: Callable[[], bytes | None] = lambda: None

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Begin a phase, or the next step; it lasts until the next one begins."""
        self.stepped = self.stepped or self.phase is Phase.step
        changed, self.phase, self.step = phase is not self.phase, phase, step
        self.beat()
        if changed:
            self.changed.set()  # written at once: what is said of this rank once it is silent must not be of an earlier phase

    def beat(self) -> None:
        """Get on with the phase: its time begins anew."""
        self.began = (self.clock(), self.paused)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, each a beat."""
        for item in items:
            self.beat()
            yield item

    def limit_s(self) -> float | None:
        """Return the seconds that the phase may go without a beat; None is for ever."""
        limit = self.limits.get(self.phase)
        return limit * FIRST_STEP if limit is not None and self.phase is Phase.step and not self.stepped else limit

    def idle_s(self) -> float:
        """Return the seconds since the last beat in which this process ran."""
        at, paused = self.began
        return self.clock() - at - (self.paused - paused)

    def start(self, config: RunConfig, attempt: Attempt, rank: int, size: int, fail: Callable[[dict[str, Any]], object]) -> None:
        """Begin to watch this rank; `fail` gets the error when the run is to end."""
        self.run_dir, self.attempt, self.rank, self.size, self.fail = attempt.run_dir, attempt, rank, size, fail
        self.limits = {phase: value_at(config, path) for phase, path in FIELDS.items()}
        self.limits[Phase.checking] = min(config.limits.prepare_s, CHECKING_S) if config.limits.prepare_s is not None else None
        self.beat_s = max(TICK_S, size / 50)  # whatever the number of ranks, at most 50 small files a second
        self.log_file = attempt.folder / f"rank-{rank}.log"
        (self.run_dir / "ranks").mkdir(exist_ok=True)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self.first_written = self._write()
        self.ticked = self.wrote = self.clock()
        self.beat()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def log_to(self, folder: Path) -> None:
        """Let stacks go to this rank's log in the attempt's folder. All ranks have met: none is taken for one of an older attempt."""
        self._write()
        self.log_file = folder / f"rank-{self.rank}.log"
        self.opened = self.log_file.open("a")
        faulthandler.register(signal.SIGUSR1, file=self.opened, all_threads=True)

    def stop(self) -> None:
        """Watch no more: this rank has done its part, and nobody waits for it."""
        self.ended.set()
        self.changed.set()
        if self.thread is not None:
            self.thread.join(TICK_S)
            self._file.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.run_dir / "ranks" / f"rank-{self.rank}.json"

    def _watch(self) -> None:
        while not self.ended.is_set():
            if self.changed.wait(TICK_S):
                self.changed.clear()
                self.wrote = float("-inf")
            try:
                self._tick()
            except Exception as error:  # no memory, no disk: what it watches continues, or ends of the same
                log.debug("the watchdog: %r", error)

    def _tick(self) -> None:
        now = self.clock()
        self.paused += max(0.0, now - self.ticked - 2 * TICK_S)  # stopped and continued, or a machine that slept
        self.ticked = now
        self._count_io()
        if now - self.wrote >= self.beat_s:
            self.wrote = now
            if not self.attempt.is_current():
                self._give_way()
            self._write()
            self._follow()
        if self._is_overdue():
            self._ask_around()

    def _is_overdue(self) -> bool:
        limit = self.limit_s()
        return limit is not None and self.idle_s() > limit and self.clock() >= self.not_before

    def _count_io(self) -> None:
        """Count what is read and written as progress, in phases that are about files."""
        if self.phase in (Phase.step, Phase.evaluating):
            return
        try:
            lines = Path("/proc/self/io").read_text().split()
        except OSError:
            return
        done = int(lines[1]) + int(lines[3])
        if done - self.io_bytes >= PROGRESS_BYTES:
            self.io_bytes = done
            self.beat()

    def own(self) -> Beat:
        """Return what this rank says of itself."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=self.phase,
            step=self.step,
            idle_s=round(self.idle_s(), 1),
            limit_s=self.limit_s(),
            collectives=self.collectives(),
            stack=_stack(frame),
        )

    def _write(self) -> float:
        """Write this rank's beat; returns its time on the file system."""
        fields = dataclasses.asdict(self.own())
        del fields["written"]
        write_json(self._file, fields)
        return self._file.stat().st_mtime

    def _follow(self) -> None:
        """End this rank where the run has failed, or was stopped before its first step, unless it ends by itself."""
        if self.attempt.has_ended(State.failed):
            how, code = "failed", Exit.failed
        elif self.phase in BEFORE_STEPS and self.attempt.has_ended(State.preempted):
            how, code = "been stopped", Exit.stopped
        else:
            return
        exit_after(LAST_RESORT_S, code)
        if not self.ended.wait(GRACE_S):
            self._dump(f"the run has {how}, and this rank continues")
            os._exit(code)

    def _give_way(self) -> None:
        """End this rank, whose place in RUN_DIR/ranks a newer attempt's has taken, unless its loop sees that soon and ends by itself."""
        if not self.ended.wait(LAST_RESORT_S):
            self._dump("a newer attempt has started, and this rank continues")
            os._exit(Exit.superseded)

    def _ask_around(self) -> None:
        """Find out which rank blocks the others, and end the run; nothing where this rank or the one it waits for gets on after all."""
        began, raised, until = self.began, self._write(), self.clock() + SILENT_BEATS * self.beat_s
        while silent := self._silent_since(raised):
            halted = all(beat.rank not in silent or state_of(beat) in HALTED for beat in self._beats().values())
            if halted or self.clock() > until or self.ended.wait(TICK_S):
                break
            self.ticked = self.wrote = self.clock()
            self._write()
            self._follow()
        if self.began != began or self.ended.is_set():
            return
        now, beats = self._write(), self._beats()
        verdict = judge(beats, silent)
        left = verdict.left_s(now)
        if left > 0:
            self.not_before = self.clock() + min(left, 60.0)
            return
        self._end(verdict, now)

    def _beats(self) -> dict[int, Beat]:
        """Return every rank's beat of this attempt; a rank that never wrote one has never begun."""
        known = {rank: beat for rank, beat in read_beats(self.run_dir).items() if beat.written >= self.first_written}
        limit = self.limits[Phase.preparing]
        return {rank: known.get(rank, Beat(rank=rank, limit_s=limit, written=self.first_written)) for rank in range(self.size)}

    def _silent_since(self, raised: float) -> list[int]:
        return [rank for rank, beat in self._beats().items() if rank != self.rank and beat.written <= raised]

    def _end(self, verdict: Verdict, now: float) -> None:
        """Mark the run failed, let every rank write its stacks, and end."""
        exit_after(LAST_RESORT_S, Exit.failed)
        assert self.log_file is not None
        limit, field = self.limit_s(), FIELDS[self.phase]
        if self.phase is Phase.checking and limit == CHECKING_S:
            field = "more than nodes need to try their devices and links"
        error = verdict.error(now, f"nothing for {limit:g} s: {field}; stacks in {self.log_file.parent}")
        self.fail(error)
        self._dump(error["message"])
        if verdict.silent:
            send(verdict.culprits, self.run_dir, signal.SIGUSR1, signal.SIGCONT)
        time.sleep(2 * self.beat_s + GRACE_S)
        os._exit(Exit.failed)

    def _dump(self, why: str) -> None:
        """Append the stacks of all threads to this rank's log, and write NCCL's flight record next to it."""
        assert self.log_file is not None
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        record = threading.Thread(target=self._write_flight_record, daemon=True)  # may wait for what hangs
        record.start()
        record.join(GRACE_S)

    def _write_flight_record(self) -> None:
        assert self.log_file is not None
        if record := self.flight_record():
            self.log_file.with_name(f"nccl-rank-{self.rank}.pickle").write_bytes(record)


def _stack(frame: FrameType | None, deepest: int = 40) -> tuple[str, ...]:
    """Return where a thread is, innermost last, our own files relative to the checkout."""
    lines: list[str] = []
    while frame is not None and len(lines) < deepest:
        path = frame.f_code.co_filename
        lines.append(f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(lines))


watch = Watchdog()
"""This rank's: like its log, a process has one."""
