"""Time to the first step, memory and disk of a run that streams a large file, by the command that a user types."""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.arguments import at_least
from tools.bench.curate import Memory
from trainers.config.choices import ObjectiveName
from trainers.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from trainers.processes import prepare_child
from trainers.rundir.rows import read_rows, steps
from trainers.units import in_bytes, in_time

WORDS, LETTERS, IN_ROW = 15, 120, 50
"""Words of so many letters, each of which becomes one token, so that a large file is trained in minutes; words of a row."""
SEQ_LEN, BATCH, SHARD = 512, 64, 8192
LOOK_S = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench stream`."""
    parser.add_argument("--bytes", type=at_least(10_000_000), default=2_000_000_000, metavar="N", help="of the file (default 2e9)")


def run(options: argparse.Namespace) -> int:
    """Write a file, train one pass over it as a stream, and print what was measured; returns the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        rows = write(file, options.bytes)
        save_tokenizer(folder)
        num_steps = rows * (IN_ROW + 1) // (SEQ_LEN * BATCH)
        line = [sys.executable, "-m", "launcher", *settings(folder, max(1, num_steps))]
        print(f"{in_bytes(file.stat().st_size)} in {rows:,} rows, {num_steps:,} steps:\n  {' '.join(line[2:])}", flush=True)
        began = time.monotonic()
        env = os.environ | {"FULLTUNE_CACHE": str(folder / "cache")}
        with (folder / "log").open("wb") as log:
            child = subprocess.Popen(line, env=env, stdout=log, stderr=log, preexec_fn=prepare_child())
            memory, disk, first = Memory(child.pid), 0, None
            while child.poll() is None:
                first = first or (time.monotonic() - began if (folder / "run" / "metrics.jsonl").is_file() and steps_of(folder) else None)
                disk = max(disk, size_of(folder / "run" / "stream"))
                time.sleep(LOOK_S)
        if child.returncode:
            print((folder / "log").read_text()[-4000:])
            return child.returncode
        say(folder / "run", first or 0.0, time.monotonic() - began, memory.peak, disk)
    return 0


def write(file: Path, size: int) -> int:
    """Write rows of text until the file has so many bytes; returns the number of rows."""
    rng, rows = random.Random(0), 0
    words = ["".join(rng.choices(string.ascii_lowercase, k=LETTERS)) for _ in range(WORDS)]
    with file.open("w") as stream:
        while stream.tell() < size:
            stream.write(json.dumps({"text": " ".join(rng.choices(words, k=IN_ROW))}) + "\n")
            rows += 1
    return rows


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the words, trained on a few rows: that of a run would read 200,000."""
    from trainers.data.tokenizer import load_tokenizer

    write(folder / "few.jsonl", 1_000_000)
    model = ModelConfig(architecture={"model_type": "llama"}, train_tokenizer=300 + WORDS * (LETTERS + 5))
    data = DataConfig(path=str(folder / "few.jsonl"), prepared_dir=str(folder / "kept"))
    config = RunConfig(model=model, data=data, objective=ObjectiveConfig(name=ObjectiveName.cpt))
    load_tokenizer(config).save_pretrained(folder / "tokenizer")


def settings(folder: Path, num_steps: int) -> list[str]:
    """Return the settings of a tiny model's run over the file."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return [
        *("model=scratch", *(f"model.architecture.{key}={value}" for key, value in sizes.items()), "data=files", "objective=cpt"),
        *("model.train_tokenizer=0", f"model.tokenizer={folder / 'tokenizer'}", f"data.path={folder / 'rows.jsonl'}"),
        *(f"data.seq_len={SEQ_LEN}", "data.streaming=true"),
        *(f"data.shard_rows={SHARD}", f"train.steps={num_steps}", f"train.global_batch={BATCH}", "train.microbatch=16"),
        *("train.precision=fp32", "train.sample_tokens=0", f"run_dir={folder / 'run'}", "log.wandb=disabled", "launch.processes=1"),
        "launch.gpus_per_node=0",
    ]


def steps_of(folder: Path) -> int:
    """Return the steps that are taken."""
    return len(steps(read_rows(folder / "run")))


def size_of(folder: Path) -> int:
    """Return the bytes below a folder, while others write and remove there."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed meanwhile
            continue
    return found


def say(run_dir: Path, first: float, whole: float, memory: int, disk: int) -> None:
    """Print what was measured."""
    index = [json.loads(line) for line in next((run_dir / "stream").glob("*/index.jsonl")).read_text().splitlines()]
    taken = steps(read_rows(run_dir))
    rows, read = sum(shard["rows"] for shard in index), sum(shard["read"] for shard in index)
    print(f"first step after {in_time(first)}, {len(taken):,} steps and the export after {in_time(whole)}")
    reached = "the last one too" if index[-1]["is_last"] else "not to its end"
    print(f"{read:,} rows of the file read in {len(index)} shards, {reached}; {rows:,} packed rows")
    print(f"peak memory of all processes {in_bytes(memory)}; most on disk in RUN_DIR/stream {in_bytes(disk)}")
