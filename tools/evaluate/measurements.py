"""What a command line asks to measure: runs, their bases or one model, each with its settings; and what is kept of it. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.evaluate import record
from tools.evaluate.intervals import Floats
from tools.evaluate.pairs import rewards_of
from tools.evaluate.record import FOLDER, Evaluation
from tools.runs import is_run, runs_below
from trainers.config.choices import Metric, Quantisation
from trainers.config.derived import SCORED
from trainers.config.errors import ConfigError
from trainers.config.measured import validate_evaluation
from trainers.config.schema import DataConfig, EvaluationConfig, ModelConfig, RunConfig, plain
from trainers.config.seq2seq import has_encoder, require_general_source
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.base import config_of
from trainers.rundir.ending import State

KEPT, KEPT_MISMATCHED = "eval.npy", "eval-mismatched.npy"
"""Of RUN_DIR/reference: what the reference says of the held-out documents, and of their prompts with other answers."""


@dataclass(kw_only=True)
class Measurement:
    """A model to measure: under which name what is measured goes to which folder, and what the workers have said of it."""

    name: str
    """`run`, `base` or `model`."""
    config: RunConfig
    folder: Path | None
    """Directory of its weights; None is the run's base."""
    out: Path
    parts: dict[str, Any] = field(default_factory=dict)
    """Where the workers keep its metrics, once they have said so."""
    weights: str = ""
    """What identifies its weights, an adapter's base included."""
    files: str = ""
    """What identifies its own files."""
    lm_eval: dict[str, Any] | None = None
    """Metrics of standard benchmarks."""

    def as_json(self) -> dict[str, Any]:
        """Return what the workers need."""
        return {"config": plain(self.config), "folder": None if self.folder is None else str(self.folder)}

    def about(self, dtype: str) -> dict[str, Any]:
        """Return what NAME.json says in addition to the metrics."""
        return {
            "name": self.name,
            "model": str(self.folder or self.config.model.id),
            "weights": self.weights,
            "files": self.files,
            "settings": plain(self.config.evaluation),
            "dtype": dtype,
            "sets": {part: found["set"] for part, found in self.parts.items()},
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        } | ({} if self.lm_eval is None else {"lm_eval": self.lm_eval})


def measurements_of(options: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Return the models that paths name, bases first, and why others are left out; raises ConfigError."""
    found, skipped = [], []
    for path in {path.resolve(): path for path in options.paths}.values():
        if not path.is_dir():
            raise ConfigError("RUN_OR_MODEL", str(path), "no such directory")
        if (path / "adapter_config.json").is_file() or ((path / "config.json").is_file() and not is_run(path)):
            found.append(_model(path, options))
        else:
            done, others = _runs(path, options)
            found += done
            skipped += others
    if sum(one.name == "model" for one in found) > 1:
        raise ConfigError("--out", str(options.out or FOLDER), "several models have one place for their results", "one model at a time")
    with_base = [] if options.no_base else [one for one in found if one.config.model.id is not None and not _scores(one.config)]
    return [*(Measurement(name="base", config=one.config, folder=None, out=one.out) for one in with_base), *found], skipped


def _scores(config: RunConfig) -> bool:
    """Tell a run of a reward model, whose base has no head to compare."""
    return config.objective.name in SCORED


def _runs(path: Path, options: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Return the runs at or below a path that are done, and of the others why they are left out."""
    runs = list(runs_below(path))
    if not runs:
        raise ConfigError("RUN_OR_MODEL", str(path), "is neither a run nor a folder of runs nor a model")
    states = {run: read_state(run) for run in runs}
    done = [run for run in runs if states[run] == State.done and (run / paths.EXPORT).is_dir()]
    configs = {run: with_options(config_of(run), options) for run in done}
    found = [Measurement(name="run", config=configs[run], folder=run / paths.EXPORT, out=run / FOLDER) for run in done]
    return found, [f"{run} is {states[run]}, not done" for run in runs if run not in done]


def _model(path: Path, options: argparse.Namespace) -> Measurement:
    """Return a model directory as it is measured: with a run's rows, or those of --path, which leaves the base out."""
    if options.like is not None:
        if not is_run(options.like):
            raise ConfigError("--like", str(options.like), "is not a run directory")
        config = config_of(options.like)
    elif options.path is not None and not (path / "adapter_config.json").is_file():
        config = RunConfig(model=ModelConfig(id=str(path), encoder_decoder=has_encoder(path)), data=DataConfig(path=options.path))
        options.no_base = True
    else:
        raise ConfigError("RUN_OR_MODEL", str(path), "is a model, and nothing says what to measure it on", "--like RUN, or --path FILE")
    return Measurement(name="model", config=with_options(config, options), folder=path, out=options.out or Path(FOLDER))


def with_options(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Return a run's config with the settings that the command line gives; raises ConfigError for what they cannot be."""
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(EvaluationConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in given.get("metrics", []) if name not in list(Metric)]:
        raise ConfigError("--metrics", unknown[0], "there is no such metric", f"of {', '.join(Metric)}")
    if "metrics" in given:
        given["metrics"] = [Metric(name) for name in given["metrics"]]
    for name in ("rows", "max_new_tokens", "general_rows"):
        if name in given and given[name] < (name != "rows"):
            raise ConfigError(f"--{name.replace('_', '-')}", given[name], "must be greater than 0")
    for name in ("path", "general"):
        if name in given and Path(given[name]).exists():
            given[name] = os.path.abspath(given[name])
    for name in ("lm_eval", "judge"):
        if _scores(config) and getattr(options, name):
            reason = f"a model of objective={config.objective.name} gives scores, and no answers"
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), reason, "leave it out")
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **given))
    validate_evaluation(config.evaluation, config.data.mix)
    if config.model.encoder_decoder:
        require_general_source(config)
    return config


