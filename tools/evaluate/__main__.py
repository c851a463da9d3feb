"""Measure runs that are done, and the base that they began with: losses, answers, what was forgotten.

python -m tools.evaluate runs/mine                              a run, on the rows that it held out
python -m tools.evaluate runs/sweeps/compare_quickstart         every run of a sweep that is done
python -m tools.evaluate runs/mine --general stories.txt        forgetting too: the loss on text of the base's own domain
python -m tools.evaluate some/model --like runs/mine --out OUT  any model directory, on a run's rows
python -m tools.evaluate runs/mine --judge http://host:8000/v1 --judge-model NAME

Settings come from the run's own config.yaml (evaluation.*); options here take their place. A loss is a mean over supervised tokens;
answers are the most likely token at every place, the same whatever the batch and the number of processes. Figures and their 95 %
intervals go to RUN/evaluation, with every answer. What is measured already, also of another run's base, is not measured again, and a
stopped command continues where it was. `python -m tools.compare` puts runs side by side.

Exit codes: 0 done, 1 a model could not be measured, or the judge has scored nothing, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from tools.evaluate import judging, record
from tools.evaluate.judge import Judge
from tools.evaluate.record import FOLDER, Evaluation
from tools.evaluate.say import table_of
from tools.evaluate.workers import Subject, run_workers
from tools.runs import is_run, runs_below
from trainers.config.checks import validate_evaluation
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EvaluationConfig, Metric, ModelConfig, RunConfig, read_at
from trainers.rundir.attempt import read_status
from trainers.rundir.ending import Exit

DTYPES = ("float32", "bfloat16", "float64")


def main(arguments: list[str] | None = None) -> int:
    """Measure runs; returns the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        return evaluate(options)
    except KeyboardInterrupt:
        print("stopped: what was measured is kept, and the same command continues from there", file=sys.stderr)
        return Exit.interrupted
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.bad_input


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_MODEL", help="run directories, folders of them, or one model")
    parser.add_argument(
        "--like", type=Path, metavar="RUN", help="for a model directory: the run whose rows and settings it is measured with"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for a model directory: where its results go (default ./evaluation)")
    parser.add_argument("--no-base", action="store_true", help="leave the base out; nothing is then compared with it")
    settings = parser.add_argument_group("settings, in the place of the run's evaluation.*")
    settings.add_argument("--path", metavar="FILE", help="rows to evaluate on (default: those that the run held out)")
    settings.add_argument("--rows", type=int, help="rows that are answered; 0 for losses alone")
    settings.add_argument(
        "--metrics", type=lambda text: text.split(","), metavar="A,B", help=f"of {', '.join(Metric)}; the first is the score"
    )
    settings.add_argument(
        "--extract", metavar="HOW", help="what exact_match compares: auto, hashes, number, whole, or a regular expression"
    )
    settings.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    settings.add_argument("--general", metavar="FILE", help="text of the base's own domain: a file, a run, a hub id, or `sampled`")
    settings.add_argument("--general-rows", type=int, metavar="N", help="rows of it that count")
    machine = parser.add_argument_group("the machine; none of these changes a result, except --dtype")
    machine.add_argument("--batch", type=int, default=8, metavar="N", help="documents at once (default 8)")
    machine.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the documents, a GPU each (default 1)")
    machine.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto is the GPU where there is one")
    dtype = "type to compute in (default float32); bfloat16 takes half the memory, and more time for answers"
    machine.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=dtype)
    judge = parser.add_argument_group("a judge of the answers, next to the base's, on five criteria from 1 to 5")
    judge.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint up to its version, as http://host:8000/v1")
    judge.add_argument("--judge-model", metavar="NAME", help="the model that judges; its key is read from FULLTUNE_JUDGE_KEY")
    judge.add_argument("--judge-timeout", type=float, default=60.0, metavar="S", help="seconds for one reply (default 60)")
    judge.add_argument("--judge-attempts", type=int, default=3, metavar="N", help="tries for one reply (default 3)")
    benchmarks = parser.add_argument_group("standard benchmarks, by the lm-eval package (pip install lm-eval)")
    benchmarks.add_argument("--lm-eval", type=lambda text: text.split(","), metavar="A,B", help="its tasks, as arc_easy,hellaswag")
    benchmarks.add_argument("--lm-eval-dir", metavar="DIR", help="a directory of task files of your own")
    return parser


