"""Ranks that have a part of the experts each take the steps of one process: for any mixture, method and mesh."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import Ranks
from meshed import compare, compare_continued, config_for, train
from small_models import small

from tools.bench.plan import _without_copies_of_gloo
from trainers.config.choices import Activations, ObjectiveName, Offload, OptimizerName, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.expert import require_experts
from trainers.config.mesh import Mesh, mesh_of, seats_of
from trainers.config.schema import EngineConfig, ObjectiveConfig, PeftConfig
from trainers.engines.build import build_engine
from trainers.model.blueprint import Blueprint
from trainers.model.exchange import exchange
from trainers.plan.plan import _export
from trainers.plan.simulate import ranks as fake_ranks
from trainers.plan.simulate import simulate
from trainers.plan.trace import Moment, Trace
from trainers.world import World


def mixture(kind: str, **changes: Any) -> Blueprint:
    """A small model; `changes` are of its config."""
    blueprint = small(kind)
    for name, value in changes.items():
        setattr(blueprint.config, name, value)
    return blueprint


LORA = {"peft": PeftConfig(method=PeftMethod.lora, rank=4, alpha=8, targets=["q_proj", "v_proj"])}
STACKS = {"peft": PeftConfig(method=PeftMethod.lora, rank=4, alpha=8, targets=["q_proj", "experts"])}
DPO = {"objective": ObjectiveConfig(name=ObjectiveName.dpo, beta=0.5)}
CASES: list[Any] = [
    ("qwen3_moe", 2, {"expert": 2}, {}),
    ("qwen3_moe", 4, {"expert": 2}, {"train": {"balance_loss": 1.0, "activations": Activations.block}}),
    ("qwen3_moe", 4, {"expert": 4}, STACKS),
    ("mixtral", 4, {"expert": 4}, DPO | {"train": {"logits_chunk": 7}}),
    ("mixtral", 4, {"expert": 2, "replicate": 2, "sync_each_microbatch": False}, {"train": {"global_batch": 8}}),
    ("mixtral", 2, {"expert": 2, "offload_optimizer": Offload.cpu}, LORA),
    ("deepseek_v3", 4, {"expert": 4, "context": 2}, {"train": {"balance_loss": 1.0}}),
    ("deepseek_v3", 4, {"expert": 2, "prefetch": 2}, {"train": {"activations": Activations.block}}),
    ("gpt_oss", 4, {"expert": 4}, {"train": {"activations": Activations.offload}}),
    ("gpt_oss", 2, {"expert": 2}, STACKS),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]


@pytest.mark.parametrize(("kind", "size", "engine", "settings"), [CASES[0], *SLOW])
def test_ranks_with_a_part_of_the_experts_equal_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, kind: str, size: int, engine: dict[str, Any], settings: dict[str, Any]
) -> None:
    (whole,) = ranks(1).call(train, tmp_path / "whole", small(kind), {}, dict(settings))
    for split in ranks(size).call(train, tmp_path / "split", small(kind), engine, dict(settings)):
        compare(split, whole)
    assert f"; {engine['expert']} ranks deal out the experts of each block" in split["report"]["parameters"]
    assert "not understood" not in split["report"]["logits"]


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Saved on 4 ranks, of which 2 have 3 experts over 2, and on one; continued on others: curve and bytes of one process."""
    model, settings = mixture("qwen3_moe", num_experts=6), {"optim": OptimizerName.adamw}
    meshes = {"dealt": (4, {"expert": 2}), "one": (1, {}), "sharded": (2, {}), "all": (2, {"expert": 2})}
    compare_continued(ranks, tmp_path, model, settings, meshes, {"dealt": ("one", "sharded"), "one": ("dealt", "all")})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_is_sharded_where_a_rank_has_fewer_than_share_them(ranks: Callable[[int], Ranks], tmp_path: Path, kind: str) -> None:
    """One expert for two ranks: half of it each, as planned; the steps, export and checkpoints of one process."""
    model, settings, engine = mixture(kind, num_local_experts=2, num_experts_per_tok=1), {"optim": OptimizerName.adamw}, {"expert": 2}
    (whole,) = ranks(1).call(train, tmp_path / "whole", model, {}, dict(settings))
    with fake_ranks(4, 4) as world:
        planned = simulate(config_for(tmp_path, engine=EngineConfig(**engine), **settings), model, world, 48)
    splits = ranks(4).call(train, tmp_path / "split", model, engine, dict(settings))
    for split in splits:
        compare(split, whole)
    assert splits[0]["state"] == planned.state_bytes
    assert splits[0]["state"]["trainable"] < 1.1 * planned.trainable, "a quarter of 4 bytes each: no rank has a whole expert"
    one, four = (1, {}), (4, engine)
    for before, after in ((four, one), (one, four)):
        first = ranks(before[0]).call(train, tmp_path / "parts", model, before[1], dict(settings), 0, 5)[0]
        second = ranks(after[0]).call(train, tmp_path / "parts", model, after[1], dict(settings), 5)[0]
        assert first["losses"][:-1] + second["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert second["loaded"] == {name: values.tobytes() for name, values in first["weights"].items()}


def gathered(world: World, run_dir: Path, model: Blueprint, engine: dict[str, Any]) -> float:
    """Return the bytes that an export makes at its highest point: those of a second one, when the trace knows the live tensors."""
    built, trace = build_engine(config_for(run_dir, engine=EngineConfig(**engine)), world, model), Trace(64)
    with trace:
        for name in ("first", "second"):
            trace.mark(name)
            deque(built.weights(), maxlen=0)
    first, second = trace.moments()
    return second.total - sum(first.end.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "engine"), [("qwen3_moe", 4, {"expert": 2}), ("llama", 2, {"tensor": 2}), ("llama", 4, {"tensor": 2})]
)
def test_an_export_takes_what_is_planned(
    ranks: Callable[[int], Ranks], tmp_path: Path, kind: str, size: int, engine: dict[str, Any]
) -> None:
    """The largest tensor whole, in float32 and as it is saved: its parts are gathered into it, and are not there next to it."""
    model = replace(mixture(kind, vocab_size=64 if "expert" in engine else 512), saved_dtype=torch.bfloat16)
    config, largest = config_for(tmp_path, engine=EngineConfig(**engine)), max(p.numel() for p in model.build().parameters())
    with fake_ranks(size, size) as world:
        simulation = simulate(config, model, world, 48)
    [planned] = _export(config, simulation, Moment("step", None, None, {}), model.saved_dtype.itemsize)
    assert planned.total == 6 * largest
    assert ranks(size).call(gathered, tmp_path, model, engine)[0] == pytest.approx(planned.total, rel=0.02)


