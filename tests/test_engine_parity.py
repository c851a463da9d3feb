"""Every engine gives the curve of a plain one-process transformers loop, at any world size and for any architecture.

Over 20 steps with clipping active, losses and gradient norms agree within 1e-5 relative, and so do parameters after SGD. AdamW
divides each gradient by its own size: where a gradient is nothing but rounding noise it takes a full step of the learning rate in
whichever direction the noise points, so parameters may differ by a share of lr x steps; the bound here is 2 % of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY, Ranks, blueprint_for, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from tools.bench.orders import engine_preset
from trainers.batch import IGNORE, Batch
from trainers.config.choices import Offload, OptimizerName, Precision
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainers.engines.build import build_engine
from trainers.engines.fsdp.engine import sum_of_squares
from trainers.objectives import NextToken
from trainers.world import World

STEPS, ROWS, LENGTH = 20, 6, 24
LR = {"adamw": 1e-3, "sgd": 1e-1}
REL = 1e-5
ENGINES = ["fsdp", "fsdp_offload", "zero3", pytest.param("zero3_offload", marks=pytest.mark.cpu_adam)]


def uneven_batches() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Steps of rows (input_ids, labels) with very different numbers of labels, one row with none."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
        rows = []
        for row in range(ROWS):
            ids = torch.randint(3, 33, (LENGTH,), generator=generator)
            labels = ids.roll(-1)
            labels[: row * 4] = IGNORE
            labels[-1] = IGNORE
            if row == 2:
                labels[:] = IGNORE
            rows.append((ids, labels))
        steps.append(rows)
    return steps


def config_for(folder: Path, engine: str = "fsdp", optim: str = "adamw", **more: Any) -> RunConfig:
    """A run of a shipped engine preset; `engine.NAME=VALUE` in `more` changes a field, the rest goes to train."""
    run_dir = folder.parent / f"run-{engine}"
    run_dir.mkdir(exist_ok=True)
    settings = {key.removeprefix("engine."): more.pop(key) for key in list(more) if key.startswith("engine.")}
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder)),
        data=DataConfig(path="unused"),
        engine=EngineConfig(**(engine_preset(engine) | settings)),
        optim=OptimConfig(name=OptimizerName(optim), lr=LR[optim], clip=0.5, weight_decay=0.1),
        train=TrainConfig(**({"precision": Precision.fp32} | more)),
    )


def train_on_ranks(world: World, folder: Path, microbatch: int, engine: str = "fsdp", optim: str = "adamw", **more: Any) -> dict[str, Any]:
    """Train STEPS steps with rows dealt to ranks; return losses, grad norms, the whole weights and the start-up table."""
    built = build_engine(config_for(folder, engine, optim, **more), world, blueprint_for(folder))
    losses, norms = [], []
    for rows in uneven_batches():
        targets = sum(int((labels != IGNORE).sum()) for _, labels in rows)
        mine = rows[world.rank :: world.size]
        chunks = [mine[start : start + microbatch] for start in range(0, len(mine), microbatch)]
        local = 0.0
        for number, chunk in enumerate(chunks, 1):
            ids, labels = (torch.stack(column) for column in zip(*chunk, strict=True))
            positions = torch.arange(LENGTH).expand(ids.shape)
            batch = Batch.of(ids, labels, positions)
            loss = NextToken()(built.forward(batch), batch).total
            built.backward(loss / targets, last=number == len(chunks))
            local += loss.item()
        norms.append(built.step(LR[optim]))
        losses.append(world.sum([local])[0] / targets)
    weights = {name: tensor.float().numpy() for name, tensor in built.weights()}
    return {"losses": losses, "norms": norms, "weights": weights, "report": built.report()}


def train_plainly(folder: Path, optim: str = "adamw") -> dict[str, Any]:
    """The reference: one process, plain transformers and torch, all rows at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    lr = LR[optim]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)) if optim == "adamw" else torch.optim.SGD(groups, lr=lr)
    losses, norms = [], []
    for rows in uneven_batches():
        ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def assert_same_run(got: dict[str, Any], reference: dict[str, Any], optim: str = "adamw", rel: float = REL) -> None:
    assert got["losses"] == pytest.approx(reference["losses"], rel=rel)
    assert got["norms"] == pytest.approx(reference["norms"], rel=rel)
    atol = 0.02 * LR["adamw"] * STEPS if optim == "adamw" else 1e-5
    for name, tensor in got["weights"].items():
        torch.testing.assert_close(torch.from_numpy(tensor), reference["weights"][name], rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str], tuple[Path, dict[str, Any]]]:
    """A tiny Llama, tied or not, and what the plain loop makes of it with an optimizer; each once."""

    @cache
    def reference(tied: bool, optim: str) -> tuple[Path, dict[str, Any]]:
        folder = save_tiny(tmp_path_factory.mktemp("reference") / "model", tied=tied)
        return folder, train_plainly(folder, optim)

    return reference


