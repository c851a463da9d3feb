"""Runs as they lie in their directories, and what keeps some of them from being compared. No torch: fifty load in seconds."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.evaluate import record
from tools.evaluate.intervals import Estimate
from tools.evaluate.record import FOLDER, Evaluation, Judged
from trainers.config.choices import ObjectiveName, PeftMethod
from trainers.config.derived import SAMPLED, SCORED, loss_words, peak_lr
from trainers.config.errors import ConfigError
from trainers.config.schema import OptimConfig, PeftConfig, RunConfig, plain
from trainers.data.report import is_leaky, leaked_words
from trainers.rundir import paths
from trainers.rundir.attempt import read_status
from trainers.rundir.files import try_json
from trainers.rundir.rows import Kind, Row, kind_of, read_rows

RATE = ("optim.lr", "optim.full_lr", "optim.adamw_factor", "optim.lr_factor", "peft.lr")
METHOD = ("peft.", "objective.", *RATE)
"""Settings that are what is compared; objectives learn from the same rows, or their data are flagged."""
BEGUN = ("peft.adapter",)
"""Of those, what a run began with in addition to its base: what that had seen, it has seen too."""
FREE = (
    *("name", "run_dir", "log.", "limits.", "evaluation.", "checkpoint.", "data."),
    *("train.eval_every", "train.eval_microbatch", "train.sample_tokens", "train.step_timeout_s", "train.max_skipped", "train.profile"),
)
"""Settings that change no metric of the comparison, or whose content is compared instead of their name."""
COST = ("engine.", "train.microbatch", "train.activations", "train.logits_chunk", "train.deterministic", "model.attention")
"""Settings that change what a run costs, and not what it learns."""
RECIPE = ("optim.",)
"""Settings that a method may need to be its best; said, and compared all the same."""
POINTS = 400
"""Steps of a curve that are read at most."""
WORDS = {
    "template_hash": "chat template",
    "tokenizer_hash": "tokenizer",
    "prepared": "data",
    "base_revision": "revision of the base",
    "base_weights": "base: its weights",
    "steps": "number of steps",
    "tokens": "number of trained tokens",
    "input_tokens": "number of tokens read",
    "first_rows": "order of rows: those of the first step",
    "last_rows": "order of rows: those of the last step",
    "eval_tokens": "number of held-out tokens",
    "held_out_set": "set of rows it is evaluated on",
    "general_set": "general text it is evaluated on",
    "answered": "evaluation of answers",
    "dtype": "type it is evaluated in",
}
"""What must agree, in addition to settings."""
FOLLOWS = {
    "prepared": {"tokens", "input_tokens", "first_rows", "last_rows", "eval_tokens", "held_out_set"},
    "steps": {"tokens", "input_tokens", "last_rows"},
}
"""What differs because something else does, and is not said again."""
OF_ROWS = ("tokens", "input_tokens", "eval_tokens")
"""What runs that write their own answers need not share."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The objective's loss over a run: what had been trained on by then, what it had cost, and the loss."""

    tokens: list[float] = field(default_factory=list)
    hours: list[float] = field(default_factory=list)
    """Time of all ranks together, of steps alone."""
    loss: list[float] = field(default_factory=list)


