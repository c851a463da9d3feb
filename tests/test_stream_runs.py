"""Streams by the command that a user types: equal to prepared data, killed and continued, bounded on disk, refused with a remedy."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from command import arguments, environment, finish, launch, rank_processes, started, wait_for, wait_for_step
from conftest import WORDS
from preparing import write
from stores import Files, serving

from trainers.rundir.beats import Phase, read_beats
from trainers.rundir.rows import evaluations, read_rows, steps


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rows of ragged lengths."""
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(rng.choices(WORDS, k=6)), "completion": " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))} for _ in range(240)
    ]
    return write(tmp_path_factory.mktemp("sums") / "sums.jsonl", rows)


def line_of(base: Path, data: Path | str, run_dir: Path, *more: str) -> list[str]:
    """Return the command of a run of 12 steps of 8 rows."""
    whole = [
        text
        for text in arguments(base, Path("x"), run_dir)
        if not text.startswith(("data.path=", "train.steps=", "data.eval", "train.eval_every="))
    ]
    return [*whole, f"data.path={data}", "data.packing=false", "train.steps=12", "train.global_batch=8", "checkpoint.every=4", *more]


def numbers(run_dir: Path) -> list[tuple[str, float]]:
    return [(row["rows_hash"], row["loss"]) for row in steps(read_rows(run_dir))]


@pytest.mark.slow
def test_a_stream_equals_prepared_data(base: Path, sums: Path, cache: Path, tmp_path: Path) -> None:
    """In one window: the same rows in the same order and bit for bit the same losses, from a compressed file of a web server."""
    launch(cache, line_of(base, sums, tmp_path / "prepared"))
    stream = ("data.streaming=true", "data.shard_rows=70", "data.window_shards=4")
    served = tmp_path / "served"
    served.mkdir()
    (served / "sums.jsonl.gz").write_bytes(gzip.compress(sums.read_bytes()))
    with serving(Files, served) as url:
        launch(cache, line_of(base, f"{url}/sums.jsonl.gz", tmp_path / "remote", *stream))
    assert numbers(tmp_path / "remote") == numbers(tmp_path / "prepared")


@pytest.mark.slow
def test_a_killed_stream_continues_on_another_number_of_ranks(base: Path, sums: Path, cache: Path, tmp_path: Path) -> None:
    """Small windows, two passes; the process ahead is killed, then a rank, then a signal comes while rows are waited for.

    The same rows and losses as in one go. A process ahead that is held keeps the run from its end.
    """
    stream = ("data.streaming=true", "data.shard_rows=16", "data.window_shards=2", "train.steps=40", "train.sample_tokens=0")
    launch(cache, line_of(base, sums, tmp_path / "whole", *stream))
    line = line_of(base, sums, tmp_path / "parts", *stream)
    with started(line, environment(cache)) as process:
        wait_for_step(tmp_path / "parts", 2, process)
        killed = ahead_of(tmp_path / "parts")
        os.kill(killed, signal.SIGKILL)
        hold_ahead(tmp_path / "parts", killed)
        kept = len([path for path in (tmp_path / "parts" / "stream").glob("*/data-*") if path.is_dir()])
        assert kept <= 8, "more than the windows that are needed"
        os.kill(rank_processes(tmp_path / "parts")[0], signal.SIGKILL)
        finish(process, tmp_path / "parts")
    with started(line, environment(cache)) as process:
        wait_for(lambda: is_in(tmp_path / "parts", Phase.loading))
        hold_ahead(tmp_path / "parts")
        wait_for(lambda: is_in(tmp_path / "parts", Phase.step))
        process.terminate()
        finish(process, tmp_path / "parts", 75)
    launch(cache, [*line, "launch.processes=1"])
    whole, parts = numbers(tmp_path / "whole"), numbers(tmp_path / "parts")
    assert [row for row, _ in parts] == [row for row, _ in whole]
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)
    index = [json.loads(line) for line in next((tmp_path / "parts" / "stream").glob("*/index.jsonl")).read_text().splitlines()]
    assert [shard["read"] for shard in index] == [16] * 15
    assert [shard["is_last"] for shard in index] == [False] * 14 + [True]


