"""A run over any mesh, in the ranks of a test: steps on packed rows, what they leave, and what a checkpoint continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ranks
from tables import packed_table

from trainers.batch import Batch
from trainers.config.choices import Attention, OptimizerName, Precision
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainers.data.loader import Loader, eval_batches
from trainers.engines.build import build_engine
from trainers.evaluation import evaluate
from trainers.model.blueprint import Blueprint
from trainers.objectives import make_objective
from trainers.step import take_step
from trainers.world import World, seed_step

STEPS = 10
LR = {OptimizerName.sgd: 0.1, OptimizerName.adamw: 1e-3}


def config_for(run_dir: Path, **settings: Any) -> RunConfig:
    """A run of plain gradient descent, which does not magnify rounding; `settings` are of the groups."""
    run_dir.mkdir(exist_ok=True, parents=True)
    groups: dict[str, Any] = {"precision": Precision.fp32, "global_batch": 4, "steps": STEPS} | settings.pop("train", {})
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(architecture={"model_type": "llama"}, train_tokenizer=300, attention=settings.pop("attention", Attention.auto)),
        data=DataConfig(path=str(run_dir), seq_len=48, packing=settings.pop("packing", True)),
        optim=OptimConfig(name=settings.pop("optim", OptimizerName.sgd), lr=0.1, clip=0.5),
        train=TrainConfig(**groups),
        **settings,
    )


def train(
    world: World, run_dir: Path, model: Blueprint, engine: dict[str, Any], settings: dict[str, Any], begin: int = 0, end: int = STEPS
) -> dict[str, Any]:
    """Take steps, those before `begin` from a checkpoint in `run_dir`, and an evaluation; return losses, norms, figures and weights."""
    config = config_for(run_dir, engine=EngineConfig(**engine), **settings)
    built = build_engine(config, world, model)
    if begin:
        built.load(run_dir / str(begin))
    loaded = {name: tensor.numpy().tobytes() for name, tensor in built.weights()}
    table = packed_table(config.objective.name)
    share: dict[str, Any] = {"rank": built.mesh.data_rank(world.rank), "world_size": built.mesh.data_size, "pad_id": 0}
    loader = Loader(table, config.train, seed=0, **share)
    objective = make_objective(config.objective, table.signals, config.train.balance_loss)
    results = []
    for step in range(begin, end):
        rows = loader.row_ids(step)
        targets = objective.targets(table.sizes(rows))
        seed_step(0, step, world.rank // built.mesh.tensor)
        results.append(take_step(built, objective, loader.batches(step, rows), world, lr=LR[config.optim.name], targets=targets))
    if end < STEPS:
        dcp.save(built.state(), checkpoint_id=run_dir / str(end))
    rows = np.arange(len(table))
    held_out = evaluate(built, objective, eval_batches(table, 1, **share), world, objective.targets(table.sizes(rows)))
    assert held_out is not None
    return {
        "losses": [result.loss for result in results] + [held_out.loss],
        "norms": [result.grad_norm for result in results],
        "figures": [result.figures for result in results] + [held_out.figures],
        "weights": {name: tensor.float().numpy() for name, tensor in built.weights()},
        "loaded": loaded,
        "report": built.report(),
        "state": built.state_bytes(),
        "parameters": sum(p.numel() for p in built.model.parameters()),
    }


def compare(split: dict[str, Any], whole: dict[str, Any]) -> None:
    """Hold one rank's run next to that of one process: losses and norms within 1e-5 of their size, parameters within 1e-5."""
    assert split["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert split["norms"] == pytest.approx(whole["norms"], rel=1e-5)
    for mine, wanted in zip(split["figures"], whole["figures"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert split["loaded"] == whole["loaded"]
    for name, values in split["weights"].items():
        np.testing.assert_allclose(values, whole["weights"][name], rtol=0, atol=1e-5, err_msg=name)


def compare_continued(
    ranks: Callable[[int], Ranks],
    folder: Path,
    model: Blueprint,
    settings: dict[str, Any],
    meshes: dict[str, tuple[int, dict[str, Any]]],
    continued: dict[str, tuple[str, ...]],
) -> None:
    """Save a run on each mesh of `continued` and go on with it on that mesh and on others: curve and bytes of one process.

    `meshes` has ranks and settings of the engine by a name.
    """
    (whole,) = ranks(1).call(train, folder / "whole", model, {}, dict(settings))
    for saved, others in continued.items():
        size, engine = meshes[saved]
        first = ranks(size).call(train, folder / saved, model, engine, dict(settings), 0, 5)[0]
        exports = []
        for other in (saved, *others):
            size, engine = meshes[other]
            second = ranks(size).call(train, folder / saved, model, engine, dict(settings), 5)[0]
            assert first["losses"][:-1] + second["losses"] == pytest.approx(whole["losses"], rel=1e-5)
            exports.append(second["loaded"])
        assert all(exported == exports[0] for exported in exports)


EARLY, LATE = 3, 27
"""Tokens of the needle's first document."""


def needle_of(world: World, run_dir: Path, blueprint: Blueprint, engine: dict[str, Any], backend: Attention) -> np.ndarray[Any, Any]:
    """Return the gradient of a late token's log-probability with respect to this rank's embedded tokens, (T, H): documents of 30 and 18."""
    built = build_engine(config_for(run_dir, engine=EngineConfig(**engine), attention=backend), world, blueprint)
    ids = torch.randint(3, 33, (1, 48), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(30), torch.arange(18)])[None]
    embedded: list[torch.Tensor] = []
    layer = built.model.get_input_embeddings()
    assert layer is not None
    hook = layer.register_forward_hook(lambda _, __, out: embedded.append(out) or out.retain_grad())  # type: ignore[func-returns-value]
    built.backward(built.forward(Batch.of(ids, ids.roll(-1, 1), positions)).logps[0, LATE] / world.size, last=True)
    hook.remove()
    assert embedded[0].grad is not None
    return embedded[0].grad[0].numpy()
