"""What all ranks hold while they read a model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from tools.bench.ranks import leave, start_ranks, wait_for, write_line
from trainers.config.choices import EngineName, Precision
from trainers.config.errors import plural
from trainers.config.schema import DataConfig, EngineConfig, RunConfig, TrainConfig
from trainers.units import in_bytes

if TYPE_CHECKING:
    import torch

    from trainers.model.blueprint import Blueprint


LIMIT_S = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench load`."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks, each in turn (default 2 4)")
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="size of the checkpoint in bfloat16; float32 is twice that (default 1)"
    )
    parser.add_argument("--engine", nargs="+", choices=list(EngineName), default=["fsdp"], help="engines, each in turn (default fsdp)")


def run(options: argparse.Namespace) -> None:
    """Print what the ranks hold together while they load a checkpoint, next to its size as float32, once over all of them."""
    console = Console(stderr=True)
    table = Table("engine", "ranks", "float32 weights, all ranks", "memory at the peak, all ranks", "ratio", "seconds")
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"writing a checkpoint of {options.gigabytes:g} GB in bfloat16 to {folder}")
        total = 4 * write_checkpoint(Path(folder) / "model", options.gigabytes)
        for engine in options.engine:
            for ranks in options.ranks:
                console.print(f"loading it with {engine} on {plural(ranks, 'rank')}")
                peak, seconds = measure_loading(Path(folder), engine, ranks)
                table.add_row(engine, str(ranks), in_bytes(total), in_bytes(peak), f"{peak / total:.2f}", f"{seconds:.1f}")
    Console().print(table)
    Console().print("memory: the sum of /proc/PID/smaps_rollup's Pss, above what it was before the checkpoint was opened", style="dim")


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a Llama of random weights in bfloat16, a file for each block, and return its number of parameters."""
    from safetensors.torch import save_file
    from torch import bfloat16

    from trainers.model.weights import origin_of

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


def _llama(sizes: dict[str, Any]) -> Blueprint:
    from transformers import LlamaConfig

    from trainers.model.blueprint import Blueprint

    return Blueprint(config=LlamaConfig(**sizes), folder=None, revision=None, seed=0, trust_remote_code=False)


def measure_loading(folder: Path, engine: str, ranks: int) -> tuple[float, float]:
    """Start ranks, let them load together, and return bytes at the peak above the start, and seconds of the slowest."""
    samples: list[tuple[float, list[int]]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run_dir = Path(name)
        with start_ranks(["load-rank", str(folder), engine, name], ranks, run_dir) as children:
            wait_for(children, run_dir, "ready", lambda: None, LIMIT_S)
            baseline = sum(_memory(children))
            for child in children:
                write_line(child)
            wait_for(children, run_dir, "done", lambda: samples.append((time.monotonic(), _memory(children))), LIMIT_S)
        figures = [json.loads((run_dir / f"{rank}.done").read_text()) for rank in range(ranks)]
    peak, held = 0, samples[0][1]
    for at, memory in samples:  # a rank that has read its last block does other things, and counts as it was then
        held = [now if at <= figure["last_read"] else before for now, before, figure in zip(memory, held, figures, strict=True)]
        peak = max(peak, sum(held))
    return peak - baseline, max(figure["seconds"] for figure in figures)


def _memory(children: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the bytes of each child, a page that n of them share counted as 1/n in each."""
    lines = [Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines() for child in children]
    return [sum(int(line.split()[1]) * 1024 for line in those if line.startswith("Pss:")) for those in lines]


def _config(options: argparse.Namespace) -> RunConfig:
    return RunConfig(
        run_dir=options.run_dir,
        data=DataConfig(path="unused"),
        engine=EngineConfig(name=EngineName(options.engine)),
        train=TrainConfig(precision=Precision.fp32),
    )


def run_rank(options: argparse.Namespace) -> None:
    """Load as one rank: say when ready, wait for a line, build the engine, and say when the last block was read."""
    import torch
    from transformers import AutoConfig

    from trainers.engines.build import build_engine
    from trainers.model.safetensors_files import Weights
    from trainers.world import World

    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect()
    config = _config(options)
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

    run_dir = Path(options.run_dir)
    leave(run_dir, "ready", "")
    sys.stdin.readline()
    started = time.monotonic()
    with mock.patch.object(Weights, "read", timed):
        build_engine(config, world, blueprint)
    leave(run_dir, "done", json.dumps({"last_read": last[0], "seconds": last[0] - started}))
    sys.stdin.readline()
