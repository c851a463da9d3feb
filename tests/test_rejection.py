"""Rejection sampling by a user's commands: a small model's own right answers make it better on questions that are held out."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment

from trainers.data.sources import digits


@pytest.mark.soak
@pytest.mark.for_real
@pytest.mark.timeout(900)
def test_a_model_learns_from_its_own_right_answers(cache: Path, tmp_path: Path) -> None:
    """Of the hundred questions of conf/data/digits.yaml sixty are asked, sixteen times each, and forty are held out."""
    rows = list(digits())
    random.Random(1).shuffle(rows)
    for name, part in (("seen", rows[:60]), ("held", rows[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def command(*words: str) -> str:
        line, variables = [sys.executable, "-m", *words], environment(cache) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    command("launcher", "+exp=quickstart_digits", "launch.processes=1", "train.microbatch=20")
    command("tools.sample", "runs/quickstart_digits", "seen.jsonl", "--out", "answers.jsonl", "--n", "16", "--max-new-tokens", "4")
    command("tools.select", "answers.jsonl", "--reward", "exact", "--threshold", "1", "--per-prompt", "4", "--out", "best.jsonl")
    tuned = ["model=hf", "model.id=runs/quickstart_digits/export", "data=files", "data.path=best.jsonl", "data.seq_len=32"]
    tuned += ["data.packing=false", "run_dir=runs/rejection", "train.steps=100", "train.global_batch=20", "train.microbatch=20"]
    tuned += ["train.precision=fp32", "optim.full_lr=1e-3", "log.wandb=disabled", "launch.processes=1", "launch.gpus_per_node=0"]
    asked = ["evaluation.path=held.jsonl", "evaluation.rows=40", "evaluation.extract=whole", "evaluation.metrics=[exact_match]"]
    command("launcher", *tuned, *asked, "evaluation.max_new_tokens=4", "train.sample_tokens=4")
    said = command("tools.evaluate", "runs/rejection")
    base, run, difference = re.search(r"exact_match +│ +([\d.]+) ±.*│ +([\d.]+) ±.*│ +(.+?) +│", said).groups()  # type: ignore[union-attr]
    assert difference.startswith("▲")  # beyond the noise, by the interval of the difference
    assert float(base) < 0.5 < 0.7 < float(run)
