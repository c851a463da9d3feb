"""Whether PPO raises what a trained reward model says of answers to held-out questions, over seeds and next to runs rewarded by lot.

The reward model learns from pairs of the base's own answers: the right one and each wrong one. All by the commands that a user types.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench.arguments import at_least
from tools.bench.launched import launch
from tools.bench.learning import BY_LOT, HELD_OUT, QUESTIONS, SAMPLES, add_seeds, run_each, told, with_interval
from tools.bench.machine import cpu_words
from trainers.data.sources import digits
from trainers.rundir import paths
from trainers.rundir.rows import Row, evaluations, read_rows
from trainers.units import in_time

ANSWERS, TOKENS = 64, 4
"""Of the base to each question, and the longest answer."""
SAMPLE_LIMIT_S = 900.0
ON_A_CPU = ("launch.processes=1", "launch.gpus_per_node=0", "log.wandb=disabled")
COMMON = ("model=hf", "data.seq_len=32", "data.packing=false", "train.precision=fp32", *ON_A_CPU)
JUDGE = (
    "objective=reward",
    "data=files",
    "data.eval_fraction=0.1",
    "train.steps=500",
    "train.global_batch=60",
    "train.microbatch=60",
    "optim.full_lr=2e-3",
)
POLICY = ("objective=ppo", "data=digits", "objective.kl_weight=0.02", "objective.critic_lr=2e-3", "optim.full_lr=1e-3")
BATCHES = (
    "train.global_batch=128",
    "train.microbatch=128",
    "rl.group_size=1",
    "rl.batch=256",
    f"rl.max_new_tokens={TOKENS}",
    f"train.sample_tokens={TOKENS}",
)
RATES = ("optim.schedule=constant", "optim.warmup_steps=10", "train.eval_every=50", f"data.eval_fraction={HELD_OUT}")
LOT = ("reward.score.weight=0", *BY_LOT)
"""Settings of a control: the score is counted, and trained on is what is drawn."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a run's held-out evaluations say before its first step and after its last one, and its time."""

    score: tuple[float, float]
    """The reward model's mean score."""
    right: tuple[float, float]
    """Share of right answers, which no reward counts."""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench rlhf`."""
    add_seeds(parser)
    parser.add_argument("--steps", type=at_least(20), default=200, help="of a run of PPO (default 200)")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, how scores have changed; returns 1 where one has not risen, or a control's has as much."""
    with tempfile.TemporaryDirectory(prefix="fulltune-rlhf-") as temporary, Console(stderr=True).status("training the base") as status:
        folder = Path(temporary)
        launch(folder, ["+exp=quickstart_digits", f"run_dir={folder / 'base'}"])
        status.update("training the reward model")
        accuracy = train_judge(folder)
        found = run_each(options.seeds, folder, status, partial(settings, num_steps=options.steps), scored)
    return told(options, section(options, accuracy, found), failures_of(found))


def train_judge(folder: Path) -> float:
    """Train a reward model in folder/judge on pairs of the base's answers; returns its accuracy on pairs that are held out."""
    asked, answers, pairs = folder / "asked.jsonl", folder / "answers.jsonl", folder / "pairs.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in digits()))
    line = [sys.executable, "-m", "tools.sample", str(folder / "base"), str(asked), "--out", str(answers), "--n", str(ANSWERS)]
    line += ["--max-new-tokens", str(TOKENS), "--batch", "256"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=SAMPLE_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"tools.sample failed:\n{done.stderr[-3000:]}")
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in pairs_of(map(json.loads, answers.read_text().splitlines()))))
    base = folder / "base" / paths.EXPORT
    launch(folder, [*COMMON, *JUDGE, f"model.id={base}", f"data.path={pairs}", f"run_dir={folder / 'judge'}"])
    return float(evaluations(read_rows(folder / "judge"))[-1]["eval_accuracy"])


def pairs_of(answers: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the right answer and the wrong one, of each wrong answer that a row of data may have."""
    for row in answers:
        right, wrong = row["reference"], row["answer"]
        if wrong != right and wrong.strip() and "\0" not in wrong:
            yield {"prompt": row["prompt"], "chosen": _turn(right), "rejected": _turn(wrong)}


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def settings(folder: Path, name: str, seed: int, is_control: bool, num_steps: int) -> list[str]:
    """Return what a user types after `python -m launcher`."""
    judge = folder / "judge" / paths.EXPORT
    asked = [f"model.id={folder / 'base' / paths.EXPORT}", f"run_dir={folder / name}", f"seed={seed}", f"rl.eval_samples={SAMPLES}"]
    asked += [f"objective.critic={judge}", "reward.score.kind=model", f"reward.score.path={judge}"]
    asked += ["reward.right.kind=exact", "reward.right.weight=0", *(LOT if is_control else ())]
    return [*COMMON, *POLICY, *BATCHES, *RATES, f"train.steps={num_steps}", *asked]


def scored(rows: list[Row], seconds: float) -> Scored:
    """Return what a run's metrics say."""
    first, *_, last = evaluations(rows)
    ends = [(first[f"eval_reward/{name}"], last[f"eval_reward/{name}"]) for name in ("score", "right")]
    return Scored(score=ends[0], right=ends[1], seconds=seconds)


def failures_of(found: Mapping[tuple[int, bool], Scored]) -> list[str]:
    """Say which runs' scores have not risen, and more than their control's."""
    said = []
    for (seed, is_control), one in found.items():
        risen, other = one.score[1] - one.score[0], found[seed, True].score
        if not is_control and not risen > max(1.0, 2 * (other[1] - other[0])):
            ends = f"from {one.score[0]:.2f} to {one.score[1]:.2f}, and the control's from {other[0]:.2f} to {other[1]:.2f}"
            said.append(f"seed {seed}: the held-out score went {ends}; asked are a rise of 1 and twice the control's")
    return said


def section(options: argparse.Namespace, accuracy: float, found: Mapping[tuple[int, bool], Scored]) -> str:
    """Return the Markdown: command, machine and table."""
    asked = " ".join((*POLICY, *BATCHES, *RATES, f"train.steps={options.steps}"))
    about = (
        f"{cpu_words('torch', 'transformers')}. The model of `+exp=quickstart_digits` answers each of the hundred questions {ANSWERS} "
        f"times. A reward model (`{' '.join(JUDGE)}`) learns from pairs of the right answer and each wrong one. Of pairs held out, which "
        f"answers given twice may repeat, it is right in {accuracy:.1%}.\n\n"
        f"PPO (`{asked}`) learns from its score alone, with `{' '.join(LOT)}` for the controls. {QUESTIONS} "
        f"questions are not among the prompts, and each of these is answered {SAMPLES} times."
    )
    names = ("seed", "rewards", "held-out score at first", "at the end", "right answers at first", "at the end", "time")
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * 5]
    for (seed, is_control), one in found.items():
        cells = [str(seed), "drawn by lot" if is_control else "reward model", *(f"{score:.2f}" for score in one.score)]
        cells += [with_interval(share) for share in one.right]
        lines.append(f"| {' | '.join([*cells, in_time(one.seconds)])} |")
    words = (
        "Right answers are those to held-out questions, which no reward counts, with Wilson's interval at 95 % over the questions, as if "
        "each were answered once. Where a wrong answer has a high score, PPO finds it."
    )
    return "\n\n".join([f"## `{options.line}`", about, "\n".join(lines), words]) + "\n"
