"""Ranks that share rows, a slice of each, take the steps of one process: for any model, method, mesh and document that crosses slices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ranks
from meshed import EARLY, LATE, compare, config_for, needle_of, train
from small_models import small

from trainers.config.checks import validate
from trainers.config.choices import Activations, Attention, ObjectiveName, OptimizerName, PeftMethod, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh, mesh_of, seats_of
from trainers.config.schema import EngineConfig, ObjectiveConfig, PeftConfig
from trainers.config.sharding import check_world
from trainers.engines.build import build_engine
from trainers.world import World

LORA = {"peft": PeftConfig(method=PeftMethod.lora, rank=4, alpha=8, targets=["q_proj", "v_proj"])}
DPO = {"objective": ObjectiveConfig(name=ObjectiveName.dpo, beta=0.5)}
CASES: list[Any] = [
    ("llama", 2, {"context": 2}, {}),
    ("llama", 4, {"context": 4}, {}),
    ("llama", 4, {"context": 2, "replicate": 2}, {"attention": Attention.sdpa}),
    ("llama", 4, {"context": 2}, DPO),
    ("qwen3", 2, {"context": 2}, LORA),
    ("gemma3_text", 4, {"context": 4}, {"attention": Attention.eager}),
    ("gemma3_text", 2, {"context": 2}, {"attention": Attention.sdpa}),
    ("qwen3_moe", 4, {"context": 2}, {"train": {"balance_loss": 1.0, "activations": Activations.block}}),
    ("deepseek_v3", 2, {"context": 2}, {"train": {"activations": Activations.selective, "logits_chunk": 7}}),
    ("afmoe", 2, {"context": 2}, {}),
]


MORE: list[Any] = [
    ("llama", 4, {"context": 2}, {"objective": ObjectiveConfig(name=ObjectiveName.sft, label_smoothing=0.1)}),
    ("llama", 2, {"context": 2}, {"peft": replace(LORA["peft"], quantise=Quantisation.nf4)}),
    ("qwen3", 2, {"context": 2}, {"train": {"activations": Activations.offload, "microbatch": 2}}),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]
SLOW += [pytest.param(*case, marks=pytest.mark.soak) for case in MORE]


@pytest.mark.parametrize(("kind", "size", "engine", "settings"), [CASES[0], *SLOW])
def test_ranks_that_share_rows_equal_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, kind: str, size: int, engine: dict[str, Any], settings: dict[str, Any]
) -> None:
    (whole,) = ranks(1).call(train, tmp_path / "whole", small(kind), {}, settings)
    for split in ranks(size).call(train, tmp_path / "split", small(kind), engine, settings):
        compare(split, whole)
    assert f"; {engine['context']} ranks share each row" in split["report"]["parameters"]


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Saved by 2 ranks that share rows and by 2 that do not, continued by the other, by one and by 4: the curve of one process."""
    settings = {"optim": OptimizerName.adamw}
    (whole,) = ranks(1).call(train, tmp_path / "whole", small("llama"), {}, dict(settings))
    shared, apart = (2, {"context": 2}), (2, {})
    for name, saved in (("shared", shared), ("apart", apart)):
        first = ranks(saved[0]).call(train, tmp_path / name, small("llama"), saved[1], dict(settings), 0, 5)[0]
        exports = []
        for size, engine in (apart if saved is shared else shared, (1, {}), (4, {"context": 2})):
            second = ranks(size).call(train, tmp_path / name, small("llama"), engine, dict(settings), 5)[0]
            assert first["losses"][:-1] + second["losses"] == pytest.approx(whole["losses"], rel=1e-5)
            exports.append(second["loaded"])
        assert exports[0] == exports[1] == exports[2]


def needle(world: World, run_dir: Path, kind: str, engine: dict[str, Any], backend: Attention) -> np.ndarray[Any, Any]:
    return needle_of(world, run_dir, small(kind), engine, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [Attention.varlen, Attention.sdpa, Attention.eager])
