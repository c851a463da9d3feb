"""Look after runs: what each does, how far it is, its log; end one or queue it again.

python -m tools.runs                    the runs and points of sweeps below runs/
python -m tools.runs DIR --watch        those below DIR, again every two seconds
python -m tools.runs logs RUN -f        what rank 0 logs, as it comes; --rank R another one's
python -m tools.runs cancel RUN...      save at the next step and end: by scancel where SLURM has it, else by RUN/stop
python -m tools.runs requeue RUN...     put a SLURM job back into the queue, also one that has ended

State comes from RUN/status.json, how lately its ranks wrote, and squeue where there is one; no accounting is needed.
Exit codes: 0 done, 1 SLURM refuses, 2 bad arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from launcher.queue import ask, ended_as, in_queue, last_words, reason_in, record_of
from launcher.report import print_new
from launcher.stages import read_record, stages_of
from tools.command import parser_of
from trainers.config.errors import plural
from trainers.rundir import paths
from trainers.rundir.attempt import newest_attempt, read_status
from trainers.rundir.beats import read_beats
from trainers.rundir.ending import Exit
from trainers.rundir.paths import attempt_folder, log_file
from trainers.rundir.rows import last_step, read_rows, steps
from trainers.units import in_time

WATCH_S, FOLLOW_S = 2.0, 0.5
SILENT_S = 60.0
"""A run that says it is running and of which nothing was heard for so long is shown as silent."""
TAIL_BYTES = 1 << 16
HEADS = ("run", "state", "step", "loss", "tokens/s", "left", "job", "")
ALWAYS = 4
"""Columns that are there also where no run has something in them."""
WHOLE_NAME = 24
"""Letters of a name that are not broken, however narrow the terminal is."""
LATELY = 20
"""Steps that the time left is estimated from."""
STYLES = {"done": "green", "running": "cyan", "failed": "red", "silent": "red", "lost": "red", "unreadable": "red", "preempted": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is shown of a run."""

    run_dir: Path | None
    """None for a pipeline, and for a stage that has no run yet."""
    state: str
    steps: str = ""
    """In the place of `step` where there is none."""
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    left_s: float | None = None
    job: str = ""
    note: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    kind = words[0] if words and words[0] in ("logs", "cancel", "requeue") else "list"
    parser = parser_of("runs", __doc__)
    if kind == "list":
        parser.add_argument("dir", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="where to look (default runs)")
        parser.add_argument("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
    elif kind == "logs":
        parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
        parser.add_argument("-f", "--follow", action="store_true", help="continue as it grows, until Ctrl-C")
        parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose log (default 0)")
    else:
        parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    options = parser.parse_args(words if kind == "list" else words[1:])
    given = [options.dir] if kind == "list" else [options.run] if kind == "logs" else options.runs
    for path in given:
        if not path.is_dir() or (kind != "list" and not is_run(path)):
            print(f"error: {path}: is not a {'directory' if kind == 'list' else 'run directory'}", file=sys.stderr)
            return Exit.bad_input
    try:
        if kind == "list":
            return show(options.dir, options.watch)
        if kind == "logs":
            return print_log(options.run, options.rank, options.follow)
        return max([(cancel if kind == "cancel" else requeue)(run) for run in options.runs])
    except KeyboardInterrupt:
        return Exit.interrupted


def show(folder: Path, watch: bool) -> int:
    """Print the table of all runs below a folder, or keep it on the screen."""
    console = Console()
    if not watch:
        console.print(table_of(folder))
        return 0
    with Live(table_of(folder), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(table_of(folder), refresh=True)


def table_of(folder: Path) -> Table:
    """Return the table of all runs below a folder."""
    queue = in_queue()
    lines = list(_lines(folder, folder, queue))
    count = sum(line.run_dir is not None for _, line in lines)
    table = Table(title=f"{plural(count, 'run')} below {folder}", title_justify="left")
    rows = [[escape(name), *_cells(line)] for name, line in lines]
    longest = max((len(name) for name, _ in lines), default=0)
    kept = [number for number in range(len(HEADS)) if number < ALWAYS or any(row[number] for row in rows)]
    for number in kept:
        side: Literal["right", "left"] = "right" if HEADS[number] in ("step", "loss", "tokens/s", "left") else "left"
        table.add_column(HEADS[number], justify=side, overflow="fold", min_width=min(longest, WHOLE_NAME) if number == 0 else None)
    for row in rows:
        table.add_row(*(row[number] for number in kept))
    return table


def _cells(line: Line) -> list[str]:
    """Return what the table has of a run after its name."""
    steps = line.steps or f"{line.step:,}" + (f"/{line.num_steps:,}" if line.num_steps else "")
    style = STYLES.get(line.state, "")
    state = f"[{style}]{line.state}[/]" if style else line.state
    rate = "" if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}"
    loss = "" if line.loss is None else f"{line.loss:.4f}"
    return [state, steps, loss, rate, "" if line.left_s is None else in_time(line.left_s), line.job, escape(line.note)]


def _lines(folder: Path, top: Path, queue: dict[str, str] | None) -> Iterator[tuple[str, Line]]:
    """Yield a name and a line for each run below a folder; a pipeline is a tree with its stages in order, those that wait included."""
    if is_run(folder):
        yield str(folder.relative_to(top)), _line(folder, queue)
    elif record := read_record(folder):
        yield from _tree(folder, top, record, queue)
    else:
        for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from _lines(path, top, queue)


def _tree(folder: Path, top: Path, record: dict[str, Any], queue: dict[str, str] | None) -> Iterator[tuple[str, Line]]:
    """Yield a pipeline's own line, and one for each of its stages."""
    stages, state = stages_of(record), record["state"]
    ended = [stage.name for stage in stages if "ended" in state.get(stage.name, {})]
    seconds = sum(known.get("seconds", 0.0) for known in state.values())
    own = Line(run_dir=None, state="done" if len(ended) == len(stages) else "pipeline", steps=f"{len(ended)}/{len(stages)}")
    name = folder.name if folder == top else str(folder.relative_to(top))
    made_by = "" if record["pipeline"] == folder.name else f"{record['pipeline']}, "
    yield name, dataclasses.replace(own, note=f"{made_by}{in_time(seconds)} at work")
    for number, stage in enumerate(stages):
        branch = f"{'└' if number == len(stages) - 1 else '├'} {stage.name}"
        if stage.run and is_run(folder / stage.name):
            line = _line(folder / stage.name, queue)
            left = [] if stage.name in ended or line.state != "done" else ["its commands are not done"]
            yield branch, dataclasses.replace(line, note="; ".join(filter(None, [line.note, *left])))
        else:
            begun = stage.name in state
            yield branch, Line(run_dir=None, state="done" if stage.name in ended else "begun" if begun else "waits", steps="-")


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield run directories, by name; nothing is looked for inside of one."""
    if is_run(folder):
        yield folder
        return
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield from runs_below(path)


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run directory."""
    return (folder / paths.CONFIG).is_file() and (folder / paths.STATUS).is_file()


def _line(run_dir: Path, queue: dict[str, str] | None) -> Line:
    """Return what is known of a run; of one whose files hold what no run writes, that."""
    try:
        return line_of(run_dir, queue)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Line(run_dir=run_dir, state="unreadable", note=f"a file of it holds what no run writes: {error!r}")


def line_of(run_dir: Path, queue: dict[str, str] | None) -> Line:
    """Return what is known of a run; `queue` has SLURM's word for each job, None where squeue does not answer."""
    status, job = read_status(run_dir), str(record_of(run_dir).get("id", ""))
    rows = steps(read_rows(run_dir, last_bytes=TAIL_BYTES))
    step = max(int(status.get("step") or 0), last_step(rows[-1:]))
    num_steps = status.get("num_steps")
    seconds = [row["step_seconds"] for row in rows[-LATELY:]]
    state, note = state_of(run_dir, status, job, queue)
    left = (num_steps - step) * statistics.median(seconds) if num_steps and seconds and state == "running" else None
    newest = rows[-1] if rows else {}
    return Line(
        run_dir=run_dir,
        state=state,
        step=step,
        num_steps=num_steps,
        loss=newest.get("loss"),
        tokens_per_second=newest.get("tokens_per_second") if state == "running" else None,
        left_s=left,
        job=job,
        note=note,
    )


def state_of(run_dir: Path, status: dict[str, Any], job: str, queue: dict[str, str] | None) -> tuple[str, str]:
    """Return the state of a run in a word, and what else is to be said of it."""
    state = str(status.get("state", "unknown"))
    if state == "failed":
        return state, str(status.get("error", {}).get("message", "")).partition("\n")[0]
    word = (queue or {}).get(job, "")
    if word and not (state == "running" and word == "RUNNING"):
        notes = [f"{state} before"] if state == "preempted" else []
        notes += [f"does not start as it is: {reason}"] if (reason := reason_in(word)) else []
        return word.partition(" ")[0].lower(), "; ".join(notes)
    if state in ("running", "submitted") and job and queue is not None and not word:
        end, said = ended_as(job), last_words(run_dir)
        why = f": {said.splitlines()[-1].strip()};" if said else ":"
        return "lost", f"{f'the job ended as {end}' if end else 'SLURM has no such job any more'}{why} the same command continues the run"
    if state == "running":
        silent = time.time() - max((beat.written for beat in read_beats(run_dir).values()), default=status.get("time", 0.0))
        return ("running", _slow_ranks(status)) if silent < SILENT_S else ("silent", f"no rank wrote for {in_time(silent)}")
    return state, ""


def _slow_ranks(status: dict[str, Any]) -> str:
    """Say which ranks block the others, where the run has found any."""
    found = status.get("stragglers")
    if not found:
        return ""
    groups = [f"; {words}" if words else "" for words in found.get("groups", [""] * len(found["ranks"]))]
    rows = zip(found["ranks"], found["hosts"], found["what"], found["factors"], groups, strict=True)
    return "slow: " + ", ".join(f"rank {rank} on {host} ({what}, {by:.1f} x the median{group})" for rank, host, what, by, group in rows)


def print_log(run_dir: Path, rank: int, follow: bool) -> int:
    """Print a rank's log of the newest attempt, and what comes; the next attempt's too."""
    attempt = newest_attempt(run_dir)
    path, shown = log_file(attempt_folder(run_dir, attempt), rank), 0
    if not path.is_file() and not follow:
        print(f"error: {path}: there is no such log yet", file=sys.stderr)
        return Exit.bad_input
    while True:
        shown = print_new(path, shown)
        if not follow:
            return 0
        time.sleep(FOLLOW_S)
        if (newer := newest_attempt(run_dir)) != attempt:
            attempt, shown = newer, 0
            path = log_file(attempt_folder(run_dir, attempt), rank)


def cancel(run_dir: Path) -> int:
    """End a run: a job that SLURM has, by scancel; another one by the file that its ranks look for."""
    job = str(record_of(run_dir).get("id", ""))
    if job and job in (in_queue(job) or {}):
        return _tell(ask("scancel", job), f"{run_dir}: job {job} is ended; the same command continues the run")
    if read_status(run_dir).get("state") != "running":
        print(f"{run_dir}: is not running", file=sys.stderr)
        return 0
    (run_dir / paths.STOP).touch()
    print(f"{run_dir}: saves at its next step, and ends; the same command continues it")
    return 0


def requeue(run_dir: Path) -> int:
    """Put a run's SLURM job back into the queue."""
    job = str(record_of(run_dir).get("id", ""))
    if not job:
        line = " ".join(json.loads((run_dir / paths.MANIFEST).read_text())["command"])
        print(f"error: {run_dir}: was not submitted to SLURM; its command continues it: {line}", file=sys.stderr)
        return Exit.bad_input
    return _tell(ask("scontrol", "requeue", job), f"{run_dir}: job {job} is in the queue again")


def _tell(error: str, done: str) -> int:
    print(f"error: {error}" if error else done, file=sys.stderr if error else sys.stdout)
    return Exit.failed if error else 0


if __name__ == "__main__":
    sys.exit(main())
