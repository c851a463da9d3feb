"""Parameter-efficient methods next to full fine-tuning: the same rows in the same order, each run by the command that a user types."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.bench.arguments import at_least
from tools.bench.machine import gpu_words, versions
from tools.bench.orders import PRESETS
from tools.markdown import cell_of, put_section
from trainers import host
from trainers.config.choices import Precision
from trainers.config.errors import plural
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.ending import Exit
from trainers.rundir.rows import evaluations, last_step, read_rows, steps
from trainers.units import in_bytes

METHODS = {
    "none": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA",
    "loftq": "LoftQ",
    "pissa": "PiSSA",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "adalora": "AdaLoRA",
}
"""Presets of conf/peft, with their names in words."""
CONF = Path(__file__).parents[2] / "conf"
CLASSES = ("frozen", "trainable", "gradients", "optimizer")
SAME = ("steps", "rows", "tokens", "input_tokens", "skipped_steps", "eval_tokens", "prepared")
"""Values that all runs must have in common."""
ADALORA_STEPS = 3600
"""About the steps of the runs that conf/peft/adalora.yaml has its schedule from."""
BAD_INPUT = 2
LOOK_S, STOP_S, SMALL = 0.2, 60.0, 1 << 27


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A method's run at one learning rate."""

    lr: float
    figures: dict[str, Any] = field(default_factory=dict)
    """summary.json, with `eval_tokens`, `prepared` (the data's key) and `export_bytes`; empty where the run failed."""
    step_seconds: list[float] = field(default_factory=list)
    reason: str = ""
    """Why it failed."""
    is_old: bool = False
    """An earlier start of the command has finished it."""

    @property
    def loss(self) -> float:
        """Held-out loss at the end; infinite where there is none."""
        loss = self.figures.get("eval_loss_after")
        return math.inf if loss is None else float(loss)


class Refused(Exception):
    """The launcher does not take the settings."""


