"""Trace a real short run: which of our lines a whole run and one of its steps execute, and the collectives of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOOK = Path(__file__).parent / "hook"
SMALL = 64
"""Elements of the largest tensor that counts as a small collective: numbers that ranks agree on, not weights."""
CORPUS = [{"text": f"{number} is followed by {number + 1}, and twice {number} is {2 * number}."} for number in range(400)]
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Traced:
    """What a run and its median steady step execute; a line is a line event of Python's tracing, or a function's first line."""

    by_file: dict[str, int]
    """Lines of the whole run."""
    step_by_file: dict[str, int]
    collectives: list[str]
    """Of a steady step, in order: their names, and the file that called them."""
    small_collectives: int

    @property
    def run_files(self) -> int:
        """Return the files that the run passes."""
        return len(self.by_file)

    @property
    def run_lines(self) -> int:
        """Return the lines that the run executes, each once."""
        return sum(self.by_file.values())

    @property
    def step_files(self) -> int:
        """Return the files that a steady step passes."""
        return len(self.step_by_file)

    @property
    def step_lines(self) -> int:
        """Return the lines that a steady step executes, each once."""
        return sum(self.step_by_file.values())


def trace(folder: Path, ranks: int, overrides: tuple[str, ...] = (), code: Path = ROOT) -> Traced:
    """Train a tiny Llama for eight steps in an empty folder and return what rank 0, its launcher and its agent executed."""
    notes, data, run_dir = folder / "notes", folder / "corpus.jsonl", folder / "run"
    notes.mkdir(parents=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in CORPUS), encoding="utf-8")
    model = ["model=scratch", "model.train_tokenizer=300", *(f"model.architecture.{key}={value}" for key, value in LLAMA.items())]
    model.append("model.architecture.num_key_value_heads=2")
    steps = ["train.steps=8", f"train.global_batch={2 * ranks}", "train.precision=fp32", "data.seq_len=64", "data.eval_fraction=0.1"]
    line = [sys.executable, "-m", "launcher", *model, "data=files", f"data.path={data}", "objective=cpt", "optim.lr=1e-3"]
    line += [*steps, "log.wandb=disabled", f"launch.processes={ranks}", "launch.gpus_per_node=0", f"run_dir={run_dir}", *overrides]
    variables = {
        "FULLTUNE_STRUCTURE": str(notes),
        "FULLTUNE_STRUCTURE_ROOT": str(code),
        "FULLTUNE_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(HOOK), str(code)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(line, cwd=code, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"the traced run ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return read([json.loads(path.read_text(encoding="utf-8")) for path in notes.glob("*.json")])


def read(processes: list[dict[str, Any]]) -> Traced:
    """Put together what the hook noted in each process; ranks other than 0 are left out."""
    ours = [process for process in processes if process["rank"] in (None, "0")]
    lines: dict[str, set[int]] = {}
    for step in (step for process in ours for step in process["steps"]):
        for name, numbers in step["lines"].items():
            lines.setdefault(name, set()).update(numbers)
    stepping = max(ours, key=lambda process: len(process["steps"]))["steps"]
    steady = sorted(stepping[2:-1], key=lambda step: sum(map(len, step["lines"].values())))  # the first and the last do more
    if not steady:
        raise RuntimeError("no step was seen: `seed_step` is not called at the start of a step")
    middle = steady[len(steady) // 2]
    return Traced(
        by_file={name: len(numbers) for name, numbers in sorted(lines.items()) if numbers},
        step_by_file={name: len(numbers) for name, numbers in middle["lines"].items() if numbers},
        collectives=[f"{name} of {elements} by {caller}" for name, caller, elements in middle["collectives"]],
        small_collectives=sum(elements <= SMALL for _, _, elements in middle["collectives"]),
    )
