"""Measure this checkout on this machine: preparation and packing, the loop, reading a model, the engines beside each other.

python -m tools.bench data
python -m tools.bench data --path FILE --tokenizer DIR --seq-len 2048
python -m tools.bench train
python -m tools.bench load --ranks 2 4
python -m tools.bench engines --parameters 1e9 --precision bf16 --out FILE.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainers import host
from trainers.config import (
    ConfigError,
    DataConfig,
    DataSource,
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
    TooLong,
    TrainConfig,
    WandbMode,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainers.data.encode import Documents, Encoder
    from trainers.data.loader import Loader
    from trainers.data.prepare import Prepared
    from trainers.data.sources import Row
    from trainers.data.table import TokenTable
    from trainers.model import Blueprint
    from trainers.world import World

REFERENCE = {"efficiency": 0.9890, "pack_seconds": 0.14, "rows_per_second": 7641}
"""The best public packer on gsm8k_train with GPT-2's tokenizer at 2,048 tokens, tokenising on one core."""


def data(options: argparse.Namespace) -> None:
    """Print rows a second with one process and with all cores, beside the bare tokenizer, and how well rows are packed."""
    from trainers.data import prepare, sources
    from trainers.data.encode import encoder_of
    from trainers.data.pack import pack
    from trainers.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        config = _data_config(options, folder)
        tokenizer = load_tokenizer(config)
        rows = list(sources.rows(config.data, sources.data_path(config.data), config.objective.name))
        encoder = encoder_of(config, tokenizer, prepare.find_layout(config, sources.data_path(config.data)))
        table = Table(
            "measured",
            "here",
            "best public packer on gsm8k_train, gpt2, 2,048",
            title=f"{len(rows):,} rows, {options.seq_len} tokens a row",
        )
        bare = _bare(tokenizer, encoder, rows)
        table.add_row("bare tokenizer, one core, offsets and no mask", f"{bare:,.0f} rows/s", "")
        for processes in sorted({1, sources.cores()}):
            rate, documents = _encode(encoder, rows, processes)
            reference = f"{REFERENCE['rows_per_second']:,} rows/s" if processes == 1 else ""
            table.add_row(f"rows to masked tokens, {processes} process(es)", f"{rate:,.0f} rows/s", reference)
        lengths = np.concatenate([part.lengths for part in documents])
        started = time.perf_counter()
        packed = len(pack(lengths, options.seq_len)[1]) - 1
        seconds = time.perf_counter() - started
    table.add_row("packing", f"{seconds:.3f} s", f"{REFERENCE['pack_seconds']:.2f} s")
    efficiency = lengths.sum() / (packed * options.seq_len)
    table.add_row(f"filled, in {packed:,} rows", f"{efficiency:.2%}", f"{REFERENCE['efficiency']:.2%}")
    table.add_row("fewest rows possible", f"{-(-int(lengths.sum()) // options.seq_len):,}", "")
    Console().print(table)


def _data_config(options: argparse.Namespace, folder: str) -> RunConfig:
    files = options.path is not None
    model = ModelConfig(tokenizer=options.tokenizer) if options.tokenizer else ModelConfig(train_tokenizer=4096)
    source = DataSource.files if files else DataSource.python_docs
    return RunConfig(
        model=model,
        data=DataConfig(source=source, path=options.path, template=options.template, seq_len=options.seq_len, prepared_dir=folder),
    )


def _bare(tokenizer: PreTrainedTokenizerFast, encoder: Encoder, rows: list[Row]) -> float:
    """Return rows a second of the tokenizer's own call on the rendered texts, on one core."""
    from trainers.data.sources import parse

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = [encoder.render(parse(row))[0].text for row in islice(rows, 4000)]
    tokenizer(texts[:100])
    started = time.perf_counter()
    for at in range(0, len(texts), 256):
        tokenizer(texts[at : at + 256], add_special_tokens=False, return_offsets_mapping=True)
    return len(texts) / (time.perf_counter() - started)


