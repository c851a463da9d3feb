"""Each optimizer gives the curve of its reference implementation in one plain process, however the model is split; and continues exactly.

References: torch.optim.AdamW, SGD and Muon, transformers' Adafactor, lion-pytorch, schedulefree, bitsandbytes' classes. Those of
8 bits share a scale in blocks that begin where a rank's part begins: their reference is given the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ranks, blueprint_for, save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from launcher.compose import compose
from tools.bench.plan import SIZES, Case, _take_steps, _without_copies_of_gloo, blueprint_of_case
from trainers.batch import IGNORE, Batch
from trainers.config.choices import EngineName, Offload, OptimizerName, OptimizerState, PeftMethod, Precision, Schedule
from trainers.config.derived import peak_lr
from trainers.config.errors import ConfigError
from trainers.config.optimizers import validate_optimizer
from trainers.config.schema import EngineConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.engines.build import build_engine
from trainers.objectives import NextToken
from trainers.optim.rounding import noise, round_into, salt
from trainers.plan.simulate import bytes_of_whole, simulate
from trainers.plan.simulate import ranks as fake_ranks
from trainers.plan.trace import Trace
from trainers.world import World

STEPS, LENGTH = 5, 24
LR = {"adafactor": 1e-2, "lion": 1e-3, "muon": 1e-2, "schedule_free_adamw": 1e-2}
BETAS = {"lion": [0.9, 0.99]}
SMALL = 512
"""Elements from which the tiny model's tensors get 8 bits."""
NAMES = [*OptimizerName, "adamw+bf16", "lion+bf16"]
MATRICES = ("muon", "adafactor")


def lr_of(name: str) -> float:
    return LR.get(name.partition("+")[0], 1e-3)


def optim_of(name: str) -> OptimConfig:
    plain, _, state = name.partition("+")
    betas = BETAS.get(plain, [0.9, 0.95])
    fields: dict[str, Any] = {"schedule": Schedule.constant} if plain == "schedule_free_adamw" else {}
    return OptimConfig(
        name=OptimizerName(plain), lr=lr_of(name), betas=betas, clip=0.5, weight_decay=0.1, state=OptimizerState(state or "fp32"), **fields
    )


def run_of(folder: Path, engine: str, name: str) -> RunConfig:
    run_dir = folder.parent / f"run-{engine}"
    run_dir.mkdir(exist_ok=True)
    config = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder)),
        engine=EngineConfig(name=EngineName(engine)),
        optim=optim_of(name),
        train=TrainConfig(precision=Precision.fp32),
    )
    validate_optimizer(config)
    return config


