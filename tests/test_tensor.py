"""Ranks that split each layer take the steps of one process: for any plan of transformers', method, mesh and vocabulary."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from meshed import compare, compare_continued, config_for, train
from small_models import TEXT, small
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.batch import IGNORE, Batch, Needs
from trainers.config.choices import Activations, ObjectiveName, Offload, OptimizerName, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh, mesh_of, seats_of
from trainers.config.schema import EngineConfig, ObjectiveConfig, PeftConfig
from trainers.config.sharding import check_world
from trainers.config.tensor import require_counts
from trainers.engines.build import build_engine
from trainers.model.blueprint import Blueprint
from trainers.model.tensor import plan_of
from trainers.world import World

VOCABULARY = 36
ALIKE = ("olmo2", "apertus", "phi", "cohere", "doge")
"""Architectures of Llama's sizes: norms of all heads together, an activation that is trained, norms of each head, other parameters."""


def even(kind: str, **changes: Any) -> Blueprint:
    """A small model whose vocabulary divides; `changes` are of its config, and its `folder`."""
    blueprint = small("llama" if kind in ALIKE else kind)
    if kind in ALIKE:
        blueprint = dataclasses.replace(blueprint, config=AutoConfig.for_model(kind, **TEXT))
    for name, value in ({"vocab_size": VOCABULARY} | changes).items():
        if name != "folder":
            setattr(blueprint.config, name, value)
    return dataclasses.replace(blueprint, folder=changes.get("folder"))


LORA = {"peft": PeftConfig(method=PeftMethod.lora, rank=4, alpha=8, targets=["q_proj", "v_proj", "o_proj", "down_proj"])}
DPO = {"objective": ObjectiveConfig(name=ObjectiveName.dpo, beta=0.5)}
TIED = {"tie_word_embeddings": True}
CASES: list[Any] = [
    (("llama", {}), 2, {"tensor": 2}, {}),
    (("llama", TIED), 4, {"tensor": 2}, {"train": {"logits_chunk": 7}}),
    (("llama", {"num_key_value_heads": 4}), 4, {"tensor": 4}, {"train": {"activations": Activations.block}}),
    (("llama", {}), 4, {"tensor": 2, "context": 2}, {}),
    (("qwen3", {}), 4, {"tensor": 2, "replicate": 2}, DPO),
    (("qwen3", {}), 2, {"tensor": 2}, LORA),
    (("gemma2", {}), 2, {"tensor": 2, "offload_optimizer": Offload.cpu}, {"train": {"activations": Activations.selective}}),
    (("olmo2", {}), 2, {"tensor": 2}, {"train": {"activations": Activations.offload}}),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]
SOAK = [
    pytest.param(("llama", {}), 8, {"context": 2, "tensor": 2, "replicate": copies}, settings, marks=pytest.mark.soak)
    for copies, settings in ((1, LORA), (2, {}))
]
"""Eight ranks: a copy is sharded over two groups of four, or each group has a copy."""