@dataclass(kw_only=True)
class Run:
    """What a run directory says of a run."""

    run_dir: Path
    name: str
    """Its directory, from where all of them are."""
    state: str
    config: dict[str, Any]
    """Settings by their dotted path."""
    summary: dict[str, Any]
    manifest: dict[str, Any]
    plan: dict[str, Any]
    trained: Curve
    evaluated: Curve
    marks: dict[str, Any]
    """What must agree with the others', by a key of WORDS."""
    ours: Evaluation | None
    base: Evaluation | None
    export_bytes: int
    rewarded: dict[str, Estimate] = field(default_factory=dict)
    """`reward` and each `pass@k` of held-out prompts at the step that is exported, where the run learns from its own answers."""
    judged: Judged | None = None
    """A judge's scores; None where another judge, or of other rows, has scored most runs."""
    has_same_costs: bool = True
    """Its set-up is that of the others, so that times and memory compare."""
    faults: list[str] = field(default_factory=list)
    """Why it is not comparable."""
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """The objective's held-out loss of the step that is exported, by which rates are chosen; None where there is none."""
        value = self.summary.get("eval_loss_after")
        return None if value is None else float(value)

    @property
    def loss_words(self) -> str:
        """What that loss is: `loss` in nats a token, `smoothed loss`, or that of the objective by its name."""
        return loss_words(ObjectiveName(self.config["objective.name"]), self.config.get("objective.label_smoothing") or 0.0)

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        given = {name: self.config[f"optim.{name}"] for name in ("lr", "full_lr", "lr_factor")}
        given["adamw_factor"] = self.config.get("optim.adamw_factor", 1.0)  # older runs have none
        method = PeftMethod(self.config["peft.method"])
        return peak_lr(OptimConfig(**given), PeftConfig(method=method, lr=self.config["peft.lr"])).value

    @property
    def hours(self) -> float:
        """Hours of all ranks together: GPU-hours, where they are GPUs."""
        if (hours := self.summary.get("gpu_hours")) is not None:
            return float(hours)
        return float(self.summary.get("train_seconds") or 0.0) * int(self.summary.get("world_size") or 1) / 3600

    @property
    def is_on_gpu(self) -> bool:
        """Tell whether its hours are GPU-hours."""
        return self.summary.get("gpu_hours") is not None

    @property
    def is_full(self) -> bool:
        """Tell full fine-tuning."""
        return bool(self.config["peft.method"] == "none")


def load(run_dir: Path, name: str) -> Run:
    """Read a run directory, as far as it can be read; raises ConfigError where its config.yaml cannot."""
    status = read_status(run_dir)
    summary, manifest = try_json(run_dir / paths.SUMMARY), try_json(run_dir / paths.MANIFEST)
    ours, base = (record.load(run_dir / FOLDER, subject) for subject in ("run", "base"))
    judged = None if ours is None or base is None else record.load_judged(run_dir / FOLDER, ours, base)
    config = _settings(run_dir / paths.CONFIG)
    is_sampled = config["objective.name"] in SAMPLED
    trained, evaluated, marks = _curves(run_dir, int(summary.get("world_size") or 1), is_sampled)
    marks |= _marks(summary, manifest, ours, base, judged)
    run = Run(
        run_dir=run_dir,
        name=name,
        state=str(status.get("state", "unknown")),
        config=config,
        summary=summary,
        manifest=manifest,
        plan=try_json(run_dir / paths.PLAN),
        trained=trained,
        evaluated=evaluated,
        marks={key: mark for key, mark in marks.items() if not is_sampled or key not in OF_ROWS},
        rewarded=_rewarded(run_dir, summary.get("export_step")) if is_sampled else {},
        ours=ours,
        base=base,
        export_bytes=sum(file.stat().st_size for file in (run_dir / paths.EXPORT).glob("*.safetensors")),
        judged=judged,
    )
    run.faults += _own_faults(run, status)
    run.notes += _own_notes(run)
    return run


def _marks(
    summary: dict[str, Any], manifest: dict[str, Any], ours: Evaluation | None, base: Evaluation | None, judged: Judged | None
) -> dict[str, Any]:
    """Return what must agree between runs, by a key of WORDS; what is not known is None, or not there."""
    data = manifest.get("data", {})
    marks = {"prepared": manifest.get("prepared"), "base_revision": manifest.get("base_revision")}
    marks |= {key: data.get(key) for key in ("template_hash", "tokenizer_hash")}
    marks |= {key: summary.get(key) for key in ("steps", "tokens", "input_tokens")}
    if ours is not None:
        sets = ours.about.get("sets", {})
        measured = next((sets[part] for part in ("held_out", "classes", "pairs") if part in sets), None)
        marks |= {"held_out_set": measured, "general_set": sets.get("general"), "dtype": ours.about.get("dtype")}
        marks |= {"answered": _answered(ours)}
    marks |= {} if base is None else {"base_weights": base.about.get("weights")}
    return marks | ({} if judged is None else {"judge": f"{judged.about['model']}, {judged.about['scored']} answers"})


