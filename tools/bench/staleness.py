"""Steps an hour of a run that samples ahead of training against one where they take turns, by the command that a user types."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tools.bench.arguments import at_least
from tools.bench.launched import launch
from tools.bench.machine import cpu_words
from tools.markdown import put_section
from trainers import host
from trainers.config.errors import plural
from trainers.rundir.rows import Row, read_rows, steps

WORDS, PROMPTS = 200, 256
FIRST = 3
"""Steps that are not timed: they allocate, and the first two rollouts of a run that samples ahead are of the same weights."""
TURNS = ("sync_seconds", "sampling_seconds", "scoring_seconds", "measuring_seconds", "waiting_seconds")
"""Parts of a step where sampling and training take turns."""
AHEAD = ("sync_seconds", "measuring_seconds", "waiting_seconds")
"""Parts of a step of a run that samples ahead: opening, sampling and scoring are done meanwhile."""
PARTS = ("sync_seconds", "opening_seconds", "sampling_seconds", "scoring_seconds", "measuring_seconds", "waiting_seconds")
Mean = dict[str, float]
"""Seconds by part, means over the steps that are timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench staleness`."""
    parser.add_argument("--steps", type=at_least(FIRST + 1), default=20, help=f"of a run; the first {FIRST} are not timed (default 20)")
    parser.add_argument("--runs", type=at_least(1), default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--answers", type=at_least(8), default=32, help="answers of a step, a multiple of 8 (default 32)")
    parser.add_argument("--tokens", type=at_least(1), default=128, help="of an answer: more of them make sampling slower (default 128)")
    parser.add_argument("--prompt-words", type=at_least(1), default=24, help="more of them make training slower (default 24)")
    parser.add_argument("--hidden-size", type=at_least(16), default=128, help="of the model, of 4 blocks (default 128)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, steps an hour and the time of a step by part; returns the exit code."""
    console, found = Console(stderr=True), dict[int, list[Mean]]({0: [], 1: []})
    with tempfile.TemporaryDirectory(prefix="fulltune-staleness-") as temporary, console.status("") as status:
        folder = Path(temporary)
        write_prompts(folder / "prompts.jsonl", options.prompt_words)
        for number in range(options.runs):
            for staleness, means in found.items():
                status.update(f"run {number + 1} of {options.runs}: rl.staleness={staleness}")
                run_dir = folder / f"{staleness}-{number}"
                launch(folder, settings(folder, run_dir, staleness, options))
                means.append(means_of(steps(read_rows(run_dir))))
    text = section(options, {staleness: _median(means) for staleness, means in found.items()})
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    return 0


def write_prompts(file: Path, num_words: int) -> None:
    """Write prompts of random words, the same each time."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 8, WORDS)]
    file.write_text("".join(json.dumps({"prompt": " ".join(rng.choice(words, num_words))}) + "\n" for _ in range(PROMPTS)))


def settings(folder: Path, run_dir: Path, staleness: int, options: argparse.Namespace) -> list[str]:
    """Return what a user types after `python -m launcher`: one rank and one generator, a small model of random weights.

    The rate is so small that answers stay as long as they are. Their reward is a length, so that groups differ.
    """
    room = 8 * options.prompt_words + 32  # more than a prompt has: of a vocabulary of 1,024 a word is a few tokens
    return [
        *("model=scratch", "model.train_tokenizer=1024", f"model.architecture.hidden_size={options.hidden_size}"),
        *("data=files", f"data.path={folder / 'prompts.jsonl'}", "data.template=chatml", "data.packing=false"),
        *(f"data.seq_len={room + options.tokens}", f"model.architecture.max_position_embeddings={room + options.tokens}"),
        *("objective=grpo", "rl.group_size=8", f"rl.max_new_tokens={options.tokens}", f"rl.batch={options.answers}"),
        *("reward.short.kind=length", "reward.short.unit=characters", "reward.short.max=1", "reward.short.soft=10000"),
        *(f"rl.staleness={staleness}", f"train.steps={options.steps}", f"train.global_batch={options.answers}", "train.microbatch=8"),
        *("train.precision=fp32", "train.sample_tokens=0", "optim.lr=1e-7", "optim.schedule=constant", "log.wandb=disabled"),
        *("launch.processes=1", "launch.gpus_per_node=0", f"run_dir={run_dir}"),
    ]


def means_of(rows: Sequence[Row]) -> Mean:
    """Return the mean seconds of a step, of its parts, and of the training that is the rest."""
    timed = rows[FIRST:]
    found = {name: statistics.fmean(row.get(name, 0.0) for row in timed) for name in ("step_seconds", *PARTS)}
    own = AHEAD if any("opening_seconds" in row for row in timed) else TURNS
    return found | {"training_seconds": found["step_seconds"] - sum(found[name] for name in own)}


def _median(runs: list[Mean]) -> Mean:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def section(options: argparse.Namespace, found: Mapping[int, Mean]) -> str:
    """Return the Markdown: command, machine, steps an hour and the time of a step by part."""
    about = (
        f"{cpu_words('torch', 'transformers')}. One rank and one generator, {options.answers} answers a step of up to {options.tokens} "
        f"tokens. {options.steps} steps a run, of which the first {FIRST} are not timed; median of {options.runs} runs each, in turn."
    )
    names = ("step_seconds", *PARTS, "training_seconds")
    heads = ["`rl.staleness`", "steps an hour", "this : 0", *("a step" if name == "step_seconds" else _word(name) for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for staleness, one in found.items():
        speed = found[0]["step_seconds"] / one["step_seconds"]
        cells = [str(staleness), f"{3600 / one['step_seconds']:,.0f}", f"{speed:.2f}", *(f"{one[name]:.2f} s" for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    words = (
        "Times are those of metrics.jsonl. With `rl.staleness=1` opening, sampling and scoring are done while the step before is trained, "
        f"{_threads()}"
    )
    return "\n\n".join([f"## `{options.line}`", about, "\n".join(lines), words]) + "\n"


def _threads() -> str:
    """Return how many threads a rank and its generator have next to each other, and how many where they take turns."""
    cores, given = host.cores(), os.environ.get("OMP_NUM_THREADS")
    next_to, in_turn = (given or host.threads_per_rank(sharing) for sharing in (2, 1))
    return (
        f"with {plural(int(next_to), 'thread')} for the rank and {plural(host.threads_per_rank(2), 'thread')} for the generator on "
        f"{plural(cores, 'core')}; taking turns the rank has {plural(int(in_turn), 'thread')} and the generator {cores}."
    )


def _word(name: str) -> str:
    return name.removesuffix("_seconds")
