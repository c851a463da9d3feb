"""Mixtures of experts train as a plain transformers loop does, however experts are computed; adapters on their stacks as peft's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ranks
from peft_cases import NoTokenizer
from small_models import small
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tools.bench.orders import engine_preset
from tools.merge.adapter import Adapter, read_adapter
from trainers.batch import IGNORE, Batch
from trainers.config.checks import validate
from trainers.config.choices import Activations, Experts, PeftMethod, Precision, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.engines.base import require_moved
from trainers.engines.build import build_engine
from trainers.model.blueprint import Blueprint, flops_per_token
from trainers.model.experts import choose, experts_words
from trainers.objectives import make_objective
from trainers.peft.saved import export_adapter
from trainers.world import World

KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
LR, STEPS, LENGTH = 1e-2, 5, 12


def mixture(kind: str) -> Blueprint:
    if kind != "gpt_oss":
        return small(kind)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": 33, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Blueprint(config=config, folder=None, revision=None, seed=0, trust_remote_code=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp("mixtures") / kind for kind in KINDS}
    for kind, folder in made.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(mixture(kind).config).save_pretrained(folder)
    return made


def rows() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        ids = torch.randint(3, 33, (6, LENGTH), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -1] = IGNORE
        for row in range(len(ids)):
            labels[row, :row] = IGNORE
        yield ids, labels


def batch_of(ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch.of(ids, labels, torch.arange(LENGTH).expand(ids.shape))


def config_for(run_dir: Path, folder: Path, engine: str = "fsdp", peft: PeftConfig | None = None, **more: Any) -> RunConfig:
    run_dir.mkdir(exist_ok=True, parents=True)
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder), experts=more.pop("experts", Experts.auto)),
        data=DataConfig(path=str(folder), packing=False, seq_len=32),
        peft=peft or PeftConfig(),
        engine=EngineConfig(**engine_preset(engine)),
        optim=OptimConfig(lr=LR, clip=0.5, weight_decay=0.1),
        train=TrainConfig(**({"precision": Precision.fp32, "microbatch": 1} | more)),
    )


def train(world: World, run_dir: Path, folder: Path, engine: str, peft: PeftConfig | None, more: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of `rows`, dealt to ranks; export an adapter before the first step and after the last."""
    config = config_for(run_dir, folder, engine, peft, **more)
    base = AutoConfig.from_pretrained(folder)
    blueprint = Blueprint(config=base, folder=folder, revision=None, seed=0, trust_remote_code=False, experts=config.model.experts)
    built = build_engine(config, world, blueprint)
    objective = make_objective(config.objective, (), config.train.balance_loss)

    def export(name: str) -> None:
        values = [(key, tensor.clone()) for key, tensor in built.weights()]
        if peft is not None:
            export_adapter(iter(values), built.adaptation, NoTokenizer(), run_dir / name, write=world.rank == 0)

    export("begin")
    report = built.report()
    losses, norms = [], []
    for number, (ids, labels) in enumerate(rows()):
        targets, local = int((labels != IGNORE).sum()), 0.0
        mine = range(world.rank, len(ids), world.size)
        for row in mine:
            batch = batch_of(ids[row : row + 1], labels[row : row + 1])
            loss = objective(built.forward(batch), batch)
            built.backward(loss.trained / targets, last=row == mine[-1])
            local += loss.total.item()
        norms.append(built.step(LR))
        losses.append(world.sum([local])[0] / targets)
        if number == 0:
            require_moved(built, world)
    export("end")
    built.train(False)
    with torch.no_grad():
        logps = built.forward(batch_of(*next(rows()))).logps.numpy()
    return {"curve": losses + norms, "logps": logps, "report": report}