def ahead_of(run_dir: Path, other_than: int = 0) -> int:
    """Return the process that prepares a run's shards, 0 where there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"trainers.data.ahead" in words and str(run_dir / "config.yaml").encode() in words and int(folder.name) != other_than:
                return int(folder.name)
    return 0


def is_in(run_dir: Path, phase: Phase) -> bool:
    """Tell whether rank 0, of the attempt that is under way, is in a phase or past it and taking steps."""
    beat = read_beats(run_dir).get(0)
    return beat is not None and beat.pid in rank_processes(run_dir) and beat.phase in (phase, Phase.step)


def hold_ahead(run_dir: Path, other_than: int = 0) -> None:
    """Let the next process that prepares a run's shards do nothing more."""
    wait_for(lambda: ahead_of(run_dir, other_than), timeout_s=100)
    os.kill(ahead_of(run_dir, other_than), signal.SIGSTOP)


@pytest.mark.slow
def test_a_bad_row_ends_an_adapter_run_that_then_continues_without_it(base: Path, sums: Path, cache: Path, tmp_path: Path) -> None:
    """With held-out rows, evaluations and the export: what a run of prepared data has."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    held = write(tmp_path / "held.jsonl", rows[:20])
    data = write(tmp_path / "rows.jsonl", [*rows[20:180], {"prompt": 1, "completion": 2}, *rows[180:]])
    stream = ("data.streaming=true", "data.shard_rows=32", "data.window_shards=1", f"data.eval_path={held}", "train.eval_every=8")
    line = line_of(base, data, tmp_path / "run", *stream, "peft=lora", "train.steps=24", "train.sample_tokens=0")
    stopped = launch(cache, line, expect=2)
    assert "rows.jsonl:161: has `prompt` that is a number" in stopped
    assert "data.skip_bad_rows=true" in stopped
    launch(cache, [*line, "data.skip_bad_rows=true"])
    assert (tmp_path / "run" / "export" / "adapter_config.json").is_file()
    assert [row["step"] for row in evaluations(read_rows(tmp_path / "run"))] == [0, 8, 16, 24]
    assert not list((tmp_path / "run" / "stream").glob("*/data-*"))
    index = [json.loads(line) for line in next((tmp_path / "run" / "stream").glob("*/index.jsonl")).read_text().splitlines()]
    assert sum(shard["counts"].get("bad", 0) for shard in index) == 1


@pytest.mark.soak
def test_a_sweep_a_plan_and_a_file_that_is_cut_off(base: Path, sums: Path, cache: Path, tmp_path: Path) -> None:
    stream = ("data.streaming=true", "data.shard_rows=70", "data.window_shards=4")
    sweep = [text for text in line_of(base, sums, tmp_path / "x", *stream) if not text.startswith(("run_dir=", "optim.lr="))]
    launch(cache, [*sweep[:3], "-m", *sweep[3:], "optim.lr=1e-2,5e-3", f"hydra.sweep.dir={tmp_path / 'sweep'}"])
    points = sorted(path.parent for path in (tmp_path / "sweep").rglob("metrics.jsonl"))
    one, other = (numbers(point) for point in points)
    assert [row for row, _ in one] == [row for row, _ in other]
    assert one != other
    assert "a stream (first shard data-" in launch(cache, line_of(base, sums, tmp_path / "plan", *stream, "mode=plan"))
    cut = tmp_path / "cut.jsonl.gz"
    rng = np.random.default_rng(0)
    rows = [json.dumps({"prompt": str(rng.integers(1 << 60)), "completion": str(rng.integers(1 << 60))}) for _ in range(2000)]
    cut.write_bytes(gzip.compress("\n".join(rows).encode())[:40_000])
    small = ("data.streaming=true", "data.shard_rows=64", "data.window_shards=1", "train.steps=400")
    assert "cannot be read after line" in launch(cache, line_of(base, cut, tmp_path / "cut", *small), expect=2)
