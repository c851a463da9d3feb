"""What no row of the data reaches is not trained: frozen, without adapters, exported as it came, under both engines alike.

The engines' weights are compared after steps with weight decay, over dense, mixture, hybrid and vision-language architectures. AdamW's
eps is large here: with its usual one, a gradient of nothing but rounding noise becomes a whole step of the learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from peft_cases import NoTokenizer, batch_of
from small_models import ALL, LARGER, MIXTURES, small
from torch import nn

from tools.bench.orders import engine_preset
from trainers.batch import IGNORE, Batch
from trainers.config.choices import AdapterBias, OptimizerName, PeftMethod, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.engines.base import require_moved
from trainers.engines.build import build_engine
from trainers.health.spikes import TrainingFailed
from trainers.model import reach
from trainers.model.reach import find_unreached, groups_of
from trainers.model.weights import origin_of
from trainers.peft import adapt as adapting
from trainers.peft.base import Adaptation
from trainers.peft.saved import export_adapter, reopen_adapter
from trainers.world import World

LR, DECAY, EPS = 1e-2, 0.5, 1e-3
MORE = sorted(ALL.keys() - {"gemma3", "qwen3_moe", "mamba", "got_ocr2", "bloom"})


def rows(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(steps):
        ids = torch.randint(6, 33, (4, 12), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -1] = IGNORE
        found.append((ids, labels))
    return found


def config_for(run_dir: Path, kind: str, engine: str = "fsdp", peft: PeftConfig | None = None, **optim: Any) -> RunConfig:
    run_dir.mkdir(exist_ok=True, parents=True)
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(architecture={"model_type": kind}),
        data=DataConfig(path="unused", packing=False, seq_len=32),
        peft=peft or PeftConfig(),
        engine=EngineConfig(**engine_preset(engine)),
        optim=OptimConfig(**({"lr": LR, "weight_decay": DECAY, "eps": EPS} | optim)),
        train=TrainConfig(precision=Precision.fp32, microbatch=1),
    )


def adapted(kind: str, **peft: Any) -> tuple[Adaptation, Any]:
    blueprint = small(kind)
    model = blueprint.build()
    config = config_for(Path(), kind, peft=PeftConfig(**({"method": PeftMethod.lora, "rank": 2} | peft)))
    return adapting.adapt(model, origin_of(model, blueprint), config, blueprint, torch.float32), model


@pytest.mark.parametrize("kind", ["qwen3_moe", "bart", "jamba", *LARGER])
def test_what_gets_no_gradient_is_found_without_values(kind: str) -> None:
    """The reference is a backward of the whole model with values."""
    blueprint = small(kind)
    whole = blueprint.build("cpu").train()
    ids, _ = rows(1)[0]
    whole(input_ids=ids, position_ids=torch.arange(12).expand(ids.shape), use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
    without = {name for name, parameter in whole.named_parameters() if parameter.grad is None and parameter.requires_grad}
    model = blueprint.build()
    assert find_unreached(model, 64) == without
    assert all(parameter.is_meta for parameter in model.parameters())


class Routed(nn.Module):
    """Experts in a list, of which only those are called that a token is sent to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, made = self.router(hidden).softmax(-1), torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            if bool((weights.argmax(-1) == number).any()):
                made = made + weights[..., number, None] * expert(hidden)
        return made


def test_experts_that_no_token_was_sent_to_are_not_frozen() -> None:
    model = small("qwen3").build()
    with torch.device("meta"):
        model.model.layers[1].mlp = Routed(32)
        model.model.layers[0].mlp.spare = nn.ModuleList([nn.Linear(32, 32)])
    assert find_unreached(model, 64) == {"model.layers.0.mlp.spare.0.weight", "model.layers.0.mlp.spare.0.bias"}


def test_code_that_needs_values_leaves_all_to_be_trained(caplog: pytest.LogCaptureFixture) -> None:
    model = small("gemma3").build()
    model.model.language_model.norm.forward = lambda hidden: hidden.tolist()
    assert find_unreached(model, 64) == set()
    assert "is not known" in caplog.text


def test_parts_are_named_by_the_fewest_modules() -> None:
    numels = {"a.b.w": 4, "a.b.v": 1, "a.c.w": 2, "d.w": 8, "d.e.w": 1}
    assert groups_of({"a.b.w", "a.b.v", "d.w"}, numels) == {"d.w": 8, "a.b": 5}
    assert groups_of(set(), numels) == {}


