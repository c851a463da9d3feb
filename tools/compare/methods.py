"""Runs by method, each at its best rate, with what may be said of them: the numbers of every table, page and plot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.compare.gather import FREE, RATE, Run, flag, is_among, load
from tools.evaluate.intervals import Estimate, level_of_all, verdict
from tools.evaluate.pairs import BUCKETS
from tools.evaluate.record import Evaluation, accuracy_apart, loss_apart, rightness_apart, score_apart, task_metric
from tools.runs import runs_below
from trainers.config.errors import ConfigError, plural

NAMES = {
    "none": "full fine-tuning",
    "freeze": "part of the model",
    "lora": "LoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "ptuning": "P-tuning",
    "adalora": "AdaLoRA",
}


@dataclass(kw_only=True)
class Figures:
    """What is known of a method: its best run's metrics, and how they differ from the base's and from full fine-tuning's.

    A metric's interval is of 95 %; those of differences are wider, so that all methods' together hold with 95 % (Bonferroni).
    """

    held_out: Estimate | None = None
    """Loss in nats a token; without an interval where it is training's own value."""
    own_loss: Estimate | None = None
    """Training's own held-out loss, where that is not one in nats a token; without an interval."""
    held_out_to_full: Estimate | None = None
    score: Estimate | None = None
    score_to_base: Estimate | None = None
    score_to_full: Estimate | None = None
    forgetting: Estimate | None = None
    """Loss on general text less that of the base, in nats a token."""
    forgetting_to_full: Estimate | None = None
    accuracy: Estimate | None = None
    """Share of pairs whose preferred answer has the higher score."""
    longer: Estimate | None = None
    """That of pairs whose preferred answer is the longer one."""
    shorter: Estimate | None = None
    accuracy_to_full: Estimate | None = None
    told: Estimate | None = None
    """Share of documents whose class is found, or of answers that are told as wanted or not."""
    told_to_full: Estimate | None = None
    macro_f1: Estimate | None = None
    calibration_error: Estimate | None = None
    reward: Estimate | None = None
    """Mean reward of answers to held-out prompts, of runs that learn from their own answers."""
    passed: Estimate | None = None
    """Share of such answers that are right."""
    wins: Estimate | None = None
    """Share of answers that a judge prefers to the base's, ties as half."""
    judged: Estimate | None = None
    """A judge's mean score of the answers, from 1 to 5."""
    judged_to_base: Estimate | None = None

    def verdict(self, name: str) -> str:
        """Say what a difference allows to: `better`, `worse`, `no difference`, or nothing."""
        return verdict(getattr(self, name), lower_is_better="held_out" in name or "forgetting" in name)


@dataclass(kw_only=True)
class Method:
    """A method, as it does at the best of the rates that were tried."""

    label: str
    best: Run
    tried: list[Run]
    """All of its runs that are comparable, by rising rate."""
    figures: Figures = field(default_factory=Figures)

    @property
    def search_hours(self) -> float:
        """Hours of all ranks that all of its rates took."""
        return sum(run.hours for run in self.tried)

    @property
    def is_at_edge(self) -> bool:
        """Tell whether the best of several rates is the lowest or the highest."""
        return len(self.tried) > 1 and self.best in (self.tried[0], self.tried[-1])


@dataclass(kw_only=True)
class Comparison:
    """Methods side by side, full fine-tuning first, then by how much they train; and the runs that are left out."""

    title: str
    methods: list[Method]
    runs: list[Run]
    metric: str | None
    """The task's score."""
    price: float | None
    """Of an hour of a GPU."""
    base: Evaluation | None

    @property
    def full(self) -> Method | None:
        """Full fine-tuning, which the others are compared with; of several objectives the first."""
        return next((method for method in self.methods if method.best.is_full), None)

    @property
    def flagged(self) -> list[Run]:
        """Return the runs that are not comparable."""
        return [run for run in self.runs if run.faults]

    @property
    def has_pairs(self) -> bool:
        """Tell whether some method was measured on pairs of answers."""
        return any(method.figures.accuracy is not None for method in self.methods)

    @property
    def is_on_gpu(self) -> bool:
        """Tell whether hours are GPU-hours."""
        return any(method.best.is_on_gpu for method in self.methods)

    @property
    def loss_words(self) -> str:
        """What the runs minimise: `loss` in nats a token, the loss of an objective by its name, or `loss of its own` of several ones."""
        found = {method.best.loss_words for method in self.methods}
        return found.pop() if len(found) == 1 else "loss of its own" if found else "loss"

    @property
    def has_one_loss(self) -> bool:
        """Tell whether all runs minimise the same, with the same settings, so that their own losses compare."""
        return len({str(_objective(method.best.config)) for method in self.methods}) < 2

    @property
    def full_words(self) -> str:
        """What others are compared with, in a table's head: `full`, or where several train the whole model the first one's label."""
        full, several = self.full, sum(method.best.is_full for method in self.methods) > 1
        return full.label if full is not None and several else "full"

    @property
    def is_picked(self) -> bool:
        """Tell whether rates were chosen by the loss that is reported."""
        return any(len(method.tried) > 1 for method in self.methods) and not self.has_own_rows

    @property
    def has_own_rows(self) -> bool:
        """Tell whether runs are evaluated on rows that training never looked at, not even to choose a rate."""
        found = [method.best.ours for method in self.methods if method.best.ours is not None]
        return any(evaluation.about.get("settings", {}).get("path") for evaluation in found)


