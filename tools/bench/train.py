"""The loop, next to a bare transformers loop."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from trainers import host
from trainers.config.choices import DataSource, ObjectiveName, Precision, Schedule, TooLong, WandbMode
from trainers.config.derived import peak_lr
from trainers.config.schema import DataConfig, LogConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from trainers.processes import allocator_environment
from trainers.units import in_bytes

if TYPE_CHECKING:
    from trainers.data.loader import Loader
    from trainers.data.prepare import Prepared
    from trainers.model.blueprint import Blueprint
    from trainers.world import World


SHAPES = {
    "cpt": "packed rows, every token trained",
    "sft": "packed chats, answers trained",
    "unpacked": "padded chats, answers trained",
}
VARIANTS = ("fulltune", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench train`."""
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 rows of 512 tokens (default 12)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each loop, in turn (default 3)")


def run(options: argparse.Namespace) -> None:
    """Print our loop against a bare transformers loop on the same model and batches, each in a process of its own, in turn."""
    table = Table(
        "rows",
        "tokens/s: fulltune",
        "transformers",
        "ratio",
        "peak bytes: fulltune",
        "transformers",
        "ratio",
        title=f"{options.steps} steps, median of {options.runs} runs each, {host.cores()} cores",
    )
    for shape, words in SHAPES.items():
        figures: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.runs):
            for variant in VARIANTS:
                figures[variant].append(_in_process(shape, variant, options.steps))
        ours, bare = (
            {key: statistics.median(run[key] for run in figures[variant]) for key in ("speed", "peak", "loss")} for variant in VARIANTS
        )
        if abs(ours["loss"] - bare["loss"]) > 1e-3 * abs(bare["loss"]):
            raise RuntimeError(f"the two loops do not train the same: last losses {ours['loss']} and {bare['loss']}")
        speed, peak = ours["speed"] / bare["speed"], ours["peak"] / bare["peak"]
        sizes = (in_bytes(ours["peak"]), in_bytes(bare["peak"]), f"{peak:.2f}")
        table.add_row(f"{shape}: {words}", f"{ours['speed']:,.0f}", f"{bare['speed']:,.0f}", f"{speed:.2f}", *sizes)
    Console().print(table)


def _in_process(shape: str, variant: str, steps: int) -> dict[str, float]:
    line = [sys.executable, "-m", "tools.bench", "one", shape, variant, "--steps", str(steps)]
    env = os.environ | (allocator_environment(os.environ) if variant == "fulltune" else {})  # as the launcher starts a rank
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_one(options: argparse.Namespace) -> None:
    """Train with one of the two loops and print {speed, peak, loss}: tokens a second after the first step, bytes above the start."""
    import torch

    from trainers.data.loader import Loader
    from trainers.data.prepare import prepare
    from trainers.data.tokenizer import load_tokenizer, pad_id
    from trainers.model.blueprint import make_blueprint
    from trainers.world import World

    torch.set_num_threads(host.cores())
    world = World.from_environment()
    world.connect()
    with tempfile.TemporaryDirectory() as run_dir:
        config = _config(options.shape, options.steps, run_dir)
        data = prepare(config)
        tokenizer = load_tokenizer(config)
        blueprint = make_blueprint(config.model, 0, tokenizer)
        loader = Loader(data.train, config.train, seed=0, rank=0, world_size=1, pad_id=pad_id(tokenizer))
        loop = _ours if options.variant == "fulltune" else _bare_loop
        speed, peak, loss = loop(config, world, data, blueprint, loader)
    print(json.dumps({"speed": speed, "peak": peak, "loss": loss}))


def _config(shape: str, steps: int, run_dir: str) -> RunConfig:
    """A Llama of 8.8 million parameters with a vocabulary of 16,384, in float32."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    return RunConfig(
        run_dir=run_dir,
        model=ModelConfig(architecture={"model_type": "llama", "tie_word_embeddings": True, **sizes}, train_tokenizer=16384),
        data=DataConfig(
            source=DataSource.python_docs,
            seq_len=512,
            packing=shape != "unpacked",
            too_long=TooLong.split if shape == "cpt" else TooLong.truncate,
            max_lost_fraction=1.0,
        ),
        objective=ObjectiveConfig(name=ObjectiveName.cpt if shape == "cpt" else ObjectiveName.sft),
        optim=OptimConfig(lr=1e-3, schedule=Schedule.constant),
        train=TrainConfig(steps=steps, global_batch=8, microbatch=4, precision=Precision.fp32),
        log=LogConfig(wandb=WandbMode.disabled),
    )


Figures = tuple[float, float, float]


def _ours(config: RunConfig, world: World, data: Prepared, blueprint: Blueprint, loader: Loader) -> Figures:
    """Train with the product's own loop and engine; its metrics.jsonl gives the time of each step."""
    from trainers.engines.build import build_engine
    from trainers.loop import train as train_run
    from trainers.rundir.attempt import Attempt
    from trainers.rundir.metrics import host_bytes_peak
    from trainers.rundir.rows import read_rows, steps

    engine = build_engine(config, world, blueprint)
    before = host_bytes_peak()
    train_run(config, world, Attempt(Path(config.run_dir)), engine, data, loader, 1.0)
    rows = steps(read_rows(Path(config.run_dir)))
    tokens = sum(row["input_tokens_per_second"] * row["step_seconds"] for row in rows[1:])
    return tokens / sum(row["step_seconds"] for row in rows[1:]), host_bytes_peak() - before, rows[-1]["loss"]


def _bare_loop(config: RunConfig, world: World, data: Prepared, blueprint: Blueprint, loader: Loader) -> Figures:
    """Train as transformers' documentation does: the model computes the loss from labels, AdamW as it comes, gradients clipped."""
    import torch

    from trainers.batch import IGNORE
    from trainers.rundir.metrics import host_bytes_peak

    model = blueprint.build("cpu")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr(config.optim, config.peft).value, betas=(0.9, 0.95), weight_decay=0.0)
    before, tokens, seconds, total = host_bytes_peak(), 0, 0.0, 0.0
    for step in range(loader.num_steps):
        started = time.perf_counter()
        batches = loader.step(step)
        weight = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
            loss = model(**inputs, labels=batch.labels, shift_labels=batch.labels, num_items_in_batch=weight).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step:
            tokens += sum(batch.num_tokens for batch in batches)
            seconds += time.perf_counter() - started
    return tokens / seconds, host_bytes_peak() - before, total
