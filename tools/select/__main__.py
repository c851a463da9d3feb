"""Choose the best of several answers by rewards: rows to fine-tune on, and pairs for DPO.

python -m tools.select answers.jsonl --reward exact --threshold 1 --out best.jsonl
python -m tools.select answers.jsonl --reward exact --reward length:max=200,soft=50,weight=0.2 --out best.jsonl --pairs pairs.jsonl
python -m tools.select answers.jsonl --reward model:path=runs/reward/export --per-prompt 2 --cap 10000 --out best.jsonl

ANSWERS are files of `python -m tools.sample`. A reward is KIND:SETTING=VALUE,... ; every kind also has `weight` and `name`:
  exact      1 where answer and reference agree; extract=auto|hashes|number|whole|REGEX, as evaluation.extract
  math       1 where answer and reference are the same mathematics, by math-verify (pip install); timeout_s=S
  json       1 where the answer is JSON that the schema takes; schema=FILE, else the row's field `schema`
  length     1 from min to max, falling to 0 over `soft` outside; unit=tokens|words|characters
  format     1 where pattern=REGEX matches the whole answer; the pattern is the last setting
  code       1 where the answer's code passes the row's tests (Python, raising where one fails); tests=FIELD,timeout_s=S,memory_mib=N,
             processes=N,disk_mib=N. It runs without network and files of this machine, and not at all where that cannot be
  model      what a reward model says; path=DIR, the export of a run with objective=reward
  judge      a judge's mean score, 0 to 1; url=URL,model=NAME,timeout_s=S,at_once=N; its key is read from FULLTUNE_JUDGE_KEY
  function   a Python function of an answer's row; path=module:function,timeout_s=S. It runs here, with your rights

The reward is the weighted sum. An answer of which a part fails has none: it is counted, and neither chosen nor rejected. Answers that were
cut at the longest length are left out, or count with --keep-cut. A row of OUT has the conversation, its `reward`, the parts, and in `from`
which answer of which model and row it is. A pair has the best answer of a prompt and the worst, which differ by more than --margin.

Exit codes: 0 written, 1 a judge answers no more (its replies are kept), 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.command import ended, parser_of
from tools.select.choose import Chosen, Limits, choose
from tools.select.rewards import read
from trainers.config.errors import ConfigError
from trainers.config.schema import RewardConfig
from trainers.config.secrets import mask
from trainers.rewards.score import Found, Rewards
from trainers.rundir.files import try_row, write_json

NEEDED = ("prompt", "answer", "finish")
Row = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Choose; returns the exit code."""
    options = make_parser().parse_args(arguments)
    return ended(lambda: select(options), lambda: "stopped: a judge's replies are kept", (OSError,))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = parser_of("select", __doc__)
    parser.add_argument("answers", nargs="+", type=Path, metavar="ANSWERS", help="files of python -m tools.sample")
    parser.add_argument("--reward", action="append", required=True, metavar="KIND:...", help="a reward; several add up by their weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the chosen answers, as rows to fine-tune on")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="pairs of a better and a worse answer, for objective=dpo")
    parser.add_argument("--threshold", type=float, metavar="R", help="least reward of a chosen answer, and of a preferred one")
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="most answers of a prompt (default 1)")
    parser.add_argument("--cap", type=int, metavar="N", help="most answers of all, those with the highest rewards")
    parser.add_argument("--margin", type=float, default=0.0, metavar="R", help="the answers of a pair differ by more (default 0)")
    parser.add_argument("--pairs-per-prompt", type=int, default=1, metavar="N", help="most pairs of a prompt (default 1)")
    parser.add_argument("--keep-cut", action="store_true", help="answers that were cut at the longest length count too")
    return parser


def select(options: argparse.Namespace) -> None:
    """Write the rows and pairs; raises ConfigError, Refused and OSError."""
    asked = require(options)
    for file in filter(None, (options.out, options.pairs)):
        if not file.parent.is_dir():
            raise ConfigError("--out", str(file), "its folder does not exist", f"mkdir -p {file.parent}")
    rows = [row for file in options.answers for row in read_answers(file)]
    with Rewards(asked, Path(f"{options.out}.asked")) as rewards:
        found = rewards.score(rows)
    names = ("threshold", "per_prompt", "cap", "margin", "pairs_per_prompt", "keep_cut")
    chosen = choose(rows, found.total.tolist(), Limits(**{name: getattr(options, name) for name in names}))
    _write(options.out, [_as_row(rows[number], found, number) for number in chosen.best])
    if options.pairs is not None:
        _write(options.pairs, [_as_pair(rows, found, *pair) for pair in chosen.pairs])
    told = report(rows, found, chosen)
    write_json(Path(f"{options.out}.json"), told | {"rewards": mask(options.reward), "answers_of": list(map(str, options.answers))})
    say(told, options)