@pytest.mark.parametrize(
    "peft",
    [
        {"targets": ["all-linear"]},
        {"targets": ["q_proj", "v_proj"], "bias": AdapterBias.all},
        {"targets": ["all-linear"], "method": PeftMethod.ia3, "rank": 8},
    ],
    ids=str,
)
def test_no_adapter_is_put_on_what_the_data_never_reach(peft: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the text's layers are those of the vision tower's, too; the export opens in plain peft as it is."""
    monkeypatch.chdir(tmp_path)
    adaptation, _ = adapted("gemma3", **peft)
    assert adaptation.trained
    assert not [name for name in adaptation.trained if "vision" in name or "projector" in name]
    assert {name for name in adaptation.unreached if "language_model" in name} == set()
    assert f"model.vision_tower, model.multi_modal_projector: {len(adaptation.unreached)} tensors" in adaptation.notes["never reached"]
    values = ((key, torch.full(tensor.shape, 0.5)) for key, tensor in adaptation.contents().items())
    export_adapter(values, adaptation, NoTokenizer(), tmp_path / "out", write=True)
    opened = reopen_adapter(tmp_path / "out", small("gemma3").build("cpu"))
    with_adapter = {name for name, _ in opened.named_parameters() if ".lora_" in name or ".ia3_" in name}
    assert with_adapter
    assert not [name for name in with_adapter if "vision" in name or "projector" in name]


@pytest.mark.parametrize("where", ["targets", "modules_to_save"])
def test_naming_only_what_the_data_never_reach_is_refused(where: str) -> None:
    name = {"targets": "fc1", "modules_to_save": "multi_modal_projector"}[where]
    with pytest.raises(ConfigError, match="the data never reach") as refused:
        adapted("gemma3", **({"targets": ["q_proj"]} | {where: [name]}))
    assert refused.value.path == f"peft.{where}"


def test_without_a_choice_of_pefts_own_the_layers_that_the_data_reach_are_offered() -> None:
    with pytest.raises(ConfigError) as refused:
        adapted("gemma3")
    assert refused.value.remedy == "peft.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
def test_layers_that_cannot_be_adapted_are_refused_with_targets_that_can(kind: str) -> None:
    """Mamba's output projection; the remedy is applied as it is printed."""
    with pytest.raises(ConfigError) as refused:
        adapted(kind, targets=["all-linear"], dropout=0.05)
    assert refused.value.path == "peft.targets"
    assert refused.value.value == ["all-linear"]
    assert "'out_proj'" in refused.value.reason
    found = re.fullmatch(r"peft\.targets=\[(.*)\]", refused.value.remedy)
    assert found is not None
    names = found[1].split(",")
    adaptation, _ = adapted(kind, targets=names, dropout=0.05)
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in adaptation.trained} == set(names)


@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_all_linear_of_a_mixture_says_what_of_its_experts_it_leaves(kind: str) -> None:
    """peft takes names that experts had as layers for their stacks, also when it opens an adapter: such layers have none."""
    adaptation, _ = adapted(kind, targets=["all-linear"], dropout=0.05)
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in adaptation.trained}
    assert names & {"q_proj", "q_a_proj"}
    assert not names & {"gate_proj", "up_proj", "down_proj", "experts"}
    assert "none on " in adaptation.notes["adapters"]
    assert "experts.gate_up_proj (" in adaptation.notes["adapters"]


def test_names_that_peft_takes_for_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="one stack") as refused:
        adapted("deepseek_v3", targets=["gate_proj", "up_proj"])
    assert refused.value.path == "peft.targets"


def train(world: World, run_dir: Path, kind: str, engine_name: str, peft: PeftConfig | None = None) -> dict[str, Any]:
    """Take five steps with weight decay; return the weights of the export, and of the base, with what is trained."""
    blueprint = small(kind)
    config = config_for(run_dir, kind, engine_name, peft)
    engine = build_engine(config, world, blueprint)
    before = {name: tensor.numpy().copy() for name, tensor in engine.weights()}
    norms = []
    for ids, labels in rows(5):
        batch = batch_of(ids[world.rank :: world.size], labels[world.rank :: world.size])
        engine.backward(-engine.forward(batch).logps.sum() / 44, last=True)
        norms.append(engine.step(LR))
    weights = {name: tensor.numpy().copy() for name, tensor in engine.weights()}
    checkpointed = set(engine.state()["model"])
    report, unreached = engine.report(), engine.adaptation.unreached
    moments = engine.state_bytes()["optimizer"]
    return {"before": before, "weights": weights, "norms": norms, "report": report, "unreached": unreached} | {
        "saved": checkpointed,
        "moments": moments,
        "trained": engine.adaptation.trained,
    }


