"""The routers' balance loss is what its formula says, the same under any split of a step; routers decide in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from conftest import Ranks
from small_models import small
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tools.bench.orders import engine_preset
from trainers.batch import IGNORE, NO_DOCUMENT, Batch
from trainers.config.checks import validate
from trainers.config.choices import Activations, ObjectiveName, PeftMethod, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.engines.build import build_engine, outline
from trainers.model.experts import balance, mixtures
from trainers.objectives import make_objective
from trainers.step import take_step
from trainers.world import World

ROWS, LENGTH = 12, 16


def config_for(run_dir: Path, kind: str, engine: str = "fsdp", **train: Any) -> RunConfig:
    run_dir.mkdir(exist_ok=True, parents=True)
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(architecture={"model_type": kind}, train_tokenizer=300),
        data=DataConfig(path=str(run_dir), seq_len=LENGTH),
        engine=EngineConfig(**engine_preset(engine)),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(**({"precision": Precision.fp32, "balance_loss": 100.0} | train)),
    )


def packed_rows() -> Batch:
    """Rows of two documents each, the last three tokens padding; one row without labels."""
    ids = torch.randint(3, 33, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels, documents, positions = ids.roll(-1, 1), torch.full_like(ids, NO_DOCUMENT), torch.zeros_like(ids)
    for row in range(ROWS):
        cut, end = 3 + row % 7, LENGTH - 3
        documents[row, :cut], documents[row, cut:end] = 2 * row, 2 * row + 1
        positions[row, :cut], positions[row, cut:end], positions[row, end:] = torch.arange(cut), torch.arange(end - cut), torch.arange(3)
        labels[row, cut - 1], labels[row, end - 1 :] = IGNORE, IGNORE
    labels[4] = IGNORE
    return Batch(
        input_ids=ids, labels=labels, position_ids=positions, documents=documents,
        num_rows=ROWS, num_tokens=ROWS * (LENGTH - 3), num_documents=2 * ROWS,
    )  # fmt: skip


def some(batch: Batch, first: int, count: int) -> Batch:
    rows = slice(first, first + count)
    documents = batch.documents[rows]
    return Batch(
        input_ids=batch.input_ids[rows], labels=batch.labels[rows], position_ids=batch.position_ids[rows],
        documents=documents.where(documents == NO_DOCUMENT, documents - 2 * first),
        num_rows=count, num_tokens=count * (LENGTH - 3), num_documents=2 * count,
    )  # fmt: skip


def test_of_one_document_it_is_that_of_transformers() -> None:
    logits = torch.randn(LENGTH, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = Batch.of(ids, ids, torch.arange(LENGTH)[None])
    found = balance(logits, logits.topk(2).indices, batch) / LENGTH
    assert float(found) == pytest.approx(float(load_balancing_loss_func((logits,), 5, 2)), rel=1e-6)
    even = balance(torch.zeros(LENGTH, 4), torch.arange(2 * LENGTH).view(LENGTH, 2) % 4, batch) / LENGTH
    assert float(even) == pytest.approx(2.0)


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_it_counts_each_document_by_its_labels_and_leaves_out_padding(is_sigmoid: bool) -> None:
    """By hand, document by document, with the normalised affinities of DeepSeek-V3 (eq. 17 to 20) for sigmoid routers."""
    batch, generator = packed_rows(), torch.Generator().manual_seed(2)
    logits = torch.randn(ROWS * LENGTH, 6, generator=generator)
    chosen = logits.topk(3).indices
    wanted = 0.0
    for document in range(batch.num_documents):
        rows = (batch.documents.flatten() == document).nonzero().flatten()
        affinities = logits[rows].sigmoid() if is_sigmoid else logits[rows].exp()
        p = (affinities / affinities.sum(1, keepdim=True)).mean(0)
        f = torch.stack([(chosen[rows] == expert).sum() / len(rows) for expert in range(6)])
        labels = int((batch.labels.flatten()[rows] != IGNORE).sum())
        wanted += labels * 6 * float(f @ p)
    assert float(balance(logits, chosen, batch, is_sigmoid)) == pytest.approx(wanted, rel=1e-5)


def step_in(world: World, run_dir: Path, kind: str, engine: str, microbatch: int, train: dict[str, Any]) -> Any:
    """Take two steps over all rows, dealt to ranks in runs of `microbatch`."""
    config = config_for(run_dir, kind, engine, **train)
    built = build_engine(config, world, small(kind))
    objective = make_objective(config.objective, (), config.train.balance_loss)
    whole = packed_rows()
    mine = [some(whole, first, microbatch) for first in range(world.rank * microbatch, ROWS, world.size * microbatch)]
    targets = int((whole.labels != IGNORE).sum())
    return [take_step(built, objective, mine, world, lr=1e-2, targets=targets) for _ in range(2)]


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_step_is_the_same_under_any_split(ranks: Callable[[int], Ranks], tmp_path: Path, kind: str, engine: str) -> None:
    """Ranks x accumulation x rows: 1 x 12 x 1, 2 x 6 x 1, 2 x 1 x 6, 3 x 4 x 1; with blocks computed again, too."""
    (whole,) = ranks(1).call(step_in, tmp_path / "whole", kind, engine, ROWS, {})
    (without,) = ranks(1).call(step_in, tmp_path / "without", kind, engine, ROWS, {"balance_loss": None})
    assert whole[0].loss == pytest.approx(without[0].loss, rel=1e-6)  # it is trained on and not part of the loss
    assert abs(whole[0].grad_norm - without[0].grad_norm) > 1e-3
    assert whole[0].figures["balance"] >= 2.0
    for size, microbatch, again in ((1, 1, False), (2, 1, False), (2, 6, True), (3, 1, False)):
        more = {"activations": Activations.block if again else Activations.keep}
        split = ranks(size).call(step_in, tmp_path / f"{size}-{microbatch}", kind, engine, microbatch, more)[0]
        for one, other in zip(split, whole, strict=True):
            assert [one.loss, one.grad_norm, one.figures["balance"]] == pytest.approx(
                [other.loss, other.grad_norm, other.figures["balance"]], rel=1e-5
            )


def routed(world: World, run_dir: Path, kind: str, engine: str) -> list[tuple[float, bool, str]]:
    """Compare what each router chooses in a bf16 run with the same router in float32 on the same hidden states."""
    built: Any = build_engine(config_for(run_dir, kind, engine, precision=Precision.bf16, balance_loss=None), world, small(kind))
    assert built.report()["routers"].startswith("computed in float32")
    reference = small(kind).build("cpu")
    found: list[tuple[float, bool, str]] = []
    for mixture in mixtures(reference):
        plain = reference.get_submodule(mixture.router)
        if engine == "zero3":  # whose weights are those that the export has, in bfloat16
            for parameter in plain.parameters():
                parameter.data = parameter.data.bfloat16().float()

        def compare(_: Any, args: Any, out: Any, plain: Any = plain) -> None:
            with torch.no_grad():
                logits, _, chosen = plain(args[0].float())
            found.append((float((out[0] - logits).abs().max()), bool((out[2] == chosen).all()), str(out[0].dtype)))

        built.model.get_submodule(mixture.router).register_forward_hook(compare)
    batch = some(packed_rows(), 0, ROWS)
    with torch.no_grad():
        built.forward(batch)
    return found


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow), pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_routers_of_a_bf16_run_decide_in_float32(ranks: Callable[[int], Ranks], tmp_path: Path, kind: str, engine: str) -> None:
    for found in ranks(2).call(routed, tmp_path / "run", kind, engine):
        assert found
        for difference, same, dtype in found:
            assert difference < 1e-6
            assert same
            assert dtype == "torch.float32"


def test_a_balance_loss_is_refused_by_name_where_it_means_nothing(tmp_path: Path) -> None:
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="no router") as refused:
        outline(config_for(tmp_path, "qwen3"), world, small("qwen3"))
    assert refused.value.path == "train.balance_loss"
    config = config_for(tmp_path, "qwen3_moe")
    config.peft, config.data.packing = PeftConfig(method=PeftMethod.prompt, lr=1e-2), False
    with pytest.raises(ConfigError, match="in front of each row"):
        validate(config)


@pytest.mark.parametrize(("objective", "says"), [(ObjectiveName.sft, True), (ObjectiveName.ppo, False)])
def test_a_balance_loss_is_offered_where_it_can_be_had(
    objective: ObjectiveName, says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainers.engines.build.outline", Mock(side_effect=KeyboardInterrupt))
    config = config_for(tmp_path, "qwen3_moe", "fsdp", balance_loss=None)
    with pytest.raises(KeyboardInterrupt):
        build_engine(replace(config, objective=ObjectiveConfig(name=objective)), cast(World, None), small("qwen3_moe"))
    assert ("train.balance_loss=" in caplog.text) is says