def outlined(world: World, run_dir: Path, model: Blueprint) -> str:
    try:
        build_engine(config_for(run_dir, engine=EngineConfig(expert=2)), world, model)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_models_whose_experts_are_not_dealt_are_refused_by_name(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    said = {
        "llama": "LlamaForCausalLM has no experts whose weights are stacks",
        "qwen3_moe": "3 experts a block, which do not divide over 2",
    }
    for kind, words in said.items():
        found = ranks(2).call(outlined, tmp_path, mixture(kind, num_experts=3))[0]
        assert words in found, kind
        assert "engine.expert=1" in found, kind


def test_the_nearest_size_that_works_is_named() -> None:
    require_experts({"num_local_experts": 128}, 8, 64, 8)
    for known, expert, ranks_of_copy, node, near in (
        ({"num_experts": 60}, 8, 64, 8, 4),
        ({"n_routed_experts": 256}, 3, 24, 6, 2),
        ({}, 16, 64, 8, 8),
        ({"num_experts": 5}, 2, 8, 8, 1),
    ):
        with pytest.raises(ConfigError, match=rf"engine\.expert={near}$"):
            require_experts(known, expert, ranks_of_copy, node)


def test_a_mesh_says_which_ranks_have_all_experts_together() -> None:
    mesh = mesh_of(EngineConfig(replicate=2, expert=4), 16)
    assert mesh == Mesh(replicate=2, shard=8, expert=4)
    assert (mesh.copy_size, mesh.data_size, mesh.same_rows) == (8, 16, 1)
    assert seats_of(mesh, 8)[:3] == [
        "# ranks  nodes  copy  rows of group  slices  parts of experts",
        "# 0-3    0      0     0-3            0       0-3",
        "# 4-7    0      0     4-7            0       0-3",
    ]
    assert seats_of(Mesh(context=4, shard=2, expert=2), 8)[1] == "# 0-3    0      0     0              0-3     0-1"
    with pytest.raises(ConfigError, match="8 ranks of a copy do not divide into groups of that size"):
        mesh_of(EngineConfig(replicate=2, expert=3), 16)


def test_a_plan_has_a_part_of_the_experts_and_sends_tokens_to_the_others(tmp_path: Path) -> None:
    """Of 4 ranks with all 4 experts together: a quarter of all else, one expert of each stack, and tokens by all-to-all inside the team."""
    model = mixture("qwen3_moe")
    with fake_ranks(4, 4) as world:
        found = simulate(config_for(tmp_path, engine=EngineConfig(expert=4)), model, world, 48)
    built = model.build()
    experts = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in built.parameters())
    assert found.parameters == total
    assert found.state_bytes["trainable"] == pytest.approx(total, rel=0.05)
    assert found.state_bytes["trainable"] > experts
    sent: dict[str, float] = {}
    for moment in found.moments:
        for key, size in moment.sent.items():
            sent[key.split()[0]] = sent.get(key.split()[0], 0.0) + size
    tokens, hidden, chosen, blocks = 48, 32, 2, 2
    there_and_back = 4 * tokens * chosen * hidden * 3 / 4
    assert sent["all-to-all"] == pytest.approx(2 * 2 * blocks * there_and_back, rel=0.02)


def exchange_while_gloo_keeps_all(world: World) -> int:
    """Exchange rows with the other ranks while every tensor that gloo gets is kept; return how many storages a trace still has then."""
    plain, kept, trace = dist.all_to_all_single, list[Any](), Trace(0)

    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.extend(args)
        return plain(*args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", keeping), trace, _without_copies_of_gloo(trace):
        rows = torch.full((world.size, 3), float(world.rank))
        came = exchange(rows, dist.group.WORLD)
        assert came[:, 0].tolist() == list(range(world.size))
        assert len(trace.live) == 2
        del rows, came
    assert len(kept) > 1
    return len(trace.live)


def test_what_gloo_keeps_of_an_exchange_that_is_done_is_not_traced(ranks: Callable[[int], Ranks]) -> None:
    """Its thread frees tensors when it gets to it: on a busy machine a real run's traced peak was 5 % above, at times."""
    assert ranks(2).call(exchange_while_gloo_keeps_all) == [0, 0]
