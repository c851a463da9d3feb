"""Plans of meshes next to real runs on CPU ranks, and what large models take on theirs by mode=plan."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tools.bench.machine import versions
from tools.bench.plan import MESH_CASES, TOLERANCE, Case, measure, predict
from tools.markdown import put_section
from trainers.config.mesh import mesh_of
from trainers.rundir import paths
from trainers.units import in_bytes

LARGE = ("llama70b_full_128k", "llama405b_full", "qwen3_30b_a3b_full", "qwen3_235b_a22b_lora", "gpt_oss_120b_lora")
"""Experiments that are planned for H100."""
PLAN_S = 60.0
"""Of a processor, at most, for one plan."""
TIMEOUT_S = 900.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench meshes`."""
    parser.add_argument("--large", action="store_true", help=f"plan {', '.join(LARGE)} alone, without real runs")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> None:
    """Print, and write to `--out`, plans and real runs; raises RuntimeError where they differ, or a plan takes longer than PLAN_S."""
    lines = [f"## `{options.line}`", "", f"{versions('torch', 'transformers')}, {date.today().isoformat()}", ""]
    wrong: list[str] = []
    for part in [_large] if options.large else [_real, _large]:
        table, differs = part()
        lines += [*table, ""]
        wrong += differs
    print("\n".join(lines), flush=True)
    if options.out is not None:
        put_section(options.out, "\n".join(lines))
    if wrong:
        raise RuntimeError("\n".join(wrong))


def differences(ranks: int) -> list[tuple[Case, float, str]]:
    """Return, for each mesh of so many ranks, its case, the planned peak over the traced one, and what differs, if anything."""
    cases = [case for case in MESH_CASES if case.ranks == ranks]
    found = []
    for case, real, planned in zip(cases, measure(ranks, cases), map(predict, cases), strict=True):
        ratio = planned["peak"] / real["peak"]
        differs = planned["state"] != real["state"] or abs(ratio - 1) > TOLERANCE
        found.append((case, ratio, f"{case.name}: planned {planned}, found {real}" if differs else ""))
    return found


def _real() -> tuple[list[str], list[str]]:
    """Return a table of real runs next to their plans, and what differs."""
    lines = ["Real runs on CPU ranks: the bytes of their state equal the plan's.", ""]
    lines += ["| ranks | copies | shard | context | tensor | expert | run | peak: planned / traced |", f"|{'---:|' * 6}---|---:|"]
    wrong = []
    for ranks in sorted({case.ranks for case in MESH_CASES}):
        for case, ratio, differs in differences(ranks):
            mesh = mesh_of(case.config(".").engine, ranks)
            sizes = (ranks, mesh.replicate, mesh.shard, mesh.context, mesh.tensor, mesh.expert)
            lines.append(f"| {' | '.join(map(str, sizes))} | {case.name} | {ratio:.4f} |")
            wrong += [differs] if differs else []
    return lines, wrong


def _large() -> tuple[list[str], list[str]]:
    """Return a table of the large models' plans, and which took too long."""
    from launcher.job import ROOT  # a GPU machine on which other benches run may have no launcher

    lines = ["By `python -m launcher +exp=EXPERIMENT mode=plan hardware=h100 plan.changes=false`:", ""]
    lines += ["| experiment | GPUs | mesh | memory of a GPU | seconds a step | CPU seconds to plan |", "|---|---:|---|---:|---:|---:|"]
    slow = []
    for experiment in LARGE:
        with tempfile.TemporaryDirectory() as folder:
            line = [sys.executable, "-m", "launcher", f"+exp={experiment}", "mode=plan", "hardware=h100", "plan.changes=false"]
            before = _cpu_s()
            subprocess.run([*line, f"run_dir={folder}/run"], cwd=ROOT, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
            took, plan = _cpu_s() - before, json.loads((Path(folder) / "run" / paths.PLAN).read_text("utf-8"))
        seconds = " to ".join(f"{second:.3g}" for second in plan["step_seconds"])
        gpus = plan["place"]["nodes"] * plan["place"]["ranks_per_node"]
        lines.append(f"| {experiment} | {gpus} | {plan['engine']} | {in_bytes(plan['needed']['h100'])} | {seconds} | {took:.0f} |")
        slow += [f"{experiment}: {took:.0f} s to plan"] if took > PLAN_S else []
    return lines, slow


def _cpu_s() -> float:
    """Return the processor's seconds of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