def _encode(encoder: Encoder, rows: list[Row], processes: int) -> tuple[float, list[Documents]]:
    from trainers.data.prepare import encode_rows

    started = time.perf_counter()
    documents = list(encode_rows(encoder, iter(rows), processes))
    return len(rows) / (time.perf_counter() - started), documents


SHAPES = {
    "cpt": "packed rows, every token trained",
    "sft": "packed chats, answers trained",
    "unpacked": "padded chats, answers trained",
}
VARIANTS = ("fulltune", "transformers")


def train(options: argparse.Namespace) -> None:
    """Print our loop against a bare transformers loop on the same model and batches, each in a process of its own, in turn."""
    table = Table(
        "rows",
        "tokens/s: fulltune",
        "transformers",
        "ratio",
        "peak bytes: fulltune",
        "transformers",
        "ratio",
        title=f"{options.steps} steps, median of {options.runs} runs each, {len(os.sched_getaffinity(0))} cores",
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
        sizes = (f"{ours['peak'] / 2**20:,.0f} MiB", f"{bare['peak'] / 2**20:,.0f} MiB", f"{peak:.2f}")
        table.add_row(f"{shape}: {words}", f"{ours['speed']:,.0f}", f"{bare['speed']:,.0f}", f"{speed:.2f}", *sizes)
    Console().print(table)


def _in_process(shape: str, variant: str, steps: int) -> dict[str, float]:
    line = [sys.executable, "-m", "tools.bench", "one", shape, variant, "--steps", str(steps)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def one(options: argparse.Namespace) -> None:
    """Train with one of the two loops and print {speed, peak, loss}: tokens a second after the first step, bytes above the start."""
    import torch

    from trainers.data.loader import Loader
    from trainers.data.prepare import prepare
    from trainers.data.tokenizer import load_tokenizer, pad_id
    from trainers.model import make_blueprint
    from trainers.world import World

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    world = World.from_environment()
    world.connect()
    with tempfile.TemporaryDirectory() as run_dir:
        config = _train_config(options.shape, options.steps, run_dir)
        data = prepare(config)
        tokenizer = load_tokenizer(config)
        blueprint = make_blueprint(config.model, 0, tokenizer)
        loader = Loader(data.train, config.train, seed=0, rank=0, world_size=1, pad_id=pad_id(tokenizer))
        run = _ours if options.variant == "fulltune" else _bare_loop
        speed, peak, loss = run(config, world, data, blueprint, loader)
    print(json.dumps({"speed": speed, "peak": peak, "loss": loss}))


def _train_config(shape: str, steps: int, run_dir: str) -> RunConfig:
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
    from trainers.engines.base import build_engine
    from trainers.loop import train as train_run
    from trainers.metrics import host_bytes_peak
    from trainers.status import Attempt

    engine = build_engine(config, world, blueprint)
    before = host_bytes_peak()
    train_run(config, world, Attempt(Path(config.run_dir)), engine, data, loader, 1.0)
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(row["input_tokens_per_second"] * row["step_seconds"] for row in rows[1:])
    return tokens / sum(row["step_seconds"] for row in rows[1:]), host_bytes_peak() - before, rows[-1]["loss"]


def _bare_loop(config: RunConfig, world: World, data: Prepared, blueprint: Blueprint, loader: Loader) -> Figures:
    """Train as transformers' documentation does: the model computes the loss from labels, AdamW as it comes, gradients clipped."""
    import torch

    from trainers.batch import IGNORE
    from trainers.metrics import host_bytes_peak

    model = blueprint.build("cpu")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, betas=(0.9, 0.95), weight_decay=0.0)
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


SAMPLE_S = 0.02
"""Seconds between two looks at the ranks: at their memory, or whether they are done."""
LOAD_LIMIT_S, TOGETHER_S = 600, 1.0
REASON_LENGTH = 400


def load(options: argparse.Namespace) -> None:
    """Print what the ranks hold together while they load a checkpoint, beside what it is as float32 once over all of them."""
    console = Console(stderr=True)
    table = Table("engine", "ranks", "float32 weights, all ranks", "memory at the peak, all ranks", "ratio", "seconds")
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"writing a checkpoint of {options.gigabytes:g} GB in bfloat16 to {folder}")
        total = 4 * _write_checkpoint(Path(folder) / "model", options.gigabytes)
        for engine in options.engine:
            for ranks in options.ranks:
                console.print(f"loading it with {engine} on {ranks} ranks")
                peak, seconds = _measure_loading(Path(folder), engine, ranks)
                table.add_row(
                    engine, str(ranks), f"{total / 2**20:,.0f} MiB", f"{peak / 2**20:,.0f} MiB", f"{peak / total:.2f}", f"{seconds:.1f}"
                )
    Console().print(table)
    Console().print("memory: the sum of /proc/PID/smaps_rollup's Pss, above what it was before the checkpoint was opened", style="dim")


