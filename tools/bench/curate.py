"""Rows a second and peak memory of a curation with all its steps without models."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.bench.arguments import at_least
from trainers.processes import prepare_child
from trainers.units import in_bytes, in_time

ROW_BYTES = 1000
NEAR, PERSONAL = 0.05, 0.02
"""Share of rows that are near duplicates, and that hold an e-mail address and a telephone number."""
AIM = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench curate`."""
    parser.add_argument("--rows", type=at_least(100), default=50_000, metavar="N", help="rows of 1 kB (default 50,000)")
    parser.add_argument("--processes", type=at_least(1), default=2, metavar="N", help="at once (default 2)")


def run(options: argparse.Namespace) -> int:
    """Make rows, curate them, and print time and memory, also for a million rows; returns the exit code."""
    from launcher.presets import CONF  # a GPU machine on which other benches run may have no launcher

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w") as stream:
            stream.writelines(rows(options.rows))
        line = [sys.executable, "-m", "tools.curate", str(CONF / "curate" / "default.yaml"), str(file), "--out", f"{folder}/out"]
        began = time.monotonic()
        child = subprocess.Popen([*line, "--processes", str(options.processes)], stdout=subprocess.DEVNULL, preexec_fn=prepare_child())
        memory = Memory(child.pid)
        if child.wait():
            return child.returncode
        seconds = time.monotonic() - began
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads((Path(folder) / "out" / "report.json").read_text())["rows"]
        say(options, seconds, spent.ru_utime + spent.ru_stime, memory.peak, file.stat().st_size, found["after"])
    return 0


def say(options: argparse.Namespace, seconds: float, cpu: float, peak: int, size: int, after: int) -> None:
    """Print what was measured, and what it means for a million rows if time grows with the rows."""
    print(f"{options.rows:,} rows, {in_bytes(size)}, {options.processes} processes: {after:,} rows stay")
    print(f"{seconds:.1f} s, {options.rows / seconds:,.0f} rows a second; peak memory of all processes {in_bytes(peak)}")
    shared = cpu / options.processes / options.rows * AIM
    print(f"{cpu:.1f} s of CPU time, {cpu / options.rows * 1e6:,.0f} microseconds a row")
    print(f"a million rows, if time grows with the rows: {in_time(seconds / options.rows * AIM)}; on idle cores {in_time(shared)}")


def rows(count: int) -> Iterator[str]:
    """Yield chats of random words, as lines of JSON, some of them near duplicates of an earlier one or with personal data."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 20_000)])
    earlier: list[str] = []
    for number in range(count):
        text = " ".join(rng.choice(words, ROW_BYTES // 7))
        if earlier and rng.random() < NEAR:
            kept = earlier[rng.integers(len(earlier))].split()
            kept[rng.integers(len(kept))] = "changed"
            text = " ".join(kept)
        elif len(earlier) < 1000:
            earlier.append(text)
        if rng.random() < PERSONAL:
            text += f" write to user{number}@example.org or call +44 20 7946 {number % 10_000:04}"
        turns = [{"role": "user", "content": text[:200]}, {"role": "assistant", "content": f"{text[200:]}."}]
        yield json.dumps({"messages": turns}) + "\n"


class Memory:
    """The most memory that a process and all that it started have had at a time: their proportional sets, looked at four times a second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while held := sum(map(_memory_of, _with_children(self.pid))):
            self.peak = max(self.peak, held)
            time.sleep(0.25)


def _with_children(pid: int) -> list[int]:
    """Return a process and those that it, or any of its threads, has started, and theirs."""
    words: list[str] = []
    try:
        for thread in Path(f"/proc/{pid}/task").glob("*/children"):
            words += thread.read_text().split()
    except OSError:  # it has ended meanwhile
        pass
    return [pid, *(one for word in words for one in _with_children(int(word)))]


def _memory_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
