"""Measure runs that are done, and the base that they began with: losses, answers, what was forgotten.

python -m tools.evaluate runs/mine                              a run, on the rows that it held out
python -m tools.evaluate runs/sweeps/compare_quickstart         every run of a sweep that is done
python -m tools.evaluate runs/mine --general stories.txt        forgetting too: the loss on text of the base's own domain
python -m tools.evaluate some/model --like runs/mine --out OUT  any model directory, on a run's rows
python -m tools.evaluate runs/mine --judge http://host:8000/v1 --judge-model NAME

Settings come from the run's own config.yaml (evaluation.*); options here take their place. A loss is a mean over supervised tokens. Of
pairs of answers it is that of the preferred ones, and accuracy and margin say how well they are told from the others. Of a classifier
accuracy, F1 and calibration are measured, of objective=kto how well wanted answers are told from the others. Answers are the
most likely token at every place, the same whatever the batch and the number of processes. Metrics and their 95 % intervals go to
RUN/evaluation, with every answer. What is measured already, also of another run's base, is not measured again, and a stopped command
continues where it was. `python -m tools.compare` puts runs side by side.

Exit codes: 0 done, 1 a model could not be measured, or the judge has scored nothing, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tools.command import ended, parser_of
from tools.evaluate.measurements import Measurement, keep, measurements_of, with_options
from tools.evaluate.say import table_of
from tools.evaluate.verdicts import collect_verdicts
from tools.evaluate.workers import run_workers
from trainers.config.choices import Metric
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.rewards.judged import Judge
from trainers.rundir.ending import Exit

DTYPES = ("float32", "bfloat16", "float64")


def main(arguments: list[str] | None = None) -> int:
    """Measure runs; returns the exit code."""
    options = make_parser().parse_args(arguments)
    return ended(lambda: evaluate(options), lambda: "stopped: what was measured is kept, and the same command continues from there")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = parser_of("evaluate", __doc__)
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
    settings.add_argument(
        "--count-in-prompt",
        metavar="REGEX",
        help="the score also by how often this matches in the prompt, as documents of RAFT do",
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
    require(options)
    asked, skipped = measurements_of(options)
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    if not asked:
        raise ConfigError("RUN_OR_MODEL", " ".join(map(str, options.paths)), "there is no run that is done")
    machine = {name: getattr(options, name) for name in ("batch", "device", "dtype", "processes")}
    code = run_workers(asked, **machine, tasks=options.lm_eval or (), tasks_dir=options.lm_eval_dir)
    return report(asked, options) if code == Exit.done else code


def require(options: argparse.Namespace) -> None:
    """Raise ConfigError for options that cannot be, or do not go together."""
    for name in ("batch", "processes", "judge_attempts", "judge_timeout"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "must be greater than 0")
    if options.judge and not options.judge_model:
        raise ConfigError("--judge-model", None, "nothing says which model of the endpoint judges", "--judge-model NAME")
    if options.lm_eval_dir is not None and not Path(options.lm_eval_dir).is_dir():
        raise ConfigError("--lm-eval-dir", options.lm_eval_dir, "no such directory")
    if options.judge and options.no_base:
        raise ConfigError("--no-base", True, "answers are judged next to the base's", "leave one of the two out")
    source = options.general if options.general and options.general.isidentifier() else None  # or a file's name: the run says
    with_options(RunConfig(), argparse.Namespace(**vars(options) | ({"general": None} if source else {})))


def report(measured: list[Measurement], options: argparse.Namespace) -> int:
    """Keep what was measured, let a judge score it where one is given, and print a table for each run; returns the exit code."""
    console, code = Console(), int(Exit.done)
    bases = {measurement.out: measurement for measurement in measured if measurement.name == "base"}
    for run in [measurement for measurement in measured if measurement.name != "base"]:
        theirs = keep(bases[run.out], options.dtype) if run.out in bases else None
        ours = keep(run, options.dtype, theirs)
        if options.judge and theirs is not None:
            judge = Judge(url=options.judge, model=options.judge_model, timeout_s=options.judge_timeout, attempts=options.judge_attempts)
            code = code if collect_verdicts(run.out, ours, theirs, judge) else Exit.failed
        console.print(table_of(run.out, ours, theirs))
    return code


if __name__ == "__main__":
    sys.exit(main())
