"""train.profile: a trace of some steps, and what they took and waited for. Off the path of a run that does not ask for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.metrics import console

log = logging.getLogger("fulltune")
SKIPPED = 2
"""First steps of an attempt that are not traced: they allocate, compile and find out what to gather ahead."""
HEAVIEST = 10
COLLECTIVES = ("nccl", "gloo:", "c10d::", "record_param_comms")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
"""Beginnings of the names of what waits."""


class Profile:
    """A trace by torch.profiler of so many of rank 0's steps, written once they are taken."""

    def __init__(self, steps: int, attempt: Attempt, device: torch.device) -> None:
        """Trace nothing yet."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profiler = profile(activities=activities, acc_events=True)
        self.steps, self.attempt, self.done, self.data_seconds, self.is_running = steps, attempt, 0, 0.0, False

    def after_step(self, data_seconds: float) -> None:
        """Note that a step was taken, which waited so long for its rows."""
        self.done += 1
        if self.is_running:
            self.data_seconds += data_seconds
        if self.done == SKIPPED:
            self.profiler.start()
            self.is_running = True
        elif self.done == SKIPPED + self.steps:
            self.close()

    def close(self) -> None:
        """Write and print what was traced, where a trace has begun and is not written yet."""
        if not self.is_running:
            if self.done < SKIPPED:
                log.warning("train.profile traced nothing: it begins after %d steps of an attempt, and there were %d", SKIPPED, self.done)
            return
        self.is_running = False
        self.profiler.stop()
        steps = self.done - SKIPPED
        folder = self.attempt.run_dir / paths.PROFILE
        folder.mkdir(exist_ok=True)
        trace = folder / f"attempt-{self.attempt.number}.json.gz"  # no other attempt writes this name
        self.profiler.export_chrome_trace(str(trace))
        tables = tables_of(self.profiler.key_averages(), steps, self.data_seconds)
        for table in tables:
            console.print(table)
        write_tables(tables, trace.with_name(f"attempt-{self.attempt.number}.txt"))
        log.info("traced %d steps: %s opens at ui.perfetto.dev or chrome://tracing", steps, trace)


def tables_of(events: Iterable[Any], steps: int, data_seconds: float) -> list[Table]:
    """Return the heaviest operators, by the time on the device or else on the CPU, and the time spent waiting; each a step."""
    found = list(events)
    on_device = any(event.self_device_time_total for event in found)
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    total = sum(getattr(event, name) for event in found) or 1.0
    heaviest = Table("operator", title=f"the {HEAVIEST} heaviest operators of {steps} steps")
    for column in ("calls a step", f"ms a step on the {'device' if on_device else 'CPU'}", "share"):
        heaviest.add_column(column, justify="right")
    for event in sorted(found, key=lambda event: -getattr(event, name))[:HEAVIEST]:
        spent = getattr(event, name)
        heaviest.add_row(event.key[:70], f"{event.count / steps:g}", f"{spent / steps / 1e3:.2f}", f"{spent / total:.1%}")
    waits = Table("waiting for", "ms a step", title="time of rank 0 spent waiting")
    waits.add_row("data", f"{1e3 * data_seconds / steps:.2f}")
    for what, beginnings in (("collectives", COLLECTIVES), ("the device (host synchronisation)", SYNCS)):
        spent = sum(max(event.cpu_time_total, event.device_time_total) for event in found if event.key.startswith(beginnings))
        waits.add_row(what, f"{spent / steps / 1e3:.2f}")
    return [heaviest, waits]


def write_tables(tables: Iterable[Table], path: Path) -> None:
    """Write tables as a terminal shows them."""
    from rich.console import Console

    with path.open("w", encoding="utf-8") as file:
        plain = Console(file=file, width=120)
        for table in tables:
            plain.print(table)