@dataclass
class Result:
    """What is known of a method."""

    trials: dict[int, Trial] = field(default_factory=dict)
    """Its runs, by their rate's place: 0 is the recommended one, 1 `factor` times that."""
    waiting: list[int] = field(default_factory=list)
    """Places of the rates to run next."""
    refused: str = ""
    """Why there are no runs."""

    def best(self) -> int | None:
        """Return the place of the rate with the lowest held-out loss."""
        best = min(self.trials, key=lambda place: self.trials[place].loss, default=None)
        return None if best is None or math.isinf(self.trials[best].loss) else best

    def further(self, most: int) -> list[int]:
        """Return the place of one more rate, next to the best where that is the first or the last, unless there are enough."""
        best = self.best()
        if best is None or len(self.trials) >= most:
            return []
        return [best - 1] if best == min(self.trials) else [best + 1] if best == max(self.trials) else []

    def is_at_edge(self) -> bool:
        """Tell whether the best rate is the first or the last of several."""
        return len(self.trials) > 1 and self.best() in (min(self.trials), max(self.trials))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench methods`."""
    parser.add_argument("overrides", nargs="*", help="settings of every run as for `python -m launcher`, such as data.template=chatml")
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--data", required=True, help="rows, 1 in 20 held out; those over --seq-len are left out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="presets of conf/peft (default all of these)")
    parser.add_argument("--engine", choices=PRESETS, default="fsdp", help="preset of conf/engine (default fsdp)")
    parser.add_argument("--processes", type=at_least(1), default=2, help="ranks (default 2)")
    parser.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    parser.add_argument("--steps", type=at_least(2), default=200, help="optimizer steps a run (default 200)")
    parser.add_argument("--rows", type=at_least(1), default=8, help="rows a step over all ranks (default 8)")
    parser.add_argument("--seq-len", type=at_least(16), default=256, help="longest row in tokens (default 256)")
    parser.add_argument("--rank", type=at_least(1), default=8, help="rank of the low-rank methods (default 8)")
    parser.add_argument("--rates", type=at_least(1), default=3, help="learning rates around each preset's (default 3)")
    parser.add_argument("--factor", type=float, default=10.0, help="a rate over the next lower one (default 10)")
    parser.add_argument("--most", type=at_least(1), default=5, help="rates at most: further ones while the last is best (default 5)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a run may take (default 900)")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the runs are kept (default runs/methods)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, what each method makes of the same rows; 1 if a run failed or none ended, 130 on Ctrl-C."""
    if options.rows % options.processes:
        options.error(f"--rows {options.rows}: is not divisible by {options.processes} processes")
    if options.factor <= 1:
        options.error(f"--factor {options.factor:g}: must be more than 1")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        options.error(f"--out {options.out}: there is no such directory")
    first = -(options.rates // 2)
    places = list(range(first, first + options.rates))[: options.most]
    results = {method: Result(waiting=places) for method in dict.fromkeys(options.methods)}
    try:
        with Bar(len(results) * len(places), options.steps) as bar:
            while waiting := [(method, result) for method, result in results.items() if result.waiting]:
                for method, result in waiting:  # in turn: a machine that slows down does so for all
                    _go_on(options, method, result, bar)
    except KeyboardInterrupt:
        print(_section(options, results), end="")
        print(f"stopped: what is finished stays in {options.runs}, and the same command continues from there", file=sys.stderr)
        return Exit.interrupted
    text, trials = _section(options, results), _trials(results)
    print(text, end="")
    if options.out is not None and any(trial.figures for _, trial in trials):
        put_section(options.out, text)
    return Exit.failed if not trials or any(trial.reason for _, trial in trials) else 0


def _trials(results: dict[str, Result]) -> list[tuple[str, Trial]]:
    return [(method, trial) for method, result in results.items() for trial in result.trials.values()]


class Bar:
    """Progress in steps of all runs that are known of; a line a run, too."""

    def __init__(self, runs: int, steps: int) -> None:
        """Count the runs that each method begins with."""
        console = Console(stderr=True)
        words = (TextColumn("{task.description}"), BarColumn(), TextColumn("step"), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*words, console=console, disable=not console.is_terminal)
        self.steps, self.done, self.runs = steps, 0, runs
        self.task = self.progress.add_task("", total=self.runs * self.steps)
        self.signals: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):  # one that raised by itself could lose a run that is just being started
            signal.signal(number, lambda number, _frame: self.signals.append(number))

    def __enter__(self) -> Bar:
        """Begin to show it."""
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it as it is."""
        self.progress.stop()

    def show(self, what: str, step: int) -> None:
        """Say what runs, and how far it is; raises KeyboardInterrupt where a signal has come."""
        if self.signals:
            raise KeyboardInterrupt
        self.progress.update(self.task, description=what, completed=self.done * self.steps + step, total=self.runs * self.steps)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, highlight=False, soft_wrap=True)


def _go_on(options: argparse.Namespace, method: str, result: Result, bar: Bar) -> None:
    """Run a method at its next rate; after the last one at a further one, while that is the best."""
    place = result.waiting[0]
    lr = float(f"{recommended_lr(method) * options.factor**place:.3g}")
    what = f"{METHODS[method]}, optim.lr={lr:g}"
    try:
        trial = result.trials[place] = _try(options, method, lr, partial(bar.show, what))
    except Refused as error:
        result.refused = f"refused: {error}"
        bar.say(f"{METHODS[method]}: {result.refused}")
        bar.runs -= len(result.waiting)
        result.waiting = []
        return
    bar.say(f"{what}: {trial.reason or _change(trial)}")
    rest = result.waiting[1:]
    result.waiting = rest or result.further(options.most)
    bar.done, bar.runs = bar.done + 1, bar.runs + len(result.waiting) - len(rest)


def preset(method: str) -> str:
    """Return the text of conf/peft/METHOD.yaml, empty where there is none."""
    file = CONF / "peft" / f"{method}.yaml"
    return file.read_text("utf-8") if file.exists() else ""


def recommended_lr(method: str) -> float:
    """Return the learning rate of a method's preset, else that of full fine-tuning."""
    own = (yaml.safe_load(preset(method)) or {}).get("lr")
    return float(own or yaml.safe_load((CONF / "optim" / "adamw.yaml").read_text("utf-8"))["full_lr"])


def settings(method: str, rank: int, steps: int) -> list[str]:
    """Return a method's overrides: its preset, at a rank of ours and its own alpha / rank, a schedule at its share of the steps."""
    fields = yaml.safe_load(preset(method)) or {}
    given = [f"peft={method}"]
    if {"rank", "alpha"} <= fields.keys():
        first = rank * fields["rank"] // fields.get("target_rank", fields["rank"])
        given += [f"peft.rank={first}", f"peft.alpha={fields['alpha'] * first / fields['rank']:g}"]
    given += [f"peft.target_rank={rank}"] if "target_rank" in fields else []
    return given + [f"peft.{name}={round(fields[name] * steps / ADALORA_STEPS)}" for name in ("tinit", "tfinal") if name in fields]


def _overrides(options: argparse.Namespace) -> list[str]:
    """Return what every run has."""
    return [
        *("model=hf", f"model.id={_quoted(options.model)}", "data=files", f"data.path={_quoted(options.data)}"),
        *(f"data.seq_len={options.seq_len}", "data.too_long=drop", "data.max_lost_fraction=1", "data.packing=false"),
        *("data.eval_fraction=0.05", f"engine={options.engine}", f"launch.processes={options.processes}"),
        *(f"train.steps={options.steps}", f"train.global_batch={options.rows}", f"train.microbatch={options.rows // options.processes}"),
        *(f"train.precision={options.precision}", "train.sample_tokens=0", "log.wandb=disabled", *options.overrides),
    ]


def _quoted(value: str) -> str:
    """Return a value as Hydra reads it."""
    if re.fullmatch(r"[\w./~@:-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _try(options: argparse.Namespace, method: str, lr: float, show: Callable[[int], None]) -> Trial:
    """Start a run, or continue it, and return what it leaves; raises Refused."""
    given = [*_overrides(options), *settings(method, options.rank, options.steps), f"optim.lr={lr:g}"]
    key = hashlib.sha256("\n".join([*given, preset(method)]).encode()).hexdigest()[:8]
    run_dir = options.runs / f"{method}-{lr:g}-{key}"
    is_old = (run_dir / paths.SUMMARY).exists()
    options.runs.mkdir(parents=True, exist_ok=True)
    log = options.runs / f"{run_dir.name}.log"
    with log.open("wb") as file:
        line = [sys.executable, "-m", "launcher", *given, f"run_dir={_quoted(str(run_dir))}"]
        child = subprocess.Popen(line, stdout=file, stderr=file, preexec_fn=prepare_child())
    try:
        until = time.monotonic() + options.timeout
        while child.poll() is None and time.monotonic() < until:
            show(last_step(steps(read_rows(run_dir))))
            time.sleep(LOOK_S)
        if child.poll() is None:
            return Trial(lr=lr, reason=f"took longer than {options.timeout:g} s")
    finally:
        _stop(child)
    if child.returncode == BAD_INPUT:
        raise Refused(_why(run_dir, log))
    if child.returncode:
        return Trial(lr=lr, reason=f"exit code {child.returncode}: {_why(run_dir, log)}")
    return _read(run_dir, lr, is_old)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Let a run that continues save and stop."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _why(run_dir: Path, log: Path) -> str:
    """Return why a run did not end, in one line without folders of this machine: what the launcher refused, or the ranks' error."""
    refused = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("error: ")]
    status = run_dir / paths.STATUS
    error = json.loads(status.read_text("utf-8")).get("error", {}) if status.exists() else {}
    said = refused[-1].removeprefix("error: ") if refused else error.get("message", "it left no reason").splitlines()[0]
    return re.sub(r"(?<![\w.])~?/(?:[^\s/'\"`]+/)+", "", said)