def opened(folder: Path, adapter: Path | None, experts: str = "eager") -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts)
    if adapter is None:
        return model.train()
    import peft

    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def train_plainly(model: Any) -> list[float]:
    """The reference: one process, plain transformers, peft and torch, all rows at once."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.95))
    losses, norms = [], []
    for ids, labels in rows():
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses + norms


def logps_of(model: Any) -> torch.Tensor:
    ids, labels = next(rows())
    with torch.no_grad():
        logps = model.eval()(input_ids=ids).logits.log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).where(labels != IGNORE, 0.0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "engine", "size"),
    [
        ("qwen3_moe", "fsdp", 2),
        *(
            pytest.param(kind, engine, 2, marks=SLOW)
            for kind in KINDS
            for engine in ("fsdp", "zero3")
            if (kind, engine) != ("qwen3_moe", "fsdp")
        ),
        *(pytest.param(kind, "fsdp", 1, marks=SLOW) for kind in ("gpt_oss", "deepseek_v3")),
        pytest.param("mixtral", "fsdp", 3, marks=SLOW),
    ],
)
def test_losses_and_gradient_norms_are_those_of_plain_transformers(
    ranks: Callable[[int], Ranks], tmp_path: Path, folders: dict[str, Path], kind: str, engine: str, size: int
) -> None:
    for experts in ("grouped_mm", "batched_mm", "eager") if engine == "fsdp" else ("grouped_mm", "eager"):
        plainly = train_plainly(opened(folders[kind], None, experts))
        ours = ranks(size).call(train, tmp_path / experts, folders[kind], engine, None, {"experts": Experts(experts)})[0]
        assert ours["curve"] == pytest.approx(plainly, rel=1e-5)
        assert ours["report"]["experts"].startswith(experts)


LORA = PeftConfig(method=PeftMethod.lora, rank=4, alpha=8.0, targets=["all-linear", "experts"], lr=LR)


@pytest.mark.parametrize(
    ("kind", "engine", "size"),
    [
        ("qwen3_moe", "fsdp", 2),
        *(pytest.param(kind, "zero3", 2, marks=SLOW) for kind in ("qwen3_moe", "gpt_oss")),
        pytest.param("gpt_oss", "fsdp", 1, marks=SLOW),
        pytest.param("deepseek_v3", "fsdp", 3, marks=SLOW),
    ],
)
def test_adapters_on_stacks_train_as_plain_peft_does_and_open_in_it(
    ranks: Callable[[int], Ranks], tmp_path: Path, folders: dict[str, Path], kind: str, engine: str, size: int
) -> None:
    folder, run = folders[kind], tmp_path / "run"
    ours = ranks(size).call(
        train, run, folder, engine, LORA, {"activations": Activations.block if kind == "gpt_oss" else Activations.keep}
    )[0]
    assert "experts.gate_up_proj" in ours["report"]["adapters"]
    assert ours["curve"] == pytest.approx(train_plainly(opened(folder, run / "begin")), rel=1e-5)
    plain = opened(folder, run / "end")
    torch.testing.assert_close(torch.from_numpy(ours["logps"]), logps_of(plain), rtol=0, atol=1e-5)
    assert logps_of(opened(folder, run / "begin")).sub(logps_of(plain)).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = merged.state_dict()
    with torch.no_grad(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    adapter = Adapter(read_adapter(run / "end"), empty, folder)
    changed = {name: adapter.make(name, lambda key: state[key].clone()) for name in state if adapter.changes(name)}
    assert {name.rpartition(".")[2] for name in changed} >= {"gate_up_proj", "down_proj"}
    merged.load_state_dict(changed, strict=False)
    torch.testing.assert_close(logps_of(merged), logps_of(plain), rtol=0, atol=1e-5)


def decayed(world: World, run_dir: Path, folder: Path, engine: str) -> tuple[Any, Any]:
    """Take a step in which no token reaches expert 3, with decay; return its matrices before and after."""
    config = dataclasses.replace(config_for(run_dir, folder, engine), optim=OptimConfig(lr=LR, weight_decay=0.5))
    base = AutoConfig.from_pretrained(folder)
    built: Any = build_engine(config, world, Blueprint(config=base, folder=folder, revision=None, seed=0, trust_remote_code=False))
    before = {name: tensor.numpy().copy() for name, tensor in built.weights() if "experts.down_proj" in name and "bias" not in name}
    ids, labels = next(rows())
    batch = batch_of(ids[world.rank :: world.size], labels[world.rank :: world.size])
    built.backward(-built.forward(batch).logps.sum() / 50, last=True)
    built.step(LR)
    return before, {name: tensor.numpy().copy() for name, tensor in built.weights() if name in before}


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=SLOW)])
def test_an_expert_of_a_stack_without_tokens_decays_under_both_engines(
    ranks: Callable[[int], Ranks], tmp_path: Path, folders: dict[str, Path], engine: str
) -> None:
    """The stack is one parameter, which has a gradient: zeros for the expert. Decay is all that moves it."""
    model = AutoModelForCausalLM.from_pretrained(folders["gpt_oss"])
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e4
    model.save_pretrained(tmp_path / "model")
    before, after = ranks(2).call(decayed, tmp_path / "run", tmp_path / "model", engine)[0]
    assert before
    for name, tensor in before.items():
        torch.testing.assert_close(torch.from_numpy(after[name][3]), torch.from_numpy(tensor[3] * (1 - LR * 0.5)))
        assert abs(after[name][0] - tensor[0] * (1 - LR * 0.5)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_experts_that_a_token_is_sent_to(kind: str) -> None:
    """Torch's own counter of a forward is the reference: a third of forward and backward."""
    blueprint = dataclasses.replace(mixture(kind), experts=Experts.batched_mm)
    blueprint.config._attn_implementation = "eager"
    model = blueprint.build("cpu")
    ids = next(rows())[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert flops_per_token(shapes, blueprint.config, LENGTH) / 3 == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.05)


def test_experts_are_grouped_where_that_works_and_the_reason_is_said_where_not() -> None:
    assert experts_words(mixture("qwen3_moe").build())["experts"] == "grouped_mm, all experts of a block in one product"
    odd = mixture("qwen3_moe")
    odd.config.moe_intermediate_size = 12
    said = experts_words(odd.build())["experts"]
    assert said.startswith("eager, one expert after the other: model.layers.0.mlp.experts.down_proj is 4 x 32 x 12")
    with pytest.raises(ConfigError, match="multiples of 8") as refused:
        dataclasses.replace(odd, experts=Experts.grouped_mm).build()
    assert refused.value.path == "model.experts"
    dense = small("qwen3").build()
    assert experts_words(dense) == {}
    with pytest.raises(ConfigError, match="no experts"):
        choose(dense, Experts.grouped_mm)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("peft.targets", {"method": PeftMethod.dora}),
        ("peft.dropout", {"dropout": 0.05}),
        ("peft.quantise", {"quantise": Quantisation.nf4}),
        ("model.experts", {"experts": Experts.eager}),
    ],
)
def test_what_an_adapter_on_a_stack_does_not_go_with_is_refused(
    tmp_path: Path, folders: dict[str, Path], field: str, change: dict[str, Any]
) -> None:
    more = {"experts": change["experts"]} if "experts" in change else {}
    peft = dataclasses.replace(LORA, **{key: value for key, value in change.items() if key != "experts"})
    with pytest.raises(ConfigError, match="experts") as refused:
        validate(config_for(tmp_path, folders["mixtral"], peft=peft, **more))
    assert refused.value.path == field
    validate(config_for(tmp_path, folders["mixtral"], peft=LORA))
