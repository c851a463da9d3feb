"""The policy's weights as generators open them, and the proof that what they answer with is the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainers.batch import IGNORE
from trainers.config.choices import Precision
from trainers.config.schema import RunConfig
from trainers.data.ends import stop_ids
from trainers.data.loader import deal, make_batch
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.model.blueprint import Blueprint
from trainers.model.export import export
from trainers.objectives.base import SAMPLED_LOGPS
from trainers.peft.base import FullTraining
from trainers.peft.saved import export_adapter
from trainers.rundir.attempt import Attempt
from trainers.world import World

T = TypeVar("T")
EXACT, ROUNDED = 1e-3, 0.25
"""Mean differences in nats a token that are not suspicious, in float32 and where anything is rounded to 16 bits."""


def write_weights(
    engine: Engine, blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World, attempt: Attempt
) -> None:
    """Put the weights as they are now into a directory, a model's or an adapter's, complete or absent; collective.

    Raises Superseded, and puts nothing into place, where a newer attempt has started.
    """
    adaptation, write, mark = engine.adaptation, world.rank == 0, f".attempt-{attempt.number}"
    weights = while_current(engine.weights(), attempt)
    if isinstance(adaptation, FullTraining):
        export(weights, adaptation.form, blueprint, tokenizer, stop_ids(tokenizer), folder, write, mark=mark)
    else:
        export_adapter(weights, adaptation, tokenizer, folder, write, mark)
    world.barrier()


def while_current(items: Iterable[T], attempt: Attempt) -> Iterator[T]:
    """Yield items, each a beat; the end needs that no newer attempt has started."""
    yield from watch.each(items)
    attempt.require_current()


def temper(model: nn.Module, temperature: float) -> Callable[[], None]:
    """Have a model's log-probabilities and entropies be those of softmax(logits / temperature); returns what ends that.

    A head that reads a few tokens at a time divides a few tokens' logits. Whole logits are there twice for a moment.
    """
    if temperature == 1:
        return lambda: None

    def divide(_model: nn.Module, _given: Any, output: Any) -> None:
        output.logits = output.logits / temperature

    return model.register_forward_hook(divide, prepend=True).remove  # before the head's own, which makes log-probabilities


@dataclass(frozen=True)
class Mismatch:
    """How far the log-probabilities of the same tokens are apart, in nats."""

    mean: float
    largest: float


def bound_of(config: RunConfig, blueprint: Blueprint) -> float:
    """Return the largest mean difference of a token that a run accepts."""
    if config.rl.mismatch is not None:
        return config.rl.mismatch
    exact = config.train.precision is Precision.fp32 and blueprint.saved_dtype is torch.float32
    return EXACT if exact else ROUNDED


@torch.no_grad()
def compare(engine: Engine, table: TokenTable, world: World, microbatch: int, pad_id: int) -> Mismatch:
    """Compare generator and trainer on a microbatch of answers on each rank, the first ones of a table; collective."""
    rows = np.arange(min(len(table), microbatch * engine.mesh.data_size))
    mine = make_batch(table, deal(rows, microbatch, **engine.mesh.share_of(world.rank))[0], microbatch, pad_id).to(world.device)
    engine.train(False)
    logps = engine.forward(mine).logps
    engine.train(True)
    apart = (logps - mine.signals[SAMPLED_LOGPS].squeeze(-1)).abs()[mine.labels != IGNORE].double()
    total, count = world.sum([float(apart.sum()), float(len(apart))])
    [largest] = world.max([float(apart.max()) if len(apart) else 0.0])
    return Mismatch(mean=total / max(count, 1.0), largest=largest)


def require_near(found: Mismatch, bound: float, step: int) -> None:
    """Raise TrainingFailed where the generator is not the policy."""
    if not found.mean <= bound:
        raise TrainingFailed(
            f"step {step}: the generator gives the tokens of its answers other log-probabilities than the trainer does, {found.mean:.2g} "
            f"nats a token in the mean (rl.mismatch allows {bound:g}), {found.largest:.2g} at most: it has other weights than are trained"
        )