def _write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a Llama of random weights in bfloat16, a file for each block, and return its number of parameters."""
    from safetensors.torch import save_file
    from torch import bfloat16

    from trainers.weights import origin_of

    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "num_key_value_heads": 12}
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 1536) / (4 * 1536**2 + 3 * 1536 * 4096)))
    blueprint = _llama(sizes | {"num_hidden_layers": layers})
    model = blueprint.build()
    origin, shapes = origin_of(model, blueprint), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    blueprint.config.dtype = bfloat16
    blueprint.config.save_pretrained(folder)
    weight_map = {name: "-".join(name.split(".")[:3]) + ".safetensors" for name in origin.names()}
    for file in dict.fromkeys(weight_map.values()):
        names = [name for name in origin.names() if weight_map[name] == file]
        save_file({name: origin.read(name, (0,) * len(shapes[name]), shapes[name]).to(bfloat16) for name in names}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(parameter.numel() for parameter in model.parameters())


def _llama(sizes: dict[str, int]) -> Blueprint:
    from transformers import LlamaConfig

    from trainers.model import Blueprint

    return Blueprint(config=LlamaConfig(**sizes), folder=None, revision=None, seed=0, trust_remote_code=False)


def _measure_loading(folder: Path, engine: str, ranks: int) -> tuple[float, float]:
    """Start ranks, let them load together, and return bytes at the peak above the start, and seconds of the slowest."""
    samples: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run_dir = Path(name)
        with _ranks(["load-rank", str(folder), engine, name], ranks, run_dir) as children:
            _wait(children, run_dir, "ready", lambda: None, LOAD_LIMIT_S)
            baseline = _memory(children)
            for child in children:
                _write_line(child)
            _wait(children, run_dir, "done", lambda: samples.append((time.monotonic(), _memory(children))), LOAD_LIMIT_S)
        figures = [json.loads((run_dir / f"{rank}.done").read_text()) for rank in range(ranks)]
    last = max(figure["last_read"] for figure in figures)
    return max(memory for at, memory in samples if at <= last) - baseline, max(figure["seconds"] for figure in figures)


class RanksFailed(RuntimeError):
    """A rank ended before it was done."""

    def __init__(self, reason: str, said: str) -> None:
        """Keep the reason, one line, and what that rank's log ends with."""
        self.reason, self.said = reason, said
        super().__init__(f"{reason}\n{said}")


