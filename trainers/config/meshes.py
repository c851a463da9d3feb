"""engine.mesh=auto: the meshes that a run may have on its ranks. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trainers.config.activations import validate_activations
from trainers.config.errors import ConfigError
from trainers.config.expert import experts_of
from trainers.config.mesh import Mesh, mesh_of
from trainers.config.schema import EngineConfig, RunConfig
from trainers.config.sharding import check_world, known_config, validate_mesh


def meshes(config: RunConfig, nodes: int, ranks_per_node: int, known: Mapping[str, Any] | None = None) -> list[Mesh]:
    """Return the meshes that a run may have, those whose ranks share least first; raises the ConfigError of the first where none works.

    Sizes over 1 that the settings name are kept. Ranks that share rows, layers or experts are on one node; there is one copy, or one a
    node. `known` is the model's config. Without it, or what is here of it, each model may have layers to split and experts to deal out.
    """
    engine, size = config.engine, nodes * ranks_per_node
    copies = [engine.replicate] if engine.replicate > 1 else sorted({1, nodes})
    known = known_config(config.model) if known is None else known
    count = experts_of(known)
    contexts = _sizes(engine.context, ranks_per_node)
    tensors = _sizes(engine.tensor, 1 if count > 1 else ranks_per_node)
    experts = _sizes(engine.expert, ranks_per_node if count > 1 or not known else 1)
    groups = [(context, tensor, expert) for context in contexts for tensor in tensors for expert in experts]
    found: list[Mesh] = []
    refused: list[ConfigError] = []
    for context, tensor, expert in sorted(groups, key=lambda group: (math.prod(group), group[1], group[0])):
        if context * tensor != engine.context * engine.tensor and ranks_per_node % (context * tensor):
            continue
        for replicate in copies:
            try:
                found.append(
                    _checked(config, Mesh(replicate=replicate, context=context, tensor=tensor, expert=expert), size, ranks_per_node)
                )
            except ConfigError as error:
                refused.append(error)
    if not found:
        raise refused[0]
    return found


def with_mesh(engine: EngineConfig, mesh: Mesh) -> EngineConfig:
    """Return an engine's settings with the sizes of a mesh."""
    return dataclasses.replace(engine, **dataclasses.asdict(mesh))


def words_of(mesh: Mesh) -> str:
    """Say what the ranks of a mesh share, next to the model."""
    parts = [f"{mesh.replicate} copies"] if mesh.replicate > 1 else []
    shared = {"context": mesh.context, "tensor": mesh.tensor, "expert": mesh.expert}
    parts += [f"{name} {size}" for name, size in shared.items() if size > 1]
    return ", ".join(parts) or "sharding alone"


def _sizes(given: int, ranks_per_node: int) -> list[int]:
    return [given] if given > 1 else [size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0]


def _checked(config: RunConfig, sizes: Mesh, size: int, ranks_per_node: int) -> Mesh:
    """Return a mesh of `size` ranks with all sizes of another but that of `shard`; raises ConfigError where a run may not have it."""
    engine = dataclasses.replace(with_mesh(config.engine, sizes), shard=config.engine.shard)
    one, mesh = dataclasses.replace(config, engine=engine), mesh_of(engine, size)
    if mesh.same_rows * mesh.expert > 1:
        validate_mesh(one)
        validate_activations(one)
    check_world(one, size, ranks_per_node)
    return mesh
