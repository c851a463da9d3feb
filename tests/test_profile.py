"""train.profile=STEPS leaves a trace and a table of rank 0's steps, and changes nothing of what is trained."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from trainers.profiling import SKIPPED, Profile
from trainers.rundir.attempt import Attempt


def taken(run_dir: Path, steps: int, count: int) -> None:
    """Take `count` steps of a matrix product each."""
    profile = Profile(steps, Attempt(run_dir, number=3), torch.device("cpu"))
    for _ in range(count):
        (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
        profile.after_step(0.25)
    profile.close()


@pytest.mark.parametrize("count", [SKIPPED + 2, SKIPPED + 5, SKIPPED + 1])
def test_a_trace_and_a_table_of_so_many_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    """As many as are asked for, also where the run goes on, and fewer where it ends before."""
    taken(tmp_path, 2, count)
    steps = min(2, count - SKIPPED)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "attempt-3.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == steps
    table = (tmp_path / "profile" / "attempt-3.txt").read_text()
    assert f"heaviest operators of {steps} steps" in table
    assert "aten::mm" in table
    assert [line for line in table.splitlines() if "data" in line and "250.00" in line]
    assert "aten::mm" in "".join(capsys.readouterr())


def test_a_run_that_ends_before_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fulltune"):
        taken(tmp_path, 2, SKIPPED - 1)
    assert "traced nothing" in caplog.text
    assert not (tmp_path / "profile").exists()
