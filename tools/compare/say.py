"""A comparison in words and tables: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.compare.gather import Run
from tools.compare.methods import Comparison, Method, cost_of, figures_of
from tools.evaluate.intervals import Estimate
from tools.evaluate.record import of_json
from tools.evaluate.say import NOTHING, Form, interval, marked, plus_minus
from tools.markdown import cell_of
from trainers.units import in_bytes

OF_SOURCE = "eval_loss_after/"
"""Begins the keys of summary.json for the sources of a mixture."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts."""

    title: str
    heads: list[str]
    lines: list[list[str]]


def learned(comparison: Comparison, form: Form) -> Grid:
    """Return what methods have learned and forgotten, each next to full fine-tuning or the base."""
    full = comparison.full is not None and len(comparison.methods) > 1
    columns: list[tuple[str, Callable[[Method], str]]] = [
        ("method", lambda method: method.label),
        ("trained parameters", _trained),
        ("learning rate", lambda method: f"{method.best.lr:.3g}" + (" †" if method.is_at_edge else "")),
        ("held-out loss", lambda method: form(method.figures.held_out, 4, "")),
        (f"held-out {comparison.loss_words}, of training", lambda method: form(method.figures.own_loss, 4, "")),
    ]
    for source in dict.fromkeys(key.partition("/")[2] for method in comparison.methods for key in method.best.summary if OF_SOURCE in key):
        columns.append((f"held-out loss, {source}", lambda method, source=source: _of_source(method, source)))  # type: ignore[misc]
    if full:
        columns.append((f"held-out loss - {comparison.full_words}", lambda method: _apart(method, "held_out_to_full", 4, form)))
    if comparison.metric:
        columns.append((comparison.metric, lambda method: form(method.figures.score, 3, "")))
        columns.append((f"{comparison.metric} - base", lambda method: _apart(method, "score_to_base", 3, form)))
    if full and comparison.metric:
        columns.append((f"{comparison.metric} - {comparison.full_words}", lambda method: _apart(method, "score_to_full", 3, form)))
    columns += _of_pairs(form) if comparison.has_pairs else []
    if full and comparison.has_pairs:
        columns.append((f"preference accuracy - {comparison.full_words}", lambda method: _apart(method, "accuracy_to_full", 3, form)))
    columns.append(("accuracy", lambda method: form(method.figures.told, 3, "")))
    if full:
        columns.append((f"accuracy - {comparison.full_words}", lambda method: _apart(method, "told_to_full", 3, form)))
    columns.append(("macro F1", lambda method: form(method.figures.macro_f1, 3, "")))
    columns.append(("calibration error", lambda method: form(method.figures.calibration_error, 3, "")))
    columns.append(("held-out reward", lambda method: form(method.figures.reward, 3, "")))
    columns.append(("pass@1", lambda method: form(method.figures.passed, 3, "")))
    for name in _passes(comparison):
        columns.append((name, lambda method, name=name: form(method.best.rewarded.get(name), 3, "")))  # type: ignore[misc]
    columns.append(("forgetting", lambda method: _apart(method, "forgetting", 4, form)))
    columns.append(("judge, 1 to 5", lambda method: form(method.figures.judged, 2, "")))
    columns.append(("judge - base", lambda method: _apart(method, "judged_to_base", 2, form)))
    columns.append(("wins against the base", lambda method: form(method.figures.wins, 3, "")))
    for task, metric in _benchmarks(comparison):
        columns.append((f"{task}, {metric}", lambda method, task=task, metric=metric: form(_benchmark(method, task, metric), 3, "")))  # type: ignore[misc]
    return _grid("What they learned and forgot", comparison.methods, columns)


def _of_pairs(form: Form) -> list[tuple[str, Callable[[Method], str]]]:
    """Return the columns of pairs of answers."""
    return [
        ("preference accuracy", lambda method: form(method.figures.accuracy, 3, "")),
        ("longer preferred", lambda method: form(method.figures.longer, 3, "")),
        ("shorter preferred", lambda method: form(method.figures.shorter, 3, "")),
    ]


def _passes(comparison: Comparison) -> list[str]:
    """Return each pass@k of more than one answer that any run has, the smallest k first."""
    names = {name for method in comparison.methods for name in method.best.rewarded if name.startswith("pass@")} - {"pass@1"}
    return sorted(names, key=lambda name: int(name.partition("@")[2]))


def _of_source(method: Method, source: str) -> str:
    """Return the held-out loss of one source of a mixture, as training has measured it."""
    loss = method.best.summary.get(f"{OF_SOURCE}{source}")
    return "" if loss is None else f"{loss:.4f}"


