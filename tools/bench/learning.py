"""Whether quickstart_grpo learns, over seeds and next to runs whose rewards are drawn by lot, by the commands that a user types."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.status import Status

from tools.bench.arguments import at_least
from tools.bench.launched import launch
from tools.bench.machine import cpu_words
from tools.markdown import put_section
from trainers.data.sources import digits
from trainers.rl.held_out import wilson
from trainers.rundir import paths
from trainers.rundir.rows import Row, evaluations, read_rows, steps
from trainers.units import in_time

HELD_OUT, SAMPLES = 0.4, 8
"""Share of the questions that are not trained on, and answers to each of them at an evaluation."""
QUESTIONS = round(HELD_OUT * len(list(digits())))
LAST = 10
"""Steps whose mean is the reward at the end of a run."""
LEAST, MOST = 0.2, 0.8
"""A run that learns begins below the one and ends above the other."""
BY_LOT = ("reward.lot.kind=function", "reward.lot.path=tools.bench.learning:by_lot")
LOT = ("reward.right.weight=0", *BY_LOT)
"""Settings of a control: right answers are counted, and trained on is what is drawn."""
CALLS = itertools.count()
Found = TypeVar("Found")


def by_lot(row: Mapping[str, Any]) -> float:
    """Return 1 for one answer in four, whatever it says: drawn from the prompt and the number of the call."""
    text = f"{row['prompt']} {next(CALLS)}"
    return float(hashlib.sha256(text.encode()).digest()[0] < 64)


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a run says of itself: shares of right answers, and its time."""

    reward: tuple[float, float]
    """Right answers of the first step's rollout, and of the last steps'."""
    held_out: tuple[float, float]
    """pass@1 of held-out questions before the first step and after the last one."""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench learning`."""
    add_seeds(parser)
    parser.add_argument("--steps", type=at_least(20), help="of a run (default: the experiment's)")


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a command that runs each seed and its control."""
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="of the runs and their controls (default 0 1 2)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, what each run has learnt; returns 1 where a run has not learnt, or a control has."""
    with tempfile.TemporaryDirectory(prefix="fulltune-learning-") as temporary, Console(stderr=True).status("training the base") as status:
        folder = Path(temporary)
        launch(folder, ["+exp=quickstart_digits", f"run_dir={folder / 'base'}"])
        found = run_each(options.seeds, folder, status, partial(settings, num_steps=options.steps), learnt)
    return told(options, section(options, found), failures_of(found))


def run_each(
    seeds: Sequence[int], folder: Path, status: Status, words: Callable[..., list[str]], found: Callable[[list[Row], float], Found]
) -> dict[tuple[int, bool], Found]:
    """Run each seed and its control by `words(folder, name, seed, is_control)`; returns what `found` makes of its rows and seconds."""
    results = dict[tuple[int, bool], Found]()
    for seed, is_control in itertools.product(seeds, (False, True)):
        name = f"{'control' if is_control else 'run'}-{seed}"
        status.update(f"{name} of {len(seeds)} seeds")
        began = time.monotonic()
        launch(folder, words(folder, name, seed, is_control))
        results[seed, is_control] = found(read_rows(folder / name), time.monotonic() - began)
    return results


def told(options: argparse.Namespace, text: str, failures: list[str]) -> int:
    """Print a section, write it to --out, and say what has failed; returns the exit code."""
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def settings(folder: Path, name: str, seed: int, is_control: bool, num_steps: int | None) -> list[str]:
    """Return what a user types after `python -m launcher`."""
    asked = [f"data.eval_fraction={HELD_OUT}", f"rl.eval_samples={SAMPLES}", *(LOT if is_control else ())]
    asked += [] if num_steps is None else [f"train.steps={num_steps}"]
    return ["+exp=quickstart_grpo", f"model.id={folder / 'base' / paths.EXPORT}", f"run_dir={folder / name}", f"seed={seed}", *asked]


def learnt(rows: list[Row], seconds: float) -> Learnt:
    """Return what a run's metrics say."""
    taken, held = steps(rows), evaluations(rows)
    last = statistics.fmean(row["reward/right"] for row in taken[-LAST:])
    ends = held[0]["eval_reward/right"], held[-1]["eval_reward/right"]
    return Learnt(reward=(taken[0]["reward/right"], last), held_out=ends, seconds=seconds)


def failures_of(found: Mapping[tuple[int, bool], Learnt]) -> list[str]:
    """Say which runs have not learnt, and which controls have."""
    said = []
    for (seed, is_control), one in found.items():
        (begin, end), grows = one.reward, one.held_out[1] > one.held_out[0]
        if is_control and end > MOST / 2:
            said.append(f"seed {seed}: a control, whose rewards are drawn by lot, ends with {end:.2f} of its answers right")
        if not is_control and not (begin < LEAST and end > MOST and grows):
            words = f"of its answers right from {begin:.2f} to {end:.2f}, held out from {one.held_out[0]:.2f} to {one.held_out[1]:.2f}"
            said.append(f"seed {seed}: {words}; asked is from below {LEAST} to above {MOST}")
    return said


def section(options: argparse.Namespace, found: Mapping[tuple[int, bool], Learnt]) -> str:
    """Return the Markdown: command, machine and table."""
    about = (
        f"{cpu_words('torch', 'transformers')}. `+exp=quickstart_grpo` after `+exp=quickstart_digits`, with `{' '.join(LOT)}` for the "
        f"controls. {QUESTIONS} of the hundred questions are held out, and each of these is answered {SAMPLES} times."
    )
    lines = ["| seed | rewards | right answers at first | at the end | held out at first | at the end | time |", "|---|---|" + "---:|" * 5]
    for (seed, is_control), one in found.items():
        cells = [str(seed), "drawn by lot" if is_control else "`exact`", *(f"{share:.2f}" for share in one.reward)]
        cells += [with_interval(share) for share in one.held_out]
        lines.append(f"| {' | '.join([*cells, in_time(one.seconds)])} |")
    words = (
        f"Right answers are those of the first rollout, and the mean of the last {LAST} steps. Held out is pass@1, with Wilson's interval "
        "at 95 % over the questions, as if each were answered once."
    )
    return "\n\n".join([f"## `{options.line}`", about, "\n".join(lines), words]) + "\n"


def with_interval(share: float) -> str:
    """Say a share of right answers to the held-out questions, and Wilson's interval."""
    low, high = wilson(share, QUESTIONS)
    return f"{share:.2f} ({low:.2f} to {high:.2f})"