@contextmanager
def _ranks(command: list[str], count: int, run_dir: Path, threads: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a sub-command as `count` ranks that log to run_dir; none is left at the end, however it comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    shared["TORCHINDUCTOR_CACHE_DIR"] = str(run_dir / "inductor")  # torch makes it when imported, wherever temporary files go
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            line = [sys.executable, "-m", "tools.bench", *command]
            with (run_dir / f"{rank}.log").open("wb") as log:
                children.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env))
        yield children
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _write_line(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()


def _wait(children: list[subprocess.Popen[bytes]], run_dir: Path, state: str, look: Callable[[], None], limit_s: float = math.inf) -> None:
    """Look again and again until each rank has written its `state` file; raises RanksFailed if one ends before."""
    started = time.monotonic()
    while not all((run_dir / f"{rank}.{state}").exists() for rank in range(len(children))):
        if any(child.poll() is not None for child in children):
            raise _failure(children, run_dir)
        if time.monotonic() - started > limit_s:
            raise RanksFailed(f"the ranks were not {state} in {limit_s:.0f} s", _end_of_log(run_dir, 0))
        look()
        time.sleep(SAMPLE_S)


def _failure(children: list[subprocess.Popen[bytes]], run_dir: Path) -> RanksFailed:
    """Find the rank that failed first: one that was killed, else the first that gave a reason; the others fail because of it."""
    deadline = time.monotonic() + TOGETHER_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(SAMPLE_S)
    reasons = sorted(run_dir.glob("*.failed"), key=lambda file: file.stat().st_mtime_ns)
    for rank, child in enumerate(children):
        if child.returncode == -signal.SIGKILL:
            return RanksFailed(f"rank {rank} was killed by SIGKILL (out of memory, or kill -9)", _end_of_log(run_dir, rank))
    if reasons:
        return RanksFailed(reasons[0].read_text(), _end_of_log(run_dir, int(reasons[0].stem)))
    rank, code = next((rank, child.returncode) for rank, child in enumerate(children) if child.returncode is not None)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RanksFailed(f"rank {rank} {how}", _end_of_log(run_dir, rank))


def _end_of_log(run_dir: Path, rank: int) -> str:
    return (run_dir / f"{rank}.log").read_text("utf-8", "replace")[-3000:].strip()


@contextmanager
def _explaining(run_dir: Path) -> Iterator[None]:
    """Leave the reason of this rank's failure, one line, where `_failure` looks for it."""
    try:
        yield
    except ConfigError as error:
        _leave(run_dir, "failed", " ".join(str(error).split())[:REASON_LENGTH])
        sys.exit(2)
    except Exception as error:
        _leave(run_dir, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH])
        raise


def _leave(run_dir: Path, state: str, text: str) -> None:
    """Write this rank's `state` file, complete or absent."""
    name = f"{os.environ['RANK']}.{state}"
    partial = run_dir / f"{name}.partial"
    partial.write_text(text)
    partial.rename(run_dir / name)


def _memory(children: list[subprocess.Popen[bytes]]) -> int:
    """Return the bytes of all children, a page that n of them share counted as 1/n in each."""
    total = 0
    for child in children:
        lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def load_rank(options: argparse.Namespace) -> None:
    """Load as one rank: say when ready, wait for a line, build the engine, and say when the last block was read."""
    import torch
    from transformers import AutoConfig

    from trainers.engines.base import build_engine
    from trainers.stored import Weights
    from trainers.world import World, die_with_parent

    die_with_parent()
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect()
    config = RunConfig(
        run_dir=options.run_dir,
        data=DataConfig(path="unused"),
        engine=EngineConfig(name=EngineName(options.engine)),
        train=TrainConfig(precision=Precision.fp32),
    )
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 32}
    build_engine(config, world, _llama(tiny))  # what is imported on the way is not the checkpoint's
    blueprint = _llama({})
    blueprint.folder = Path(options.folder) / "model"
    blueprint.config = AutoConfig.from_pretrained(blueprint.folder)
    last, read = [0.0], Weights.read

    def timed(weights: Weights, *block: Any) -> torch.Tensor:
        tensor = read(weights, *block)
        last[0] = time.monotonic()
        return tensor

    Weights.read = timed  # type: ignore[method-assign]
    run_dir = Path(options.run_dir)
    _leave(run_dir, "ready", "")
    sys.stdin.readline()
    started = time.monotonic()
    build_engine(config, world, blueprint)
    _leave(run_dir, "done", json.dumps({"last_read": last[0], "seconds": last[0] - started}))
    sys.stdin.readline()


PRESETS = sorted(file.stem for file in (Path(__file__).parents[1] / "conf" / "engine").glob("*.yaml") if not file.stem.endswith("nvme"))
"""Engines by the names that the launcher has for them; NVMe needs a path of this machine."""
FAILED, STOPPED = 1, 130


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine's ranks measured: the rows of its metrics.jsonl, and what rank 0 knows besides."""

    steps: list[dict[str, Any]]
    build_seconds: float
    parameters: int
    device: str
    """Name of the GPU; empty on a CPU."""

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


