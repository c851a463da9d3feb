"""Small tables of tokens and the configs that train on them without a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.config.choices import ObjectiveName, Precision, WandbMode
from trainers.config.derived import learning_rate
from trainers.config.schema import DataConfig, LogConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainers.data.pack import pack, pack_units
from trainers.data.table import TokenTable
from trainers.model.blueprint import Blueprint
from trainers.objectives import REFERENCE

LR, STEPS = 1e-2, 3
EPS = 1e-3
"""AdamW divides by sqrt(v) + eps: with its usual 1e-8, a gradient of pure rounding noise becomes a full step of size lr."""


def ragged_table(lengths: list[int], packed: int | None = None, masked: tuple[int, ...] = ()) -> TokenTable:
    """Documents of these lengths, the first third of each unsupervised; `masked` ones have no label at all."""
    generator = np.random.default_rng(3)
    tokens = [generator.integers(3, 33, length) for length in lengths]
    supervised = [np.r_[np.zeros(max(1, length // 3)), np.ones(length - max(1, length // 3))] for length in lengths]
    for document in masked:
        supervised[document][:] = 0
    order, rows = pack(np.array(lengths), packed) if packed else (np.arange(len(lengths)), np.arange(len(lengths) + 1))
    return TokenTable(
        tokens=np.concatenate(tokens).astype(np.int32),
        supervised=np.concatenate(supervised).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        order=order,
        rows=rows,
    )


LENGTHS = [5, 29, 11, 3, 40, 17, 8, 23]


def config_for(run_dir: Path, model: Path, **train_fields: Any) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(model)),
        data=DataConfig(path="unused"),
        optim=OptimConfig(lr=LR, warmup_steps=1, clip=0.5, weight_decay=0.1, eps=EPS),
        train=TrainConfig(**{"precision": Precision.fp32} | train_fields),
        log=LogConfig(wandb=WandbMode.disabled),
    )


def blueprint_for(model: Path, attention: str | None = None) -> Blueprint:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    config._attn_implementation = attention
    return Blueprint(config=config, folder=model, revision=None, seed=0, trust_remote_code=False)


def plain_adamw(model: torch.nn.Module, lr: float, num_steps: int, clip: float = 0.5) -> Callable[[], float]:
    """Return what takes a step of plain AdamW as `config_for` sets it, with the gradients that are there; it returns their norm."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1}]
    groups += [{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer, taken = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=EPS), itertools.count()

    def step() -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(trained, clip))
        rate = learning_rate(OptimConfig(warmup_steps=1), lr, next(taken), num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return step


def pair_table(lengths: list[int], packed: int | None = None) -> TokenTable:
    """Pairs of documents of these lengths, a pair a row where they are not packed; the two of a pair begin with the same tokens."""
    table = ragged_table(lengths)
    tokens, units = table.tokens.copy(), np.arange(len(lengths)) // 2
    for first in range(0, len(lengths), 2):
        shared = max(1, min(lengths[first : first + 2]) // 3)
        starts = table.offsets[first : first + 2]
        tokens[starts[1] : starts[1] + shared] = tokens[starts[0] : starts[0] + shared]
    order, rows = pack_units(np.array(lengths), units, packed) if packed else (table.order, np.arange(0, len(lengths) + 1, 2))
    return replace(table, tokens=tokens, units=units, order=order, rows=rows, apart=packed is None)


def packed_table(objective: ObjectiveName) -> TokenTable:
    """Ten documents of 3 to 40 tokens in packed rows; of dpo five pairs, with what a reference says of each document."""
    lengths = [5, 29, 11, 3, 40, 17, 8, 23, 26, 30]
    if objective is not ObjectiveName.dpo:
        return ragged_table(lengths, packed=48)
    table = pair_table(lengths, packed=70)
    return replace(table, signals={REFERENCE: np.linspace(-9, -5, len(lengths), dtype=np.float32)})