def require(options: argparse.Namespace) -> dict[str, RewardConfig]:
    """Return the rewards that options name; raises ConfigError and Refused for options that cannot be."""
    for name in ("per_prompt", "cap", "pairs_per_prompt"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "must be greater than 0")
    if not options.margin >= 0:
        raise ConfigError("--margin", options.margin, "must be at least 0: an answer makes no pair with itself")
    return read(options.reward)


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Return the answers of a file; raises ConfigError for any other line."""
    if not file.is_file():
        remedy = "the same python -m tools.sample again, which writes the rest" if Path(f"{file}.part").exists() else ""
        raise ConfigError("ANSWERS", str(file), "there is no such file", remedy)
    rows = []
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        if line.strip():
            row = try_row(line)
            if row is None or not all(name in row for name in NEEDED):
                raise ConfigError("ANSWERS", f"{file}:{number}", "is not an answer of python -m tools.sample")
            rows.append({"reference": "", "row": {}, "ids": None} | row | {"at": f"{file}:{number}"})
    if not rows:
        raise ConfigError("ANSWERS", str(file), "holds no answers")
    return rows


def _as_row(row: Row, found: Found, number: int) -> dict[str, Any]:
    turns = [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
    return (
        {"messages": turns} | _tools(row) | {"reward": float(found.total[number]), "rewards": _parts(found, number), "from": _origin(row)}
    )


def _as_pair(rows: list[dict[str, Any]], found: Found, preferred: int, other: int) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": rows[number]["answer"]}] for number in (preferred, other))
    both = (preferred, other)
    more = {"rewards": [_parts(found, number) for number in both], "from": [_origin(rows[number]) for number in both]}
    return {"prompt": rows[preferred]["prompt"], "chosen": chosen, "rejected": rejected} | _tools(rows[preferred]) | more


def _tools(row: Row) -> dict[str, Any]:
    return {"tools": row["tools"]} if row.get("tools") else {}


def _parts(found: Found, number: int) -> dict[str, float]:
    return {name: float(values[number]) for name, values in found.parts.items()}


def _origin(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("at", "file", "line", "model", "sample", "seed") if name in row}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    staging = Path(f"{file}.tmp")
    with staging.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        stream.flush()
        os.fsync(stream.fileno())
    staging.rename(file)


def report(rows: list[dict[str, Any]], found: Found, chosen: Chosen) -> dict[str, Any]:
    """Return the counts, and each part's mean over the answers that have it and over the chosen ones; None where there are none."""
    parts = {
        name: {"mean": _mean(values), "chosen": _mean(values[chosen.best]), "failures": dict(found.failures[name])}
        for name, values in found.parts.items()
    }
    return {
        "prompts": chosen.prompts,
        "answers": len(rows),
        "chosen": len(chosen.best),
        "pairs": len(chosen.pairs),
        "prompts_without": chosen.without,
        "left": dict(chosen.left),
        "parts": parts,
    }


def _mean(values: Any) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def say(told: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print what was chosen and what was not."""
    print(f"{told['chosen']} of {told['answers']} answers of {told['prompts']} prompts: {options.out}")
    if options.pairs is not None:
        print(f"{told['pairs']} pairs: {options.pairs}")
    print(f"  prompts without a chosen answer: {told['prompts_without']}")
    for reason, count in told["left"].items():
        print(f"  {reason}: {count}")
    for name, part in told["parts"].items():
        means = ["none" if part[key] is None else f"{part[key]:.3f}" for key in ("mean", "chosen")]
        print(f"  reward {name}: mean {means[0]}, of the chosen {means[1]}")
        for reason, count in part["failures"].items():
            print(f"    failed: {reason} ({count})")


if __name__ == "__main__":
    sys.exit(main())
