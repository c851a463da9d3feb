"""What an order is measured with: model, rows, world and clock, the same for our loop and a peer's."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.bench.training import plain_tokenizer, random_rows
from trainers.config.mesh import mesh_of
from trainers.config.schema import RunConfig
from trainers.data.loader import Loader
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.engines.build import build_engine, require_parts
from trainers.model.blueprint import Blueprint, flops_per_token, make_blueprint
from trainers.peft.base import Adaptation
from trainers.rundir.metrics import peak_tflops
from trainers.world import World

Figures = dict[str, Any]
SPREAD = 0.02
"""Standard deviation of random weights, as most architectures begin."""


class Noise:
    """Random weights made on the device at once, a function of each tensor's name: shapes decide speed and memory, values do not."""

    def __init__(self, origin: Any, device: torch.device) -> None:
        """Take the names and shapes of `origin`."""
        self.origin, self.device = origin, device

    def names(self) -> list[str]:
        """Return those of the origin."""
        found: list[str] = self.origin.names()
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return that of the origin."""
        found: tuple[int, ...] = self.origin.shape(name)
        return found

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block: ones of a norm's weight, zeros of a bias, else Gaussian."""
        if len(shape) < 2:
            return torch.zeros(tuple(shape), device=self.device) if name.endswith("bias") else torch.ones(tuple(shape), device=self.device)
        seed = int.from_bytes(hashlib.sha256(f"{name} {tuple(offset)}".encode()).digest()[:7], "little")
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(tuple(shape), device=self.device, generator=generator).mul_(SPREAD)

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Random numbers are drawn in float32."""
        return dtype == torch.float32


def _with_noise(adaptation: Adaptation, device: torch.device) -> None:
    """Put Noise in the place of the origin at the end of the chain, under adapters and quantisation."""
    holder: Any = adaptation
    while hasattr(holder.origin, "origin"):
        holder = holder.origin
    holder.origin = Noise(holder.origin, device)


@dataclass
class Bench:
    """What an order is measured with."""

    config: RunConfig
    world: World
    blueprint: Blueprint
    table: TokenTable
    loader: Loader
    warmup: int

    @staticmethod
    def of(config: RunConfig, order: dict[str, Any]) -> Bench:
        """Connect, and make model and rows."""
        world = World.from_environment()
        require_parts(config, world)
        world.connect()
        tokenizer = plain_tokenizer()
        blueprint = make_blueprint(config.model, config.seed, tokenizer)
        count = config.train.global_batch * (config.train.steps or 1)
        vocab_size = blueprint.config.get_text_config().vocab_size
        table = random_rows(count, config.data.seq_len, vocab_size, order.get("whole_rows", False))
        share = mesh_of(config.engine, world.size).share_of(world.rank)
        loader = Loader(table, config.train, seed=config.seed, pad_id=0, **share)
        return Bench(config, world, blueprint, table, loader, order["warmup"])

    def engine(self) -> Engine:
        """Build the engine with noise for weights."""
        return build_engine(self.config, self.world, self.blueprint, lambda adaptation: _with_noise(adaptation, self.world.device))

    def flops(self, shapes: dict[str, tuple[int, ...]], frozen: set[str]) -> float:
        """Return the FLOPs of a token."""
        return flops_per_token(shapes, self.blueprint.config, self.table.mean_attended(), frozen)

    def speed(self, seconds: list[float], tokens: list[int], flops: float | None) -> Figures:
        """Return tokens a second and MFU, medians of the steps that count."""
        rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)][self.warmup :]
        rate, peak = statistics.median(rates), peak_tflops(self.config)
        mfu = None if peak is None or flops is None else rate * flops / (peak * 1e12)
        return {"tokens_per_second": rate, "step_seconds": statistics.median(seconds[self.warmup :]), "mfu": mfu}
