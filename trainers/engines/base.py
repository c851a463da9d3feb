"""What the loop asks of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainers.batch import Batch
from trainers.config import EngineName, RunConfig
from trainers.model import Blueprint
from trainers.world import World


class Engine(Protocol):
    """A model, its gradients and its optimizer, sharded over ranks. Every method is collective: all ranks call it."""

    def token_logps(self, batch: Batch) -> Tensor:
        """Return (B, S) float32 log-probabilities of the labels, with a graph while training."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar; `last` marks the step's last microbatch. Gradients sum over ranks."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update, clear gradients; return the global gradient norm before clipping. Non-finite updates nothing."""
        ...

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of model and optimizer into `folder`."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, at any world size."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export by name, whole and on the CPU, one at a time."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of what `weights` yields."""
        ...

    def report(self) -> dict[str, str]:
        """Return the precision and memory statements for the start-up table, checked on the live tensors."""
        ...


def build_engine(config: RunConfig, world: World, blueprint: Blueprint) -> Engine:
    """Build the engine the config names, weights loaded."""
    from trainers.engines.fsdp import FSDPEngine

    choices = {EngineName.fsdp: FSDPEngine}
    return choices[config.engine.name](config, world, blueprint)