@pytest.mark.parametrize(("model", "size", "engine", "settings"), [CASES[0], *SLOW, *SOAK])
def test_ranks_that_split_layers_equal_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, model: Any, size: int, engine: dict[str, Any], settings: dict[str, Any]
) -> None:
    (whole,) = ranks(1).call(train, tmp_path / "whole", even(model[0], **model[1]), {}, dict(settings))
    for split in ranks(size).call(train, tmp_path / "split", even(model[0], **model[1]), engine, dict(settings)):
        compare(split, whole)
    assert f"; {engine['tensor']} ranks split each layer" in split["report"]["parameters"]


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Saved on 6 ranks whose parts of layers do not divide evenly, and on one; continued on others: curve and bytes of one process."""
    model, settings = even("llama", **TIED), {"optim": OptimizerName.adamw, "train": {"global_batch": 6}}
    meshes = {"uneven": (6, {"tensor": 2}), "one": (1, {}), "sharded": (2, {}), "shared": (4, {"tensor": 2, "context": 2})}
    compare_continued(ranks, tmp_path, model, settings, meshes, {"uneven": ("one", "sharded"), "one": ("uneven", "shared")})


@pytest.mark.slow
def test_dropout_between_layers_is_the_same_on_ranks_that_split_them(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    settings = {"peft": dataclasses.replace(LORA["peft"], dropout=0.3)}
    first, second = ranks(2).call(train, tmp_path, even("qwen3"), {"tensor": 2}, settings)
    (plain, _) = ranks(2).call(train, tmp_path, even("qwen3"), {"tensor": 2}, dict(LORA))
    assert first["losses"] == second["losses"] != plain["losses"]
    assert all((values == second["weights"][name]).all() for name, values in first["weights"].items())


def entropies(world: World, run_dir: Path, engine: dict[str, Any], chunk: int) -> tuple[Any, Any]:
    """Return log-probabilities and entropies (B, S) of two rows, some of whose tokens have no label, by a model with softcapping."""
    config = config_for(run_dir, engine=EngineConfig(**engine), train={"logits_chunk": chunk})
    built = build_engine(config, world, even("gemma2"))
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(4))
    labels = ids.roll(-1, 1).where(torch.arange(20) > 4, IGNORE)
    output = built.forward(Batch.of(ids, labels, torch.arange(20).repeat(2, 1)), Needs(entropy=True))
    assert output.entropy is not None
    return output.logps.detach().numpy(), output.entropy.numpy()


@pytest.mark.slow
def test_entropies_are_those_of_the_whole_vocabulary(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    ((logps, entropy),) = ranks(1).call(entropies, tmp_path, {}, 0)
    assert entropy.max() > 1
    for chunk in (0, 7):
        for ours, of_vocabulary in ranks(2).call(entropies, tmp_path, {"tensor": 2}, chunk):
            np.testing.assert_allclose(ours, logps, atol=2e-6)
            np.testing.assert_allclose(of_vocabulary, entropy, atol=2e-6)


def outlined(world: World, run_dir: Path, kind: str, changes: dict[str, Any]) -> str:
    try:
        build_engine(config_for(run_dir, engine=EngineConfig(tensor=2)), world, even(kind, **changes))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_models_that_are_not_split_are_refused_by_name(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    said: dict[tuple[str, str, int], str] = {
        ("qwen3_moe", "vocab_size", 36): "is a mixture of experts, whose stacks are not split",
        ("falcon_h1", "vocab_size", 36): "FalconH1ForCausalLM has layers that are not split",
        ("bloom", "vocab_size", 36): "transformers has no plan of how to split BloomForCausalLM",
        ("llama", "vocab_size", 33): "33 tokens in its vocabulary, which do not divide over 2 ranks",
        ("llama", "num_key_value_heads", 1): "1 key-value heads, which do not divide over 2 ranks",
    }
    for (kind, name, value), words in said.items():
        found = ranks(2).call(outlined, tmp_path, kind, {name: value})[0]
        assert words in found, kind
        assert "engine.tensor=1" in found, kind


@pytest.mark.slow
def test_an_activation_that_is_trained_is_that_of_one_process(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Each rank has some of the features that it sees; transformers initialises none, so the model is a saved one."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(even("apertus").config).save_pretrained(tmp_path / "model")
    model = even("apertus", folder=tmp_path / "model")
    (whole,) = ranks(1).call(train, tmp_path / "whole", model, {}, {})
    moved = [name for name, values in whole["weights"].items() if "alpha" in name and values.tobytes() != whole["loaded"][name]]
    assert len(moved) == 4
    for split in ranks(2).call(train, tmp_path / "split", model, {"tensor": 2}, {}):
        compare(split, whole)


def planned(kind: str, **changes: Any) -> dict[str, str]:
    with torch.device("meta"):
        return plan_of(AutoModelForCausalLM.from_config(even(kind, **changes).config), 2)


def test_what_a_plan_does_not_name_between_split_layers_is_summed_or_refused() -> None:
    """Norms of each head and trained activations see this rank's part alone; what is for each head is not cut."""
    found = planned("phi", qk_layernorm=True) | planned("apertus")
    for path in ("self_attn.q_layernorm", "self_attn.k_layernorm", "mlp.act_fn"):
        assert found[f"model.layers.1.{path}"] == "replicated_with_grad_allreduce", path
    assert "model.layers.1.self_attn.q_layernorm" not in planned("phi")
    assert "model.layers.0.self_attn.o_proj" in planned("cohere")
    for kind, changes, name in (("cohere", {"use_qk_norm": True}, "q_norm.weight"), ("doge", {}, "A")):
        with pytest.raises(ConfigError, match=rf"self_attn\.{name} is between layers that are split") as refused:
            planned(kind, **changes)
        assert refused.value.remedy == "engine.tensor=1"


