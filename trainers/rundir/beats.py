"""What each rank does, written to RUN_DIR/ranks/rank-R.json, so that others can name it once it is silent. No torch."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from trainers.rundir.files import write_json
from trainers.rundir.paths import RANKS


class Phase(StrEnum):
    """What a rank does, as messages say it."""

    starting = "starting"
    preparing = "preparing data"
    connecting = "connecting"
    checking = "checking nodes"
    loading = "loading"
    step = "step"
    sampling = "sampling"
    evaluating = "evaluating"
    saving = "saving"
    exporting = "exporting"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last wrote about itself."""

    rank: int
    host: str = ""
    pid: int = 0
    phase: str = Phase.starting
    step: int | None = None
    idle_s: float = 0.0
    """Seconds since it began its step, or last got on with what it does."""
    limit_s: float | None = None
    collectives: int = 0
    """Begun so far: a rank that has begun fewer than others is the one that they wait for."""
    groups: dict[str, int] = field(default_factory=dict)
    """The same by process group, whose name says who is in it."""
    stack: tuple[str, ...] = ()
    """Of its main thread, innermost last, as `file:line in function`."""
    written: float = 0.0
    """Modification time of the file, by the file system's one clock."""

    @property
    def place(self) -> tuple[int, bool]:
        """How far it has come: the least of all ranks is waited for."""
        return self.collectives, self.phase not in (Phase.starting, Phase.preparing)

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
    for path in (run_dir / RANKS).glob("rank-*.json"):
        try:
            with path.open(encoding="utf-8") as file:  # opened first: a network file system then has the newest time of it
                fields, written = json.load(file), os.fstat(file.fileno()).st_mtime
            beats[int(fields["rank"])] = Beat(**fields | {"stack": tuple(fields["stack"]), "written": written})
        except (OSError, ValueError, KeyError, TypeError):  # removed just now
            continue
    return beats


def beat_file(run_dir: Path, rank: int) -> Path:
    """Return where a rank writes about itself."""
    return run_dir / RANKS / f"rank-{rank}.json"


def write_beat(run_dir: Path, beat: Beat) -> float:
    """Write what a rank says about itself; returns the file's modification time, by the file system's clock."""
    file, fields = beat_file(run_dir, beat.rank), dataclasses.asdict(beat)
    del fields["written"]
    write_json(file, fields)
    return file.stat().st_mtime
