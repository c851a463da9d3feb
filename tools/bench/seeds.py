"""Memory of models of 7B and 70B by mode=plan, full, with LoRA and with QLoRA, next to the rules of thumb that people quote."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tools.bench.machine import versions
from tools.markdown import put_section
from trainers.rundir import paths

TIMEOUT_S = 600.0
MODELS = {"7B": ("llama8b_full", "meta-llama/Llama-2-7b-hf"), "70B": ("llama70b_full", "meta-llama/Llama-3.1-70B")}
"""By size: the experiment that is planned, and its model."""
DEVICE = "a100_80"
GB = 1e9
CARDS = {"48 GB": 48e9, "80 GB": 80e9}
ROWS = ("data.seq_len=2048", "train.microbatch=1", "train.activations=block", "plan.changes=false", "plan.tokens=1e8")
"""One row of 2,048 tokens a GPU, with activation checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A case, and what people say that it takes."""

    size: str
    method: str
    """A preset of conf/peft."""
    gpus: int
    quoted_gb: float
    """Of all GPUs together."""
    reckoned: str
    """How it comes about."""


CASES = (
    Rule(size="7B", method="none", gpus=1, quoted_gb=112, reckoned="16 bytes a parameter"),
    Rule(size="7B", method="none", gpus=4, quoted_gb=112, reckoned="16 bytes a parameter"),
    Rule(size="7B", method="lora", gpus=1, quoted_gb=16, reckoned="2 bytes a parameter, and a little"),
    Rule(size="7B", method="qlora", gpus=1, quoted_gb=6, reckoned="half a byte a parameter, and a little"),
    Rule(size="70B", method="none", gpus=32, quoted_gb=1120, reckoned="16 bytes a parameter"),
    Rule(size="70B", method="lora", gpus=4, quoted_gb=160, reckoned="2 bytes a parameter, and a little"),
    Rule(size="70B", method="qlora", gpus=1, quoted_gb=48, reckoned="half a byte a parameter, and a little"),
)
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
"""Of a plan's peak, in the order of the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench seeds`."""
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> None:
    """Print, and write to `--out`, the plans next to the rules; raises CalledProcessError where one cannot be planned."""
    plans = [plan_of(case) for case in CASES]
    lines = [f"## `{options.line}`", "", f"{versions('torch', 'transformers')}, {date.today().isoformat()}", "", *table(plans)]
    print("\n".join(lines), flush=True)
    if options.out is not None:
        put_section(options.out, "\n".join(lines))


def command_of(case: Rule) -> list[str]:
    """Return the words of the launcher that plan a case."""
    experiment, model = MODELS[case.size]
    nodes = -(-case.gpus // 8)
    place = [f"launch.nodes={nodes}", f"launch.gpus_per_node={case.gpus // nodes}", f"train.global_batch={case.gpus}"]
    named = [f"+exp={experiment}", f"model.id={model}", f"model.tokenizer={model}", f"peft={case.method}"]
    return [*named, *place, "mode=plan", f"hardware={DEVICE}", *ROWS]


def plan_of(case: Rule) -> dict[str, Any]:
    """Return the plan of a case, as plan.json has it."""
    from launcher.job import ROOT  # a GPU machine on which other benches run may have no launcher

    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "launcher", *command_of(case), f"run_dir={folder}/run"]
        done = subprocess.run(line, cwd=ROOT, timeout=TIMEOUT_S, capture_output=True, text=True, check=False)
        file = Path(folder) / "run" / paths.PLAN
        if not file.is_file():  # exit code 1 says that the run does not fit, with a plan
            raise RuntimeError(f"{' '.join(line)}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def table(plans: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of all cases, and a sentence on each difference."""
    lines = ["A row of 2,048 tokens a GPU, bf16, activation checkpointing, AdamW. GB are 10^9 bytes; parts are of one GPU at its peak.", ""]
    lines += [f"| model | method | GPUs | {' | '.join(PARTS)} | one GPU | all GPUs | quoted |", f"|---|---|{'---:|' * (len(PARTS) + 4)}"]
    for case, plan in zip(CASES, plans, strict=True):
        parts = " | ".join(f"{plan['peak'].get(name, 0) / GB:.1f}" for name in PARTS)
        one = plan["needed"][DEVICE]
        method = "full" if case.method == "none" else case.method
        whole = f"{one / GB:.1f} | {one * case.gpus / GB:,.0f}"
        lines.append(f"| {case.size} | {method} | {case.gpus} | {parts} | {whole} | {case.quoted_gb:,.0f} |")
    return [*lines, "", *(f"- {difference(case, plan)}" for case, plan in zip(CASES, plans, strict=True))]


def difference(case: Rule, plan: Mapping[str, Any]) -> str:
    """Say in a sentence or two how the plan of all GPUs differs from what is quoted, and by which of its parts."""
    name = f"{case.size}, {'full' if case.method == 'none' else case.method}, {case.gpus} GPU{'s' * (case.gpus > 1)}"
    peak, one = plan["peak"], plan["needed"][DEVICE]
    state = sum(peak.get(part, 0) for part in ("parameters", "gradients", "optimizer")) * case.gpus
    working = sum(peak.get(part, 0) for part in ("activations", "logits", "buffers")) * case.gpus
    outside = (one - sum(peak.get(part, 0) for part in PARTS)) * case.gpus
    apart = one * case.gpus / GB - case.quoted_gb
    said = f"{abs(apart):,.0f} GB {'more' if apart > 0 else 'less'} than quoted ({case.reckoned})"
    each = f"{state / GB:,.0f} GB are weights, gradients and optimizer state, {state / plan['parameters']:.2g} bytes a parameter; "
    each += f"{working / GB:,.0f} GB activations, logits and buffers; {outside / GB:,.0f} GB the allocator's slack, CUDA and NCCL"
    fits = ""
    if case.gpus == 1:
        on = [f"{'fits' if one <= size else 'does not fit'} on {card}" for card, size in CARDS.items()]
        fits = f" It {' and '.join(on)}."
    return f"{name}: {said}. {each}.{fits}"
