"""The command: rows in their order, each written as it is measured, until they are done or the time is over."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from tools.bench.arguments import at_least
from tools.bench.gpu import launches, processes
from tools.bench.gpu.processes import NotDone, TimeIsUp, Worker
from tools.bench.gpu.results import Record, Results
from tools.bench.gpu.rows import COMMON, GAIN, Row, Size, all_rows
from tools.bench.machine import gpu_words, versions
from tools.bench.ranks import raise_on_signals
from trainers import host
from trainers.rundir.ending import Exit
from trainers.units import in_bytes

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "torchao", "triton", "trl")
NEEDED = ("hydra", "omegaconf", "peft", "datasets")
LIMIT = 4
"""Times the expected seconds after which a row is ended."""
LEAST_LIMIT_S = 120.0
LAST_S = 8.0
"""Seconds at the end in which nothing is begun."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench gpu`."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu.md"), help="page to write (default benchmarks/gpu.md)")
    parser.add_argument("--minutes", type=float, default=25.0, help="time for all of it; what does not fit is left out (default 25)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="only rows whose name contains one of these")
    parser.add_argument("--again", nargs="+", default=[], metavar="WORDS", help="measure rows again whose name contains one of these")
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    parser.add_argument("--list", action="store_true", help="name the rows in their order, and measure nothing")
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU with tiny models: do all rows run?")
    parser.add_argument("--memory", type=at_least(1), help="bytes of the device (default: the GPU's)")
    parser.add_argument("--gpus", type=at_least(1), help="how many GPUs rows of meshes take (default: all of the machine)")
    parser.add_argument(
        "--scratch", type=Path, help="folder for runs, checkpoints and exports, 40 GB, removed at the end (default: temporary)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure and write; returns 0 even where rows failed, which are rows with the reason; 130 on Ctrl-C."""
    raise_on_signals()
    device, memory, gpus = _device(options)
    size = Size(memory=options.memory or memory, tiny=options.rehearse, gpus=options.gpus or gpus)
    rows = [row for row in all_rows(size) if not options.only or any(words in row.id for words in options.only)]
    if options.list:
        print("\n".join(f"{row.seconds:4d} s  {row.id}" for row in rows))
        return Exit.done
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        options.error(f"{', '.join(missing)} cannot be imported: docs/gpu.md says what to bring to a machine without a network")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(page=options.out, device=device, about=_about(options, device, memory), line=options.line)
    if not options.fresh:
        results.read(tuple(options.again))
    scratch = Path(tempfile.mkdtemp(prefix="fulltune-gpu-", dir=options.scratch))
    try:
        Session(size, all_rows(size), results, scratch, time.monotonic() + 60 * options.minutes).run(rows)
    except KeyboardInterrupt:
        print(f"stopped: what is measured is in {options.out}, and the same command continues", file=sys.stderr)
        return Exit.interrupted
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(results.markdown(), end="")
    return Exit.done


def run_rank(options: argparse.Namespace) -> None:
    """Measure one row; only this imports torch."""
    from tools.bench.gpu import worker

    worker.run_rank(options)


def _device(options: argparse.Namespace) -> tuple[str, int, int]:
    """Return the device's name and bytes, and how many there are, asked of a process of its own: this one takes no memory of a GPU."""
    if options.rehearse:
        return "a CPU, tiny models", host.memory_limit().bytes, 2
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.total_memory, torch.cuda.device_count(), p.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        if options.list:
            return "none", 80 << 30, 1
        options.error("this machine has no GPU that torch can use; --rehearse tries the command on a CPU")
    total, count, name = done.stdout.splitlines()[-1].split(" ", 2)
    return name, int(total), int(count)


def _about(options: argparse.Namespace, device: str, memory: int) -> str:
    words = f"{device}, {in_bytes(memory)}"
    with_driver = words if options.rehearse else f"{words}; {gpu_words(device)}"
    rehearsal = " A rehearsal: its values say nothing about a GPU." if options.rehearse else ""
    return f"{date.today().isoformat()}, {with_driver}, {host.cores()} cores; {versions(*PACKAGES)}.{rehearsal}"


class Session:
    """One call of the command."""

    def __init__(self, size: Size, known: list[Row], results: Results, scratch: Path, ends: float) -> None:
        """`known` are all rows, which decide what a path has kept; `ends` is when the time is over."""
        self.size, self.known, self.results, self.scratch, self.ends = size, known, results, scratch, ends
        self.next: Worker | None = None

    def run(self, rows: list[Row]) -> None:
        """Measure what is missing."""
        waiting = [row for row in rows if row.id not in self.results.records]
        try:
            for number, row in enumerate(waiting):
                self._measure(row, is_last=number + 1 == len(waiting))
        finally:
            if self.next is not None:
                processes.end(self.next.process)
            self.results.write()

    def _measure(self, row: Row, is_last: bool) -> None:
        """Measure a row and keep it, or name it as left out."""
        left, expected = self.ends - time.monotonic() - LAST_S, self.results.took(row)
        if expected > left:
            self.results.left_out.append(row.id)
            self.results.write()
            return
        limit = max(LEAST_LIMIT_S, LIMIT * expected)
        kept, fastest = self.results.best(self.known, row.path) if row.path else ((), 0.0)
        tried = merged(kept, row.tries)
        overrides = merged(COMMON, row.overrides, tried)
        started = time.monotonic()
        try:
            figures = self._figures(row, overrides, min(limit, left), is_last)
        except TimeIsUp as error:
            if left < limit:
                self.results.left_out.append(row.id)
                return
            figures = {"failed": str(error)}
        except NotDone as error:
            figures = {"failed": str(error)}
        if row.path and (speed := figures.get("tokens_per_second")) is not None:
            figures |= {"kept": list(tried), "is_kept": speed >= GAIN * fastest}
        record = self.results.add(row, overrides, time.monotonic() - started, figures)
        print(f"{row.id}: {_words(record)}", file=sys.stderr, flush=True)

    def _figures(self, row: Row, overrides: tuple[str, ...], limit_s: float, is_last: bool) -> Record:
        """Measure in the way of the row's kind."""
        if row.kind == "launch":
            return launches.launch(row, overrides, self.scratch, limit_s)
        if row.kind == "tool":
            return launches.tool(row.more["line"], self.scratch, limit_s)
        if row.kind == "tests":
            return launches.tests(self.scratch, limit_s)
        order = row.more | {"kind": row.kind, "overrides": list(overrides), "warmup": self.size.warmup}
        worker, self.next = self.next or Worker(self.scratch), None
        planner = Worker(self.scratch, no_gpu=True) if row.more.get("plan") else None
        try:
            worker.give(order)
            if planner is not None:
                planner.give(order | {"kind": "plan"})
            if not is_last:
                self.next = Worker(self.scratch)
            return _ask(worker, planner, limit_s)
        finally:
            for each in (worker, planner):
                if each is not None:
                    processes.end(each.process)
                    shutil.rmtree(each.folder, ignore_errors=True)


def _ask(worker: Worker, planner: Worker | None, limit_s: float) -> Record:
    """Return a worker's values, with what a plan predicts where one was asked."""
    until = time.monotonic() + limit_s
    try:
        figures = worker.wait(limit_s)
    except TimeIsUp:
        raise
    except NotDone as error:
        raise NotDone(worker.reason() or str(error)) from None
    if planner is None:
        return figures
    try:
        return figures | planner.wait(max(1.0, min(until - time.monotonic(), limit_s / 4)))
    except NotDone as error:
        return figures | {"words": f"no plan: {planner.reason() or error}"}


def merged(*parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return overrides in which the last one of each key wins, in the place of the first."""
    found: dict[str, str] = {}
    for text in (text for part in parts for text in part):
        found[text.partition("=")[0].lstrip("+")] = text
    return tuple(found.values())


def _words(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    speed = record.get("tokens_per_second")
    return f"{speed:,.0f} tokens/s" if speed is not None else record.get("words", "done")