def _read(run_dir: Path, lr: float, is_old: bool) -> Trial:
    """Return what a finished run leaves."""
    figures = json.loads((run_dir / paths.SUMMARY).read_text("utf-8"))
    rows = read_rows(run_dir)
    figures["eval_tokens"] = evaluations(rows)[0]["eval_tokens"]
    figures["prepared"] = json.loads((run_dir / paths.MANIFEST).read_text("utf-8"))["prepared"]
    figures["export_bytes"] = sum(file.stat().st_size for file in (run_dir / paths.EXPORT).glob("*.safetensors"))
    return Trial(lr=lr, figures=figures, step_seconds=[row["step_seconds"] for row in steps(rows)], is_old=is_old)


def require_same(trials: list[tuple[str, Trial]]) -> dict[str, Any]:
    """Return what all finished runs have in common; raises RuntimeError where they have not seen the same tokens."""
    done = [(f"{method} at {trial.lr:g}", {key: trial.figures[key] for key in SAME}) for method, trial in trials if trial.figures]
    for name, same in done:
        if differs := [f"{key} {same[key]} and {done[0][1][key]}" for key in SAME if same[key] != done[0][1][key]]:
            raise RuntimeError(f"{name} and {done[0][0]} are not the same training: {', '.join(differs)}")
    return done[0][1] if done else {}


