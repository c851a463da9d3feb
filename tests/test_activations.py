"""What is kept of a block for backward decides memory and time, and no number: loss and gradients stay the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import arguments, launch
from conftest import TINY, Ranks, blueprint_for
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.compose import compose
from launcher.job import make_job
from launcher.proposals import changes_of
from tools.bench.orders import engine_preset
from tools.bench.plan import Case, blueprint_of_case
from trainers.batch import Batch
from trainers.config.choices import Activations, EngineName, Offload, PeftMethod, Precision, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig, plain
from trainers.engines.activations import bytes_on_host, keep_for_backward
from trainers.engines.build import build_engine
from trainers.model.blueprint import find_blocks
from trainers.objectives import NextToken
from trainers.plan.auto import plan_of
from trainers.plan.plan import Plan
from trainers.plan.request import HardwareConfig, Place, PlanConfig, Variant
from trainers.plan.simulate import Simulation, simulate
from trainers.plan.simulate import ranks as ranks_of_a_plan
from trainers.plan.trace import Trace
from trainers.rundir.attempt import Attempt
from trainers.settle import settled
from trainers.step import take_step
from trainers.units import GIB
from trainers.world import World, seed_step

STEPS, ROWS, LENGTH, BLOCKS = 5, 6, 24, 3
HOW = [how for how in Activations if how is not Activations.auto]
LORA: dict[str, Any] = {"method": PeftMethod.lora, "rank": 2, "dropout": 0.2, "targets": ["all-linear"]}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "dora": LORA | {"method": PeftMethod.dora},
    "qlora": LORA | {"quantise": Quantisation.nf4},
    "adalora": {"method": PeftMethod.adalora, "rank": 4, "target_rank": 2, "tinit": 1, "tfinal": 1, "targets": ["q_proj", "down_proj"]},
    "prompt": {"method": PeftMethod.prompt, "virtual_tokens": 3},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STYLES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gemma2": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128},
}
"""With dropout in attention where there is any, in residuals, too, in GPT-2's."""