def test_the_nearest_size_that_works_is_named() -> None:
    known = {"num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256}
    require_counts(known, EngineConfig(tensor=8), 64)
    for tensor, ranks_of_copy, context, near in ((16, 64, 1, 8), (6, 24, 1, 4), (16, 64, 2, 8), (3, 6, 1, 2)):
        with pytest.raises(ConfigError, match=rf"engine\.tensor={near}$"):
            require_counts(known, EngineConfig(tensor=tensor, context=context), ranks_of_copy)
    with pytest.raises(ConfigError, match=r"nodes of 6 ranks do not divide into groups of 4.*\n.*engine\.tensor=2$"):
        require_counts(known, EngineConfig(tensor=4), 12, 6)
    with pytest.raises(ConfigError, match=r"engine\.tensor=2 engine\.shard=6$"):
        require_counts(known, EngineConfig(tensor=12, shard=1), 12, 6)


@pytest.mark.parametrize(
    ("engine", "world_size", "node", "remedy"),
    [
        ({"tensor": 3, "context": 16, "shard": 1}, 48, 12, "engine.tensor=1 engine.shard=3"),
        ({"tensor": 16, "context": 16}, 256, 8, "engine.tensor=8"),
        ({"tensor": 3, "context": 2}, 48, 12, "engine.tensor=2"),
        ({"tensor": 16}, 16, 8, "engine.tensor=8"),
        ({"tensor": 4, "replicate": 2}, 24, 6, "engine.tensor=2"),
    ],
)
def test_a_remedy_of_the_mesh_is_not_refused_again(tmp_path: Path, engine: dict[str, int], world_size: int, node: int, remedy: str) -> None:
    known = {"model_type": "llama", "num_attention_heads": 40, "num_key_value_heads": 8}
    config = config_for(tmp_path, engine=EngineConfig(**engine), train={"global_batch": 3 * 256})
    config.model.architecture = known
    with pytest.raises(ConfigError) as refused:
        check_world(config, world_size, node)
    assert refused.value.remedy == remedy
    better = engine | {name: int(size) for name, size in re.findall(r"engine\.(\w+)=(\d+)", remedy)}
    check_world(dataclasses.replace(config, engine=EngineConfig(**better)), world_size, node)


def test_a_mesh_says_which_ranks_split_layers() -> None:
    mesh = mesh_of(EngineConfig(replicate=2, context=2, tensor=2), 16)
    assert mesh == Mesh(replicate=2, shard=2, context=2, tensor=2)
    assert (mesh.size, mesh.copy_size, mesh.same_rows) == (16, 8, 4)
    assert [(mesh.data_rank(rank), mesh.slice_rank(rank)) for rank in (0, 1, 2, 15)] == [(0, 0), (0, 0), (0, 1), (3, 1)]
    assert seats_of(mesh, 8)[1:3] == [
        "# 0-3    0      0     0              0-1     0-1",
        "# 4-7    0      0     1              0-1     0-1",
    ]