def _answered(evaluation: Evaluation) -> str:
    """Say which answers were asked for and how they are measured."""
    settings = evaluation.about.get("settings", {})
    asked = {key: settings.get(key) for key in ("metrics", "extract", "max_new_tokens")}
    return f"{len(evaluation.answers)} rows, {json.dumps(asked, sort_keys=True)}" if evaluation.answers else "none"


def _settings(file: Path) -> dict[str, Any]:
    """Return config.yaml flat, fields that are newer than the file at their defaults."""
    try:
        found: dict[str, Any] = yaml.load(file.read_text("utf-8"), yaml.CSafeLoader)
        return _defaults() | dict(_flat(dict(found), ""))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ConfigError("RUN_DIR", str(file), f"cannot be read: {str(error).splitlines()[0]}", "leave that run out") from error


@functools.cache
def _defaults() -> dict[str, Any]:
    return dict(_flat(plain(RunConfig()), ""))


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value); a list is one value."""
    if isinstance(node, dict) and (node or not prefix):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif node != {}:
        yield prefix, node


def _rewarded(run_dir: Path, step: int | None) -> dict[str, Estimate]:
    """Return the mean reward and pass@k that were measured after a step, these with their intervals."""
    row = next((row for row in read_rows(run_dir) if kind_of(row) == Kind.evaluation and row["step"] == step), {})
    found = {}
    names = [key.removeprefix("eval_") for key in row if key.startswith("eval_pass@") and not key.endswith(("_low", "_high"))]
    for name in ("reward", *names):
        if (value := row.get(f"eval_{name}")) is not None:
            found[name] = Estimate(value=value, low=row.get(f"eval_{name}_low"), high=row.get(f"eval_{name}_high"), count=0)
    return found


def _curves(run_dir: Path, ranks: int, is_sampled: bool) -> tuple[Curve, Curve, dict[str, Any]]:
    """Return the training and held-out curves of metrics.jsonl, about POINTS steps of them, and what of it must agree.

    Of answers that the model gives itself both are of the negative reward.
    """
    hours = 0.0
    trained: list[tuple[Row, float]] = []
    held_out: list[tuple[Row, float]] = []
    for row in read_rows(run_dir):
        if kind_of(row) == Kind.step:
            hours += row.get("step_seconds", 0.0) * ranks / 3600
            trained.append((row, hours))
        elif kind_of(row) == Kind.evaluation:
            held_out.append((row, hours))
    marks: dict[str, Any] = {"first_rows": trained[0][0].get("rows_hash"), "last_rows": trained[-1][0].get("rows_hash")} if trained else {}
    if held_out:
        marks["eval_tokens"] = held_out[0][0].get("eval_tokens")
    every = max(1, len(trained) // POINTS)
    few = [*trained[:-1:every], *trained[-1:]]
    return _curve(few, "reward", -1.0) if is_sampled else _curve(few, "loss"), _curve(held_out, "eval_loss"), marks


def _curve(rows: list[tuple[Row, float]], key: str, sign: float = 1.0) -> Curve:
    finite = [(row["tokens"], hour, sign * row[key]) for row, hour in rows if row.get(key) is not None and "tokens" in row]
    return Curve(tokens=[point[0] for point in finite], hours=[point[1] for point in finite], loss=[point[2] for point in finite])


def _own_faults(run: Run, status: dict[str, Any]) -> list[str]:
    """Return what is wrong with a run by itself."""
    if run.state != "done":
        reason = str(status.get("error", {}).get("message", "")).partition("\n")[0]
        return [f"is {run.state} at step {status.get('step', 0)}, not done" + (f": {reason}" if run.state == "failed" and reason else "")]
    if not run.summary:
        return ["has no summary.json that can be read"]
    faults = ["its training loss is not a finite number"] if run.summary.get("train_loss") is None else []
    has_rows = run.marks.get("eval_tokens") is not None
    return faults + (["its held-out loss is not a finite number"] if has_rows and run.loss is None else [])


def _own_notes(run: Run) -> list[str]:
    """Return what is to be known of a run in addition to its metrics."""
    notes = [f"{run.summary['skipped_steps']} steps updated nothing"] if run.summary.get("skipped_steps") else []
    leaked = run.manifest.get("data", {}).get("leakage")
    notes += [] if not leaked or not is_leaky(leaked) else [f"its held-out loss says too little: {leaked_words(leaked)}"]
    exported, steps = run.summary.get("export_step"), run.summary.get("steps")
    if exported not in (None, steps):
        notes.append(f"exports step {exported} of {steps}, of the lowest held-out loss")
    if run.state == "done" and run.ours is None:
        notes.append(f"is not evaluated: python -m tools.evaluate {run.run_dir}")
    elif run.ours is not None and run.base is None and run.config["objective.name"] not in SCORED:
        notes.append("its base is not evaluated: nothing can be said of forgetting")
    elif run.ours is not None and run.base is not None:
        notes += [] if run.judged is None else [record.judged_words(run.judged.about)]
        if run.base.about.get("sets") != run.ours.about.get("sets") or run.base.about.get("dtype") != run.ours.about.get("dtype"):
            notes.append(f"its base is evaluated on other rows or in another type: python -m tools.evaluate {run.run_dir}")
    return notes


def flag(runs: list[Run]) -> None:
    """Add to each run what it does not share with most of the others: faults and notes, by name, with both values."""
    ended = [run for run in runs if not run.faults]
    explained: dict[str, set[str]] = {run.name: set() for run in ended}
    for key, words in WORDS.items():
        known = [run for run in ended if run.marks.get(key) is not None and key not in explained[run.name]]
        for run, common in _strays(known, _mark_of(key)):
            why = _data_settings(run, ended) if key == "prepared" else ""
            run.faults.append(f"another {words}: {_short(run.marks[key])}, the others' {_short(common)}{why}")
            explained[run.name] |= FOLLOWS.get(key, set())
    for run, common in _strays([run for run in ended if run.judged is not None], _mark_of("judge")):
        run.notes.append(f"another judge, or other answers: {run.marks['judge']}, the others' {common}: its scores are not shown")
        run.judged = None
    free = (*FREE, "model.id") if all(run.marks.get("base_weights") for run in ended) else FREE
    for path in sorted({path for run in ended for path in run.config}):
        if (is_among(path, METHOD) and not is_among(path, BEGUN)) or is_among(path, free):
            continue
        for run, common in _strays(ended, _setting_of(path)):
            words = f"{path} = {_short(run.config.get(path))}, the others' {_short(common)}"
            words += "; runs of one seed compare with each other: name those alone" if path == "seed" else ""
            if is_among(path, COST):
                _set_apart(run, words)
            else:
                (run.notes if is_among(path, RECIPE) else run.faults).append(words)
    for run, common in _strays(ended, lambda run: run.summary.get("world_size")):
        _set_apart(run, f"{run.summary.get('world_size')} ranks, the others' {common}")


def _set_apart(run: Run, words: str) -> None:
    run.has_same_costs = False
    run.notes.append(f"{words}: another set-up, whose costs compare with no others")


def _mark_of(key: str) -> Callable[[Run], Any]:
    return lambda run: run.marks[key]


def _setting_of(path: str) -> Callable[[Run], Any]:
    return lambda run: run.config.get(path)


def _data_settings(run: Run, runs: list[Run]) -> str:
    """Say which settings of its data a run does not share."""
    names = sorted(name for name in run.config if name.startswith("data."))
    found = [(path, common) for path in names for stray, common in _strays(runs, _setting_of(path)) if stray is run]
    return "".join(f"; {path} = {_short(run.config.get(path))}, the others' {_short(common)}" for path, common in found)


def is_among(path: str, names: tuple[str, ...]) -> bool:
    """Tell whether a setting is one of these, or in one of these groups, which end in a dot."""
    return any(path.startswith(name) if name.endswith(".") else path == name for name in names)


def _strays(runs: list[Run], value: Callable[[Run], Any]) -> list[tuple[Run, Any]]:
    """Return the runs whose value is not the commonest, the first of those that are as common, with that."""
    values = [json.dumps(value(run), sort_keys=True, default=str) for run in runs]
    if len(set(values)) < 2:
        return []
    counts = Counter(values)
    common = max(dict.fromkeys(values), key=lambda text: counts[text])
    return [(run, json.loads(common)) for run, text in zip(runs, values, strict=True) if text != common]


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