def save_style(folder: Path, style: str) -> Path:
    torch.manual_seed(0)
    common = {key: value for key, value in TINY.items() if style != "gpt2" or not key.startswith(("hidden", "inter", "num", "max"))}
    config = AutoConfig.for_model(style, **(common | {"num_hidden_layers": BLOCKS, "initializer_range": 0.2} | STYLES[style]))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def batches_of(world: World, step: int, microbatch: int) -> list[Batch]:
    """This rank's microbatches: rows of two documents each."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 33, (ROWS, LENGTH), generator=generator)[world.rank :: world.size]
    positions = torch.arange(LENGTH) % (LENGTH * 2 // 3)
    return [Batch.of(part, part.roll(-1, 1), positions.expand(part.shape)) for part in ids.split(microbatch)]


def five_steps(world: World, folder: Path, engine: str, how: Activations, method: str, precision: Precision, **more: Any) -> dict[str, Any]:
    """Return losses and gradient norms of five steps, the start-up table, and how many inputs were on the host after a forward."""
    run_dir = folder.parent / f"run-{engine}"
    run_dir.mkdir(exist_ok=True)
    config = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder)),
        data=DataConfig(path="unused", packing=method != "prompt"),
        engine=EngineConfig(**(engine_preset(engine) | more)),
        peft=PeftConfig(lr=1e-2, **METHODS[method]) if METHODS[method] else PeftConfig(),
        optim=OptimConfig(full_lr=1e-2, clip=0.5),
        train=TrainConfig(steps=STEPS, global_batch=ROWS, precision=precision, activations=how),
    )
    built: Any = build_engine(config, world, blueprint_for(folder))
    counts, forward = [], built.forward

    def counted(*given: Any) -> Any:
        output = forward(*given)
        counts.append(sum(len(placed.tensors) for placed in built.tensors() if placed.kind == "activations"))
        return output

    built.forward = counted
    results = []
    for step in range(STEPS):
        seed_step(0, step, world.rank)
        if built.adaptation.update is not None:
            built.adaptation.update.at(step, STEPS)
        results.append(take_step(built, NextToken(), batches_of(world, step, 1), world, lr=1e-2, targets=ROWS * LENGTH))
    assert not [item for placed in built.tensors() if placed.kind == "activations" for item in placed.tensors], "all have come back"
    table = built.report()
    built.close()
    return {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], "table": table, "on_host": set(counts)}


def each_way(world: World, folder: Path, engine: str, method: str, precision: Precision, **more: Any) -> dict[str, dict[str, Any]]:
    hows = [how for how in HOW if method != "adalora" or how is not Activations.selective]  # refused
    return {str(how): five_steps(world, folder, engine, how, method, precision, **more) for how in hows}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("styles")
    return {style: save_style(made / style / "model", style) for style in STYLES}


def assert_same(found: dict[str, dict[str, Any]]) -> None:
    kept = found["keep"]
    for how, run in found.items():
        assert run["losses"] == kept["losses"], how
        assert run["norms"] == pytest.approx(kept["norms"], rel=1e-6), how
        assert run["on_host"] == ({BLOCKS} if how == "offload" else {0}), how


CASES = [
    (size, engine, style, method)
    for size, engine in ((1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (1, "zero3"), (2, "zero3"), (3, "zero3"))
    for style, method in [("llama", method) for method in METHODS] + [(style, "full") for style in STYLES if style != "llama"]
]
QUICK = [(2, "fsdp", "llama", "lora")]
SLOW = [(1, "fsdp", "llama", "full"), (3, "fsdp", "llama", "qlora"), (2, "fsdp", "qwen3_moe", "full"), (2, "zero3", "llama", "full")]


@pytest.mark.parametrize(
    ("size", "engine", "style", "method"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.soak) for case in CASES],
)
def test_what_is_kept_changes_no_number(
    ranks: Callable[[int], Ranks], folders: dict[str, Path], size: int, engine: str, style: str, method: str
) -> None:
    """Dropout draws the same numbers again, and a router sends each token to the same experts."""
    found = ranks(size).call(each_way, folders[style], engine, method, Precision.fp32)
    assert_same(found[0])


class AddsInPlace(torch.nn.Linear):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made = super().forward(hidden_states)
        made += 1.0
        return made


def test_a_block_that_changes_what_is_kept_is_refused() -> None:
    """Its product would be added to in forward and once more when it is found again: torch sees nothing of that."""
    block = AddsInPlace(4, 4)
    keep_for_backward([block], Activations.selective, pin_memory=False)
    with pytest.raises(ConfigError, match="changes in place"):
        block(hidden_states=torch.ones(2, 3, 4))
    with torch.no_grad():
        assert block(torch.ones(2, 3, 4)).shape == (2, 3, 4)


def test_selective_computes_no_product_again() -> None:
    """FLOPs of forward and backward: as where all is kept; one more forward where the input alone is. Narrow products are done again."""
    flops = {}
    for how in HOW:
        torch.manual_seed(0)
        model = blueprint_of_case(Case(1, "tiny")).build("cpu")
        keep_for_backward(find_blocks(model), how, pin_memory=False)
        trace = Trace(33)
        with trace:
            trace.mark("a step")
            model(torch.ones(1, 48, dtype=torch.int64), use_cache=False).logits.sum().backward()
        flops[how] = sum(moment.flops for moment in trace.moments())
    assert flops[Activations.selective] == flops[Activations.keep]
    assert flops[Activations.offload] == flops[Activations.block] > 1.2 * flops[Activations.keep]


@pytest.mark.parametrize("engine", [EngineName.fsdp, pytest.param(EngineName.zero3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_plan_knows_what_each_needs(engine: EngineName) -> None:
    """In the order that `auto` tries them in: less on the device, more to do or to move."""
    needed, work, on_host = [], [], []
    for how in HOW:
        case = Case(2, "tiny", engine=engine, precision=Precision.fp32, activations=how, seq_len=512)
        config, blueprint = case.config("."), blueprint_of_case(case)
        with ranks_of_a_plan(2, 2) as world:
            found = simulate(config, blueprint, world, case.seq_len, gpus=True)
        needed.append(found.peak.total)
        work.append(sum(moment.flops for moment in found.moments))
        on_host.append(found.inputs_on_host)
        text = blueprint.config
        if how is Activations.offload:
            assert found.inputs_on_host == bytes_on_host(config, text.num_hidden_layers, text.hidden_size, 4, pinned=True)
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > 1.5 * needed[2]
    assert work == sorted(work)
    assert on_host[:3] == [0, 0, 0]
    assert on_host[3] == 5 * 2 * 512 * 64 * 4


@pytest.mark.slow
def test_auto_takes_the_cheapest_that_fits() -> None:
    """And of several devices for each its own; what it takes is in the plan, with what the others need."""
    case = Case(2, "tiny", precision=Precision.fp32, seq_len=512)
    config = case.config(".")
    config.data.path, config.model.train_tokenizer, config.run_dir = "unused", 33, "unused"
    place = Place(nodes=1, ranks_per_node=2, gpus=True, save_s=300)
    known: dict[str, Simulation] = {}

    def of(how: str, *sizes: float) -> Plan:
        config.train.activations = Activations(how)
        devices = [HardwareConfig(name=f"d{number}", memory_gib=size / GIB) for number, size in enumerate(sizes)]
        return plan_of(Variant(run=plain(config), place=place), devices, PlanConfig(), known)

    needed = {str(how): of(str(how), 1e12).most_needed for how in HOW}
    for how in HOW[:3]:
        found = of("auto", needed[how] / 0.89)
        assert (found.activations, found.verdict) == ({"d0": how}, "fits")
    assert len(known) == len(HOW), "each is simulated once"
    assert of("auto", 1.02 * needed["selective"]).activations == {"d0": "block"}, "what fits is better than what is tight"
    least = min(needed, key=lambda how: needed[how])
    several = of("auto", 0.5 * needed[least], needed["block"] / 0.89, needed["keep"] / 0.89)
    assert several.activations == {"d0": least, "d1": "block", "d2": "keep"}
    assert several.verdicts == {"d0": "does not fit", "d1": "fits", "d2": "fits"}
    assert several.needed == {"d0": needed[least], "d1": needed["block"], "d2": needed["keep"]}
    assert "keep needs" in several.notes[-1]
    assert several.engine == "fsdp, activations=block"


@pytest.mark.slow
def test_auto_is_chosen_once_a_run(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """It is said with the reason, kept in manifest.json, and chosen again only for other ranks or microbatches."""
    line = [*arguments(base, chats, tmp_path / "run"), "train.activations=auto", "optim.schedule=constant"]
    said = launch(cache, [*line, "train.steps=2", "train.eval_every=null"])
    assert "train.activations=auto: cpu takes keep" in said
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["activations"]["chosen"] == "keep"
    manifest["activations"] |= {"chosen": "block", "reason": "block, as it was said"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    more = ["train.steps=4", "train.extend=true", "train.eval_every=null"]
    said = launch(cache, [*line, *more])
    assert "block, as it was said" in said
    assert "a block's input kept for backward" in said


def test_proposals_come_in_the_order_of_what_they_cost() -> None:
    line = ["+exp=llama70b_full", "train.microbatch=4", "train.global_batch=256", "data.path=absent/set"]

    def proposed(*more: str) -> list[str]:
        return [" ".join(change) for change in changes_of(make_job(compose([*line, *more])))]

    said = proposed("train.activations=keep", "engine.replicate=2")
    costs = ["train.microbatch=2", "train.activations=selective", "train.activations=block", "train.activations=offload"]
    costs += ["engine.replicate=1", "engine.offload_optimizer=cpu", "engine=fsdp_offload", "launch.nodes=16", "peft=lora", "peft=qlora"]
    places = [next(number for number, words in enumerate(said) if cost in words) for cost in costs]
    assert places == sorted(places)
    assert len(said) == len(set(said))
    assert not [words for words in proposed("train.activations=auto") if "train.activations" in words]
    assert not [words for words in proposed("train.activations=block") if "selective" in words]
    assert "train.activations=offload" in proposed("train.activations=block")


def test_the_choice_is_made_anew_where_the_engine_leaves_another_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(*_: Any, **given: Any) -> Any:
        asked.append(given["input"])
        return SimpleNamespace(stdout='{"chosen": "keep", "reason": "keep fits"}')

    monkeypatch.setattr(subprocess, "run", answer)
    same: Any = {"max": lambda values: values, "from_first": lambda value: value}
    world: Any = SimpleNamespace(rank=0, size=4, local_size=4, device=torch.device("cpu"), **same)
    (tmp_path / "manifest.json").write_text("{}")
    base = RunConfig(run_dir=str(tmp_path), train=TrainConfig(activations=Activations.auto))
    for engine in (EngineConfig(), EngineConfig(replicate=2), EngineConfig(replicate=2, offload_param=Offload.cpu)):
        for _ in range(2):
            found = settled(dataclasses.replace(base, engine=engine), world, Attempt(tmp_path))
            assert found.train.activations is Activations.keep
    assert len(asked) == 3
