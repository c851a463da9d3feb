"""The quality of rows at a glance, before training: format, consistency, diversity, length, and a sample to read.

python -m tools.data_report chats.jsonl more/ --html report.html
python -m tools.data_report +exp=llama8b_mix data.seq_len=4096 --html report.html --json report.json

Arguments are files and directories of rows in any layout, or settings as for `python -m launcher`. With settings the run's data are
prepared, once, and the report adds lengths in tokens and the held-out documents that are trained. `!` marks what to look into.
Personal data of the kinds that tools.curate knows are masked in all that is shown.

Exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from launcher.compose import compose
from launcher.config import run_config
from tools.command import Refused, ended, parser_of
from tools.data_report import look, say
from tools.data_report.page import page
from trainers.config.choices import ObjectiveName
from trainers.config.derived import Source
from trainers.config.errors import ConfigError
from trainers.data import sources
from trainers.rundir.files import write_json

ROWS, SAMPLE = 100_000, 10


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = parser_of("data_report", __doc__)
    parser.add_argument(
        "what", nargs="+", metavar="PATH|SETTING", help="files and directories of rows, or settings such as +exp=quickstart"
    )
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"look at N rows at most, drawn from all (default {ROWS:,})")
    parser.add_argument("--sample", type=int, default=SAMPLE, metavar="N", help=f"rows to read (default {SAMPLE})")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report with plots as one page that opens offline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    options = parser.parse_args(arguments)
    return ended(lambda: run(options), failures=(OSError, MemoryError))


def run(options: argparse.Namespace) -> None:
    """Print the report and write what is asked for; raises ConfigError and Refused."""
    if options.rows < 1 or options.sample < 0:
        raise Refused("--rows is 1 or more, and --sample 0 or more")
    settings = [word for word in options.what if "=" in word and not Path(word).exists()]
    if settings and len(settings) < len(options.what):
        path = next(word for word in options.what if word not in settings)
        raise Refused(f"{path} is a path and {settings[0]} a setting: name paths, or settings with data.path={path}")
    report = of_run(settings, options) if settings else of_paths(options.what, options)
    report |= {"given": options.what, "name": _name(options.what, settings)}
    for file, content in ((options.html, page), (options.json, None)):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, report) if content is None else file.write_text(content(report), "utf-8")
    print(say.text(report))


def _name(given: list[str], settings: list[str]) -> str:
    """Return what a report is called: by its experiment, its sources or its files."""
    pairs = [(field, value) for field, _, value in (word.partition("=") for word in settings)]
    words = [value for field, value in pairs if field == "+exp"]
    words = words or [field.split(".")[2] for field, _ in pairs if re.fullmatch(r"data\.mix\.[^.]+\.path", field)]
    words = words or [Path(value).name for field, value in pairs if field in ("data.path", "data.eval_path")]
    return ", ".join(dict.fromkeys(words or [Path(word).name for word in given]))


def of_paths(paths: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the report on files of rows; raises ConfigError where there is no such file, or no row."""
    for path in paths:
        if not Path(path).exists():
            raise ConfigError("PATH", path, "no such file or directory", "a file of rows, or settings such as +exp=quickstart")
    rows = chain.from_iterable(sources.rows(Source(path, "train"), ObjectiveName.sft) for path in paths)
    report = look.report_of(rows, options.rows, options.sample)
    if not report["rows"]:
        raise ConfigError("PATH", paths[0], "has no rows", "a file of rows")
    return report


def of_run(settings: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the report on the data of a run, prepared if need be; raises ConfigError."""
    from tools.data_report import prepared

    config = run_config(compose(settings))
    about = prepared.about(config)
    return look.report_of(prepared.rows_of(config), options.rows, options.sample) | {"prepared": about}


if __name__ == "__main__":
    sys.exit(main())