def engines(options: argparse.Namespace) -> int:
    """Print, and write to --out, what each engine makes of the same model and rows; 1 if one failed or none ran, 130 on Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return _compare(options)
    except KeyboardInterrupt:
        print("stopped: no process and no temporary file is left", file=sys.stderr)
        return STOPPED


def _compare(options: argparse.Namespace) -> int:
    import torch

    gpus = torch.cuda.device_count()
    ranks = options.ranks or gpus or 2
    if gpus and ranks > gpus:
        options.error(f"--ranks {ranks}: this machine has {gpus} GPU(s), and a rank takes one")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        options.error(f"--out {options.out}: there is no such directory")
    runs: dict[str, Run | str] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="fulltune-bench-") as folder:
        for name in dict.fromkeys(options.engine):
            try:
                runs[name] = _run_engine(options, name, ranks, Path(folder) / name, on_gpu=bool(gpus))
            except RanksFailed as error:
                failed = True
                runs[name] = f"failed: {error.reason}"
                print(f"{error.said}\n{name} failed: {error.reason}".strip(), file=sys.stderr)
    text = _section(options, ranks, runs)
    print(text, end="")
    if options.out is not None:
        _put_section(options.out, text)
    return FAILED if failed or not any(isinstance(run, Run) for run in runs.values()) else 0


def _interrupt(_number: int, _frame: object) -> None:
    """Raise KeyboardInterrupt, once: a second signal must not end the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run_engine(options: argparse.Namespace, name: str, ranks: int, run_dir: Path, on_gpu: bool) -> Run | str:
    """Train with an engine on ranks of its own; returns why not where it is not installed, and raises RanksFailed if it fails."""
    if engine_preset(name)["name"] is EngineName.zero3 and importlib.util.find_spec("deepspeed") is None:
        return "not installed: pip install deepspeed"
    run_dir.mkdir()
    kept = ("parameters", "precision", "seq_len", "microbatch", "steps", "checkpointing")
    (run_dir / "order.json").write_text(json.dumps({"engine": name} | {key: getattr(options, key) for key in kept}))
    threads = 1 if ranks > 1 and not on_gpu else host.threads_per_rank(ranks)
    console = Console(stderr=True)
    with console.status(f"{name}: starting") as status, _ranks(["engine-rank", str(run_dir)], ranks, run_dir, threads) as children:
        if not console.is_terminal:
            print(f"{name}: {ranks} rank(s)", file=sys.stderr)
        _wait(children, run_dir, "done", lambda: status.update(f"{name}: {_progress(run_dir, options.steps)}"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    run = Run(steps=rows, **json.loads((run_dir / "0.done").read_text()))
    print(f"{name}: {len(rows)} steps, losses {run.losses()}", file=sys.stderr)
    return run


def _progress(run_dir: Path, steps: int) -> str:
    metrics = run_dir / "metrics.jsonl"
    return f"step {len(metrics.read_text().splitlines())} of {steps}" if metrics.is_file() else "building"


def engine_preset(name: str) -> dict[str, Any]:
    """Return the fields of EngineConfig that conf/engine/NAME.yaml sets; the launcher and Hydra may not be there."""
    import yaml

    preset: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "conf" / "engine" / f"{name}.yaml").read_text())
    kinds: dict[str, Callable[[Any], Any]] = {"name": EngineName, "offload_param": Offload, "offload_optimizer": Offload}
    return {key: kinds[key](value) if key in kinds else value for key, value in preset.items()}


