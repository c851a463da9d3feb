"""What is shown of a run: its log as it grows, and at its end the main values of RUN_DIR/summary.json."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainers.rundir import paths
from trainers.rundir.files import try_json
from trainers.units import in_bytes, in_time


def print_new(log: Path, shown: int) -> int:
    """Print what follows the first `shown` bytes of a log; returns how many there are now."""
    if not log.is_file():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(text)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return summary.json; empty where there is none that can be read."""
    return try_json(run_dir / paths.SUMMARY)


def print_summary(run_dir: Path) -> None:
    """Print the summary of a run that is done, or that there is none."""
    summary = read_summary(run_dir)
    if not summary:
        print(f"{run_dir}: done, but summary.json cannot be read")
        return
    try:
        _print_table(run_dir, summary)
    except Exception as error:  # a value of another type than it should have, a terminal that takes no table
        print(f"{run_dir}: done, but its summary cannot be shown ({type(error).__name__}: {error}): see {run_dir / paths.SUMMARY}")


def _print_table(run_dir: Path, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(run_dir.name), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if (run_dir / paths.EXPORT).is_dir():  # the directory may have been moved or copied since
        summary |= {"export": run_dir / paths.EXPORT}
    for name, value in rows(summary):
        table.add_row(name, value)
    Console().print(table, markup=False)


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table's lines; a value that the run does not have makes no line."""
    lines = [
        ("held-out loss", _change(summary.get("eval_loss_before"), summary.get("eval_loss_after"))),
        *_of_sources(summary),
        ("training loss", _number(summary.get("train_loss"), ".4f")),
        ("steps", _number(summary.get("steps"), ",d")),
        ("exported step", _exported(summary)),
        ("steps that overflowed", _number(summary.get("overflow_steps") or None, ",d")),
        ("skipped steps", _number(summary.get("skipped_steps") or None, ",d")),
        ("tokens", _number(summary.get("tokens"), ",d")),
        ("tokens/s", _number(summary.get("tokens_per_second"), ",.0f")),
        ("MFU", _number(summary.get("mfu"), ".1%")),
        ("peak device memory", _written(partial(in_bytes, digits=2), summary.get("device_bytes_peak"))),
        ("peak host memory", _written(partial(in_bytes, digits=2), summary.get("host_bytes_peak"))),
        ("trained parameters", _share(summary.get("trainable_parameters"), summary.get("parameters"))),
        ("training time", _written(in_time, summary.get("train_seconds"))),
        ("wall time, last attempt", _written(in_time, summary.get("wall_seconds"))),
        ("GPU hours", _number(summary.get("gpu_hours") or None, ".2f")),
        ("export", str(summary.get("export") or "")),
        *_sample(summary.get("sample")),
    ]
    return [(name, value) for name, value in lines if value]


def _of_sources(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a line for each source of a mixture: its held-out loss, and how often its rows were taken."""
    lines = []
    for name in (key.partition("/")[2] for key in summary if key.startswith("epoch/")):
        change = _change(summary.get(f"eval_loss_before/{name}"), summary.get(f"eval_loss_after/{name}"))
        passes = f"{summary[f'epoch/{name}']:.2f} passes"
        lines.append((f"  {name}", f"{change}, {passes}" if change else passes))
    return lines


def _written(write: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else write(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _exported(summary: dict[str, Any]) -> str:
    """Name the step that is exported where it is not the last, whose loss differs."""
    step, last, loss = (summary.get(name) for name in ("export_step", "steps", "eval_loss_last"))
    if step in (None, last):
        return ""
    return f"{_number(step, ',d')}, of the lowest held-out loss; step {_number(last, ',d')} has {_number(loss, '.4f')}"


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return ""
    return f"{after:.4f}" if before is None else f"{before:.4f} -> {after:.4f}"


def _share(trained: int | None, total: int | None) -> str:
    if trained is None or not total:
        return ""
    return f"{trained:,d} of {total:,d} ({trained / total:.1%})"


def _sample(sample: dict[str, str] | None) -> list[tuple[str, str]]:
    return [] if not sample else [("sample prompt", _brief(sample["prompt"])), ("sample answer", _brief(sample["answer"]))]


def _brief(text: str, lines: int = 6, characters: int = 400) -> str:
    """Cut a text to what a table can hold: a small model may answer with a page of blank lines."""
    kept = [line.rstrip() for line in text.splitlines() if line.strip()]
    brief = "\n".join(kept[:lines])[:characters]
    return brief if brief == "\n".join(kept) else brief + " ..."
