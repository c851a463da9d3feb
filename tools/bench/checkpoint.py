"""How long a checkpoint stops training: written during it, or while it waits."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.bench.arguments import at_least
from tools.bench.engines import Run, compare, done_of, head, table_lines
from tools.bench.orders import PRESETS, llama_sizes
from trainers.config.choices import Activations, Precision

STATE_BYTES = 12
"""Bytes of a parameter's state: itself and two moments, in float32."""
ON_DISK = 2 * 1.02
"""Checkpoints there at once, the newest and the one that takes its place, each with its headers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench checkpoint`."""
    parser.add_argument(
        "--engine", nargs="+", choices=PRESETS, default=["fsdp"], help="presets of conf/engine, each in turn (default fsdp)"
    )
    parser.add_argument("--ranks", type=at_least(1), help="ranks (default: one a GPU, else 2)")
    parser.add_argument(
        "--parameters", type=at_least(1), default=50_000_000, help="about so many, 12 bytes of state each (default 50e6: 0.6 GB)"
    )
    parser.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    parser.add_argument("--seq-len", type=at_least(16), default=128, help="tokens a row (default 128)")
    parser.add_argument("--microbatch", type=at_least(1), default=1, help="rows a rank and step (default 1)")
    parser.add_argument("--saves", type=at_least(1), default=5, help="saves of each kind, after one that does not count (default 5)")
    parser.add_argument("--every", type=at_least(2), default=6, help="optimizer steps from save to save (default 6)")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are written, and removed at the end (default: that of temporary files)"
    )
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, what saves of both kinds cost each engine; 1 if one failed or none ran, 130 on Ctrl-C."""
    options.activations = Activations.keep
    options.steps = options.every * (2 * (options.saves + 1) + 1)
    folder = options.folder or Path(tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        options.error(f"--folder {folder}: is not a directory that can be written to")
    needed = math.ceil(ON_DISK * STATE_BYTES * num_parameters(llama_sizes(options.parameters, options.seq_len)))
    free = shutil.disk_usage(folder).free
    if needed > free:
        options.error(f"two checkpoints need {needed:,} bytes, and {free:,} are free in {folder}: fewer --parameters, another --folder")
    return compare(options, "checkpoint-rank", _section, folder)


def run_rank(options: argparse.Namespace) -> None:
    """Train as one rank; the command itself imports no torch before it has checked its arguments."""
    from tools.bench import saves

    saves.run_rank(options)


def num_parameters(sizes: dict[str, int]) -> int:
    """Return the parameters of a Llama with half as many key and value heads as others, or as many where there is one."""
    width, kv = sizes["hidden_size"], sizes["hidden_size"] * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    block = 2 * width * (width + kv) + 3 * width * sizes["intermediate_size"] + 2 * width
    return sizes["num_hidden_layers"] * block + 2 * sizes["vocab_size"] * width + width


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What saves cost a run, in seconds; the first of each kind, which allocates, is apart."""

    num_bytes: int
    synchronous: list[float]
    """Stalls: for how long the slowest rank's loop waited, a save each."""
    asynchronous: list[float]
    first: float
    """The stall of the first asynchronous save."""
    quiet: float
    """A step without a save in flight, median."""
    beside: float | None
    """A step with one from its beginning to its end, median; None where there is none."""
    whole: list[float]
    """All that an asynchronous save costs training: its stall, and by how much steps during it take longer than others."""
    late: int
    """Asynchronous saves that were in flight when the next was due."""