def engine_rank(options: argparse.Namespace) -> None:
    """Train as one rank: the preset's engine from random weights, our loop, rows that depend on nothing but their number."""
    run_dir = Path(options.run_dir)
    with _explaining(run_dir):
        order = json.loads((run_dir / "order.json").read_text())

        import torch
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        import trainers.engines.fsdp  # noqa: F401 - its imports are not part of building
        from trainers.data.loader import Loader
        from trainers.data.prepare import Prepared
        from trainers.engines.base import build_engine, require_parts
        from trainers.loop import train as train_run
        from trainers.model import flops_per_token, make_blueprint
        from trainers.status import Attempt
        from trainers.world import World, die_with_parent

        die_with_parent()
        world = World.from_environment()
        config = _engine_config(order, run_dir, world.size)
        require_parts(config, world)
        world.connect()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"-": 0}, unk_token="-")), pad_token="-")
        blueprint = make_blueprint(config.model, config.seed, tokenizer)
        table = _packed_rows(config.train.global_batch * order["steps"], order["seq_len"], blueprint.config.vocab_size)
        data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
        loader = Loader(table, config.train, seed=config.seed, rank=world.rank, world_size=world.size, pad_id=0)
        world.barrier()
        started = time.perf_counter()
        with closing(build_engine(config, world, blueprint)) as engine:
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = world.max([time.perf_counter() - started])[0]
            engine.save = lambda folder: None  # type: ignore[method-assign] # the loop ends with a checkpoint, which nobody reads
            train_run(
                config,
                world,
                Attempt(Path(config.run_dir)),
                engine,
                data,
                loader,
                flops_per_token(engine.shapes(), blueprint.config, table.mean_attended()),
            )
            parameters = sum(math.prod(shape) for shape in engine.shapes().values())
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else ""
        _leave(run_dir, "done", json.dumps({"build_seconds": seconds, "parameters": parameters, "device": device}))
        sys.stdin.readline()


def _engine_config(order: dict[str, Any], run_dir: Path, ranks: int) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(architecture={"model_type": "llama"} | _llama_sizes(order["parameters"], order["seq_len"])),
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


def _llama_sizes(parameters: int, seq_len: int) -> dict[str, int]:
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
    done = [(name, run) for name, run in runs.items() if isinstance(run, Run)]
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "deepspeed"))
    machine = f"{ranks} of {_gpu_words(done[0][1].device)}" if done and done[0][1].device else f"{host.cores()} cores, no GPU"
    model = f"{done[0][1].parameters:,}" if done else f"about {options.parameters:,}"
    what = f"{options.steps} steps of {ranks * options.microbatch} packed rows of {options.seq_len} tokens"
    extra = ", activation checkpointing" if options.checkpointing else ""
    about = f"{ranks} rank(s), a Llama of {model} parameters from random weights in {options.precision}{extra}, {what}."
    head = [
        f"## `{options.line}`",
        f"{time.strftime('%Y-%m-%d')}, {machine}; Python {platform.python_version()}, {versions}. {about}",
        "\n".join(_table(runs, done)),
    ]
    return "\n\n".join([*head, *([_legend(done)] if done else [])]) + "\n"


def _table(runs: dict[str, Run | str], done: list[tuple[str, Run]]) -> list[str]:
    """Return the table's lines: a row for each engine, a column for what is known of one; times only of a GPU."""
    if not done:
        return ["| engine | result |", "|---|---|", *(f"| {name} | {_cell(str(why))} |" for name, why in runs.items())]
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
    columns = {title: cell for title, cell in columns.items() if any(cell(run) is not None for _, run in done)}
    lines = [["engine", *columns], ["---"] * (1 + len(columns))]
    for engine, run in runs.items():
        cells = [cell(run) or "-" for cell in columns.values()] if isinstance(run, Run) else [_cell(run), *[""] * (len(columns) - 1)]
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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu_words(name: str) -> str:
    """Return the GPUs of this machine by number, name and driver."""
    import torch

    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return f"{torch.cuda.device_count()} x {name}, driver {driver}"