def keep(measured: Measurement, dtype: str, base: Evaluation | None = None) -> Evaluation:
    """Score what the workers have measured, write it to the measurement's folder, and return it; `base` is what that is of its base."""
    rows = {part: record.collect(Path(found["folder"]), found["documents"]) for part, found in measured.parts.items()}
    if "answers" in rows:
        rows["answers"] = [record.scored(row, measured.config.evaluation) for row in rows["answers"]]
    if "pairs" in rows:
        rows["pairs"] = with_rewards(rows["pairs"], measured, None if base is None or base.pairs is None else base.pairs.logps, KEPT)
    for part, kept in (("unpaired", KEPT), ("mismatched", KEPT_MISMATCHED)):
        if part in rows:
            rows[part] = with_rewards(rows[part], measured, None if base is None else base.logps.get(part), kept)
    return record.write(measured.out, measured.name, measured.about(dtype), rows)


def with_rewards(rows: list[dict[str, Any]], measured: Measurement, of_base: Floats | None, kept: str) -> list[dict[str, Any]]:
    """Return the rows of answers with `reward`, where the run's objective has one and its reference is known.

    `of_base` are the base's summed log-probabilities of the same answers; `kept` is the run's own file of its reference.
    """
    logps, tokens = (np.array([row.get(name, np.nan) for row in rows], np.float64) for name in ("nats", "tokens"))
    if np.isnan(logps).any():  # a model that gives scores, and no log-probabilities
        return rows
    reference = None if measured.name == "base" else _reference(measured, of_base, len(rows), kept)
    rewards = rewards_of(measured.config.objective, -logps, tokens, reference)
    return rows if rewards is None else [row | {"reward": value} for row, value in zip(rows, rewards.tolist(), strict=True)]


def _reference(measured: Measurement, of_base: Floats | None, count: int, kept: str) -> Floats | None:
    """Return the summed log-probabilities of answers under the model that a run is compared with, (count,).

    They are the base's, or where the reference is another model those that the run has kept of its held-out rows, else unknown.
    """
    config = measured.config
    if config.objective.reference is None and config.peft.adapter is None and config.peft.quantise is Quantisation.none:
        return None if of_base is None else of_base.ravel()
    file = Path(config.run_dir) / paths.REFERENCE / kept
    if config.evaluation.path is not None or not file.is_file():
        return None
    found = np.load(file, allow_pickle=False).astype(np.float64)
    return found if found.size == count else None
