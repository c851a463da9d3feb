"""What the settings of an engine may be, and how many ranks they fit. No torch."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from trainers.config.choices import Attention, EngineName, Float8, Offload
from trainers.config.deepspeed_keys import check_overrides
from trainers.config.derived import HEADED
from trainers.config.errors import ConfigError, plural
from trainers.config.foreign import refuse_foreign
from trainers.config.mesh import mesh_of
from trainers.config.methods import VIRTUAL
from trainers.config.schema import EngineConfig, ModelConfig, RunConfig

FSDP_ONLY = (
    "reshard_after_forward",
    "reshard_after_backward",
    "mesh",
    "replicate",
    "shard",
    "context",
    "tensor",
    "expert",
    "prefetch",
    "sync_each_microbatch",
)
SHARED = (Attention.auto, Attention.varlen, Attention.sdpa, Attention.eager)
"""Attention that takes whole rows of some heads as it takes those of all."""
ZERO3_ONLY = (
    "sub_group_size",
    "reduce_bucket_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "overlap_comm",
    "overrides",
)


def validate_engine(engine: EngineConfig) -> None:
    """Refuse what the named engine does not have or cannot do."""
    fsdp = engine.name is EngineName.fsdp
    foreign, other = (ZERO3_ONLY, "zero3") if fsdp else (FSDP_ONLY, "fsdp")
    refuse_foreign("engine", engine, f"engine.name={engine.name}", dict.fromkeys(foreign, f"engine={other}, or leave it out"))
    offloads = {name: getattr(engine, name) for name in ("offload_param", "offload_optimizer")}
    for name, where in offloads.items():
        if fsdp and where is Offload.nvme:
            raise ConfigError(f"engine.{name}", "nvme", "fsdp offloads to host memory only", "engine=zero3_nvme")
    if fsdp and engine.offload_param is Offload.cpu and engine.offload_optimizer is Offload.none:
        reason = "fsdp keeps the optimizer's state where the parameters are"
        raise ConfigError("engine.offload_optimizer", "none", reason, "engine.offload_optimizer=cpu")
    if Offload.nvme in offloads.values() and engine.nvme_path is None:
        raise ConfigError(
            "engine.nvme_path", None, "nothing says where offloaded state goes", "engine.nvme_path=/a/directory/on/local/nvme"
        )
    if Offload.nvme not in offloads.values() and engine.nvme_path is not None:
        raise ConfigError("engine.nvme_path", engine.nvme_path, "nothing is offloaded to nvme", "engine=zero3_nvme, or leave it out")
    check_overrides(engine.overrides)


def validate_mesh(config: RunConfig) -> None:
    """Refuse what does not work where ranks share rows, split layers or have some of the experts, by name."""
    if config.engine.context > 1:
        validate_context(config)
    if config.engine.tensor > 1:
        from trainers.config.tensor import validate_tensor

        validate_tensor(config)
    if config.engine.expert > 1:
        from trainers.config.expert import validate_expert

        validate_expert(config)


def validate_context(config: RunConfig) -> None:
    """Refuse what does not work where ranks share rows, by name."""
    train, method, backend = config.train, config.peft.method, config.model.attention
    refused: list[tuple[str, Any, bool, str, str]] = [
        ("train.compile", True, train.compile, "exchanges heads inside a block, which is not compiled", "train.compile=false"),
        ("train.float8", train.float8, train.float8 is not Float8.none, "cuts rows anywhere, not in whole tiles", "train.float8=none"),
        ("peft.method", method, method in VIRTUAL, "has no place for virtual tokens", "peft=lora"),
        ("model.attention", backend, backend not in SHARED, "attends by varlen, sdpa or eager", "model.attention=auto"),
    ]
    name = config.objective.name
    refused += [("objective.name", name, name in HEADED, "scores no documents: each ends in one slice", "engine.context=1")]
    for path, value, is_set, reason, remedy in refused:
        if is_set:
            value = str(value) if isinstance(value, StrEnum) else value
            raise ConfigError(path, value, f"engine.context={config.engine.context} {reason}", remedy)


def known_config(model: ModelConfig) -> dict[str, Any]:
    """Return what is known here of a text model's config, without a look at the hub; empty where nothing is."""
    known = model.architecture or (_config_json(Path(model.id)) if model.id is not None else {})
    found: dict[str, Any] = known.get("text_config", known)
    return found


def _config_json(folder: Path) -> dict[str, Any]:
    """Return the config of a model directory, nothing of one that is still to come or not readable: the rank says so."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def check_world(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> None:
    """Raise ConfigError unless `world_size` ranks are a mesh, over whose groups the global batch splits evenly.

    With `ranks_per_node` also where ranks that split layers, or have all experts together, would be on several nodes.
    """
    train, mesh = config.train, mesh_of(config.engine, world_size)
    if mesh.tensor * mesh.expert > 1:
        _require_counts(known_config(config.model), config.engine, world_size, ranks_per_node)
    share = mesh.data_size * train.microbatch
    if train.global_batch % share:
        groups = plural(world_size, "rank") if mesh.same_rows == 1 else f"{plural(mesh.data_size, 'group')} of {mesh.same_rows} ranks"
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"is not divisible by {groups} x train.microbatch {train.microbatch} = {share}",
            f"train.global_batch={near(train.global_batch, share)}",
        )


def _require_counts(known: dict[str, Any], engine: EngineConfig, world_size: int, ranks_per_node: int | None) -> None:
    """Raise ConfigError unless what is known of a model divides over the ranks that split its layers or have its experts."""
    if engine.tensor > 1:
        from trainers.config.tensor import require_counts

        require_counts(known, engine, world_size // engine.replicate // engine.context, ranks_per_node)
    if engine.expert > 1:
        from trainers.config.expert import require_experts

        require_experts(known, engine.expert, world_size // engine.replicate, ranks_per_node)


def near(size: int, share: int) -> str:
    """Return the multiples of `share` below and above a size, in words."""
    return " or ".join(str(near) for near in (size // share * share, -(-size // share) * share) if near)