def _change(trial: Trial) -> str:
    before, after = (trial.figures[f"eval_loss_{when}"] for when in ("before", "after"))
    return " -> ".join("not finite" if loss is None else f"{loss:.4f}" for loss in (before, after))


def _section(options: argparse.Namespace, results: dict[str, Result]) -> str:
    """Return the Markdown of a comparison: command, machine, versions, table, rates, and what is not to be read from it."""
    same = require_same(_trials(results))
    command = " ".join(re.sub(r"(^|=)[~/][^=]*/", r"\1", word) for word in options.line.split())
    best = {method: result.trials[place] for method, result in results.items() if (place := result.best()) is not None}
    if not best:
        return "\n\n".join([f"## `{command}`", *_grid(results)]) + "\n"
    figures = next(iter(best.values())).figures
    parts = [_about(options, same, figures), *_table(results, best), *_grid(results), *_legend(options, results, figures)]
    return "\n\n".join([f"## `{command}`", *parts]) + "\n"


def _about(options: argparse.Namespace, same: dict[str, Any], figures: dict[str, Any]) -> str:
    """Say what was run, on what."""
    machine = f"{host.cores()} cores, {in_bytes(host.memory_limit().bytes)} of memory, no GPU"
    if figures["gpu_hours"] is not None:
        import torch

        machine = f"{options.processes} of {gpu_words(torch.cuda.get_device_name())}"
    return (
        f"{time.strftime('%Y-%m-%d')}, {machine}; {versions('torch', 'transformers', 'peft')}. {Path(options.model).name}, "
        f"{_base_parameters(figures):,} parameters, {options.precision}, {options.engine}, {plural(options.processes, 'rank')}. Each run: "
        f"{same['steps']} steps of {options.rows} rows of {Path(options.data).name}, {same['input_tokens']:,} tokens of which "
        f"{same['tokens']:,} are supervised, the same in the same order; {same['eval_tokens']:,} supervised tokens are held out."
    )


def _base_parameters(figures: dict[str, Any]) -> int:
    """Return the model's parameters without an adapter's."""
    total, trained = figures["parameters"], figures["trainable_parameters"]
    return int(total if total == trained else total - trained)


def _table(results: dict[str, Result], best: dict[str, Trial]) -> list[str]:
    """Return the table: each method at its best rate."""
    sizes = {method: _sizes(trial.figures) for method, trial in best.items()}
    unit, divisor = ("KiB", 1 << 10) if max(map(max, sizes.values())) < SMALL else ("MiB", 1 << 20)
    seconds = {method: statistics.median(_step_seconds(results[method])) for method in best}
    heads = ["method", "`optim.lr`", "held-out loss before", "after", "trained parameters"]
    lines = [[*heads, *(f"{name}, {unit} a rank" for name in CLASSES), f"export, {unit}", "time a step : full"]]
    lines.append(["---"] * len(lines[0]))
    for method, result in results.items():
        if method not in best:
            why = result.refused or ("no run ended" if result.trials else "not run")
            lines.append([METHODS[method], cell_of(why), *[""] * (len(lines[0]) - 2)])
            continue
        figures = best[method].figures
        losses = (f"{figures[f'eval_loss_{when}']:.4f}" for when in ("before", "after"))
        bytes_ = (f"{size / divisor:,.1f}" for size in sizes[method])
        ratio = f"{seconds[method] / seconds['none']:.2f}" if "none" in seconds and not _old(results) else "-"
        rate = f"{best[method].lr:g}" + (" †" if result.is_at_edge() else "")
        lines.append([METHODS[method], rate, *losses, f"{figures['trainable_parameters']:,}", *bytes_, ratio])
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _sizes(figures: dict[str, Any]) -> list[float]:
    """Return the bytes a rank of each class, and those of the export."""
    return [*(figures["state_bytes"][name] / figures["world_size"] for name in CLASSES), figures["export_bytes"]]