def costs_of(run: Run) -> Costs:
    """Take a run's saves and steps apart."""
    seconds = [row["step_seconds"] for row in run.steps]
    kinds = {save["step"]: save["asynchronous"] for save in run.saves}
    begun = [kinds.get(done, run.writing[done - 1]) if done else False for done in range(len(seconds))]
    quiet = statistics.median(taken for taken, flying in list(zip(seconds, begun, strict=True))[1:] if not flying)
    beside = [taken for taken, flying, still in zip(seconds, begun, run.writing, strict=True) if flying and still]
    stalls = {kind: [save["stall_seconds"] for save in run.saves if save["asynchronous"] is kind] for kind in (False, True)}
    whole = []
    for save in run.saves:
        if save["asynchronous"]:
            following = range(save["step"], min([step for step in kinds if step > save["step"]], default=len(seconds)))
            whole.append(save["stall_seconds"] + sum(seconds[step] - quiet for step in following if begun[step]))
    return Costs(
        num_bytes=run.saves[-1]["num_bytes"],
        synchronous=stalls[False][1:],
        asynchronous=stalls[True][1:],
        first=stalls[True][0],
        quiet=quiet,
        beside=statistics.median(beside) if beside else None,
        whole=whole[1:],
        late=sum(save["late"] for save in run.saves if save["asynchronous"]),
    )


def _section(options: argparse.Namespace, ranks: int, runs: dict[str, Run | str]) -> str:
    """Return the Markdown: command, machine, versions, table, and what the table's words mean."""
    done = done_of(runs)
    return "\n\n".join([*head(options, ranks, done), "\n".join(_table(runs, done)), *(_legend(options, done) if done else [])]) + "\n"


def _table(runs: dict[str, Run | str], done: list[tuple[str, Run]]) -> list[str]:
    """Return the table's lines; times only of a GPU."""
    if not done:
        return table_lines(runs, {"result": lambda run: None})
    costs = {id(run): costs_of(run) for _, run in done}
    columns: dict[str, Callable[[Costs], str]] = {"bytes of state": lambda of: f"{of.num_bytes:,}"}
    if done[0][1].device:
        columns |= {
            "stall in seconds, asynchronous": lambda of: f"{statistics.median(of.asynchronous):.3f}",
            "synchronous": lambda of: f"{statistics.median(of.synchronous):.3f}",
            "a step in seconds": lambda of: f"{of.quiet:.3f}",
        }
    columns |= {
        "stall, asynchronous : synchronous": lambda of: f"{statistics.median(of.asynchronous) / statistics.median(of.synchronous):.1%}",
        "the longest": lambda of: f"{max(of.asynchronous) / statistics.median(of.synchronous):.1%}",
        "the first": lambda of: f"{of.first / statistics.median(of.synchronous):.1%}",
        "stall : a step, asynchronous": lambda of: f"{statistics.median(of.asynchronous) / of.quiet:.2f}",
        "stall : a step, synchronous": lambda of: f"{statistics.median(of.synchronous) / of.quiet:.2f}",
        "a step during a save : another": lambda of: "-" if of.beside is None else f"{of.beside / of.quiet:.2f}",
        "whole cost, asynchronous : synchronous": lambda of: f"{statistics.median(of.whole) / statistics.median(of.synchronous):.0%}",
    }

    def of_run(cell: Callable[[Costs], str]) -> Callable[[Run], str]:
        return lambda run: cell(costs[id(run)])

    return table_lines(runs, {title: of_run(cell) for title, cell in columns.items()})


def _legend(options: argparse.Namespace, done: list[tuple[str, Run]]) -> list[str]:
    times = "" if done[0][1].device else " Only ratios of times are given: absolute ones of a CPU say nothing about a GPU."
    count = sum(len(run.saves) for _, run in done)
    late = sum(costs_of(run).late for _, run in done)
    words = [
        f"{options.saves} saves of each kind in turn, {options.every} steps apart, after one of each that counts for `the first` alone. "
        f"All {count} checkpoints were complete, and their files held the bytes that were hashed. Stall: for how long the slowest rank's "
        "loop waited for a save, the median; the longest and the first, which allocates the copies, are asynchronous saves' against the "
        "median synchronous one. A step during a save has one in flight from its beginning to its end. Whole cost: a save's stall, and "
        f"by how much steps during it take longer than others.{times}"
    ]
    if late:
        words.append(f"{late} asynchronous saves were in flight when the next was due, so that the whole cost is higher: raise --every.")
    return words
