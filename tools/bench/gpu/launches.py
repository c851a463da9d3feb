"""Rows that are commands as a user types them: the launcher, another benchmark, the tests."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.gpu.processes import NotDone, TimeIsUp, ended, last_line, start, wait, wait_until
from tools.bench.gpu.results import Record
from tools.bench.gpu.rows import Row
from trainers.rundir.files import try_json
from trainers.rundir.rows import last_step, read_rows, steps

ROOT = Path(__file__).parents[3]


def launch(row: Row, overrides: tuple[str, ...], scratch: Path, limit_s: float) -> Record:
    """Run the launcher to the end of its run; with `kill` it is killed on the way and given again, and the steps must be the same."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
    run_dir, log = folder / "run", folder / "log"
    line = [sys.executable, "-m", "launcher", *overrides, f"run_dir={run_dir}", "checkpoint.every=2"]
    until, before, words = time.monotonic() + limit_s, {}, []
    try:
        if row.more["kill"]:
            with ended(start(line, log, scratch)) as first:
                if not wait_until(lambda: _step(run_dir) >= 4, first, until - time.monotonic()):
                    raise NotDone(_why(run_dir, log))
            before = _losses(run_dir)
            words.append(f"killed after step {max(before, default=0)}")
        with ended(start(line, log, scratch)) as again:
            try:
                wait(again, until - time.monotonic(), log)
            except TimeIsUp:
                raise
            except NotDone:
                raise NotDone(_why(run_dir, log)) from None
        record = _of_run(run_dir, before, words)
        if row.more.get("plan"):
            record |= _speed(run_dir, row.more["warmup"])
            record |= _planned(line, run_dir, until, record["words"])
        return record
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_run(run_dir: Path, before: dict[int, float], words: list[str]) -> Record:
    """Return what a run that is done left: its speed, and in words whether it continued exactly and was exported."""
    summary, after = try_json(run_dir / "summary.json"), _losses(run_dir)
    if before:
        shared = [step for step in before if step in after]
        same = all(before[step] == after[step] for step in shared)
        words.append(f"continued, the losses of {len(shared)} steps {'equal bit for bit' if same else 'DIFFER'}")
    words.append(f"exported, {sum(file.stat().st_size for file in (run_dir / 'export').glob('*.safetensors')) / 2**30:.2f} GiB")
    if any("export reopened" in file.read_text("utf-8", "replace") for file in run_dir.glob("logs/**/*") if file.is_file()):
        words.append("reopened")
    words.append(f"{summary.get('wall_seconds', 0.0):.0f} s from start to end of the last attempt")
    losses = list(after.values())
    return {"losses": losses, "peak_bytes": summary.get("device_bytes_peak"), "words": "; ".join(words)}


def _speed(run_dir: Path, warmup: int) -> Record:
    """Return the medians of the steps that count, of all GPUs together."""
    found = steps(read_rows(run_dir))[warmup:]
    names = {"input_tokens_per_second": "tokens_per_second", "step_seconds": "step_seconds", "mfu": "mfu"}
    known = {ours: [row[theirs] for row in found if row[theirs] is not None] for theirs, ours in names.items()}
    return {name: statistics.median(values) for name, values in known.items() if values}


def _planned(line: list[str], run_dir: Path, until: float, words: str) -> Record:
    """Return the bytes of a GPU that a plan predicts for the same command."""
    planned, log = run_dir.with_name("planned"), run_dir.with_name("plan-log")
    with ended(start([*line, "mode=plan", "plan.changes=false", f"run_dir={planned}"], log, run_dir.parent)) as process:
        try:
            wait(process, until - time.monotonic(), log)
        except NotDone as error:
            return {"words": f"{words}; no plan: {error}"}
    return {"plan_bytes": sum(try_json(planned / "plan.json")["peak"].values())}


def _losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in steps(read_rows(run_dir))}


def _step(run_dir: Path) -> int:
    return last_step(steps(read_rows(run_dir)))


def _why(run_dir: Path, log: Path) -> str:
    """Return a run's own error, else the last line of the launcher's log."""
    message = (try_json(run_dir / "status.json").get("error") or {}).get("message")
    return " ".join(str(message).split())[:400] if message else last_line(log)


def tool(line: list[str], scratch: Path, limit_s: float) -> Record:
    """Run another benchmark and return the last line of its table, each cell with its title."""
    folder = Path(tempfile.mkdtemp(prefix="tool-", dir=scratch))
    out = folder / "out.md"
    try:
        words = [sys.executable, "-m", "tools.bench", *line, "--out", str(out), "--folder", str(folder)]
        with ended(start(words, folder / "log", scratch)) as process:
            wait(process, limit_s, folder / "log")
        table = [text.strip("| ").split(" | ") for text in out.read_text().splitlines() if text.startswith("|")]
        return {"words": "; ".join(f"{title} {cell}" for title, cell in list(zip(table[0], table[-1], strict=False))[1:])}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tests(scratch: Path, limit_s: float) -> Record:
    """Run the tests that need a GPU and return pytest's last line."""
    log = scratch / "tests.log"
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    with ended(start(line, log, scratch)) as process:
        wait(process, limit_s, log)
    return {"words": last_line(log)}
