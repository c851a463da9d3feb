"""What a process of `tools.bench gpu` measures: one order, in our loop or a peer's, on random weights and rows."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from launcher.compose import compose
from launcher.config import run_config
from tools.bench.gpu import peers
from tools.bench.gpu.bench import Bench, Figures
from tools.bench.ranks import explaining, leave
from tools.bench.training import plain_tokenizer
from trainers.batch import Batch
from trainers.checkpoint import Checkpointer
from trainers.config.choices import Precision
from trainers.config.schema import RunConfig
from trainers.data.prepare import Prepared
from trainers.engines.base import Engine
from trainers.engines.build import build_engine
from trainers.health.isolation import require_isolation
from trainers.loop import train
from trainers.model.blueprint import make_blueprint
from trainers.peft.base import FullTraining
from trainers.rundir.attempt import Attempt
from trainers.rundir.metrics import device_bytes_peak
from trainers.rundir.rows import read_rows, steps
from trainers.world import World


def run_rank(options: argparse.Namespace) -> None:
    """Wait for an order on standard input, measure, and leave the values or the reason."""
    folder = Path(options.folder)
    line = sys.stdin.readline()
    if not line:
        return
    with explaining(folder):
        order = json.loads(line)
        config = _config(order["overrides"], folder)
        leave(folder, "done", json.dumps(KINDS[order["kind"]](config, order)))


def _config(overrides: list[str], folder: Path) -> RunConfig:
    """Return the checked settings of the overrides; raises ConfigError with what the launcher says of those that it refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return run_config(compose([*overrides, f"run_dir={folder}"]))
    except SystemExit:
        raise Refused(" ".join(said.getvalue().split())[:300]) from None


class Refused(Exception):
    """The launcher does not take the settings."""


class Unsaved(Checkpointer):
    """Saves nothing: the loop ends with a checkpoint that nobody reads."""

    def save(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


def measure_training(config: RunConfig, order: dict[str, Any]) -> Figures:
    """Train in our loop."""
    bench = Bench.of(config, order)
    started = time.perf_counter()
    with closing(bench.engine()) as engine:
        _wait_for(bench.world.device)
        build_seconds = time.perf_counter() - started
        _forget_peak()
        shapes, adaptation = engine.shapes(), engine.adaptation
        reached = {name: shape for name, shape in shapes.items() if name not in adaptation.unreached}
        flops = bench.flops(reached, set(reached) - set(adaptation.trained))
        data = Prepared(path=Path(config.run_dir), train=bench.table, eval=None, report={}, reused=True)
        attempt = Attempt(Path(config.run_dir))
        saves = Unsaved(config.checkpoint, attempt, bench.world)
        train(config, bench.world, attempt, engine, data, bench.loader, flops, saves)
        rows = steps(read_rows(Path(config.run_dir)))
        seconds = [row["step_seconds"] for row in rows]
        tokens = [round(row["input_tokens_per_second"] * row["step_seconds"]) for row in rows]
        attention = getattr(engine.model.config, "_attn_implementation", None)
        figures = bench.speed(seconds, tokens, flops) | {"build_seconds": build_seconds, "peak_bytes": device_bytes_peak()}
        parameters = sum(math.prod(shape) for shape in shapes.values())
        return figures | {"losses": [row["loss"] for row in rows], "parameters": parameters, "attention": attention}


def measure_plan(config: RunConfig, order: dict[str, Any]) -> Figures:
    """Return the bytes that a plan predicts for the same settings; the device is hidden from this process."""
    from trainers.plan.inputs import read_model
    from trainers.plan.simulate import ranks, simulate

    torch.set_num_threads(1)
    with ranks(1, 1) as world:
        found = simulate(config, read_model(config)[0], world, config.data.seq_len, gpus=True)
    return {"plan_bytes": found.peak.total}


def measure_isolation(config: RunConfig, order: dict[str, Any]) -> Figures:
    """Ask several small models in the compute type whether packed documents see each other."""
    words = []
    for name, architecture in order["models"].items():
        config.model.architecture, config.model.train_tokenizer = dict(architecture), 4096
        try:
            bench = Bench.of(config, order)
            with closing(bench.engine()) as engine:
                words.append(f"{name} {_isolated(engine, config, bench.world)}")
        except Exception as error:  # whatever an architecture or a kernel raises is what came of it
            words.append(f"{name}: {' '.join(str(error).split())[:160] or type(error).__name__}")
    return {"words": "; ".join(words)}


def _isolated(engine: Engine, config: RunConfig, world: World) -> str:
    engine.train(False)
    rounds = config.train.precision is not Precision.fp32 and any(".experts" in name for name in engine.shapes())
    vocab_size = engine.model.config.get_text_config().vocab_size
    require_isolation(lambda batch: engine.forward(batch.to(world.device)).logps, vocab_size, config.train.microbatch, rounds)
    return f"apart ({getattr(engine.model.config, '_attn_implementation', None)})"


def measure_export(config: RunConfig, order: dict[str, Any]) -> Figures:
    """Time an export, opening it with plain transformers, and loading it into an engine; both must give the same log-probabilities."""
    from trainers.model.export import export, reopen
    from trainers.model.forward import forward

    bench = Bench.of(config, order)
    folder, tokenizer = Path(config.run_dir) / "exported", plain_tokenizer()
    batch = bench.loader.step(0)[0]
    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = work()
        _wait_for(bench.world.device)
        seconds[what] = time.perf_counter() - started
        return found

    with closing(bench.engine()) as engine:
        form = cast(FullTraining, engine.adaptation).form
        timed("export", partial(export, engine.weights(), form, bench.blueprint, tokenizer, [], folder, write=True))
        wanted = _logps(engine, batch, bench.world)
        del form
    del engine
    model = timed("opened by transformers", lambda: nn.Module.to(reopen(folder, False), bench.world.device))
    with torch.no_grad():
        found = forward(model, batch.to(bench.world.device)).logps.float().cpu()
    del model
    config.model.id, config.model.architecture, config.model.train_tokenizer = str(folder), {}, 0
    loaded = make_blueprint(config.model, config.seed, tokenizer)
    with closing(timed("load into an engine", lambda: build_engine(config, bench.world, loaded))) as engine:
        again = _logps(engine, batch, bench.world)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    words = [f"{what} {taken:.1f} s" for what, taken in seconds.items()]
    worst = (float((logps - wanted).abs().mean()) for logps in (found, again))
    return {"words": f"{size:.2f} GiB; {'; '.join(words)}; nats a token from the trainer {next(worst):.1e}, loaded again {next(worst):.1e}"}


def _logps(engine: Engine, batch: Batch, world: World) -> Tensor:
    engine.train(False)
    with torch.no_grad():
        return engine.forward(batch.to(world.device)).logps.float().cpu()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


KINDS: dict[str, Callable[[RunConfig, dict[str, Any]], Figures]] = {
    "train": measure_training,
    "plan": measure_plan,
    "isolation": measure_isolation,
    "export": measure_export,
    "bare": lambda config, order: peers.bare(Bench.of(config, order)),
    "trl": lambda config, order: peers.trl(Bench.of(config, order)),
}
"""What each kind of order is measured by."""
