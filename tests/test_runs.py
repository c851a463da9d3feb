"""`python -m tools.runs`: what each run does, its log, and how it is ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, arguments, environment, wait_for_step

from trainers.rundir.rows import read_rows, steps


def runs(*words: str, expect: int = 0) -> str:
    line = [sys.executable, "-m", "tools.runs", *words]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "COLUMNS": "220"}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def copied(finished: Path, folder: Path, **changed: object) -> Path:
    """A finished run with another status.json."""
    run_dir = shutil.copytree(finished, folder)
    status = json.loads((run_dir / "status.json").read_text())
    (run_dir / "status.json").write_text(json.dumps(status | changed))
    return run_dir


def test_every_run_has_a_line(finished: Path, tmp_path: Path) -> None:
    copied(finished, tmp_path / "a" / "one")
    copied(finished, tmp_path / "b" / "two", state="failed", error={"message": "step 3: [ValueError] it broke\nmore"})
    copied(finished, tmp_path / "three", state="running", time=time.time() - 600)
    slow = {"ranks": [1], "hosts": ["node2"], "what": ["device"], "factors": [2.04]}
    copied(finished, tmp_path / "five", state="running", time=time.time(), stragglers=slow)
    copied(finished, tmp_path / "six", state="running", time=time.time(), stragglers=slow | {"groups": ["tensor group of ranks 0-1"]})
    copied(finished, tmp_path / "four", state="preempted", step=4)
    lines = {words[1]: line for line in runs(str(tmp_path)).splitlines() if len(words := [word.strip() for word in line.split("│")]) > 3}
    assert set(lines) == {"a/one", "b/two", "three", "four", "five", "six"}
    assert "slow: rank 1 on node2 (device, 2.0 x the median)" in lines["five"]
    assert "slow: rank 1 on node2 (device, 2.0 x the median; tensor group of ranks 0-1)" in lines["six"]
    assert "done" in lines["a/one"]
    assert "step 3: [ValueError] it broke" in lines["b/two"]
    assert "silent" in lines["three"]
    assert "no rank wrote for 10 min" in lines["three"]
    assert "preempted" in lines["four"]
    newest = steps(read_rows(finished))[-1]
    assert f"{newest['loss']:.4f}" in lines["a/one"]


def test_a_live_run_is_seen_and_ended(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, "launch.processes=1", "train.steps=2000", "checkpoint.every=2000", "train.eval_every=null")
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for_step(run_dir, 3, process)
        said = runs(str(tmp_path))
        assert "running" in said
        assert "/2,000" in said
        assert "cancel" not in runs("cancel", str(run_dir))
        assert process.wait(60) == 75
    finally:
        process.kill()
    assert "preempted" in runs(str(run_dir))
    assert "checkpoint saved" in runs("logs", str(run_dir))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["absent"], 2, "absent: is not a directory"),
        (["logs", "conf"], 2, "conf: is not a run directory"),
        (["cancel", "conf"], 2, "conf: is not a run directory"),
        (["requeue", "RUN"], 2, "was not submitted to SLURM; its command continues it: "),
        (["cancel", "RUN"], 0, "is not running"),
        (["logs", "RUN", "--rank", "7"], 2, "there is no such log yet"),
        (["--help"], 0, "python -m tools.runs"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], code: int, said: str, finished: Path) -> None:
    assert said in runs(*[str(finished) if word == "RUN" else word for word in words], expect=code)