def _put_section(file: Path, section: str) -> None:
    """Put a section in the place of the one with the same heading, else at the end; the file is never seen half-written."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    heading = section.splitlines()[0]
    start = lines.index(heading) if heading in lines else len(lines)
    end = next((at for at in range(start + 1, len(lines)) if lines[at].startswith(("# ", "## "))), len(lines))
    parts = ["\n".join(lines[:start]), section, "\n".join(lines[end:])]
    staging = file.resolve().with_name(f".{file.name}.{os.getpid()}.tmp")
    staging.write_text("\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n", "utf-8")
    staging.rename(file.resolve())


def _at_least(least: int) -> Callable[[str], int]:
    """Return an argument's type: a whole number, which may be written as 10e6, of at least `least`."""

    def number(text: str) -> int:
        value = float(text)
        if value != int(value) or value < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(value)

    return number


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="data|train|load|engines")
    of_data = commands.add_parser("data", help="preparation speed and packing efficiency, beside the best public packer's on GSM8K")
    of_data.add_argument("--path", help="rows (default: the documentation of this Python, as conversations)")
    of_data.add_argument("--tokenizer", help="tokenizer directory or hub id (default: one trained on the rows)")
    of_data.add_argument("--template", help="chat template: a Jinja file or `chatml`")
    of_data.add_argument("--seq-len", type=int, default=2048, help="tokens a row (default 2048)")
    of_data.set_defaults(command=data)
    of_train = commands.add_parser(
        "train", help="tokens a second and peak memory against a bare transformers loop; minutes; losses must agree"
    )
    of_train.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 rows of 512 tokens (default 12)")
    of_train.add_argument("--runs", type=int, default=3, help="runs of each loop, in turn (default 3)")
    of_train.set_defaults(command=train)
    of_load = commands.add_parser(
        "load", help="memory of all ranks while they load a model, against its size; needs 3 x the size as memory"
    )
    of_load.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks, each in turn (default 2 4)")
    of_load.add_argument(
        "--gigabytes", type=float, default=1.0, help="size of the checkpoint in bfloat16; float32 is twice that (default 1)"
    )
    of_load.add_argument("--engine", nargs="+", choices=list(EngineName), default=["fsdp"], help="engines, each in turn (default fsdp)")
    of_load.set_defaults(command=load)
    of_engines = commands.add_parser(
        "engines", help="speed, memory and parity of engines on the same random model and rows; a rank a GPU, or gloo between CPU ranks"
    )
    of_engines.add_argument(
        "--engine", nargs="+", choices=PRESETS, default=PRESETS, help="presets of conf/engine, each in turn (default all)"
    )
    of_engines.add_argument("--ranks", type=_at_least(1), help="ranks (default: one a GPU, else 2)")
    of_engines.add_argument("--parameters", type=_at_least(1), default=10_000_000, help="about so many, as 1e9 (default 10e6)")
    of_engines.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    of_engines.add_argument("--seq-len", type=_at_least(16), default=512, help="tokens a row (default 512)")
    of_engines.add_argument("--microbatch", type=_at_least(1), default=2, help="rows a rank and step (default 2)")
    of_engines.add_argument("--steps", type=_at_least(2), default=12, help="optimizer steps; the first is not timed (default 12)")
    of_engines.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    of_engines.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")
    of_engines.set_defaults(command=engines, error=of_engines.error)
    of_engine_rank = commands.add_parser("engine-rank")  # what `engines` starts
    of_engine_rank.add_argument("run_dir")
    of_engine_rank.set_defaults(command=engine_rank)
    of_rank = commands.add_parser("load-rank")  # what `load` starts
    for name in ("folder", "engine", "run_dir"):
        of_rank.add_argument(name)
    of_rank.set_defaults(command=load_rank)
    of_one = commands.add_parser("one")  # what `train` starts
    of_one.add_argument("shape", choices=SHAPES)
    of_one.add_argument("variant", choices=VARIANTS)
    of_one.add_argument("--steps", type=int, default=12)
    of_one.set_defaults(command=one)
    options = parser.parse_args(arguments)
    options.line = shlex.join(["python", "-m", "tools.bench", *(sys.argv[1:] if arguments is None else arguments)])
    return options.command(options) or 0


if __name__ == "__main__":
    sys.exit(main())