def test_a_late_token_looks_at_an_early_one_of_another_slice_and_at_no_other_document(
    ranks: Callable[[int], Ranks], tmp_path: Path, backend: Attention
) -> None:
    """Of documents of 30 and 18 tokens in slices of 12: token 27 of the first one is in the third slice, token 3 in the first."""
    (whole,) = ranks(1).call(needle, tmp_path, "qwen3", {}, backend)
    split = np.concatenate(ranks(4).call(needle, tmp_path, "qwen3", {"context": 4}, backend))
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
    assert np.abs(whole[EARLY]).max() > 1e-4 * np.abs(whole).max()
    assert not split[LATE + 1 :].any()


def outlined(world: World, run_dir: Path, kind: str) -> str:
    try:
        build_engine(config_for(run_dir, engine=EngineConfig(context=2)), world, small(kind))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_models_that_no_slice_can_be_computed_of_are_refused_by_name(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    said = {
        "falcon_h1": "layers of hybrid, whose state runs along a row",
        "jamba": "layers of linear_attention, whose state runs along a row",
        "qwen3_next": "layers of linear_attention, whose state runs along a row",
        "gpt_oss": "the model's attention has sinks",
        "bloom": "does not take attention functions from outside",
    }
    for kind, words in said.items():
        found = ranks(2).call(outlined, tmp_path, kind)[0]
        assert words in found, kind
        assert "engine.context=1" in found, kind


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": EngineConfig(context=2), "train": {"compile": True}}, "train.compile=false"),
        ({"engine": EngineConfig(context=2), "attention": Attention.flex}, "model.attention=auto"),
        (
            {"engine": EngineConfig(context=2), "peft": PeftConfig(method=PeftMethod.prefix), "packing": False},
            "no place for virtual tokens",
        ),
        ({"engine": EngineConfig(context=2), "objective": ObjectiveConfig(name=ObjectiveName.reward)}, "scores no documents"),
    ],
)
def test_settings_that_do_not_go_with_shared_rows_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    config = config_for(tmp_path, **settings)
    with pytest.raises(ConfigError) as refused:
        validate(config)
    assert said in str(refused.value)


def test_a_mesh_says_which_ranks_share_what(tmp_path: Path) -> None:
    mesh = mesh_of(EngineConfig(replicate=2, context=2), 8)
    assert mesh == Mesh(replicate=2, shard=2, context=2)
    assert mesh.size == 8
    assert [(mesh.data_rank(rank), mesh.slice_rank(rank)) for rank in (0, 1, 2, 7)] == [(0, 0), (0, 1), (1, 0), (3, 1)]
    with pytest.raises(ConfigError, match=re.escape("engine.context=1 or 2 or 3 or 6")):
        mesh_of(EngineConfig(context=4), 6)
    with pytest.raises(ConfigError, match=re.escape("2 groups of 2 ranks cannot be divided into as many copies")):
        mesh_of(EngineConfig(context=2, replicate=4), 4)
    check_world(config_for(tmp_path, engine=EngineConfig(context=4), train={"global_batch": 1}), 4)
    with pytest.raises(ConfigError, match=re.escape("2 groups of 2 ranks x train.microbatch 1 = 2")):
        check_world(config_for(tmp_path, engine=EngineConfig(context=2), train={"global_batch": 3}), 4)


def test_a_table_says_which_rank_is_where() -> None:
    assert seats_of(Mesh(shard=8), 8) == []
    assert seats_of(Mesh(replicate=2, shard=2, context=4), 8) == [
        "# ranks  nodes  copy  rows of group  slices",
        "# 0-3    0      0     0              0-3",
        "# 4-7    0      0     1              0-3",
        "# 8-11   1      1     2              0-3",
        "# 12-15  1      1     3              0-3",
    ]
    assert seats_of(Mesh(replicate=2, shard=16), 8)[1:] == [
        "# 0-15   0-1    0     0-15           0",
        "# 16-31  2-3    1     16-31          0",
    ]
    assert seats_of(Mesh(context=16, shard=2), 8)[1] == "# 0-15   0-1    0     0              0-15"
    assert seats_of(Mesh(context=2, shard=100), 8)[-1] == "# and 36 more in the same way"
