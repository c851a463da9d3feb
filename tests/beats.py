"""What ranks write while they are alive, and a clock to read it by."""

from __future__ import annotations

import json
import os
from pathlib import Path

from launcher.silence import Silence


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write_beat(run_dir: Path, rank: int, written: float) -> float:
    path = run_dir / "ranks" / f"rank-{rank}.json"
    fields = {"rank": rank, "host": "elsewhere", "pid": 7, "phase": "step", "step": 3, "idle_s": 4.0, "limit_s": 10.0}
    path.write_text(json.dumps(fields | {"collectives": 1, "stack": []}))
    os.utime(path, (written, written))
    return written


def passes(watch: Silence, clock: Clock, seconds: float) -> bool:
    """Let seconds pass; tell whether the run is lost then."""
    until = clock.now + seconds
    lost = False
    while clock.now < until:
        clock.now += 1
        lost = watch.is_lost()
    return lost
