"""What a rank keeps of long rows that several ranks share: by the plan, and of real runs on CPU ranks."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from tools.bench.arguments import at_least
from tools.bench.machine import versions
from tools.bench.plan import BLOCK, CONTEXT_CASES, SIZES, Case, measure, predict
from tools.markdown import put_section
from trainers.units import in_bytes

RANKS = 8
TOLERANCE = 0.05
"""Of a peak, and of what the plan says of activations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench context`."""
    parser.add_argument("--size", choices=SIZES, default="8B", help="model that is planned on 8 ranks, a row each (default 8B)")
    lengths = [1 << power for power in range(12, 18)]
    parser.add_argument("--lengths", type=at_least(16), nargs="+", default=lengths, help="tokens a row (default 4096 to 131072)")
    parser.add_argument("--context", type=at_least(1), nargs="+", default=[1, 2, 4, 8], help="ranks that share rows (default 1 2 4 8)")
    parser.add_argument("--real", action="store_true", help="also run small models on 4 CPU ranks, whose bytes must be the plan's")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> None:
    """Print, and write to `--out`, what a rank keeps; raises RuntimeError where a real run differs from its plan."""
    lines = [f"## `{options.line}`", "", f"{versions('torch', 'transformers')}, {date.today().isoformat()}", ""]
    lines += _planned(options)
    wrong: list[str] = []
    if options.real:
        real, wrong = _real()
        lines += ["", *real]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    if wrong:
        raise RuntimeError("\n".join(wrong))


def _planned(options: argparse.Namespace) -> list[str]:
    """Return a table of activations and of the peak, a row a length."""
    words = f"Planned: {options.size}, full, bf16, `train.activations=block`, {RANKS} ranks. Activations of a rank, and its whole peak."
    lines = [words, "", *_head("tokens a row", [f"`engine.context={context}`" for context in options.context])]
    for length in options.lengths:
        cells = []
        for context in options.context:
            found = predict(Case(RANKS, options.size, seq_len=length, microbatch=1, context=context, activations=BLOCK))
            cells.append(f"{in_bytes(found['activations'], 1)} of {in_bytes(found['peak'], 1)}")
        lines.append(_row(f"{length:,}", cells))
    return lines


def _real() -> tuple[list[str], list[str]]:
    """Return a table of real runs next to their plans, and what differs by more than TOLERANCE."""
    heads = ["activations: planned", "traced", "ratio", "peak: planned", "traced", "ratio"]
    lines, wrong = ["Real runs on 4 CPU ranks:", "", *_head("run", heads)], []
    for case, found in zip(CONTEXT_CASES, measure(CONTEXT_CASES[0].ranks, CONTEXT_CASES), strict=True):
        predicted, cells = predict(case), []
        for name in ("activations", "peak"):
            ratio = predicted[name] / found[name]
            cells += [in_bytes(predicted[name], 2), in_bytes(found[name], 2), f"{ratio:.4f}"]
            if abs(ratio - 1) > TOLERANCE or predicted["state"] != found["state"]:
                wrong.append(f"{case.name}: predicted {predicted}, found {found}")
        lines.append(_row(case.name, cells))
    return lines, wrong


def _head(first: str, names: list[str]) -> list[str]:
    return [_row(first, names), "|---|" + "---:|" * len(names)]


def _row(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"