def _old(results: dict[str, Result]) -> int:
    """Return how many runs an earlier start finished, when the machine may have had other work: their times compare with no others."""
    return sum(trial.is_old for _, trial in _trials(results))


def _step_seconds(result: Result) -> list[float]:
    """Return the seconds of a method's steps at all rates, without each run's first."""
    return [seconds for trial in result.trials.values() for seconds in trial.step_seconds[1:]]


def _grid(results: dict[str, Result]) -> list[str]:
    """Return the table of all rates."""
    lines = ["| method | its preset's rate | held-out loss after, at each rate |", "|---|---|---|"]
    for method, result in results.items():
        cells = [cell_of(result.refused)] if result.refused else []
        for place, trial in sorted(result.trials.items()):
            words = trial.reason or ("not finite" if math.isinf(trial.loss) else f"{trial.loss:.4f}")
            cells.append(f"**{trial.lr:g}: {words}**" if place == result.best() else cell_of(f"{trial.lr:g}: {words}"))
        lines.append(f"| {METHODS[method]} | {recommended_lr(method):g} | {', '.join(cells)} |")
    return ["\n".join(lines)]


def _legend(options: argparse.Namespace, results: dict[str, Result], figures: dict[str, Any]) -> list[str]:
    """Return what the words of the tables mean, and what nobody may conclude."""
    trials, factor = _trials(results), f"{options.factor:g}"
    old = _old(results)
    earlier = f" No times here: an earlier start of this command had finished {old} of the {len(trials)} runs." if old else ""
    edge = " †: the end of its grid; a better rate may lie beyond." if any(result.is_at_edge() for result in results.values()) else ""
    speed = (
        "- **Speed.** Times are of a CPU, where a small model waits for Python, and ranks wait for each other. On a GPU they differ.\n"
        if figures["gpu_hours"] is None
        else ""
    )
    return [
        f"- **Rates.** The preset's rate (for full fine-tuning that of conf/optim/adamw.yaml), {factor} times less and more. Further "
        f"rates are tried while the last one is the best, at most {options.most}. Each method is shown at its best by held-out loss."
        f"{edge}\n"
        f"- **Settings.** Low-rank methods have rank {options.rank} and their preset's alpha / rank. AdaLoRA has that rank as its mean, "
        "and its schedule at the same share of the steps. The rest is as in the presets.\n"
        "- **Tokens.** Equal tokens are checked in each run's summary.json.\n"
        "- **Bytes.** `state_bytes` of summary.json: parts of live tensors, without activations and temporary gathered tensors. "
        "Gradients are measured before a step. Export is the size of its safetensors files.\n"
        "- **Time.** The median of a method's steps at all rates, divided by that of full fine-tuning. The runs of all methods take "
        f"turns. Evaluation, start and export are not included.{earlier}",
        "What this does not show:",
        f"- **Which method is best.** One model of {_base_parameters(figures):,} parameters, one file, one seed, {options.steps} steps, "
        f"and rates a factor of {factor} apart, picked on the rows that are reported. Small differences mean nothing. The methods' papers "
        "use models of billions of parameters.\n"
        "- **Rates for other models.** Small models need far larger rates. The presets' rates are for billions of parameters.\n"
        f"{speed}"
        "- **What memory a method saves.** Frozen or 4-bit weights count for more in a larger model. Activations can outweigh all of "
        "this and are not counted.",
    ]
