"""Measure this checkout on this machine: `data` for preparation and packing, `train` for the loop, `load` for reading a model.

python -m tools.bench data
python -m tools.bench data --path FILE --tokenizer DIR --seq-len 2048
python -m tools.bench train
python -m tools.bench load --ranks 2 4
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainers.config import (
    DataConfig,
    DataSource,
    EngineConfig,
    EngineName,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    ObjectiveName,
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

    engine = build_engine(config, world, blueprint)
    before = host_bytes_peak()
    train_run(config, world, engine, data, loader, 1.0)
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
"""Seconds between two looks at the memory of the ranks."""


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "tools.bench", "load-rank", str(folder), engine]
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        try:
            for rank in range(ranks):
                log = open(Path(run_dir) / f"{rank}.log", "wb")  # noqa: SIM115 - the child's
                env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                children.append(subprocess.Popen([*line, run_dir], stdin=subprocess.PIPE, stdout=log, stderr=log, env=env))
                log.close()
            _sample(Path(run_dir), children, "ready")
            baseline = _memory(children)
            for child in children:
                _write_line(child)
            samples = _sample(Path(run_dir), children, "done")
            figures = [json.loads((Path(run_dir) / f"{rank}.done").read_text()) for rank in range(ranks)]
        finally:
            for child in children:
                child.kill()
                child.wait()
    last = max(figure["last_read"] for figure in figures)
    return max(memory for at, memory in samples if at <= last) - baseline, max(figure["seconds"] for figure in figures)


def _write_line(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()


def _sample(run_dir: Path, children: list[subprocess.Popen[bytes]], state: str, limit_s: float = 600) -> list[tuple[float, int]]:
    """Return (time, bytes of all children) until each has written its `state` file; raises RuntimeError if one ends before."""
    samples, started = [], time.monotonic()
    while not all((run_dir / f"{rank}.{state}").exists() for rank in range(len(children))):
        for rank, child in enumerate(children):
            if child.poll() is not None or time.monotonic() - started > limit_s:
                raise RuntimeError(f"rank {rank} did not load:\n{(run_dir / f'{rank}.log').read_text()[-3000:]}")
        samples.append((time.monotonic(), _memory(children)))
        time.sleep(SAMPLE_S)
    return samples


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
    folder = Path(options.run_dir)
    (folder / f"{world.rank}.ready").touch()
    sys.stdin.readline()
    started = time.monotonic()
    build_engine(config, world, blueprint)
    partial = folder / f"{world.rank}.partial"
    partial.write_text(json.dumps({"last_read": last[0], "seconds": last[0] - started}))
    partial.rename(folder / f"{world.rank}.done")
    sys.stdin.readline()


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="data|train|load")
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
    options.command(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
