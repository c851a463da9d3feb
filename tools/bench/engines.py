"""Engines next to each other on the same random model and rows."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench.arguments import at_least
from tools.bench.machine import gpu_words, versions
from tools.bench.orders import PRESETS, engine_preset
from tools.bench.ranks import RanksFailed, raise_on_signals, start_ranks, wait_for
from tools.markdown import cell_of, put_section
from trainers import host
from trainers.config.choices import Activations, Precision
from trainers.config.errors import plural
from trainers.rundir.ending import Exit
from trainers.rundir.rows import last_step, read_rows, steps
from trainers.units import in_bytes


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine's ranks measured: the rows of its metrics.jsonl, and what rank 0 knows besides."""

    steps: list[dict[str, Any]]
    build_seconds: float
    parameters: int
    device: str
    """Name of the GPU; empty on a CPU."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    """What `tools.bench checkpoint` knows of each save."""
    writing: list[bool] = field(default_factory=list)
    """And of each step: whether a save was in flight at its end."""

    def median(self, figure: str) -> float | None:
        """Return a metric's median over the steps after the first; None where it is not known."""
        values = [row[figure] for row in self.steps[1:] if row[figure] is not None]
        return statistics.median(values) if values else None

    def speed(self) -> float:
        """Return tokens a second over all ranks, padding aside."""
        return self.median("input_tokens_per_second") or math.nan

    def losses(self) -> str:
        """Return the first and the last loss."""
        return " to ".join("not finite" if row["loss"] is None else f"{row['loss']:.4f}" for row in (self.steps[0], self.steps[-1]))

    def difference(self, other: Run, figure: str) -> float:
        """Return the largest relative difference of a metric to another run's over all steps; infinite where one is not finite."""
        pairs = [(ours[figure], theirs[figure]) for ours, theirs in zip(self.steps, other.steps, strict=True)]
        return max(math.inf if None in pair else abs(pair[0] - pair[1]) / max(abs(pair[1]), 1e-30) for pair in pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench engines`."""
    parser.add_argument("--engine", nargs="+", choices=PRESETS, default=PRESETS, help="presets of conf/engine, each in turn (default all)")
    parser.add_argument("--ranks", type=at_least(1), help="ranks (default: one a GPU, else 2)")
    parser.add_argument("--parameters", type=at_least(1), default=10_000_000, help="about so many, as 1e9 (default 10e6)")
    parser.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    parser.add_argument("--seq-len", type=at_least(16), default=512, help="tokens a row (default 512)")
    parser.add_argument("--microbatch", type=at_least(1), default=2, help="rows a rank and step (default 2)")
    parser.add_argument("--steps", type=at_least(2), default=12, help="optimizer steps; the first is not timed (default 12)")
    kept = [how for how in Activations if how is not Activations.auto]
    parser.add_argument("--activations", choices=kept, default="keep", help="what is kept of a block for backward (default keep)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, what each engine makes of the same model and rows; 1 if one failed or none ran, 130 on Ctrl-C."""
    return compare(options, "engine-rank", _section)


Section = Callable[[argparse.Namespace, int, dict[str, "Run | str"]], str]
"""Returns the Markdown of what engines made of their order on a number of ranks."""


def compare(options: argparse.Namespace, command: str, section: Section, folder: Path | None = None) -> int:
    """Let each engine's ranks run a sub-command, in a temporary directory in `folder`; print the section. Returns the exit code."""
    raise_on_signals()
    try:
        return _compare(options, command, section, folder)
    except KeyboardInterrupt:
        print("stopped: no process and no temporary file is left", file=sys.stderr)
        return Exit.interrupted


def _compare(options: argparse.Namespace, command: str, section: Section, folder: Path | None) -> int:
    import torch

    gpus = torch.cuda.device_count()
    ranks = options.ranks or gpus or 2
    if gpus and ranks > gpus:
        options.error(f"--ranks {ranks}: this machine has {plural(gpus, 'GPU')}, and a rank takes one")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        options.error(f"--out {options.out}: there is no such directory")
    runs: dict[str, Run | str] = {}
    failed = False
    for name in dict.fromkeys(options.engine):
        try:
            with tempfile.TemporaryDirectory(prefix="fulltune-bench-", dir=folder) as run_dir:
                runs[name] = _train(options, command, name, ranks, Path(run_dir), on_gpu=bool(gpus))
        except RanksFailed as error:
            failed = True
            runs[name] = f"failed: {error.reason}"
            print(f"{error.said}\n{name} failed: {error.reason}".strip(), file=sys.stderr)
    text = section(options, ranks, runs)
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    return Exit.failed if failed or not any(isinstance(run, Run) for run in runs.values()) else 0


def _train(options: argparse.Namespace, command: str, name: str, ranks: int, run_dir: Path, on_gpu: bool) -> Run | str:
    """Train with an engine on ranks of its own; returns why not where it is not installed, and raises RanksFailed if it fails."""
    from trainers.engines.build import missing_package

    if (package := missing_package(engine_preset(name)["name"])) is not None:
        return f"not installed: pip install {package}"
    kept = {key: value for key, value in vars(options).items() if isinstance(value, (bool, int, str))}
    (run_dir / "order.json").write_text(json.dumps(kept | {"engine": name}))
    threads = 1 if ranks > 1 and not on_gpu else host.threads_per_rank(ranks)
    console = Console(stderr=True)
    with console.status(f"{name}: starting") as status, start_ranks([command, str(run_dir)], ranks, run_dir, threads) as children:
        if not console.is_terminal:
            print(f"{name}: {plural(ranks, 'rank')}", file=sys.stderr)
        wait_for(children, run_dir, "done", lambda: status.update(f"{name}: {_progress(run_dir, options.steps)}"))
    rows = steps(read_rows(run_dir))
    run = Run(steps=rows, **json.loads((run_dir / "0.done").read_text()))
    print(f"{name}: {len(rows)} steps, losses {run.losses()}", file=sys.stderr)
    return run


def _progress(run_dir: Path, num_steps: int) -> str:
    done = last_step(steps(read_rows(run_dir)))
    return f"step {done} of {num_steps}" if done else "building"


def run_rank(options: argparse.Namespace) -> None:
    """Train as one rank."""
    from tools.bench.training import run_rank

    run_rank(options)


def _section(options: argparse.Namespace, ranks: int, runs: dict[str, Run | str]) -> str:
    """Return the Markdown of a comparison: command, machine, versions, table, and what the table's words mean."""
    done = done_of(runs)
    extra = "" if options.activations == Activations.keep else f", activations={options.activations}"
    parts = [*head(options, ranks, done, extra), "\n".join(_table(runs, done)), *([_legend(done)] if done else [])]
    return "\n\n".join(parts) + "\n"


def done_of(runs: dict[str, Run | str]) -> list[tuple[str, Run]]:
    """Return the engines that came to their end."""
    return [(name, run) for name, run in runs.items() if isinstance(run, Run)]


def head(options: argparse.Namespace, ranks: int, done: list[tuple[str, Run]], extra: str = "") -> list[str]:
    """Return a section's heading, and what it was measured on."""
    machine = f"{ranks} of {gpu_words(done[0][1].device)}" if done and done[0][1].device else f"{host.cores()} cores, no GPU"
    model = f"{done[0][1].parameters:,}" if done else f"about {options.parameters:,}"
    what = f"{options.steps} steps of {ranks * options.microbatch} packed rows of {options.seq_len} tokens"
    about = f"{plural(ranks, 'rank')}, a Llama of {model} parameters from random weights in {options.precision}{extra}, {what}."
    return [f"## `{options.line}`", f"{time.strftime('%Y-%m-%d')}, {machine}; {versions('torch', 'transformers', 'deepspeed')}. {about}"]


def _table(runs: dict[str, Run | str], done: list[tuple[str, Run]]) -> list[str]:
    """Return the table's lines: a row for each engine, a column for what is known of one; times only of a GPU."""
    if not done:
        return table_lines(runs, {"result": lambda run: None})
    name, first = done[0]
    on_gpu = bool(first.device)
    columns: dict[str, Callable[[Run], str | None]] = {
        "tokens/s": lambda run: f"{run.speed():,.0f}" if on_gpu else None,
        f"tokens/s : {name}": lambda run: f"{run.speed() / first.speed():.2f}",
        "MFU": lambda run: None if (mfu := run.median("mfu")) is None else f"{mfu:.1%}",
        "peak device bytes a rank": lambda run: None if (peak := run.steps[-1]["device_bytes_peak"]) is None else in_bytes(peak),
        "peak host bytes a rank": lambda run: in_bytes(run.steps[-1]["host_bytes_peak"]),
        "seconds to build": lambda run: f"{run.build_seconds:.1f}" if on_gpu else None,
        f"time to build : {name}": lambda run: None if on_gpu else f"{run.build_seconds / first.build_seconds:.2f}",
        f"loss from {name}": lambda run: _relative(run.difference(first, "loss")),
        f"gradient norm from {name}": lambda run: _relative(run.difference(first, "grad_norm")),
    }
    return table_lines(runs, {title: cell for title, cell in columns.items() if any(cell(run) is not None for _, run in done)})


def table_lines(runs: dict[str, Run | str], columns: Mapping[str, Callable[[Run], str | None]]) -> list[str]:
    """Return a table's lines: each engine's cells, or why it has none."""
    lines = [["engine", *columns], ["---"] * (1 + len(columns))]
    for engine, run in runs.items():
        cells = [cell(run) or "-" for cell in columns.values()] if isinstance(run, Run) else [cell_of(run), *[""] * (len(columns) - 1)]
        lines.append([engine, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _legend(done: list[tuple[str, Run]]) -> str:
    name, first = done[0]
    times = "" if first.device else " Only ratios of times are given: absolute ones of a CPU say nothing about a GPU."
    return (
        f"tokens/s: all ranks together, padding aside, the median of the steps after the first.{times} Peaks are the largest rank's, "
        f"building included; the host's is the process's resident size, libraries included. Parity: the largest relative difference "
        f"to {name} over all {len(first.steps)} steps, with AdamW at 1e-4, clipped at 1; {name}'s losses went from {first.losses()}."
    )


def _relative(difference: float) -> str:
    return (f"{difference:.1e}" if difference else "0") if math.isfinite(difference) else "not finite"