def uneven_batches() -> list[list[tuple[Tensor, Tensor]]]:
    """Five steps of six rows (input_ids, labels) with very different numbers of labels, one row with none."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
        rows = []
        for row in range(6):
            ids = torch.randint(3, 33, (LENGTH,), generator=generator)
            labels = ids.roll(-1)
            labels[: row * 4] = IGNORE
            labels[-1] = IGNORE
            if row == 2:
                labels[:] = IGNORE
            rows.append((ids, labels))
        steps.append(rows)
    return steps


def batch_of(rows: list[tuple[Tensor, Tensor]]) -> Batch:
    ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return Batch.of(ids, labels, torch.arange(LENGTH).expand(ids.shape))


def take_steps(built: Any, world: World, first: int, last: int, lr: float) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for rows in uneven_batches()[first:last]:
        targets = sum(int((labels != IGNORE).sum()) for _, labels in rows)
        batch = batch_of(rows[world.rank :: world.size])
        loss = NextToken()(built.forward(batch), batch).total
        built.backward(loss / targets, last=True)
        norms.append(built.step(lr))
        losses.append(world.sum([float(loss)])[0] / targets)
    return losses, norms


def use_small_blocks(smallest: int = SMALL) -> None:
    from trainers.optim import bits

    bits.SMALLEST = smallest


def train_on_ranks(world: World, folder: Path, engine: str, names: list[str]) -> dict[str, Any]:
    use_small_blocks()
    found = {}
    for name in names:
        built = build_engine(run_of(folder, engine, name), world, blueprint_for(folder))
        built.report()
        losses, norms = take_steps(built, world, 0, STEPS, lr_of(name))
        table = built.report()
        weights = {key: tensor.float().numpy() for key, tensor in built.weights()}
        found[name] = {"losses": losses, "norms": norms, "weights": weights, "table": table["optimizer state"]}
    return found


def parts_of(p: Tensor, engine: str, ranks: int) -> Iterator[Tensor]:
    """Views of a parameter as the engine splits it."""
    share = -(-len(p) // ranks) * p[0].numel() if engine == "fsdp" else -(-p.numel() // ranks)
    yield from (part for part in p.detach().view(-1).split(share) if len(part))


class InParts:
    """A bitsandbytes optimizer of parts of parameters, as one process has them."""

    def __init__(self, model: nn.Module, name: str, engine: str, ranks: int) -> None:
        import bitsandbytes as bnb

        kinds = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
        self.parts: list[tuple[Tensor, list[nn.Parameter]]] = []
        coded, plain = [], []
        for key, p in model.named_parameters():
            parts = [nn.Parameter(part) for part in parts_of(p, engine, ranks)]
            self.parts.append((p, parts))
            is_small = p.numel() < SMALL or "embed" in key or "lm_head" in key or name not in kinds
            (plain if is_small else coded).append({"params": parts, "weight_decay": 0.1 if p.ndim > 1 else 0.0})
        shared = {"lr": lr_of(name), "betas": (0.9, 0.95), "eps": 1e-8}
        self.optimizers = [bnb.optim.AdamW32bit(plain, **shared)]
        self.optimizers += [kinds[name](coded, min_8bit_size=1, **shared)] if coded else []
        self.engine, self.ranks = engine, ranks

    def step(self) -> None:
        for p, parts in self.parts:
            for part, grad in zip(parts, parts_of(p.grad, self.engine, self.ranks), strict=True):
                part.grad = grad.clone()
        for optimizer in self.optimizers:
            optimizer.step()


class Both:
    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def reference_optimizer(model: nn.Module, name: str, engine: str, ranks: int) -> Any:
    plain = name.partition("+")[0]
    lr, betas = lr_of(name), tuple(BETAS.get(plain, [0.9, 0.95]))
    decayed, kept = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    if plain == "lion":
        from lion_pytorch import Lion

        return Lion(groups, lr=lr, betas=betas)
    if plain == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)
    if plain == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(groups, lr=lr, betas=betas)
        optimizer.train()
        return optimizer
    if plain == "muon":
        tables = [p for key, p in model.named_parameters() if "embed" in key or "lm_head" in key]
        matrices = [p for p in decayed if all(p is not table for table in tables)]
        rest = [{"params": tables, "weight_decay": 0.1}, groups[1]]
        return Both(
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=lr, betas=betas)
        )
    if "adamw_" in plain:
        return InParts(model, plain, engine, ranks)
    return torch.optim.SGD(groups, lr=lr) if plain == "sgd" else torch.optim.AdamW(groups, lr=lr, betas=betas)


def train_plainly(folder: Path, name: str, engine: str = "fsdp", ranks: int = 1) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = reference_optimizer(model, name, engine, ranks)
    losses, norms = [], []
    for rows in uneven_batches()[:STEPS]:
        ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str, str, int], dict[str, Any]]]:
    folder = save_tiny(tmp_path_factory.mktemp("reference") / "model", tied=False)
    return folder, cache(partial(train_plainly, folder))


LOOSE = {"muon": (1e-3, 1e-2), "adamw+bf16": (1e-4, 1e-2), "lion+bf16": (1e-3, 0.05)}
"""Relative differences of losses, and mean ones of weights over the way that they went: Muon multiplies in bfloat16, and a moment
of bfloat16 is compared with one of float32. A code of 8 bits may fall to the other side."""


def offered(engine: str) -> list[str]:
    return [str(name) for name in NAMES if engine == "fsdp" or name not in MATRICES]


SPLITS = [
    (3, "fsdp", ["adamw_8bit", "adafactor", "muon", "schedule_free_adamw"]),
    (2, "zero3", ["adamw_8bit", "lion+bf16"]),
    *(pytest.param(*split, offered(split[1]), marks=pytest.mark.slow) for split in ((1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (3, "zero3"))),
]


@pytest.mark.parametrize(("size", "engine", "names"), SPLITS, ids=lambda value: "" if isinstance(value, list) else value)
def test_each_equals_its_reference(ranks: Callable[[int], Ranks], references: Any, size: int, engine: str, names: list[str]) -> None:
    folder, reference = references
    [found, *_] = ranks(size).call(train_on_ranks, folder, engine, names)
    for name, got in found.items():
        wanted = reference(name, engine, size if "8bit" in name else 1)
        rel, way = LOOSE.get(name, (1e-5, 1e-3))
        assert got["losses"] == pytest.approx(wanted["losses"], rel=rel), name
        assert got["norms"] == pytest.approx(wanted["norms"], rel=2 * rel), name
        for key, tensor in got["weights"].items():
            off = (torch.from_numpy(tensor) - wanted["weights"][key]).abs().mean() / (lr_of(name) * STEPS)
            assert off < way, (name, key)


def continue_run(world: World, folder: Path, engine: str, names: list[str], kept: Path, saved: bool) -> dict[str, dict[str, Any]]:
    """Take three steps and save, or load; then the last two. What loads evaluates in between, which must change nothing."""
    use_small_blocks()
    found = {}
    for name in names:
        built = build_engine(run_of(folder, engine, name), world, blueprint_for(folder))
        if saved:
            take_steps(built, world, 0, 3, lr_of(name))
            dcp.save(built.state(), checkpoint_id=kept / name)
        else:
            built.load(kept / name)
        losses, _ = take_steps(built, world, 3, 4, lr_of(name))
        if not saved:
            built.train(False)
            with torch.no_grad():
                built.forward(batch_of(uneven_batches()[0][:1]))
            built.state()
            built.train(True)
        losses += take_steps(built, world, 4, 5, lr_of(name))[0]
        found[name] = {"losses": losses, "weights": {key: tensor.clone().numpy() for key, tensor in built.weights()}}
    return found


HAVE_STATE = ["adamw_8bit", "schedule_free_adamw", "adafactor", "muon", "lion", "adamw+bf16", "paged_adamw_32bit"]


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        ("fsdp", HAVE_STATE[:2]),
        pytest.param("fsdp", HAVE_STATE[2:], marks=pytest.mark.slow),
        pytest.param("zero3", [name for name in HAVE_STATE if name not in MATRICES], marks=pytest.mark.slow),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_each_continues_exactly_and_on_another_world_size(
    ranks: Callable[[int], Ranks], references: Any, tmp_path: Path, engine: str, names: list[str]
) -> None:
    folder, _ = references
    saved, again = (ranks(2).call(continue_run, folder, engine, names, tmp_path, first)[0] for first in (True, False))
    other = ranks(3).call(continue_run, folder, engine, names, tmp_path, False)[0]
    for name in names:
        assert again[name]["losses"] == saved[name]["losses"], name
        loose = 1e-3 if name in ("muon", "adamw_8bit") else 1e-5
        assert other[name]["losses"] == pytest.approx(saved[name]["losses"], rel=loose), name
        for key, tensor in saved[name]["weights"].items():
            assert (again[name]["weights"][key] == tensor).all(), (name, key)


def measured(world: World, folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    use_small_blocks(4096)  # as the plan has them, whatever an earlier test set on these ranks
    for case in cases:
        trace = Trace(SIZES[case.size]["vocab_size"])
        with trace, _without_copies_of_gloo(trace):
            built, _ = _take_steps(case, world, folder, trace)
        peak = max(moment.total for moment in trace.moments())
        found.append({"state": built.state_bytes(), "peak": peak, "kept": bytes_of_whole(built.state()["optimizer"])})
    return found


PLANNED = [Case(2, "tiny", optimizer=name) for name in OptimizerName if name not in (OptimizerName.adamw, OptimizerName.sgd)]
PLANNED += [Case(2, "tiny", state=OptimizerState.bf16), Case(2, "tiny", optimizer=OptimizerName.lion, state=OptimizerState.bf16)]
PLANNED += [replace(case, engine=EngineName.zero3) for case in PLANNED if case.optimizer not in MATRICES]


@pytest.mark.soak
def test_the_plan_has_the_bytes_of_each(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """State and what a checkpoint keeps of it to the byte, the peak of tensors within 5 %."""
    for case, found in zip(PLANNED, ranks(2).call(measured, tmp_path, PLANNED)[0], strict=True):
        with fake_ranks(2, 2) as world:
            planned = simulate(case.config("."), blueprint_of_case(case), world, case.seq_len)
        assert planned.state_bytes == found["state"], case.name
        assert planned.optimizer_bytes == found["kept"], case.name
        assert planned.peak.total == pytest.approx(found["peak"], rel=0.05), case.name


def test_rounding_is_right_on_average_and_the_same_on_any_rank() -> None:
    """Of 1 + 2^-10, an eighth of the way between two bfloat16 numbers, one in eight goes up; parts get the noise of the whole."""
    values, rounded = torch.full((1 << 16,), 1 + 2**-10), torch.empty(1 << 16, dtype=torch.bfloat16)
    mark = salt("model.embed_tokens.weight", 3)
    bits = noise(values, 0, mark)
    for half in (bits & 0xFFFF, (bits >> 16) & 0xFFFF):
        round_into(rounded, values, half)
        assert float(rounded.float().mean()) == pytest.approx(1 + 2**-10, abs=5 * 2**-7 * (0.125 * 0.875 / 65536) ** 0.5)
        round_into(rounded, -values, half)
        assert float(rounded.float().mean()) == pytest.approx(-1 - 2**-10, abs=5 * 2**-7 * (0.125 * 0.875 / 65536) ** 0.5)
    assert torch.equal(noise(values[:1000], 5000, mark), bits[5000:6000])
    assert not torch.equal(noise(values, 0, salt("model.embed_tokens.weight", 4)), bits)


REFUSED = [
    ("muon", {"name": EngineName.zero3}, {}, "optim.name"),
    ("adafactor", {"name": EngineName.zero3}, {}, "optim.name"),
    ("muon", {"offload_optimizer": Offload.cpu}, {}, "engine.offload_optimizer"),
    ("adamw_8bit", {"offload_param": Offload.cpu, "offload_optimizer": Offload.cpu}, {}, "engine.offload_param"),
    ("lion", {"name": EngineName.zero3, "offload_optimizer": Offload.nvme, "nvme_path": "."}, {}, "optim.name"),
    (
        "adamw",
        {"name": EngineName.zero3, "offload_optimizer": Offload.nvme, "nvme_path": "."},
        {"state": OptimizerState.bf16},
        "optim.name",
    ),
    ("muon", {}, {"state": OptimizerState.bf16}, "optim.state"),
    ("schedule_free_adamw", {}, {"schedule": Schedule.cosine}, "optim.schedule"),
    ("schedule_free_adamw", {}, {"schedule": Schedule.constant, "betas": [0.0, 0.9]}, "optim.betas"),
]


@pytest.mark.parametrize(("name", "engine", "optim", "field"), REFUSED)
def test_what_an_optimizer_does_not_go_with_is_refused_by_name(
    name: str, engine: dict[str, Any], optim: dict[str, Any], field: str
) -> None:
    config = RunConfig(engine=EngineConfig(**engine), optim=OptimConfig(name=OptimizerName(name), **optim))
    with pytest.raises(ConfigError) as refused:
        validate_optimizer(config)
    assert refused.value.path == field
    assert refused.value.remedy


def test_a_rate_is_adamws_times_the_presets_factor_and_one_that_is_given_stays() -> None:
    lora = PeftConfig(method=PeftMethod.lora, lr=2e-4)
    lion = OptimConfig(name=OptimizerName.lion, full_lr=1e-5, adamw_factor=0.2)
    assert peak_lr(lion, PeftConfig()).value == pytest.approx(2e-6)
    assert peak_lr(lion, lora).value == pytest.approx(4e-5)
    assert str(peak_lr(lion, lora)) == "4e-05, from peft.lr 0.0002 x optim.adamw_factor 0.2"
    assert peak_lr(replace(lion, lr=1e-3), lora).value == 1e-3


def test_each_name_has_its_preset() -> None:
    for name in OptimizerName:
        job = compose([f"optim={name}", "model.id=OWNER/NAME", "data.path=OWNER/SET"])
        assert job.optim.name is name
