"""A run on a mixture by the command that a user types: killed, continued by another number of ranks, shown, planned."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, arguments, environment, launch, rank_processes, wait_for_step
from preparing import write

from trainers.rundir.rows import evaluations, read_rows, steps

pytestmark = pytest.mark.slow


def line_of(base: Path, chats: Path, code: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the command of a run of two sources, 80 : 20 by rows for 4 steps, then 50 : 50, with smoothed labels."""
    whole = [text for text in arguments(base, chats, run_dir) if not text.startswith(("data=", "data.path=", "train.steps="))]
    mix = [f"data.mix.general={chats}", f"data.mix.code.path={code}", "data.mix_ratio=[80,20]", "data.mix_by=rows", "data.packing=false"]
    mix += ["data.mix_steps=[4]", "data.mix_change=phase", "data.mix.code.then=[80]", "objective.label_smoothing=0.1"]
    return [*whole, *mix, "checkpoint.every=2", "train.steps=12", "train.global_batch=6", *more]


NUMBERS = ("loss", "eval_loss", "nll", "eval_nll")


def manifest_rows(run_dir: Path) -> int:
    rows: int = json.loads((run_dir / "manifest.json").read_text())["mixture"]["sources"]["code"]["rows"]
    return rows


def test_a_killed_mixture_continues_on_another_number_of_ranks(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Killed with two ranks, continued by three: the rows of one rank, and losses of each source within 1e-5; rows have weights."""
    sums = [{"prompt": f"{one} + {two} =", "completion": str(one + two), "weight": 1 + two / 2} for one in range(5) for two in range(4)]
    code = write(tmp_path / "code.jsonl", random.Random(0).sample(sums, len(sums)))
    said = launch(cache, line_of(base, chats, code, tmp_path / "whole", "launch.processes=1"))
    assert "the mixture" in said
    assert "weights from 1 to 2.5" in said
    line = line_of(base, chats, code, tmp_path / "parts")
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "parts", 5, process)
    os.kill(rank_processes(tmp_path / "parts")[0], signal.SIGKILL)
    assert process.wait(60) == 1
    launch(cache, [*line, "launch.processes=3"])
    whole, parts = (read_rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["rows_hash"] for row in steps(whole)] == [row["rows_hash"] for row in steps(parts)]
    assert [row["epoch/code"] for row in steps(whole)] == [row["epoch/code"] for row in steps(parts)]
    for one, other in zip(whole, parts, strict=True):
        losses = [name for name, value in one.items() if name.startswith(NUMBERS) and value is not None]
        assert [name for name, value in other.items() if name.startswith(NUMBERS) and value is not None] == losses
        assert [other[name] for name in losses] == pytest.approx([one[name] for name in losses], rel=1e-5)
    taken = [round(row["epoch/code"] * manifest_rows(tmp_path / "whole")) for row in steps(whole)]
    assert taken[3] in (4, 5, 6), "a fifth of 24 rows"
    assert taken[-1] - taken[3] in (23, 24, 25), "half of 48 rows"
    summary, manifest = (json.loads((tmp_path / "parts" / name).read_text()) for name in ("summary.json", "manifest.json"))
    last = evaluations(parts)[-1]
    assert summary["eval_loss_after/code"] == last["eval_loss/code"]
    assert summary["eval_loss_after/general"] == last["eval_loss/general"]
    assert summary["epoch/code"] == steps(parts)[-1]["epoch/code"] > 0
    assert set(manifest["mixture"]["sources"]) == set(manifest["data"]["sources"]) == {"general", "code"}
    overrides = [text for text in line[3:] if not text.startswith("run_dir=")]
    shown = launch(cache, [sys.executable, "-m", "tools.show_batch", *overrides, "--rows", "4"])
    assert " of general: " in shown
    assert " of code: " not in shown or ", weight " in shown
    planned = launch(cache, [*line, "mode=plan", f"run_dir={tmp_path / 'planned'}"])
    assert "a mixture: general" in planned