@pytest.mark.parametrize(
    "kind", ["gemma3", pytest.param("qwen3_moe", marks=pytest.mark.slow), *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
)
def test_engines_leave_the_same_weights(ranks: Callable[[int], Ranks], tmp_path: Path, kind: str) -> None:
    """All tensors of the export, after five steps of AdamW with decay on two ranks."""
    fsdp, zero3 = (ranks(2).call(train, tmp_path / engine, kind, engine)[0] for engine in ("fsdp", "zero3"))
    assert fsdp["norms"] == pytest.approx(zero3["norms"], rel=1e-5)
    assert fsdp["weights"].keys() == zero3["weights"].keys()
    for name, tensor in fsdp["weights"].items():
        np.testing.assert_allclose(zero3["weights"][name], tensor, rtol=0, atol=5e-6, err_msg=name)
    for run in (fsdp, zero3):
        assert run["unreached"] == fsdp["unreached"]
        assert not run["saved"] & run["unreached"]
        moved = {name for name, tensor in run["weights"].items() if not np.array_equal(tensor, run["before"][name])}
        assert moved & run["unreached"] == set()
        assert moved >= {name for name in run["trained"] & run["weights"].keys() if run["weights"][name].ndim > 1}
    assert bool(fsdp["unreached"]) is (kind in LARGER or kind == "bart")


def train_with_a_step_without(world: World, run_dir: Path, engine_name: str, optim: OptimizerName) -> list[dict[str, np.ndarray]]:
    """Take three steps with decay, in the second of which nothing goes through one block's MLP; return all weights after each."""
    config = config_for(run_dir, "qwen3", engine_name, name=optim, eps=1e-8, lr=LR)
    engine: Any = build_engine(config, world, small("qwen3"))
    after = []
    for number, (ids, labels) in enumerate(rows(3)):
        mlp = engine.model.model.layers[1].mlp
        plain = mlp.forward
        if number == 1:
            mlp.forward = lambda hidden: hidden * 0.5
        batch: Batch = batch_of(ids[world.rank :: world.size], labels[world.rank :: world.size])
        engine.backward(-engine.forward(batch).logps.sum() / 44, last=True)
        engine.step(LR)
        mlp.forward = plain
        after.append({name: tensor.numpy().copy() for name, tensor in engine.weights()})
    return after


@pytest.mark.parametrize(
    ("engine", "optim"),
    [
        ("fsdp", OptimizerName.adamw),
        ("zero3", OptimizerName.adamw),
        ("zero3", OptimizerName.sgd),
        pytest.param("zero3_offload", OptimizerName.adamw, marks=pytest.mark.cpu_adam),
    ],
)
def test_a_parameter_without_a_gradient_is_neither_stepped_nor_decayed(
    ranks: Callable[[int], Ranks], tmp_path: Path, engine: str, optim: OptimizerName
) -> None:
    """In a step that others take, and with momentum of the step before; it goes on in the next."""
    first, second, third = ranks(2).call(train_with_a_step_without, tmp_path / engine, engine, optim)[0]
    absent = {name for name in first if name.startswith("model.layers.1.mlp.")}
    assert len(absent) == 3
    assert {name for name in first if np.array_equal(first[name], second[name])} == absent
    assert {name for name in first if np.array_equal(second[name], third[name])} == set()
    if optim is OptimizerName.sgd:
        for name, tensor in ranks(2).call(train_with_a_step_without, tmp_path / "fsdp", "fsdp", optim)[0][-1].items():
            np.testing.assert_allclose(third[name], tensor, rtol=0, atol=1e-6, err_msg=name)


def adapt_the_unreached(world: World, run_dir: Path) -> str:
    """Train LoRA where the model's code tells nothing of what is reached; return what the first step's check says."""
    unknown = reach.find_unreached
    adapting.find_unreached = lambda *_: set()
    try:
        peft = PeftConfig(method=PeftMethod.lora, rank=2, targets=["all-linear"])
        engine = build_engine(config_for(run_dir, "bart", peft=peft), world, small("bart"))
    finally:
        adapting.find_unreached = unknown
    ids, labels = rows(1)[0]
    batch = batch_of(ids[world.rank :: world.size], labels[world.rank :: world.size])
    engine.backward(-engine.forward(batch).logps.sum() / 44, last=True)
    engine.step(LR)
    try:
        require_moved(engine, world)
    except TrainingFailed as error:
        return str(error)
    return ""


def test_adapters_that_cannot_move_end_the_run_after_the_first_step(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    for said in ranks(2).call(adapt_the_unreached, tmp_path / "run"):
        assert "encoder_attn" in said
        assert "no gradient reaches it" in said
        assert "self_attn" not in said
