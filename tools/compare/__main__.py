"""Put runs side by side: full fine-tuning against parameter-efficient methods, with what may be said of them and what may not.

python -m tools.compare runs/sweeps/compare_quickstart                     the runs of a sweep, in the terminal
python -m tools.compare runs/a runs/b --html compare.html --csv runs.csv   a page that opens offline; a line a run
python -m tools.compare SWEEP --price 2.5                                  what GPU-hours cost
python -m tools.compare PIPELINE_DIR --html pipeline.html                  what each stage of a pipeline gave, and forgot

Metrics come from each run's directory, those with intervals from RUN/evaluation, which `python -m tools.evaluate` makes. Each method is
shown at the best of its rates by held-out loss, with what all of them cost. Runs that differ in more than their method (data, chat
template, base, tokens, rows or settings of evaluation), have not ended, or have no finite loss are named, with both values, and not
compared. No run is started, no model opened.

Exit codes: 0 compared, 1 no two runs can be compared, or the W&B report could not be written, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from launcher.stages import read_record
from tools.command import ended, parser_of
from tools.compare import say
from tools.compare.methods import Comparison, compare
from trainers.config.errors import ConfigError
from trainers.processes import exit_after
from trainers.rundir.ending import Exit

T = TypeVar("T")
ENDING_S = 10
"""For this process to end after a W&B report: wandb waits for a service process of its own, which may not answer."""


def main(arguments: list[str] | None = None) -> int:
    """Compare runs; returns the exit code."""
    options = make_parser().parse_args(arguments)
    code = ended(lambda: run(options))
    if options.wandb:
        sys.stdout.flush()
        exit_after(ENDING_S, code)
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_DIR", help="run directories, or folders of them such as a sweep's")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with tables, plots and answers, which needs no network")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a line for each run, in plain numbers")
    parser.add_argument("--wandb", action="store_true", help="write the same as a W&B report; needs a network and a key")
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU-hour (default: plan.json's, where a plan was made)")
    return parser


def require(options: argparse.Namespace) -> None:
    """Raise ConfigError for a file that cannot be; whether its folder is there is seen later."""
    for name in ("html", "markdown", "csv"):
        file = getattr(options, name)
        if file is not None and file.is_dir():
            raise ConfigError(f"--{name}", str(file), "is a directory", f"--{name} {file}/compare.{name}")


def run(options: argparse.Namespace) -> int:
    """Compare what the options name and write what they ask for; returns the exit code, raises ConfigError."""
    require(options)
    for name in ("html", "markdown", "csv"):
        file = getattr(options, name)
        if file is not None and not file.resolve().parent.is_dir():
            raise ConfigError(f"--{name}", str(file), "there is no such directory", f"mkdir -p {file.parent}")
    if len(options.paths) == 1 and read_record(options.paths[0]):
        return run_stages(options)
    comparison = compare(options.paths, options.price)
    write(options, comparison, say.print_text, say.markdown, say.write_csv, page_of)
    code = Exit.done if sum(len(method.tried) for method in comparison.methods) > 1 else Exit.failed
    if options.wandb and not report(comparison):
        return Exit.failed
    return code


def run_stages(options: argparse.Namespace) -> int:
    """Compare the stages of a pipeline; returns the exit code, raises ConfigError."""
    if options.wandb or options.price is not None:
        name = "wandb" if options.wandb else "price"
        raise ConfigError(f"--{name}", getattr(options, name), "is of runs, and this is the directory of a pipeline", "name its runs")
    from tools.compare import stages

    story = stages.tell(options.paths[0])
    write(options, story, stages.print_text, stages.markdown, stages.write_csv, stages.page)
    return Exit.done


def page_of(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    from tools.compare.page import page

    return page(comparison, sys.argv[1:])


def write(
    options: argparse.Namespace,
    found: T,
    print_text: Callable[[T, Console], None],
    markdown: Callable[[T], str],
    write_csv: Callable[[T, Path], None],
    page: Callable[[T], str],
) -> None:
    """Print what was compared, and write it in the forms that the options ask for."""
    print_text(found, Console())
    if options.markdown is not None:
        options.markdown.write_text(markdown(found), "utf-8")
    if options.csv is not None:
        write_csv(found, options.csv)
    if options.html is not None:
        options.html.write_text(page(found), "utf-8")
        print(f"page: {options.html}")


def report(comparison: Comparison) -> bool:
    """Write the W&B report; tell whether that went."""
    from tools.compare.wandb_report import NoReport, write_report

    settings = comparison.runs[0].config
    compared = [run for method in comparison.methods for run in method.tried]
    ids = [str(run.manifest["wandb_id"]) for run in compared if run.config["log.wandb"] != "disabled" and run.manifest.get("wandb_id")]
    try:
        url = write_report(settings["log.entity"], settings["log.project"], ids, say.markdown(comparison), comparison.title)
    except NoReport as error:
        print(f"error: no W&B report: {error}", file=sys.stderr)
        return False
    print(f"W&B report: {url}")
    return True


if __name__ == "__main__":
    sys.exit(main())
