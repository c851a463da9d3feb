"""Metrics: metrics.jsonl is the truth, the progress bar and W&B are its mirrors."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainers.config.choices import Float8, Precision, WandbMode
from trainers.config.schema import RunConfig
from trainers.config.secrets import MaskRecords
from trainers.rundir.attempt import Attempt
from trainers.rundir.mirror import Mirror, mode_of
from trainers.rundir.paths import METRICS, log_file
from trainers.rundir.rows import Kind, Row, finite, number, read_rows, until

log = logging.getLogger("fulltune")
console = Console(stderr=True)

PEAK_TFLOPS = {
    "B200": (2250.0, 2250.0, 4500.0),
    "H200": (989.0, 989.0, 1979.0),
    "H100 PCIe": (756.0, 756.0, 1513.0),
    "H100 NVL": (835.0, 835.0, 1671.0),
    "H100": (989.0, 989.0, 1979.0),
    "A100": (312.0, 312.0, None),
    "L40S": (362.0, 362.0, 733.0),
    "MI300X": (1307.0, 1307.0, 2615.0),
    "V100-SXM2": (125.0, None, None),
    "V100-PCIE": (112.0, None, None),
    "Tesla T4": (65.0, None, None),
}
"""Dense matrix peaks in fp16, bf16 and float8 from the vendors' data sheets, by a part of the device's name; the first match counts."""
LINE_EVERY_S = 10.0


def log_to(folder: Path, rank: int, world_size: int) -> None:
    """Send this rank's log to rank-R.log."""
    folder.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(log_file(folder, rank), encoding="utf-8", errors="replace")
    to_file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank}/{world_size} %(levelname)s %(message)s"))
    log.addHandler(to_file)


def log_to_terminal(rank: int) -> None:
    """Show rank 0's log on standard error, above the progress bar; other ranks show errors only."""
    shown: logging.Handler
    if console.is_terminal:
        shown = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    shown.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.addHandler(shown)
    log.addFilter(MaskRecords())
    log.setLevel(logging.DEBUG)
    log.propagate = False


def peak_tflops(config: RunConfig) -> float | None:
    """Return one device's dense peak in TFLOP/s in the type of its products; None where it is unknown, or for float32."""
    if config.log.peak_tflops is not None or not torch.cuda.is_available() or config.train.precision is Precision.fp32:
        return config.log.peak_tflops
    name = torch.cuda.get_device_name()
    in_fp16, in_bf16, in_float8 = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), (None, None, None))
    in_16_bits = in_fp16 if config.train.precision is Precision.fp16 else in_bf16
    return in_16_bits if config.train.float8 is Float8.none else in_float8


def host_bytes_peak() -> int:
    """Return this process's largest resident size so far, in bytes."""
    kibi = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibi if sys.platform == "darwin" else kibi * 1024


def device_bytes_peak() -> int | None:
    """Return the largest CUDA memory allocated so far, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


class Metrics:
    """Rank 0's record of a run; other ranks get one that does nothing."""

    def __init__(self, config: RunConfig, attempt: Attempt, rank: int, num_steps: int) -> None:
        """Open nothing yet: `start` says from which step."""
        self.attempt = attempt
        self.path = Path(config.run_dir) / METRICS
        self.config, self.num_steps, self.active = config, num_steps, rank == 0
        self.mirror: Mirror | None = None
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[more]}  {task.fields[speed]} tokens/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (self.active and console.is_terminal),
        )
        self.shown_at = 0.0

    def start(self, step: int) -> list[Row]:
        """Cut the record back to `step` and return the rows that stay (on rank 0); start the bar and the mirror."""
        kept = self.cut(step)
        if self.active and mode_of(self.config.log.wandb, os.environ) is not WandbMode.disabled:
            self.mirror = Mirror(self.config)
        self.task = self.bar.add_task(self.config.name, total=self.num_steps, completed=step, loss="-", more="", speed="-")
        self.bar.start()
        return kept

    def cut(self, step: int) -> list[Row]:
        """Cut the record back to `step`, and to before a rollback to it; return the rows that stay, on rank 0.

        It is a new file then, into which no row of an older attempt comes. Raises Superseded where this is the older one.
        """
        kept: list[Row] = []
        if self.active:
            kept = until(read_rows(self.attempt.run_dir), step)
            staging = self.path.with_name(f"metrics.attempt-{self.attempt.number}.tmp")
            staging.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self.file = staging.stat()
            self.attempt.require_current()
            staging.rename(self.path)
        return kept

    def write(self, kind: Kind, row: Row, figures: Mapping[str, float] = MappingProxyType({})) -> None:
        """Append a row of this kind, unless a newer attempt has begun to; readers see whole lines. A non-finite number becomes null.

        `figures` are an objective's own numbers: they go into the row under their names, and into the progress line.
        """
        if not self.active or not self.attempt.is_current():
            return
        if taken := row.keys() & figures.keys():
            raise ValueError(f"a value of the objective has the name of another number: {', '.join(sorted(taken))}")
        row = {"kind": kind} | finite({**row, **figures})
        with self.path.open("a") as file:
            if not os.path.samestat(os.fstat(file.fileno()), self.file) and not self.attempt.is_current(at_once=True):
                return
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.mirror is not None:
            self.mirror.log(row)
        self._show(kind, row, "".join(f"  {name} {value:.4g}" for name, value in figures.items()))

    def _show(self, kind: Kind, row: Row, more: str) -> None:
        if kind is Kind.evaluation:
            tokens = f"{row['eval_tokens']:,}"
            log.info("step %d: held-out loss %.4f%s over %s tokens", row["step"], number(row["eval_loss"]), more, tokens)
        if kind is not Kind.step:
            return
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        self.bar.update(self.task, completed=row["step"], loss=loss, more=more, speed=f"{row['tokens_per_second']:,.0f}")
        due = time.monotonic() - self.shown_at > LINE_EVERY_S or row["step"] == self.num_steps
        if self.bar.disable and due:
            left = (self.num_steps - row["step"]) * row["step_seconds"]
            speed = f"{row['tokens_per_second']:,.0f}"
            log.info("step %d/%d  loss %s%s  %s tokens/s  about %.0f s left", row["step"], self.num_steps, loss, more, speed, left)
            self.shown_at = time.monotonic()

    def close(self) -> None:
        """End the bar and the mirror."""
        self.bar.stop()
        if self.mirror is not None:
            self.mirror.close()

    def __enter__(self) -> Metrics:
        """Return itself; `close` is called at the end whatever happens."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close, whatever happened."""
        self.close()
