"""DPO with its kept reference, next to supervised fine-tuning of the same rows, to a second model, and to TRL's DPOTrainer."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tools.bench.arguments import at_least
from tools.bench.machine import cpu_words
from tools.bench.peers.command import INSTALL_S, ROOT, OurSteps, command_words, env_of
from tools.bench.peers.drivers import boot
from tools.bench.peers.inputs import SHAPES, make_pairs
from tools.bench.peers.measure import Measured, measure, recorded
from tools.bench.peers.venvs import default_folder, environment
from tools.markdown import put_section
from trainers import host
from trainers.config.choices import ObjectiveName, Precision, Schedule, WandbMode
from trainers.config.schema import DataConfig, LogConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from trainers.rundir import paths
from trainers.units import in_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.batch import Batch
    from trainers.data.prepare import Prepared
    from trainers.model.blueprint import Blueprint
    from trainers.world import World

VARIANTS = {
    "dpo": "DPO, the reference kept",
    "sft": "supervised, the same rows",
    "plain": "plain loop, a kept reference",
    "second": "plain loop, a second model",
}
"""What is trained in processes of its own, on the same batches."""
LEARNING_RATE, BETAS, CLIP, BETA = 1e-4, (0.9, 0.95), 1.0, 0.1
LIMIT_S = 1800.0
Found = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench preferences`."""
    parser.add_argument("--runs", type=at_least(1), default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--steps", type=at_least(2), default=4, help="steps a run; the first is not timed (default 4)")
    parser.add_argument("--model", choices=SHAPES, default="9m", help="size of the Llama (default 9m)")
    parser.add_argument("--seq-len", type=at_least(64), default=512, help="tokens of a packed row (default 512)")
    parser.add_argument("--step-rows", type=at_least(1), default=16, help="packed rows a step (default 16)")
    parser.add_argument("--microbatch", type=at_least(1), default=4, help="packed rows, or TRL's pairs, a forward (default 4)")
    parser.add_argument("--trl", action="store_true", help="TRL's DPOTrainer too, in an environment that is made once")
    parser.add_argument("--venvs", type=Path, help="where that is kept (default FULLTUNE_CACHE/peers)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, speed and memory of each, in turn; raises RuntimeError where losses do not agree."""
    console = Console(stderr=True)
    found: dict[str, list[Found]] = {name: [] for name in VARIANTS}
    peers: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory(prefix="fulltune-preferences-") as temporary, console.status("making a model and pairs") as status:
        folder = Path(temporary)
        sizes = map(str, (options.seq_len, options.step_rows, options.microbatch))
        made = _in_process(["preference-inputs", str(folder), options.model, *sizes], folder)
        for number in range(options.runs):
            for name, words in VARIANTS.items():
                status.update(f"run {number + 1} of {options.runs}: {words}")
                line = ["preference-one", str(folder), name, *map(str, (options.steps, options.seq_len, options.microbatch))]
                found[name].append(_in_process(line, folder))
            for name, measured in (_peers(options, folder, made, status.update) if options.trl else {}).items():
                status.update(f"run {number + 1} of {options.runs}: {name}")
                peers.setdefault(name, []).append(measured())
        status.update("planning")
        planned = plan_of(folder, int(made["rows"]), options)
    text = section(options, made, {name: _medians(runs) for name, runs in found.items()}, planned, peers)
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    return 0


def plan_of(folder: Path, rows: int, options: argparse.Namespace) -> Found:
    """Return what mode=plan says of our command: bytes of a rank's tensors at their peak, of the reference kept and of a second model."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        work, run_dir = Path(own), Path(own) / "run"
        line = [*our_command(folder, run_dir, rows, options), "mode=plan", "plan.changes=false"]
        line.append(f"data.prepared_dir={folder / 'prepared'}")  # where the command's own runs leave it: then it knows the documents
        done = subprocess.run(line, cwd=ROOT, env=env_of(work), capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if not (run_dir / paths.PLAN).exists():
            raise RuntimeError(f"{' '.join(line)} left no plan:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        plan = json.loads((run_dir / paths.PLAN).read_text())
    kept = plan["reference"]["disk_bytes"]
    more = {} if kept is None else {"kept": float(kept)}
    return {"peak": float(sum(plan["peak"].values())), "second": float(plan["reference"]["second_model_bytes"])} | more


def _in_process(words: list[str], folder: Path) -> Found:
    """Return what a sub-command prints last; raises RuntimeError where it fails."""
    line = [sys.executable, "-m", "tools.bench", *words]
    env = os.environ | {"FULLTUNE_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
    printed: Found = json.loads(done.stdout.splitlines()[-1])
    return printed


def _medians(runs: list[Found]) -> Found:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def make_inputs(options: argparse.Namespace) -> None:
    """Make a model and pairs that fill about so many packed rows, and print how many there are."""
    folder = Path(options.folder)
    config = config_of(folder, "dpo", 2, options.seq_len, 1)
    print(json.dumps(make_pairs(folder, options.shape, config, options.rows, options.multiple)))


def config_of(folder: Path, variant: str, steps: int, seq_len: int, microbatch: int, rows: int = 1) -> RunConfig:
    """Return the run of a variant: a step is a pass over all rows."""
    return RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(id=str(folder / "model")),
        data=DataConfig(path=str(folder / "pairs.jsonl"), seq_len=seq_len, prepared_dir=str(folder / "prepared")),
        objective=ObjectiveConfig(name=ObjectiveName.sft if variant == "sft" else ObjectiveName.dpo, beta=BETA),
        optim=OptimConfig(lr=LEARNING_RATE, schedule=Schedule.constant, betas=list(BETAS), weight_decay=0.0, clip=CLIP),
        train=TrainConfig(steps=steps, global_batch=rows, microbatch=microbatch, precision=Precision.fp32, sample_tokens=0),
        log=LogConfig(wandb=WandbMode.disabled),
    )


def run_one(options: argparse.Namespace) -> None:
    """Train a variant and print its tokens a second after the first step, bytes above the start, and last loss."""
    import torch

    from trainers.data.prepare import prepare
    from trainers.data.tokenizer import load_tokenizer, pad_id
    from trainers.model.blueprint import make_blueprint
    from trainers.rundir.metrics import host_bytes_peak
    from trainers.world import World

    torch.set_num_threads(host.cores())
    folder, world = Path(options.folder), World.from_environment()
    world.connect()
    with tempfile.TemporaryDirectory(dir=folder) as own:
        data = prepare(config_of(folder, "dpo", options.steps, options.seq_len, options.microbatch))
        config = config_of(folder, options.variant, options.steps, options.seq_len, options.microbatch, len(data.train))
        config.run_dir, config.data.prepared_dir = own, str(Path(own) / "kept")
        tokenizer = load_tokenizer(config)
        blueprint, pad = make_blueprint(config.model, 0, tokenizer), pad_id(tokenizer)
        before = host_bytes_peak()
        if options.variant in ("dpo", "sft"):
            found = _ours(config, world, data, blueprint, pad)
        else:
            found = _plain(config, data, pad, has_second=options.variant == "second")
        print(json.dumps(found | {"peak": host_bytes_peak() - before}))


def _ours(config: RunConfig, world: World, data: Prepared, blueprint: Blueprint, pad: int) -> Found:
    """Train with our loop; of DPO the reference and an evaluation of the same rows are timed too."""
    from trainers.data.loader import Loader, eval_batches
    from trainers.engines.build import build_engine
    from trainers.evaluation import evaluate
    from trainers.loop import train
    from trainers.objectives import REFERENCE, make_objective
    from trainers.reference import with_reference
    from trainers.rundir.attempt import Attempt
    from trainers.rundir.rows import read_rows, steps

    engine, attempt, found = build_engine(config, world, blueprint), Attempt(Path(config.run_dir)), {}
    if config.objective.name is ObjectiveName.dpo:
        tokens = float(data.train.row_lengths().sum())
        sft = make_objective(ObjectiveConfig(name=ObjectiveName.sft), None)
        for name in ("warm", "evaluation"):  # the first pass of a process allocates
            began = time.perf_counter()
            batches = eval_batches(data.train, config.train.microbatch, rank=0, world_size=1, pad_id=pad)
            evaluate(engine, sft, batches, world, 1)
            found[name] = tokens / (time.perf_counter() - began)
        began = time.perf_counter()
        data = with_reference(config, world, attempt, engine, data, {}, pad)
        found["reference"] = tokens / (time.perf_counter() - began)
        found["kept"] = float(data.train.signals[REFERENCE].nbytes)
    loader = Loader(data.train, config.train, seed=0, rank=0, world_size=1, pad_id=pad)
    train(config, world, attempt, engine, data, loader, 1.0)
    rows = steps(read_rows(Path(config.run_dir)))
    tokens = sum(row["input_tokens_per_second"] * row["step_seconds"] for row in rows[1:])
    return found | {"speed": tokens / sum(row["step_seconds"] for row in rows[1:]), "loss": rows[-1]["loss"]}


def _plain(config: RunConfig, data: Prepared, pad: int, has_second: bool) -> Found:
    """Train as papers' code does: the model's logits, a frozen copy or what it once said, AdamW, gradients clipped."""
    import copy
    from dataclasses import replace

    import numpy as np
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForCausalLM

    from trainers.data.loader import Loader, make_batch
    from trainers.objectives import REFERENCE

    model: Any = AutoModelForCausalLM.from_pretrained(str(config.model.id), dtype=torch.float32)
    frozen = copy.deepcopy(model).requires_grad_(False).eval() if has_second else None
    table, num = data.train, config.train.microbatch
    if frozen is None:
        known = np.zeros(len(table.offsets) - 1, np.float32)
        for at in range(0, len(table), num):
            rows = np.arange(at, min(at + num, len(table)))
            with torch.no_grad():
                documents = np.concatenate([table.documents(int(row)) for row in rows])
                known[documents] = answer_logps(model, make_batch(table, rows, num, pad)).numpy()
        table = replace(table, signals={REFERENCE: known})
    loader = Loader(table, config.train, seed=0, rank=0, world_size=1, pad_id=pad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    tokens, seconds, total = 0, 0.0, 0.0
    for step in range(loader.num_steps):
        began, batches = time.perf_counter(), loader.step(step)
        pairs, total = sum(batch.num_documents for batch in batches) // 2, 0.0
        for batch in batches:
            with torch.no_grad():
                reference = batch.signals[REFERENCE] if frozen is None else answer_logps(frozen, batch)
            ratios = (answer_logps(model, batch) - reference).view(-1, 2)
            loss = -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).sum() / pairs
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step:
            tokens += sum(batch.num_tokens for batch in batches)
            seconds += time.perf_counter() - began
    return {"speed": tokens / seconds, "loss": total}


def answer_logps(model: Any, batch: Batch) -> Tensor:
    """Return the log-probability of each document's labels by plain cross-entropy, (D,)."""
    from torch.nn.functional import cross_entropy

    from trainers.batch import IGNORE, by_document

    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    nats = cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return by_document(-nats.view(batch.labels.shape), batch)


def _peers(options: argparse.Namespace, folder: Path, made: Found, show: Callable[[str], None]) -> dict[str, Callable[[], Measured]]:
    """Return our command and TRL's, each in processes of its own, to be measured from outside; raises NotInstalled."""
    trl = environment("trl", options.venvs or default_folder(), INSTALL_S, show)
    numbers = {"pairs": int(made["pairs"]), "rows": int(made["rows"])}

    def ours() -> Measured:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            work, run_dir = Path(own), Path(own) / "run"
            line = our_command(folder, run_dir, numbers["rows"], options)
            return measure(line, ROOT, env_of(work), options.steps, LIMIT_S, OurSteps(run_dir), _quiet, log=work / "log")

    def theirs(kept: bool) -> Measured:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            work = Path(own)
            order: dict[str, Any] = {"model": str(folder / "model"), "rows": str(folder / "pairs.jsonl"), "folder": own, "kept": kept}
            order |= {"documents": numbers["pairs"], "steps": options.steps, "seq_len": options.seq_len, "microbatch": options.microbatch}
            order |= {"events": str(work / "steps.jsonl"), "lr": LEARNING_RATE, "betas": BETAS, "clip": CLIP}
            order |= {"precision": "fp32", "beta": BETA}
            (work / "order.json").write_text(json.dumps(order))
            line = [str(trl.python), str(Path(boot.__file__)), str(ROOT), "trldpo", str(work / "order.json")]
            return measure(line, work, env_of(work), options.steps, LIMIT_S, partial(recorded, work / "steps.jsonl"), _quiet)

    return {"fulltune, by its command": ours, "TRL, a second model": partial(theirs, False), "TRL, a kept reference": partial(theirs, True)}


def _quiet(done: int) -> None:
    """Show nothing."""


def our_command(folder: Path, run_dir: Path, rows: int, options: argparse.Namespace) -> list[str]:
    """Return the command that a user types: one rank, full parameters, and a step that is a pass over all packed rows."""
    given = [
        *("model=hf", f"model.id={folder / 'model'}", "data=files", f"data.path={folder / 'pairs.jsonl'}", "objective=dpo", "peft=none"),
        *(f"objective.beta={BETA}", f"data.seq_len={options.seq_len}", "launch.processes=1", f"train.steps={options.steps}"),
        *(f"train.global_batch={rows}", f"train.microbatch={options.microbatch}", "train.precision=fp32", f"optim.lr={LEARNING_RATE}"),
        *("optim.schedule=constant", f"optim.betas={list(BETAS)}".replace(" ", ""), "optim.weight_decay=0", f"optim.clip={CLIP}"),
        *("train.sample_tokens=0", "log.wandb=disabled", f"run_dir={run_dir}"),
    ]
    return [sys.executable, "-m", "launcher", *given]


def section(options: argparse.Namespace, made: Found, found: dict[str, Found], planned: Found, peers: dict[str, list[Measured]]) -> str:
    """Return the Markdown: command, machine, and tables; raises RuntimeError where what is the same has other losses."""
    for name in ("plain", "second"):
        if abs(found[name]["loss"] - found["dpo"]["loss"]) > 1e-3 * abs(found["dpo"]["loss"]):
            raise RuntimeError(f"{VARIANTS[name]} does not train the same: last losses {found['dpo']['loss']} and {found[name]['loss']}")
    about = (
        f"{cpu_words('torch', 'transformers')}. A Llama of {made['parameters']:,.0f} parameters in fp32. Each step is a pass over "
        f"{made['pairs']:,.0f} pairs, {made['tokens']:,.0f} tokens in {made['rows']:,.0f} rows of {options.seq_len}. {options.steps} "
        f"steps a run, median of {options.runs} runs each, in turn. Memory is the peak above what the process had before the model."
    )
    dpo = found["dpo"]
    lines = ["| trained | tokens/s | DPO : this | peak memory | DPO : this |", "|---|---|---|---|---|"]
    for name, words in VARIANTS.items():
        one = found[name]
        ratios = [f"{dpo[key] / one[key]:.2f}" for key in ("speed", "peak")]
        lines.append(f"| {words} | {one['speed']:,.0f} | {ratios[0]} | {in_bytes(one['peak'])} | {ratios[1]} |")
    passes = (
        f"The reference's pass reads {dpo['reference']:,.0f} tokens/s, and an evaluation of the same rows {dpo['evaluation']:,.0f}: "
        f"{dpo['reference'] / dpo['evaluation']:.2f} times."
    )
    parts = [f"## `{command_words(options.line)}`", about, "\n".join(lines), passes, _memory(found, planned)]
    parts += [_table(made, peers)] if peers else []
    return "\n\n".join(parts) + "\n"


def _memory(found: dict[str, Found], planned: Found) -> str:
    """Return the table of planned and measured memory, with the reference kept and with a second model."""
    measured, more = found["dpo"]["peak"], found["second"]["peak"] - found["plain"]["peak"]
    rows = [
        ("DPO, the reference kept", _mib(planned["peak"]), _mib(measured)),
        ("what a second model adds", _mib(planned["second"]), f"{_mib(more)}, to a plain loop"),
        ("DPO with a second model", _mib(planned["peak"] + planned["second"]), _mib(measured + more)),
        ("on disk for the reference", f"{planned['kept']:,.0f} bytes" if "kept" in planned else "", f"{found['dpo']['kept']:,.0f} bytes"),
    ]
    lines = ["| memory | by the plan | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    words = "The plan counts tensors where they are highest; what is measured is the process, with its allocator's gaps and its libraries."
    return "\n".join(lines) + f"\n\n{words}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _table(made: Found, peers: dict[str, list[Measured]]) -> str:
    """Return the table of commands that were measured from outside, each with the ratio of ours to it."""
    found = {
        name: {key: statistics.median(getattr(run, key) for run in runs) for key in ("step_seconds", "first_step_s", "peak_bytes")}
        for name, runs in peers.items()
    }
    ours = next(iter(found.values()))
    lines = ["| command | tokens/s | ours : this | memory | ours : this | to the first step | second and last loss |"]
    lines.append("|---" * 7 + "|")
    for name, one in found.items():
        losses = peers[name][0].losses
        lines.append(
            f"| {name} | {made['tokens'] / one['step_seconds']:,.0f} | {one['step_seconds'] / ours['step_seconds']:.2f} | "
            f"{in_bytes(one['peak_bytes'])} | {ours['peak_bytes'] / one['peak_bytes']:.2f} | {one['first_step_s']:.1f} s | "
            f"{losses[1]:.4f} to {losses[-1]:.4f} |"
        )
    return "\n".join(lines)
