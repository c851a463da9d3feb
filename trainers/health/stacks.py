"""Where a rank's threads are, for its log and for what it says about itself. No torch."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEEPEST = 40
"""Frames of a stack that are written."""


def main_stack() -> tuple[str, ...]:
    """Return where the main thread is, as `file:line in function`, innermost last, our own files relative to the checkout."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines: list[str] = []
    while frame is not None and len(lines) < DEEPEST:
        path = frame.f_code.co_filename
        lines.append(f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(lines))


def append_stacks(log_file: Path, why: str) -> None:
    """Append the stacks of all threads to a rank's log, after the reason."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
