"""One rank of `tools.bench engines`: our loop, on a random model and rows that depend on nothing but their number."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import trainers.engines.fsdp.engine  # noqa: F401 - its imports are not part of building
from tools.bench.orders import config_of
from tools.bench.ranks import explaining, leave
from trainers.checkpoint import Checkpointer
from trainers.config.mesh import mesh_of
from trainers.config.schema import RunConfig
from trainers.data.loader import Loader
from trainers.data.pack import pack
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.engines.build import build_engine, require_parts
from trainers.loop import train
from trainers.model.blueprint import flops_per_token, make_blueprint
from trainers.rundir.attempt import Attempt
from trainers.world import World


def run_rank(options: argparse.Namespace) -> None:
    """Train as one rank."""
    with training_rank(Path(options.run_dir)) as (training, _, _):
        checkpointer = Checkpointer(training.config.checkpoint, training.attempt, training.world)
        checkpointer.save = lambda *_, **__: None  # type: ignore[method-assign] # the loop ends with one, which nobody reads
        training.run(checkpointer)


@dataclass(frozen=True)
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
        train(self.config, self.world, self.attempt, self.engine, self.data, self.rows, self.flops_per_token, checkpointer)


@contextmanager
def training_rank(run_dir: Path) -> Iterator[tuple[Training, dict[str, Any], dict[str, Any]]]:
    """Give a rank its training, its order and a place for a Run's numbers; leave these, or why there are none, in run_dir.

    It trains with the preset's engine, from random weights, in our loop, on rows that depend on nothing but their number.
    """
    with explaining(run_dir):
        order = json.loads((run_dir / "order.json").read_text())
        world = World.from_environment()
        config = config_of(order, run_dir, world.size)
        require_parts(config, world)
        world.connect()
        blueprint = make_blueprint(config.model, config.seed, plain_tokenizer())
        table = random_rows(config.train.global_batch * order["steps"], order["seq_len"], blueprint.config.vocab_size)
        data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
        share = mesh_of(config.engine, world.size).share_of(world.rank)
        rows = Loader(table, config.train, seed=config.seed, pad_id=0, **share)
        world.barrier()
        started = time.perf_counter()
        figures: dict[str, Any] = {}
        with closing(build_engine(config, world, blueprint)) as engine:
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            figures["build_seconds"] = world.max([time.perf_counter() - started])[0]
            flops = flops_per_token(engine.shapes(), blueprint.config, table.mean_attended())
            attempt = Attempt(Path(config.run_dir))
            yield Training(config, world, attempt, engine, data, rows, flops), order, figures
            figures["parameters"] = sum(math.prod(shape) for shape in engine.shapes().values())
        figures["device"] = torch.cuda.get_device_name() if world.device.type == "cuda" else ""
        leave(run_dir, "done", json.dumps(figures))
        sys.stdin.readline()


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token, for a model whose rows are random."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"-": 0}, unk_token="-")), pad_token="-", eos_token="-")


def random_rows(rows: int, seq_len: int, vocabulary: int, whole: bool = False) -> TokenTable:
    """Return at least `rows` packed rows of random documents, an eighth of a row to a whole one long, frequent tokens among them.

    With `whole` each row is one document.
    """
    random = np.random.default_rng(0)
    shortest = seq_len if whole else max(2, seq_len // 8)
    lengths = random.integers(shortest, seq_len + 1, rows if whole else 2 * rows, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = (vocabulary * random.random(offsets[-1]) ** 3).astype(np.int32)
    supervised = np.ones(len(tokens), np.uint8)
    supervised[offsets[:-1]] = 0
    order, starts = pack(lengths, seq_len)
    return TokenTable(tokens=tokens, supervised=supervised, offsets=offsets, order=order, rows=starts)
