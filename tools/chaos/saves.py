"""Harm the saves of one run many times: kill its ranks at random bytes of a save, damage checkpoints, take the disk away."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.chaos.attempts import ATTEMPT_S, PLANTED, Run, Wrong, digest, send, size_of
from trainers.rundir import paths
from trainers.rundir.checkpoints import number_of, steps

SMALL_DISK = 3 << 20


@dataclass(kw_only=True)
class Tally:
    """What was tried of one kind of harm, and what came of it."""

    tried: int = 0
    exact: int = 0
    lost: int = 0
    inside: int = 0
    note: str = ""


@dataclass(kw_only=True)
class Harmed(Run):
    """A run, and what came of the harm that was done to it."""

    rng: random.Random
    tallies: dict[str, Tally] = field(default_factory=dict)

    def attempt_until(self, condition: Callable[[], bool]) -> None:
        """Start an attempt, wait for a condition, and kill its ranks; raises Wrong where it ended before."""
        process, until = self.start(), time.monotonic() + ATTEMPT_S
        try:
            while not condition():
                if process.poll() is not None or time.monotonic() > until:
                    raise Wrong(f"an attempt ended by itself with exit code {process.poll()}: {self.log}")
                time.sleep(0.001)
            killed = [pid for pid, role in self.processes().items() if role.startswith("rank")]
            for pid in killed:
                send(pid, signal.SIGKILL)
            process.wait(60)
            if not killed or process.returncode == 0:
                raise Wrong(f"an attempt ended before its ranks could be killed: {self.log}")
        finally:
            self.kill_all(process)

    def kill_in_save(self) -> str:
        """Start the run and kill every rank at a random byte of a save; return where that was."""
        wanted = self.newest() + self.rng.randint(1, 2)
        folder = self.run_dir / paths.CHECKPOINTS
        left = set(folder.glob(".step-*.tmp"))  # by attempts that were killed
        size = max((size_of(path) for path in steps(folder)), default=1 << 20)
        offset, at = self.rng.randrange(size), "after a save"

        def is_there() -> bool:
            nonlocal at
            reached = max((size_of(path) for path in folder.glob(f".step-{wanted:06d}.*.tmp") if path not in left), default=0)
            if reached > offset:
                at = f"at byte {reached:,} of about {size:,}"
            return reached > offset or self.newest() >= wanted

        self.attempt_until(is_there)
        return at


def harm(folder: Path, kills: int, engine: str, seed: int) -> int:
    """Run one attempt undisturbed and many harmed ones; print what came of them, and return the exit code."""
    overrides = _overrides(kills, engine)
    whole = Harmed(run_dir=folder / "whole", overrides=overrides, rng=random.Random(seed))
    run = Harmed(run_dir=folder / "harmed", overrides=overrides, rng=random.Random(seed))
    harms: list[tuple[str, Callable[[], object]]] = [("a run that nobody harms", whole.finish)]
    harms += [(f"kill {number} of {kills}", partial(tried, run, "killed in a save", run.kill_in_save)) for number in range(1, kills + 1)]
    others = {
        "a byte flipped": flip_newest,
        "step-999999 planted": plant,
        "a full disk of 3 MB": small_disk,
        "a read-only folder": read_only,
    }
    harms += [("two checkpoints", lambda: _save_two(run))]
    harms += [(name, partial(tried, run, name, partial(harmful, run))) for name, harmful in others.items()]
    harms += [("to the end", run.finish)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(harms))
        for name, harmful in harms:
            bar.update(task, description=name)
            harmful()
            bar.advance(task)
    same = run.trace() == whole.trace()
    same = same and digest(run.run_dir / paths.EXPORT) == digest(whole.run_dir / paths.EXPORT)
    return report(run, same)


def _overrides(kills: int, engine: str) -> list[str]:
    tiny = ["model.train_tokenizer=512", "model.architecture.hidden_size=64", "model.architecture.num_hidden_layers=2"]
    small = ["data.seq_len=64", "train.global_batch=4", "train.microbatch=1", "train.eval_every=null", "data.eval_fraction=0"]
    saves = ["checkpoint.every=1", "checkpoint.keep_last=3", f"train.steps={4 * kills + 20}", "train.sample_tokens=0"]
    return ["+exp=quickstart_base", *tiny, *small, "optim.warmup_steps=2", *saves, f"engine={engine}"]


def _save_two(run: Harmed) -> None:
    """Let the run save until there are two checkpoints: one to be damaged, one to continue from."""
    while len(run.complete()) < 2:
        _kill_when_saved(run, max(map(number_of, run.complete()), default=0) + 2)


def tried(run: Harmed, name: str, harmful: Callable[[], str]) -> None:
    """Do harm once; what was complete before and is kept must be as it was, and the next attempt continues from the newest."""
    tally = run.tallies.setdefault(name, Tally())
    before = run.complete()
    expected = max((number_of(path) for path in before), default=0)
    note = harmful()
    if note.startswith("skipped"):
        tally.note = note
        return
    after = run.complete()
    tally.tried += 1
    if note.startswith("at byte"):
        tally.inside += 1
        tally.note = f"{tally.inside} while its files were being written"
    tally.lost += sum(path in after and after[path] != digest for path, digest in before.items() if name != "a byte flipped")
    tally.lost += bool(before) and not after
    begun = run.begun_from()
    wanted = expected if name != "a byte flipped" else max((step for step in map(number_of, before) if step < expected), default=expected)
    tally.exact += begun == wanted
    if begun != wanted:
        tally.note = f"continued from step {begun}, and step {wanted} was there"


def flip_newest(run: Harmed) -> str:
    """Flip one bit of the newest checkpoint's largest file, and kill the attempt that passes over it."""
    newest = list(run.complete())[-1]
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[run.rng.randrange(len(data))] ^= 1 << run.rng.randrange(8)
    file.write_bytes(data)
    return run.kill_in_save()


