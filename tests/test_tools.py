"""Tools do what their --help says, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(*arguments: str, expect: int = 0, timeout_s: float = 100) -> str:
    line = [sys.executable, "-m", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["tools.show_batch", "tools.bench", "launcher"])
def test_help_says_how_to_use_it(name: str) -> None:
    assert f"python -m {name}" in tool(name, "--help")


def test_show_batch_shows_what_is_trained(tmp_path: Path) -> None:
    rows = [{"text": "The quick brown fox. " * number} for number in range(1, 30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["model=scratch", "objective=cpt", "data=files", f"data.path={tmp_path / 'rows.jsonl'}", "data.seq_len=128"]
    said = tool("tools.show_batch", *overrides, "model.train_tokenizer=300", f"data.prepared_dir={tmp_path / 'prepared'}", "--rows", "2")
    assert "quick brown" in said
    assert "supervised" in said


def test_show_batch_explains_bad_input_like_the_launcher() -> None:
    said = tool("tools.show_batch", "+exp=quickstart_base", "optim.lrr=1", expect=2)
    assert "nearest optim.lr" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_our_loop_is_no_slower_and_no_larger_than_bare_transformers() -> None:
    """`tools.bench train` itself raises where the two loops' losses differ; figures on a busy machine wander, hence the margin."""
    figures = {}
    for variant in ("fulltune", "transformers"):
        line = tool("tools.bench", "one", "cpt", variant, "--steps", "6", timeout_s=280).splitlines()[-1]
        figures[variant] = json.loads(line)
    assert figures["fulltune"]["loss"] == pytest.approx(figures["transformers"]["loss"], rel=1e-4)
    assert figures["fulltune"]["speed"] > 0.8 * figures["transformers"]["speed"]
    assert figures["fulltune"]["peak"] < figures["transformers"]["peak"]