def _benchmarks(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the standard benchmarks that any method was held against, with their metrics."""
    found = [method.best.ours.about.get("lm_eval", {}) for method in comparison.methods if method.best.ours is not None]
    return list(dict.fromkeys((task, metric) for tasks in found for task, metrics in tasks.items() for metric in metrics))


def _benchmark(method: Method, task: str, metric: str) -> Estimate | None:
    return None if method.best.ours is None else of_json(method.best.ours.about.get("lm_eval", {}).get(task, {}).get(metric))


def spent(comparison: Comparison) -> Grid:
    """Return what methods cost."""
    hours = "GPU-hours" if comparison.is_on_gpu else "rank-hours"
    columns: list[tuple[str, Callable[[Method], str]]] = [
        ("method", lambda method: method.label + ("" if method.best.has_same_costs else " ‡")),
        ("tokens/s", lambda method: _number(method.best.summary.get("input_tokens_per_second"), "{:,.0f}")),
        ("MFU", lambda method: _number(method.best.summary.get("mfu"), "{:.1%}")),
        ("peak device memory", lambda method: _size(method.best.summary.get("device_bytes_peak"))),
        ("peak host memory", lambda method: _size(method.best.summary.get("host_bytes_peak"))),
        (hours, lambda method: f"{method.best.hours:.3g}"),
        (f"{hours} of all rates", lambda method: f"{method.search_hours:.3g} ({len(method.tried)})"),
        ("cost of all rates", lambda method: _number(cost_of(method.best, comparison.price, method.search_hours), "{:,.2f}")),
        ("on disk", lambda method: _size(method.best.export_bytes or None)),
    ]
    return _grid("What they cost", comparison.methods, columns)


def rates(comparison: Comparison) -> Grid | None:
    """Return the held-out loss of each rate that was tried; None where no method has several."""
    if all(len(method.tried) < 2 for method in comparison.methods):
        return None
    lines = []
    for method in comparison.methods:
        cells = [f"{run.lr:.3g}: {_number(run.loss, '{:.4f}')}{' *' if run is method.best else ''}" for run in method.tried]
        lines.append([method.label, ", ".join(cells)])
    head = f"held-out {comparison.loss_words} at the end of training, at each rate (* the best)"
    return Grid(title="Rates tried", heads=["method", head], lines=lines)


def _grid(title: str, methods: list[Method], columns: list[tuple[str, Callable[[Method], str]]]) -> Grid:
    """Return the columns in which some method has something."""
    known = [(name, text) for name, text in columns if any(text(method) != NOTHING for method in methods)]
    return Grid(title=title, heads=[name for name, _ in known], lines=[[text(method) for _, text in known] for method in methods])


def _apart(method: Method, name: str, digits: int, form: Form) -> str:
    """Return a difference with its interval and the mark of its verdict."""
    return marked(getattr(method.figures, name), method.figures.verdict(name), digits, form)


def _trained(method: Method) -> str:
    trained, whole = method.best.summary.get("trainable_parameters"), method.best.summary.get("parameters")
    return NOTHING if not trained or not whole else f"{trained:,} ({trained / whole:.1%})"


def _size(num_bytes: float | None) -> str:
    return NOTHING if num_bytes is None else in_bytes(num_bytes, 2)


def _number(value: Any, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def conclusions(comparison: Comparison) -> list[str]:
    """Return what the numbers allow to say of each method against full fine-tuning, or the base; nothing is better inside the noise."""
    said = []
    full = comparison.full
    for method in comparison.methods:
        parts = [_of_base(method, comparison)] if full is None or method is full else _of_full(method, full, comparison)
        if any(parts):
            said.append(f"{method.label}: {'; '.join(part for part in parts if part)}.")
    return said


def _of_base(method: Method, comparison: Comparison) -> str:
    figures = method.figures
    parts = [_words(f"{comparison.metric} against the base", figures.score_to_base, figures.verdict("score_to_base"), 3)]
    parts.append(_words("loss on general text against the base", figures.forgetting, figures.verdict("forgetting"), 4))
    return "; ".join(part for part in parts if part)


def _of_full(method: Method, full: Method, comparison: Comparison) -> list[str]:
    figures = method.figures
    parts = [_words(f"held-out loss against {full.label}", figures.held_out_to_full, figures.verdict("held_out_to_full"), 4)]
    parts.append(_words(f"{comparison.metric}", figures.score_to_full, figures.verdict("score_to_full"), 3))
    parts.append(_words("preference accuracy", figures.accuracy_to_full, figures.verdict("accuracy_to_full"), 3))
    parts.append(_words("accuracy", figures.told_to_full, figures.verdict("told_to_full"), 3))
    parts.append(_words("loss on general text", figures.forgetting_to_full, figures.verdict("forgetting_to_full"), 4))
    if method.best.has_same_costs and full.best.has_same_costs:
        parts.append(_ratio("time", method.best.hours, full.best.hours))
        for words, key in (("peak device memory", "device_bytes_peak"), ("peak host memory", "host_bytes_peak")):
            parts.append(_ratio(words, method.best.summary.get(key), full.best.summary.get(key)))
    return parts


def _words(what: str, apart: Estimate | None, verdict: str, digits: int) -> str:
    """Return a difference as a clause: a verdict, and the interval that it rests on."""
    if apart is None:
        return ""
    ends = "" if apart.low is None else f" ({apart.low:+.{digits}f} to {apart.high:+.{digits}f})"
    if not verdict:
        return f"{what}: {apart.value:+.{digits}f}, of too few documents to tell"
    told = "no difference beyond the noise" if verdict == "no difference" else verdict
    return f"{what}: {told}, {apart.value:+.{digits}f}{ends}"


def _ratio(what: str, ours: float | None, theirs: float | None) -> str:
    return f"{what} {ours / theirs:.2f} x" if ours and theirs else ""


def flags(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return the runs that are left out, each with the reasons."""
    return [(run.name, run.faults) for run in comparison.flagged]


def notes(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return what is to be known of the runs that are compared."""
    return [(run.name, run.notes) for run in comparison.runs if run.notes and not run.faults]


def legend(comparison: Comparison) -> list[str]:
    """Return what the tables' words mean, and what nobody may conclude."""
    lines = [
        "Losses are nats a supervised token over all held-out rows. In brackets: 95 % intervals over the documents (bootstrap-t for "
        "losses, Wilson's for shares); the documents are the sample, and another seed of training is not in it.",
        "▲ better, ▼ worse, = no difference beyond the noise. Differences are of the same documents in pairs; their intervals are so much "
        "wider than 95 % that all of a row or column hold together with 95 % (Bonferroni).",
    ]
    if comparison.has_pairs:
        lines.append(
            "Preference accuracy: the share of pairs whose preferred answer has the higher reward, or where there are none the higher "
            "likelihood a token; then that of pairs whose preferred answer is the longer, and the shorter one. Held-out losses are of "
            "preferred answers."
        )
    if any(method.figures.told is not None for method in comparison.methods):
        lines.append(
            "Accuracy: the share of documents whose class is found, or of answers whose reward is on the right side of KTO's baseline. "
            "Calibration error: how far a classifier's confidence is from its accuracy, in ten bins."
        )
    if any(method.figures.passed is not None for method in comparison.methods):
        lines.append(
            "pass@k: how likely one of k answers to a held-out prompt is right, with Wilson's interval; of the step that is exported, as "
            "training measured it. Runs write their own answers, so they need not have trained on as many tokens."
        )
    if comparison.loss_words != "loss":
        lines.append(f"The {comparison.loss_words} is what training minimised, in the units of the objective and not in nats a token.")
    if not comparison.has_one_loss:
        lines.append("Objectives differ: each run's own loss compares with those of the same objective and settings alone.")
    if any(method.figures.forgetting is not None for method in comparison.methods):
        lines.append("Forgetting: loss on text of the base's own domain, less that of the base; above 0 something is lost.")
    if comparison.is_picked:
        lines.append(
            f"Rates were chosen by the held-out {comparison.loss_words} that is reported, which makes it look a little better for methods "
            "with more rates; "
            "evaluation.path names rows that nothing was chosen by."
        )
    if any(method.is_at_edge for method in comparison.methods):
        lines.append("†: the best rate is the lowest or the highest that was tried; a better one may lie beyond.")
    if not all(method.best.has_same_costs for method in comparison.methods):
        lines.append("‡: another set-up (below); its costs compare with no others.")
    if not comparison.is_on_gpu:
        lines.append("Times and memory are of CPU ranks: those of GPUs are others, and so is which method is faster.")
    return lines


def print_text(comparison: Comparison, console: Console) -> None:
    """Print a comparison; a column a method, as many next to each other as the terminal is wide for."""
    console.print(f"[bold]{escape(comparison.title)}[/]: {_count(comparison)}", highlight=False)
    if comparison.methods:
        for grid in (learned(comparison, plus_minus), spent(comparison)):
            for table in turned(grid, console.width):
                console.print(table)
    if (tried := rates(comparison)) is not None:
        for cells in tried.lines:
            console.print(f"rates tried, {': '.join(cells)}", highlight=False, markup=False)
    for line in conclusions(comparison):
        console.print(f"- {line}", highlight=False, markup=False)
    for name, reasons in flags(comparison):
        console.print(f"[red]not compared:[/] {escape(name)}: {escape('; '.join(reasons))}", highlight=False)
    for name, reasons in notes(comparison):
        console.print(f"[yellow]note:[/] {escape(name)}: {escape('; '.join(reasons))}", highlight=False)
    for line in legend(comparison):
        console.print(line, style="dim", highlight=False, markup=False)


def turned(grid: Grid, width: int) -> list[Table]:
    """Return a grid with its lines as columns, in tables that are at most so wide, where one column goes in."""
    first = max(map(len, grid.heads))
    tables: list[Table] = []
    room = 0
    for number, line in enumerate(grid.lines):
        wide = max(map(len, line)) + 3
        if not tables or room < wide:
            tables.append(Table(title=grid.title if not tables else None, title_justify="left", show_header=False))
            tables[-1].add_column()
            room = width - first - 5
            columns: list[list[str]] = []
        room -= wide
        columns.append(line)
        tables[-1].add_column(justify="right", no_wrap=True)
        if number == len(grid.lines) - 1 or room < max(map(len, grid.lines[number + 1])) + 3:
            for at, head in enumerate(grid.heads):
                tables[-1].add_row(head, *(escape(column[at]) for column in columns), end_section=at == 0)
    return tables


def _count(comparison: Comparison) -> str:
    compared = sum(len(method.tried) for method in comparison.methods)
    left_out = f", {len(comparison.flagged)} left out" if comparison.flagged else ""
    return f"{len(comparison.methods)} methods, {compared} runs{left_out}"


def grids(comparison: Comparison) -> list[Grid]:
    """Return all tables, with the ends of intervals."""
    found = [learned(comparison, interval), spent(comparison)] if comparison.methods else []
    return found + [grid for grid in (rates(comparison),) if grid is not None]


def markdown(comparison: Comparison) -> str:
    """Return a comparison as Markdown."""
    parts = [f"# {comparison.title}", f"{_count(comparison)}."]
    for grid in grids(comparison):
        lines = [grid.heads, ["---"] * len(grid.heads), *([cell_of(cell) for cell in line] for line in grid.lines)]
        parts += [f"## {grid.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if said := conclusions(comparison):
        parts += ["## What can be said", "\n".join(f"- {line}" for line in said)]
    if left_out := flags(comparison):
        parts += ["## Not compared", "\n".join(f"- `{name}`: {'; '.join(reasons)}" for name, reasons in left_out)]
    if noted := notes(comparison):
        parts += ["## Notes", "\n".join(f"- `{name}`: {'; '.join(reasons)}" for name, reasons in noted)]
    return "\n\n".join([*parts, *legend(comparison)]) + "\n"


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write a line for each run, also those that are left out, in plain numbers."""
    labels = {run.name: method for method in comparison.methods for run in method.tried}
    lines = [_csv_line(run, labels.get(run.name), comparison) for run in comparison.runs]
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


CSV_ESTIMATES = (
    *("held_out", "held_out_to_full", "score", "score_to_base", "score_to_full", "forgetting", "forgetting_to_full"),
    *("accuracy", "longer", "shorter", "accuracy_to_full", "wins", "told", "told_to_full", "macro_f1", "calibration_error"),
    *("reward", "passed"),
)
"""Metrics that have a value and two ends in a line."""


def _csv_line(run: Run, method: Method | None, comparison: Comparison) -> dict[str, Any]:
    own = None if method is None else figures_of(Method(label=method.label, best=run, tried=[run]), comparison)
    line: dict[str, Any] = {
        "run": run.name,
        "method": "" if method is None else method.label,
        "state": run.state,
        "compared": not run.faults,
        "best_rate": method is not None and run is method.best,
        "optim.lr": run.lr,
    }
    line |= {
        key: run.summary.get(key) for key in ("trainable_parameters", "parameters", "steps", "export_step", "tokens", "eval_loss_after")
    }
    for name in CSV_ESTIMATES:
        estimate: Estimate | None = getattr(own, name, None)
        ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
        line |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    line |= {f"{name}_verdict": own.verdict(name) if own else None for name in ("held_out_to_full", "score_to_full", "forgetting")}
    line |= {key: run.summary.get(key) for key in ("input_tokens_per_second", "mfu", "device_bytes_peak", "host_bytes_peak")}
    line |= {"hours_of_all_ranks": run.hours, "cost": cost_of(run, comparison.price), "export_bytes": run.export_bytes}
    return line | {"score_metric": comparison.metric, "reasons": "; ".join(run.faults), "notes": "; ".join(run.notes)}