QUICK = [(1, "fsdp"), (3, "zero3")]
SIZES = [
    pytest.param(size, engine, marks=[] if (size, engine) in QUICK else pytest.mark.slow)
    for size in (1, 2, 3)
    for engine in ("fsdp", "fsdp_offload", "zero3")
]


@pytest.mark.parametrize(
    ("size", "engine"), [*SIZES, *(pytest.param(size, "zero3_offload", marks=pytest.mark.cpu_adam) for size in (1, 2, 3))]
)
def test_llama_equals_the_plain_loop(ranks: Callable[[int], Ranks], references: Any, size: int, engine: str) -> None:
    cases = {1: [(True, "adamw")], 2: [(True, "adamw"), (False, "adamw"), (True, "sgd")], 3: [(False, "adamw"), (True, "sgd")]}
    for tied, optim in cases[size]:
        folder, reference = references(tied, optim)
        for result in ranks(size).call(train_on_ranks, folder, 1, engine, optim):
            assert_same_run(result, reference, optim)
            assert ("lm_head.weight" in result["weights"]) is not tied


@pytest.mark.parametrize(
    ("size", "more"),
    [
        pytest.param(2, {"engine.replicate": 2}, marks=pytest.mark.slow),
        (4, {"engine.replicate": 2, "engine.shard": 2}),
        pytest.param(2, {"engine.sync_each_microbatch": False}, marks=pytest.mark.slow),
        pytest.param(4, {"engine.replicate": 2, "engine.sync_each_microbatch": False}, marks=pytest.mark.slow),
        (2, {"engine.reshard_after_forward": False, "engine.prefetch": 2}),
        pytest.param(2, {"engine.reshard_after_backward": False}, marks=pytest.mark.slow),
        pytest.param(3, {"engine.reshard_after_backward": False, "engine.reshard_after_forward": False}, marks=pytest.mark.slow),
        (2, {"engine.offload_optimizer": Offload.cpu}),
    ],
    ids=str,
)
def test_fsdp_knobs_change_no_figure(ranks: Callable[[int], Ranks], references: Any, size: int, more: dict[str, Any]) -> None:
    folder, reference = references(True, "adamw")
    assert_same_run(ranks(size).call(partial(train_on_ranks, **more), folder, 1)[0], reference)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"engine.sub_group_size": 1000}, marks=pytest.mark.slow),
        pytest.param({"engine.offload_optimizer": Offload.cpu, "engine.sub_group_size": 1000}, marks=pytest.mark.cpu_adam),
        pytest.param({"engine.offload_param": Offload.cpu}, marks=pytest.mark.slow),
        pytest.param(
            {"engine.param_persistence_threshold": 0, "engine.overlap_comm": False, "engine.reduce_bucket_size": 4096},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"engine.overrides": {"zero_optimization": {"contiguous_gradients": False, "stage3_max_live_parameters": 10000}}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_zero3_knobs_change_no_figure(ranks: Callable[[int], Ranks], references: Any, more: dict[str, Any]) -> None:
    folder, reference = references(True, "adamw")
    assert_same_run(ranks(2).call(partial(train_on_ranks, **more), folder, 1, "zero3")[0], reference)


STYLES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


QUICK_STYLES = [("mixtral", "fsdp"), ("gemma2", "zero3")]


@pytest.mark.parametrize(
    ("style", "engine"),
    [
        pytest.param(style, engine, marks=[] if (style, engine) in QUICK_STYLES else pytest.mark.slow)
        for style in STYLES
        for engine in ("fsdp", "zero3")
    ],
)
def test_other_architectures_equal_the_plain_loop(ranks: Callable[[int], Ranks], tmp_path: Path, style: str, engine: str) -> None:
    torch.manual_seed(0)
    common = {key: value for key, value in TINY.items() if style != "gpt2" or not key.startswith(("hidden", "inter", "num", "max"))}
    config = AutoConfig.for_model(style, **(common | STYLES[style]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    reference = train_plainly(tmp_path / "model")
    assert_same_run(ranks(2).call(train_on_ranks, tmp_path / "model", 2, engine)[0], reference)


@pytest.mark.parametrize("engine", [ENGINES[0], *(pytest.param(engine, marks=pytest.mark.slow) for engine in ENGINES[1:3]), ENGINES[3]])
def test_bf16_stays_near_float32(ranks: Callable[[int], Ranks], references: Any, engine: str) -> None:
    """Within 1 % over 20 steps; a bfloat16 number has 8 bits, 0.4 %, and losses are means over many."""
    folder, reference = references(True, "adamw")
    result = ranks(2).call(partial(train_on_ranks, precision=Precision.bf16), folder, 1, engine)[0]
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-2)
    assert result["report"]["storage"].startswith("float32")
    assert result["report"]["compute"].startswith("bfloat16")


def move_norms(world: World, folder: Path, engine: str) -> dict[str, float]:
    """Five steps at 1e-5 in bf16: how far each norm weight has moved, of the values that stand in float32."""
    config = config_for(folder, engine, precision=Precision.bf16)
    config.optim.weight_decay = 0.0
    built = build_engine(config, world, blueprint_for(folder))
    before = {name: tensor.float().clone() for name, tensor in built.weights()}
    for rows in uneven_batches()[:5]:
        ids, labels = (torch.stack(column) for column in zip(*rows[world.rank :: world.size], strict=True))
        positions = torch.arange(LENGTH).expand(ids.shape)
        batch = Batch.of(ids, labels, positions)
        built.backward(-built.forward(batch).logps.sum() / 100, last=True)
        built.step(1e-5)
    return {name: float((tensor.float() - before[name]).abs().max()) for name, tensor in built.weights() if "norm" in name}


@pytest.mark.parametrize("engine", ENGINES)
def test_norm_weights_move_at_a_rate_that_bf16_could_not_hold(ranks: Callable[[int], Ranks], tiny_llama: Path, engine: str) -> None:
    """1.0 + 1e-5 is 1.0 in bfloat16: master weights that are float32 in name only would stand still."""
    for name, moved in ranks(2).call(move_norms, tiny_llama, engine)[0].items():
        assert 1e-5 < moved < 6e-5, name


def skip_a_step(world: World, folder: Path, preset: str) -> tuple[float, bool]:
    """Give rank 0 an infinite loss; return the norm and whether any weight moved."""
    engine = build_engine(config_for(folder, preset), world, blueprint_for(folder))
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    ids, labels = (torch.stack(column) for column in zip(*uneven_batches()[0][:1], strict=True))
    batch = Batch.of(ids, labels, torch.arange(LENGTH)[None])
    scale = float("inf") if world.rank == 0 else 1.0
    engine.backward(engine.forward(batch).logps.sum() * scale, last=True)
    norm = engine.step(1.0)
    return norm, any(not torch.equal(before[name], tensor) for name, tensor in engine.weights())


@pytest.mark.parametrize("preset", ENGINES)
def test_non_finite_gradients_never_reach_the_weights(ranks: Callable[[int], Ranks], tiny_llama: Path, preset: str) -> None:
    for norm, moved in ranks(2).call(skip_a_step, tiny_llama, preset):
        assert not torch.tensor(norm).isfinite()
        assert not moved


def save_and_load(world: World, folder: Path, checkpoint: Path, saved: bool, preset: str) -> dict[str, Any]:
    """Train some steps and save, or load; then the last two."""
    engine = build_engine(config_with_visits(folder, preset), world, blueprint_for(folder))
    rows = uneven_batches()
    for number, step in enumerate(rows):
        if number == STEPS - 2:
            dcp.save(engine.state(), checkpoint_id=checkpoint) if saved else engine.load(checkpoint)
        elif number < STEPS - 2 and not saved:
            continue
        ids, labels = (torch.stack(column) for column in zip(*step[world.rank :: world.size], strict=True))
        positions = torch.arange(LENGTH).expand(ids.shape)
        batch = Batch.of(ids, labels, positions)
        engine.backward(-engine.forward(batch).logps.sum() / 100, last=True)
        engine.step(1e-3)
    return {name: tensor.numpy() for name, tensor in engine.weights()}


@pytest.mark.parametrize("preset", [*ENGINES, "fsdp+visits"])
def test_saving_before_the_first_step_changes_nothing(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, preset: str) -> None:
    with_save, without = (ranks(2).call(train_after_saving, tiny_llama, folder, preset)[0] for folder in (tmp_path / "step", None))
    assert all((with_save[name] == tensor).all() for name, tensor in without.items())


def train_after_saving(world: World, folder: Path, checkpoint: Path | None, preset: str) -> dict[str, Any]:
    engine = build_engine(config_with_visits(folder, preset), world, blueprint_for(folder))
    if checkpoint is not None:
        dcp.save(engine.state(), checkpoint_id=checkpoint)
        engine.load(checkpoint)
    ids, labels = (torch.stack(column) for column in zip(*uneven_batches()[0][:2], strict=True))
    batch = Batch.of(ids, labels, torch.arange(LENGTH).expand(2, -1))
    engine.backward(-engine.forward(batch).logps.sum(), last=True)
    engine.step(0.1)
    return {name: tensor.numpy() for name, tensor in engine.weights()}


def config_with_visits(folder: Path, preset: str) -> RunConfig:
    """`NAME+visits` is a preset whose optimizer state alone lives on the host."""
    name, _, visits = preset.partition("+")
    return config_for(folder, name, **({"engine.offload_optimizer": Offload.cpu} if visits else {}))


@pytest.mark.parametrize("preset", [*ENGINES, "fsdp+visits"])
def test_a_checkpoint_continues_exactly_and_on_another_world_size(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, preset: str
) -> None:
    saved = ranks(2).call(save_and_load, tiny_llama, tmp_path / "step", True, preset)[0]
    again = ranks(2).call(save_and_load, tiny_llama, tmp_path / "step", False, preset)[0]
    others = [ranks(size).call(save_and_load, tiny_llama, tmp_path / "step", False, preset)[0] for size in (1, 3)]
    for name, tensor in saved.items():
        assert (again[name] == tensor).all(), name
        for other in others:
            torch.testing.assert_close(torch.from_numpy(other[name]), torch.from_numpy(tensor), rtol=1e-5, atol=1e-6)


def test_the_norm_of_many_numbers_is_exact() -> None:
    """32 million gradients of 1e-3: torch's float32 norm on a CPU is off in the third digit; clipping would be, too."""
    gradient = torch.full((1 << 25,), 1e-3)
    assert float(sum_of_squares([gradient])) == pytest.approx((1 << 25) * float(gradient[0]) ** 2, rel=1e-9)
