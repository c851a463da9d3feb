"""train.compile: each block compiled by itself with torch.compile, before fully_shard, whose hooks stay outside of the graph.

Blocks of one kind share one graph, so that compiling takes as long for 80 blocks as for one. Shapes stay the same from step to step:
packed rows are filled up to data.seq_len, and rows of their own lengths are compiled with the length as a symbol.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from trainers import host
from trainers.batch import Batch, Needs, Output
from trainers.cache import home
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig
from trainers.engines.float8 import whole_rows
from trainers.health.activity import watch
from trainers.model.filled import cut, filled_up
from trainers.model.forward import Head, forward

log = logging.getLogger("fulltune")
CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The variable that names where torch keeps what it has compiled."""
BACKEND = "inductor"
GRAPHS = 32
"""Graphs of one function before torch gives up and runs it as it is: kinds of blocks x training or not x with a mask or without."""
SETTLED = 2
"""Steps, or evaluations, after which nothing should be compiled any more."""
COMPILERS = {"cpu": ("g++", "CXX"), "cuda": ("gcc", "CC")}
"""By device, what compiles: torch's code for a CPU, and what starts a kernel of Triton's; and the variable that names another."""


def require_compiler() -> None:
    """Raise ConfigError where torch.compile lacks what it needs on this machine: a C or C++ compiler, and Triton for a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, variable = COMPILERS[device]
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "train.compile", True, "Triton is not installed, which writes the kernels", "pip install triton, or train.compile=false"
        )
    if shutil.which(os.environ.get(variable) or name) is None:
        reason = f"there is no compiler: {os.environ.get(variable) or name} is not on PATH"
        raise ConfigError("train.compile", True, reason, f"install {name}, name one in {variable}, or train.compile=false")
    cache_folder()


def cache_folder() -> str:
    """Return where compiled code is kept: what torch's own variable names, else a folder in FULLTUNE_CACHE, which nodes may share.

    Code for one kind of processor is not used on another: each has a folder of its own. Raises ConfigError where it cannot be made.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE) in (None, default_cache_dir()):  # torch sets the variable to its default, in /tmp, as it is imported
        kind = f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}".lower().replace(" ", "-")
        os.environ[CACHE] = str(home() / "compiled" / kind)
    folder = os.environ[CACHE]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"compiled code cannot be kept in {folder}: {error.strerror}"
        raise ConfigError("train.compile", True, reason, f"FULLTUNE_CACHE=DIR or {CACHE}=DIR in the environment") from error
    return folder


class CompiledBlocks:
    """A model's blocks, compiled at their first use: the shapes that they are given, and what is compiled when."""

    def __init__(self, blocks: Sequence[nn.Module], config: RunConfig, local_ranks: int, device: str) -> None:
        """Call it before blocks are sharded. Nothing is compiled yet."""
        from torch import compiler
        from torch._dynamo import callback
        from torch._inductor import config as inductor
        from torch.fx.experimental import _config as shapes

        self.folder, self.num_blocks = cache_folder(), len(blocks)
        self.length = whole_rows(config.data.seq_len) if config.data.packing else None
        """Tokens of a row, where all have as many."""
        self.rounds = {True: 0, False: 0}
        """Steps that are done, and evaluations."""
        self.graphs, self.again, self.began, self.is_fresh, self.is_first = 0, 0, time.time(), False, True
        compiler.config.recompile_limit = GRAPHS
        shapes.use_duck_shape = False  # else rows as long as the model is wide are taken for always that long
        threads = min(8, host.threads_per_rank(local_ranks)) if device == "cuda" else 1  # those that write kernels for a GPU
        inductor.compile_threads = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") or threads)
        for block in blocks:
            block.compile(backend=BACKEND, dynamic=None if config.data.packing else True)
        callback.on_compile_start(self._begin)
        callback.on_compile_end(self._end)

    def forward(self, model: nn.Module, batch: Batch, needs: Needs, head: Head | None = None) -> Output:
        """Return what a model's `forward` returns, and see what that compiles."""
        self.began, self.is_fresh = time.time(), False
        output = forward(model, batch, needs, head=head)
        if self.is_fresh:
            self._look(model.training)
        return output

    def done(self, training: bool) -> None:
        """Count a step, or an evaluation."""
        self.rounds[training] += 1

    def words(self) -> str:
        """Say what is compiled, and where that is kept."""
        return f"{plural(self.num_blocks, 'block')}, each by itself; kept in {self.folder}"

    def close(self) -> None:
        """Look no more."""
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)
        watch.compiling = False

    def _begin(self, *_: object) -> None:
        watch.compiling = True
        watch.beat()
        if self.is_first:
            log.info("compiling the blocks: a minute or more the first time, less once %s has them", self.folder)
        self.is_first = False

    def _end(self, *_: object) -> None:
        watch.compiling, self.is_fresh = False, True
        watch.beat()

    def _look(self, training: bool) -> None:
        """Say what the last forward has compiled; warn, once, where that should have been over."""
        from torch._dynamo.utils import get_compilation_metrics

        made = [found for found in get_compilation_metrics() if found.has_guarded_code and (found.start_time or 0.0) >= self.began]
        if not made:
            return
        self.graphs += len(made)
        why = "; ".join(dict.fromkeys(found.recompile_reason.splitlines()[0] for found in made if found.recompile_reason))
        words = f"compiled {plural(len(made), 'graph')} in {time.time() - self.began:.0f} s"
        if self.rounds[training] < SETTLED:
            log.info(words)
            log.debug("why again: %s", why or "it was the first")
            return
        self.again += len(made)
        level = logging.WARNING if self.again == len(made) else logging.DEBUG
        log.log(level, "%s after %s: %s", words, plural(self.rounds[training], "step" if training else "evaluation"), why or "unknown")


def forward_filled_up(model: nn.Module, batch: Batch, needs: Needs, compiled: CompiledBlocks | None, head: Head | None = None) -> Output:
    """Return what a model's `forward` returns of a batch, whose rows have other lengths on the way: what graphs and float8 take.

    Rows of their own lengths get some padding always: without any, attention gets no mask, and that would be another graph.
    """
    size = batch.labels.shape[1]
    length = whole_rows(size) if compiled is None else compiled.length or whole_rows(size + 1)
    wide = filled_up(batch, length)
    return cut(forward(model, wide, needs, head=head) if compiled is None else compiled.forward(model, wide, needs, head), size)