def plant(run: Harmed) -> str:
    """Copy the newest checkpoint to a name far ahead."""
    newest = list(run.complete())[-1]
    planted = run.run_dir / paths.CHECKPOINTS / f"step-{PLANTED}"
    shutil.copytree(newest, planted)
    try:
        wanted = _kill_when_saved(run, number_of(newest) + 1)
    finally:
        shutil.rmtree(planted)
    return wanted


def small_disk(run: Harmed) -> str:
    """Move the checkpoints to a full disk of 3 MB: no save succeeds, the older ones stay, the run continues."""
    folder, kept = run.run_dir / paths.CHECKPOINTS, run.run_dir / "kept"
    newest = list(run.complete())[-1]
    if os.geteuid() or size_of(newest) > SMALL_DISK - (1 << 18):
        return "skipped: root must mount it, and a checkpoint fit"
    folder.rename(kept)
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(folder)], capture_output=True, check=False)
    try:
        if mounted.returncode:
            return "skipped: mounting is not allowed here"
        shutil.copytree(kept / newest.name, folder / newest.name)
        free = shutil.disk_usage(folder).free
        (folder / "filler").write_bytes(bytes(free - (1 << 16)))
        _kill_when_said(run, "no checkpoint of step")
        survivor = folder / newest.name
        if digest(survivor) != digest(kept / newest.name):
            raise Wrong(f"{survivor} has changed on a full disk")
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True, timeout=30)
        folder.rmdir()
        kept.rename(folder)
    return "no save succeeded"


def read_only(run: Harmed) -> str:
    """Make the folder of checkpoints read-only: no save succeeds, the older ones stay, the run continues."""
    folder = str(run.run_dir / paths.CHECKPOINTS)
    if os.geteuid():
        os.chmod(folder, 0o555)
        try:
            _kill_when_said(run, "no checkpoint of step")
        finally:
            os.chmod(folder, 0o755)
        return "no save succeeded"
    lines = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]]  # root writes wherever it is not mounted so
    mounted = [subprocess.run(line, capture_output=True, check=False, timeout=30).returncode for line in lines]
    try:
        if any(mounted):
            return "skipped: mounting is not allowed here"
        _kill_when_said(run, "no checkpoint of step")
    finally:
        if not mounted[0]:
            subprocess.run(["umount", folder], check=True, timeout=30)
    return "no save succeeded"


def _kill_when_saved(run: Harmed, step: int) -> str:
    run.attempt_until(lambda: run.newest() >= step)
    return f"killed after step {step}"


def _kill_when_said(run: Harmed, words: str) -> None:
    log = run.log
    begin = log.stat().st_size
    run.attempt_until(lambda: words.encode() in log.read_bytes()[begin:])


def report(run: Harmed, same: bool) -> int:
    """Print the tallies and return the exit code."""
    table = Table("harm", "tried", "resumed from the newest", "checkpoints lost", "")
    for name, tally in run.tallies.items():
        table.add_row(name, str(tally.tried), str(tally.exact), str(tally.lost), tally.note)
    Console(width=110).print(table)
    good = same and all(tally.exact == tally.tried and not tally.lost for tally in run.tallies.values())
    attempts = len(list((run.run_dir / paths.LOGS).glob("attempt-*")))
    print(f"{attempts} attempts; their trace and the export {'are' if same else 'are NOT'} those of the run that nobody harmed")
    print(f"checkpoints lost: {sum(tally.lost for tally in run.tallies.values())}")
    return 0 if good else 1
