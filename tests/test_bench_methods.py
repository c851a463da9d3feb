"""`python -m tools.bench methods`: the same training by several methods, through the command that a user types."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, environment, wait_until_gone

from tools.bench.methods import SAME, Result, Trial, recommended_lr, require_same, settings


@pytest.mark.soak
def test_methods_are_compared_at_equal_tokens(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Two methods that run and one that the config refuses; stopped after the first run, the same command continues from there."""
    out, runs = tmp_path / "figures.md", tmp_path / "runs"
    out.write_text("# By hand\n")
    given = ["--model", str(base), "--data", str(chats), "--methods", "none", "ia3", "prompt", "--runs", str(runs), "--out", str(out)]
    small = ["--steps", "3", "--rows", "4", "--seq-len", "64", "--rates", "1", "--most", "1", "--processes", "1"]
    line = [sys.executable, "-m", "tools.bench", "methods", "data.template=chatml", "data.packing=true", *given, *small]
    stopped = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(runs.glob("ia3-*")) or stopped.poll() is not None)
        stopped.send_signal(signal.SIGINT)
        said = stopped.communicate(timeout=60)
    finally:
        stopped.kill()
    assert stopped.returncode == 130, said
    assert "continues from there" in said[1]
    assert "| IA3 | not run |" in said[0]
    wait_until_gone(next(runs.glob("ia3-*")))
    assert out.read_text() == "# By hand\n"
    done = subprocess.run(line, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    assert text == f"# By hand\n\n{done.stdout}"
    assert "No times here: an earlier start of this command had finished 1 of the 2 runs" in text
    for folder in (base, chats.parent, tmp_path):
        assert str(folder) not in text
    rows = {cells[1]: cells[2:-1] for row in text.splitlines()[:12] if len(cells := [cell.strip() for cell in row.split("|")]) > 1}
    assert rows["prompt tuning"][0].startswith("refused: `data.packing`")
    full, ia3 = (json.loads(next(runs.glob(f"{name}-*/summary.json")).read_text()) for name in ("none", "ia3"))
    assert full["input_tokens"] == ia3["input_tokens"] > full["tokens"] > 0
    trained = ia3["trainable_parameters"]
    assert trained == 3 * (16 + 16 + 48), "three blocks, a factor for each key, value and inner feature"
    assert ia3["state_bytes"] == {
        "frozen": 4 * full["parameters"],
        "trainable": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }
    expected = [f"{ia3['eval_loss_before']:.4f}", f"{ia3['eval_loss_after']:.4f}", f"{trained:,}"]
    assert rows["IA3"][:4] == ["0.003", *expected]
    assert [float(cell) for cell in rows["IA3"][4:8]] == pytest.approx([size / 1024 for size in ia3["state_bytes"].values()], abs=0.05)
    assert rows["full fine-tuning"][-1] == "-"


def wait_for(happened: Callable[[], Any], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def trial(lr: float, loss: float | None, **more: Any) -> Trial:
    return Trial(lr=lr, figures={"eval_loss_after": loss} | dict.fromkeys(SAME, 1) | more)


def test_rates_go_on_while_the_last_is_the_best() -> None:
    rising = Result({-1: trial(0.1, 3.0), 0: trial(1, 2.0), 1: trial(10, 1.0)})
    assert (rising.best(), rising.further(most=5), rising.further(most=3), rising.is_at_edge()) == (1, [2], [], True)
    rising.trials[2] = trial(100, None)  # not finite
    assert (rising.best(), rising.further(most=5), rising.is_at_edge()) == (1, [], False)
    falling = Result({-1: trial(0.1, 1.0), 0: trial(1, 2.0)})
    assert falling.further(most=5) == [-2]
    assert Result({0: Trial(lr=1.0, reason="failed")}).further(most=5) == []


def test_runs_over_other_tokens_are_not_compared() -> None:
    trials = [("none", trial(1, 2.0)), ("lora", Trial(lr=1, reason="failed")), ("ia3", trial(1, 1.0))]
    assert require_same(trials)["tokens"] == 1
    with pytest.raises(RuntimeError, match="dora at 1 and none at 1 are not the same training: tokens 2 and 1"):
        require_same([*trials, ("dora", trial(1, 1.0, tokens=2))])


def test_a_preset_says_its_rate() -> None:
    """Where it has none, the optimizer's preset says that of full fine-tuning."""
    rates = {"none": 1e-5, "lora": 2e-4, "dora": 2e-4, "qlora": 2e-4, "loftq": 1e-4, "pissa": 2e-5, "ia3": 3e-3, "prompt": 3e-2}
    assert {method: recommended_lr(method) for method in rates} == rates
    assert settings("qlora", rank=8, steps=200) == ["peft=qlora", "peft.rank=8", "peft.alpha=2"]
    scheduled = ["peft=adalora", "peft.rank=6", "peft.alpha=16", "peft.target_rank=4", "peft.tinit=60", "peft.tfinal=180"]
    assert settings("adalora", rank=4, steps=360) == scheduled
