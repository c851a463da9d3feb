"""Engines beside each other on the same random model and rows."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from tools.bench.arguments import at_least
from tools.bench.machine import gpu_words, versions
from tools.bench.ranks import FAILED, STOPPED, RanksFailed, explaining, leave, raise_on_signals, start_ranks, wait_for
from tools.markdown import cell_of, put_section
from trainers import host
from trainers.config.schema import (
    DataConfig,
    EngineConfig,
    EngineName,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    ObjectiveName,
    Offload,
    OptimConfig,
    Precision,
    RunConfig,
    Schedule,
    TrainConfig,
    WandbMode,
)
from trainers.rundir.rows import last_step, read_rows, steps

if TYPE_CHECKING:
    from trainers.checkpoint import Checkpointer
    from trainers.data.loader import Loader
    from trainers.data.prepare import Prepared
    from trainers.data.table import TokenTable
    from trainers.engines.base import Engine
    from trainers.rundir.attempt import Attempt
    from trainers.world import World


PRESETS = sorted(file.stem for file in (Path(__file__).parents[2] / "conf" / "engine").glob("*.yaml") if not file.stem.endswith("nvme"))
"""Engines by the names that the launcher has for them; NVMe needs a path of this machine."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine's ranks measured: the rows of its metrics.jsonl, and what rank 0 knows besides."""

    steps: list[dict[str, Any]]
    build_seconds: float
    parameters: int
    device: str
    """Name of the GPU; empty on a CPU."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    """What `tools.bench checkpoint` knows of each save."""
    writing: list[bool] = field(default_factory=list)
    """And of each step: whether a save was in flight at its end."""

    def median(self, figure: str) -> float | None:
        """Return a figure's median over the steps after the first; None where it is not known."""
        values = [row[figure] for row in self.steps[1:] if row[figure] is not None]
        return statistics.median(values) if values else None

    def speed(self) -> float:
        """Return tokens a second over all ranks, padding aside."""
        return self.median("input_tokens_per_second") or math.nan

    def losses(self) -> str:
        """Return the first and the last loss."""
        return " to ".join("not finite" if row["loss"] is None else f"{row['loss']:.4f}" for row in (self.steps[0], self.steps[-1]))

    def difference(self, other: Run, figure: str) -> float:
        """Return the largest relative difference of a figure to another run's over all steps; infinite where one is not finite."""
        pairs = [(ours[figure], theirs[figure]) for ours, theirs in zip(self.steps, other.steps, strict=True)]
        return max(math.inf if None in pair else abs(pair[0] - pair[1]) / max(abs(pair[1]), 1e-30) for pair in pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench engines`."""
    parser.add_argument("--engine", nargs="+", choices=PRESETS, default=PRESETS, help="presets of conf/engine, each in turn (default all)")
    parser.add_argument("--ranks", type=at_least(1), help="ranks (default: one a GPU, else 2)")
    parser.add_argument("--parameters", type=at_least(1), default=10_000_000, help="about so many, as 1e9 (default 10e6)")
    parser.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    parser.add_argument("--seq-len", type=at_least(16), default=512, help="tokens a row (default 512)")
    parser.add_argument("--microbatch", type=at_least(1), default=2, help="rows a rank and step (default 2)")
    parser.add_argument("--steps", type=at_least(2), default=12, help="optimizer steps; the first is not timed (default 12)")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, what each engine makes of the same model and rows; 1 if one failed or none ran, 130 on Ctrl-C."""
    return compare(options, "engine-rank", _section)


Section = Callable[[argparse.Namespace, int, dict[str, "Run | str"]], str]
"""Returns the Markdown of what engines made of their order on a number of ranks."""


def compare(options: argparse.Namespace, command: str, section: Section, folder: Path | None = None) -> int:
    """Let each engine's ranks run a sub-command, in a temporary directory in `folder`; print the section. Returns the exit code."""
    raise_on_signals()
    try:
        return _compare(options, command, section, folder)
    except KeyboardInterrupt:
        print("stopped: no process and no temporary file is left", file=sys.stderr)
        return STOPPED


def _compare(options: argparse.Namespace, command: str, section: Section, folder: Path | None) -> int:
    import torch

    gpus = torch.cuda.device_count()
    ranks = options.ranks or gpus or 2
    if gpus and ranks > gpus:
        options.error(f"--ranks {ranks}: this machine has {gpus} GPU(s), and a rank takes one")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        options.error(f"--out {options.out}: there is no such directory")
    runs: dict[str, Run | str] = {}
    failed = False
    for name in dict.fromkeys(options.engine):
        try:
            with tempfile.TemporaryDirectory(prefix="fulltune-bench-", dir=folder) as run_dir:
                runs[name] = _train(options, command, name, ranks, Path(run_dir), on_gpu=bool(gpus))
        except RanksFailed as error:
            failed = True
            runs[name] = f"failed: {error.reason}"
            print(f"{error.said}\n{name} failed: {error.reason}".strip(), file=sys.stderr)
    text = section(options, ranks, runs)
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    return FAILED if failed or not any(isinstance(run, Run) for run in runs.values()) else 0


def _train(options: argparse.Namespace, command: str, name: str, ranks: int, run_dir: Path, on_gpu: bool) -> Run | str:
    """Train with an engine on ranks of its own; returns why not where it is not installed, and raises RanksFailed if it fails."""
    if engine_preset(name)["name"] is EngineName.zero3 and importlib.util.find_spec("deepspeed") is None:
        return "not installed: pip install deepspeed"
    kept = {key: value for key, value in vars(options).items() if isinstance(value, (bool, int, str))}
    (run_dir / "order.json").write_text(json.dumps(kept | {"engine": name}))
    threads = 1 if ranks > 1 and not on_gpu else host.threads_per_rank(ranks)
    console = Console(stderr=True)
    with console.status(f"{name}: starting") as status, start_ranks([command, str(run_dir)], ranks, run_dir, threads) as children:
        if not console.is_terminal:
            print(f"{name}: {ranks} rank(s)", file=sys.stderr)
        wait_for(children, run_dir, "done", lambda: status.update(f"{name}: {_progress(run_dir, options.steps)}"))
    rows = steps(read_rows(run_dir))
    run = Run(steps=rows, **json.loads((run_dir / "0.done").read_text()))
    print(f"{name}: {len(rows)} steps, losses {run.losses()}", file=sys.stderr)
    return run


def _progress(run_dir: Path, num_steps: int) -> str:
    done = last_step(steps(read_rows(run_dir)))
    return f"step {done} of {num_steps}" if done else "building"


def engine_preset(name: str) -> dict[str, Any]:
    """Return the fields of EngineConfig that conf/engine/NAME.yaml sets; the launcher and Hydra may not be there."""
    import yaml

    preset: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "conf" / "engine" / f"{name}.yaml").read_text())
    kinds: dict[str, Callable[[Any], Any]] = {"name": EngineName, "offload_param": Offload, "offload_optimizer": Offload}
    return {key: kinds[key](value) if key in kinds else value for key, value in preset.items()}


def run_rank(options: argparse.Namespace) -> None:
    """Train as one rank."""
    from trainers.checkpoint import Checkpointer

    with training_rank(Path(options.run_dir)) as (training, _, _):
        checkpointer = Checkpointer(training.config.checkpoint, training.attempt, training.world)
        checkpointer.save = lambda *_, **__: None  # type: ignore[method-assign] # the loop ends with one, which nobody reads
        training.run(checkpointer)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a rank trains, and with what."""

    config: RunConfig
    world: World
    attempt: Attempt
    engine: Engine
    data: Prepared
    rows: Loader
    flops_per_token: float

    def run(self, checkpointer: Checkpointer) -> None:
        """Train in our loop."""
        from trainers.loop import train

        train(self.config, self.world, self.attempt, self.engine, self.data, self.rows, self.flops_per_token, checkpointer)


@contextmanager
def training_rank(run_dir: Path) -> Iterator[tuple[Training, dict[str, Any], dict[str, Any]]]:
    """Give a rank its training, its order and a place for a Run's figures; leave these, or why there are none, in run_dir.

    It trains with the preset's engine, from random weights, in our loop, on rows that depend on nothing but their number.
    """
    with explaining(run_dir):
        order = json.loads((run_dir / "order.json").read_text())

        import torch
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        import trainers.engines.fsdp  # noqa: F401 - its imports are not part of building
        from trainers.data.loader import Loader
        from trainers.data.prepare import Prepared
        from trainers.engines.build import build_engine, require_parts
        from trainers.model.blueprint import flops_per_token, make_blueprint
        from trainers.processes import die_with_parent
        from trainers.rundir.attempt import Attempt
        from trainers.world import World

        die_with_parent()
        world = World.from_environment()
        config = _config(order, run_dir, world.size)
        require_parts(config, world)
        world.connect()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"-": 0}, unk_token="-")), pad_token="-")
        blueprint = make_blueprint(config.model, config.seed, tokenizer)
        table = _packed_rows(config.train.global_batch * order["steps"], order["seq_len"], blueprint.config.vocab_size)
        data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
        loader = Loader(table, config.train, seed=config.seed, rank=world.rank, world_size=world.size, pad_id=0)
        world.barrier()
        started = time.perf_counter()
        figures: dict[str, Any] = {}
        with closing(build_engine(config, world, blueprint)) as engine:
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            figures["build_seconds"] = world.max([time.perf_counter() - started])[0]
            flops = flops_per_token(engine.shapes(), blueprint.config, table.mean_attended())
            training = Training(
                config=config,
                world=world,
                attempt=Attempt(Path(config.run_dir)),
                engine=engine,
                data=data,
                rows=loader,
                flops_per_token=flops,
            )
            yield training, order, figures
            figures["parameters"] = sum(math.prod(shape) for shape in engine.shapes().values())
        figures["device"] = torch.cuda.get_device_name() if world.device.type == "cuda" else ""
        leave(run_dir, "done", json.dumps(figures))
        sys.stdin.readline()


def _config(order: dict[str, Any], run_dir: Path, ranks: int) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(architecture={"model_type": "llama"} | llama_sizes(order["parameters"], order["seq_len"])),
        data=DataConfig(path="unused", seq_len=order["seq_len"]),
        objective=ObjectiveConfig(name=ObjectiveName.cpt),
        engine=EngineConfig(**engine_preset(order["engine"])),
        optim=OptimConfig(lr=1e-4, schedule=Schedule.constant),
        train=TrainConfig(
            steps=order["steps"],
            global_batch=ranks * order["microbatch"],
            microbatch=order["microbatch"],
            precision=Precision(order["precision"]),
            activation_checkpointing=order["checkpointing"],
        ),
        log=LogConfig(wandb=WandbMode.disabled),
    )


def llama_sizes(parameters: int, seq_len: int) -> dict[str, int]:
    """Return a Llama of about so many parameters: width / depth near 128, a quarter of the weights or less for the vocabulary."""
    width = 128 * max(1, round((parameters * 128 / 12) ** (1 / 3) / 128))
    inner = 64 * round(width * 8 / 3 / 64)
    vocabulary = 1 << max(8, min(15, int(math.log2(max(1, parameters / (8 * width))))))
    block = 3 * width * width + 3 * width * inner + 2 * width
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": max(1, round((parameters - 2 * vocabulary * width) / block)),
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": max(2048, seq_len),
    }


def _packed_rows(rows: int, seq_len: int, vocabulary: int) -> TokenTable:
    """Return at least `rows` packed rows of random documents, an eighth of a row to a whole one long, frequent tokens among them."""
    from trainers.data.pack import pack
    from trainers.data.table import TokenTable

    random = np.random.default_rng(0)
    lengths = random.integers(max(2, seq_len // 8), seq_len + 1, 2 * rows, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = (vocabulary * random.random(offsets[-1]) ** 3).astype(np.int32)
    supervised = np.ones(len(tokens), np.uint8)
    supervised[offsets[:-1]] = 0
    order, starts = pack(lengths, seq_len)
    return TokenTable(tokens=tokens, supervised=supervised, offsets=offsets, order=order, rows=starts)


def _section(options: argparse.Namespace, ranks: int, runs: dict[str, Run | str]) -> str:
    """Return the Markdown of a comparison: command, machine, versions, table, and what the table's words mean."""
    done = done_of(runs)
    extra = ", activation checkpointing" if options.checkpointing else ""
    parts = [*head(options, ranks, done, extra), "\n".join(_table(runs, done)), *([_legend(done)] if done else [])]
    return "\n\n".join(parts) + "\n"


def done_of(runs: dict[str, Run | str]) -> list[tuple[str, Run]]:
    """Return the engines that came to their end."""
    return [(name, run) for name, run in runs.items() if isinstance(run, Run)]


def head(options: argparse.Namespace, ranks: int, done: list[tuple[str, Run]], extra: str = "") -> list[str]:
    """Return a section's heading, and what it was measured on."""
    machine = f"{ranks} of {gpu_words(done[0][1].device)}" if done and done[0][1].device else f"{host.cores()} cores, no GPU"
    model = f"{done[0][1].parameters:,}" if done else f"about {options.parameters:,}"
    what = f"{options.steps} steps of {ranks * options.microbatch} packed rows of {options.seq_len} tokens"
    about = f"{ranks} rank(s), a Llama of {model} parameters from random weights in {options.precision}{extra}, {what}."
    return [f"## `{options.line}`", f"{time.strftime('%Y-%m-%d')}, {machine}; {versions('torch', 'transformers', 'deepspeed')}. {about}"]


def _table(runs: dict[str, Run | str], done: list[tuple[str, Run]]) -> list[str]:
    """Return the table's lines: a row for each engine, a column for what is known of one; times only of a GPU."""
    if not done:
        return table_lines(runs, {"result": lambda run: None})
    name, first = done[0]
    on_gpu = bool(first.device)
    columns: dict[str, Callable[[Run], str | None]] = {
        "tokens/s": lambda run: f"{run.speed():,.0f}" if on_gpu else None,
        f"tokens/s : {name}": lambda run: f"{run.speed() / first.speed():.2f}",
        "MFU": lambda run: None if (mfu := run.median("mfu")) is None else f"{mfu:.1%}",
        "peak device bytes a rank": lambda run: _mib(run.steps[-1]["device_bytes_peak"]),
        "peak host bytes a rank": lambda run: _mib(run.steps[-1]["host_bytes_peak"]),
        "seconds to build": lambda run: f"{run.build_seconds:.1f}" if on_gpu else None,
        f"time to build : {name}": lambda run: None if on_gpu else f"{run.build_seconds / first.build_seconds:.2f}",
        f"loss from {name}": lambda run: _relative(run.difference(first, "loss")),
        f"gradient norm from {name}": lambda run: _relative(run.difference(first, "grad_norm")),
    }
    return table_lines(runs, {title: cell for title, cell in columns.items() if any(cell(run) is not None for _, run in done)})


def table_lines(runs: dict[str, Run | str], columns: Mapping[str, Callable[[Run], str | None]]) -> list[str]:
    """Return a table's lines: each engine's cells, or why it has none."""
    lines = [["engine", *columns], ["---"] * (1 + len(columns))]
    for engine, run in runs.items():
        cells = [cell(run) or "-" for cell in columns.values()] if isinstance(run, Run) else [cell_of(run), *[""] * (len(columns) - 1)]
        lines.append([engine, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _legend(done: list[tuple[str, Run]]) -> str:
    name, first = done[0]
    times = "" if first.device else " Only ratios of times are given: absolute ones of a CPU say nothing about a GPU."
    return (
        f"tokens/s: all ranks together, padding aside, the median of the steps after the first.{times} Peaks are the largest rank's, "
        f"building included; the host's is the process's resident size, libraries included. Parity: the largest relative difference "
        f"to {name} over all {len(first.steps)} steps, with AdamW at 1e-4, clipped at 1; {name}'s losses went from {first.losses()}."
    )


def _relative(difference: float) -> str:
    return (f"{difference:.1e}" if difference else "0") if math.isfinite(difference) else "not finite"


def _mib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**20:,.0f} MiB"