def evaluate(options: argparse.Namespace) -> int:
    """Measure what the options name; returns the exit code, raises ConfigError."""
    for name in ("batch", "processes", "judge_attempts", "judge_timeout"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "must be greater than 0")
    if options.judge and not options.judge_model:
        raise ConfigError("--judge-model", None, "nothing says which model of the endpoint judges", "--judge-model NAME")
    if options.lm_eval_dir is not None and not Path(options.lm_eval_dir).is_dir():
        raise ConfigError("--lm-eval-dir", options.lm_eval_dir, "no such directory")
    if options.judge and options.no_base:
        raise ConfigError("--no-base", True, "answers are judged next to the base's", "leave one of the two out")
    subjects, skipped = subjects_of(options)
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    if not subjects:
        raise ConfigError("RUN_OR_MODEL", " ".join(map(str, options.paths)), "there is no run that is done")
    machine = {name: getattr(options, name) for name in ("batch", "device", "dtype", "processes")}
    code = run_workers(subjects, **machine, tasks=options.lm_eval or (), tasks_dir=options.lm_eval_dir)
    if code != Exit.done:
        return code
    console = Console()
    for run in [subject for subject in subjects if subject.name != "base"]:
        base = next((subject for subject in subjects if subject.name == "base" and subject.out == run.out), None)
        theirs = None if base is None else keep(base, options.dtype)
        ours = keep(run, options.dtype)
        if options.judge and theirs is not None:
            judge = Judge(url=options.judge, model=options.judge_model, timeout_s=options.judge_timeout, attempts=options.judge_attempts)
            code = code if judging.judge(run.out, ours, theirs, judge) else Exit.failed
        console.print(table_of(run.out, ours, theirs))
    return code


def subjects_of(options: argparse.Namespace) -> tuple[list[Subject], list[str]]:
    """Return the models that paths name, bases first, and why others are left out; raises ConfigError."""
    found, skipped = [], []
    for path in {path.resolve(): path for path in options.paths}.values():
        if not path.is_dir():
            raise ConfigError("RUN_OR_MODEL", str(path), "no such directory")
        if (path / "adapter_config.json").is_file() or ((path / "config.json").is_file() and not is_run(path)):
            found.append(_model(path, options))
            continue
        runs = list(runs_below(path))
        if not runs:
            raise ConfigError("RUN_OR_MODEL", str(path), "is neither a run nor a folder of runs nor a model")
        for run in runs:
            state = read_status(run).get("state")
            if state != "done" or not (run / "export").is_dir():
                skipped.append(f"{run} is {state}, not done")
                continue
            config = with_options(read_at(run), options)
            found.append(Subject(name="run", config=config, folder=run / "export", out=run / FOLDER))
    if sum(subject.name == "model" for subject in found) > 1:
        raise ConfigError("--out", str(options.out or FOLDER), "several models have one place for their results", "one model at a time")
    with_base = (
        [] if options.no_base else [subject for subject in found if subject.config.model.id is not None and subject.folder is not None]
    )
    bases = [Subject(name="base", config=subject.config, folder=None, out=subject.out) for subject in with_base]
    return [*bases, *found], skipped


def _model(path: Path, options: argparse.Namespace) -> Subject:
    """Return a model directory as it is measured: with a run's rows, or those of --path."""
    if options.like is not None:
        if not is_run(options.like):
            raise ConfigError("--like", str(options.like), "is not a run directory")
        config = read_at(options.like)
    elif options.path is not None and not (path / "adapter_config.json").is_file():
        config = RunConfig(model=ModelConfig(id=str(path)), data=DataConfig(path=options.path))
        options.no_base = True
    else:
        raise ConfigError("RUN_OR_MODEL", str(path), "is a model, and nothing says what to measure it on", "--like RUN, or --path FILE")
    return Subject(name="model", config=with_options(config, options), folder=path, out=options.out or Path(FOLDER))


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
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **given))
    validate_evaluation(config.evaluation)
    return config


def keep(subject: Subject, dtype: str) -> Evaluation:
    """Score what the workers have measured, write it to the subject's folder, and return it."""
    rows = {part: record.collect(Path(found["folder"]), found["documents"]) for part, found in subject.parts.items()}
    if "answers" in rows:
        rows["answers"] = [record.scored(row, subject.config.evaluation) for row in rows["answers"]]
    return record.write(subject.out, subject.name, subject.about(dtype), rows)


if __name__ == "__main__":
    sys.exit(main())