def compare(paths: list[Path], price: float | None) -> Comparison:
    """Read the runs below paths, flag them, and compare those that can be; raises ConfigError where there is none."""
    found = list({run_dir.resolve(): run_dir for path in paths for run_dir in _runs(path)}.values())
    runs = [load(run_dir, name) for run_dir, name in zip(found, _names(found), strict=True)]
    flag(runs)
    metrics = [task_metric(run.ours) for run in runs if run.ours is not None and not run.faults]
    metric = next((metric for metric in metrics if metric is not None), None)
    methods = _methods([run for run in runs if not run.faults])
    base = next((method.best.base for method in methods if method.best.base is not None), None)
    prices = {run.plan["price"] for run in runs if run.plan.get("price")}
    comparison = Comparison(
        title=paths[0].resolve().name if len(paths) == 1 else plural(len(runs), "run"),
        methods=methods,
        runs=runs,
        metric=metric,
        price=prices.pop() if price is None and len(prices) == 1 else price,
        base=base,
    )
    for method in methods:
        method.figures = figures_of(method, comparison)
    return comparison


def _runs(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ConfigError("RUN_DIR", str(path), "no such directory")
    found = list(runs_below(path))
    if not found:
        raise ConfigError("RUN_DIR", str(path), "is neither a run nor a folder of runs")
    return found


def _names(run_dirs: list[Path]) -> list[str]:
    """Return each run's directory without what all have in front."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _methods(runs: list[Run]) -> list[Method]:
    """Return comparable runs by what they differ in besides the rate, the best rate of each by held-out loss at the end of training."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        own = {path: value for path, value in run.config.items() if not is_among(path, (*RATE, *FREE))}
        groups.setdefault(json.dumps(own, sort_keys=True, default=str), []).append(run)
    methods = []
    for tried in groups.values():
        tried.sort(key=lambda run: run.lr)
        if any(run.loss is None for run in tried):  # nothing to choose a rate by: each is shown by itself
            methods += [Method(label=_name(run.config), best=run, tried=[run]) for run in tried]
            continue
        best = min(tried, key=lambda run: run.loss or 0.0)
        methods.append(Method(label=_name(best.config), best=best, tried=tried))
    _tell_apart(methods)
    return sorted(methods, key=lambda method: (not method.best.is_full, -(method.best.summary.get("trainable_parameters") or 0)))


def _objective(config: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in config.items() if path.startswith("objective.")}


def _name(config: dict[str, Any]) -> str:
    """Return a method in words, as its paper calls it."""
    if config["peft.quantise"] == "nf4":
        return "LoftQ" if config["peft.init"] == "loftq" else "QLoRA"
    if config["peft.init"] == "pissa":
        return "PiSSA"
    name = NAMES.get(config["peft.method"], str(config["peft.method"]))
    name = f"rank-stabilised {name}" if config["peft.rank_stabilised"] else name
    return f"{name}+" if config["peft.lr_ratio"] != 1.0 else name


def _tell_apart(methods: list[Method]) -> None:
    """Add to labels that are the same the settings in which these methods differ, the setting of least words first."""
    for label in {method.label for method in methods}:
        same = [method for method in methods if method.label == label]
        if len(same) == 1:
            continue
        paths = [path for path in same[0].best.config if len({str(method.best.config.get(path)) for method in same}) > 1]
        paths = [path for path in paths if not is_among(path, (*RATE, *FREE))]
        for method in same:
            words = [f"{path.rpartition('.')[2]} {method.best.config.get(path)}" for path in paths]
            method.label = ", ".join([label, *(words or [f"lr {method.best.lr:.3g}"])])


def figures_of(method: Method, comparison: Comparison) -> Figures:
    """Return a method's metrics, and what they allow to say of it against the base and full fine-tuning."""
    run, full, metric = method.best, comparison.full, comparison.metric
    of_tokens = run.loss_words == "loss"
    own = None if run.loss is None or run.rewarded else Estimate(value=run.loss, low=None, high=None, count=0)
    rewarded = {"reward": run.rewarded.get("reward"), "passed": run.rewarded.get("pass@1")}
    if run.ours is None:
        if not of_tokens:
            return Figures(own_loss=own, **rewarded)
        return Figures(held_out=None if comparison.has_own_rows else own)  # training's own value is of the rows that it held out
    found = Figures(held_out=run.ours.loss("held_out"), score=run.ours.score(metric) if metric else None, **rewarded)
    found.own_loss = None if of_tokens else own
    found.accuracy, found.longer, found.shorter = (run.ours.accuracy(bucket) for bucket in BUCKETS)
    found.told, classes = run.ours.rightness(), run.ours.classes
    if classes is not None:
        found.macro_f1, found.calibration_error = classes.macro_f1(), classes.calibration_error()
    found.wins = None if run.judged is None else run.judged.win_rate()
    if run.base is not None:
        level = level_of_all(len(comparison.methods))
        found.forgetting = loss_apart(run.ours, run.base, "general", level)
        found.score_to_base = score_apart(run.ours, run.base, metric, level) if metric else None
        found.judged = None if run.judged is None else run.judged.score("overall")
        found.judged_to_base = None if run.judged is None else run.judged.apart("overall", level)
    if full is not None and full.best is not run and full.best.ours is not None:
        theirs, level = full.best.ours, level_of_all(len(comparison.methods) - 1)
        found.held_out_to_full = loss_apart(run.ours, theirs, "held_out", level)
        found.forgetting_to_full = loss_apart(run.ours, theirs, "general", level)
        found.score_to_full = score_apart(run.ours, theirs, metric, level) if metric else None
        found.accuracy_to_full = accuracy_apart(run.ours, theirs, level=level)
        found.told_to_full = rightness_apart(run.ours, theirs, level)
    return found


def cost_of(run: Run, price: float | None, hours: float | None = None) -> float | None:
    """Return the price of a run's GPU-hours; None where it has none."""
    return None if price is None or not run.is_on_gpu else price * (run.hours if hours is None else hours)
