"""engine.mesh=auto: the meshes that a run may have on its ranks. No torch."""

from __future__ import annotations

import dataclasses

from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh, mesh_of
from trainers.config.schema import EngineConfig, RunConfig
from trainers.config.sharding import check_world, validate_mesh


def meshes(config: RunConfig, nodes: int, ranks_per_node: int) -> list[Mesh]:
    """Return the meshes that a run may have, those whose ranks share least first; raises the ConfigError of the first where none works.

    Sizes over 1 that the settings name are kept. Ranks that share rows or layers are on one node; there is one copy, or one a node.
    """
    engine, size = config.engine, nodes * ranks_per_node
    copies = [engine.replicate] if engine.replicate > 1 else sorted({1, nodes})
    contexts, tensors = (_sizes(given, ranks_per_node) for given in (engine.context, engine.tensor))
    found: list[Mesh] = []
    refused: list[ConfigError] = []
    for context, tensor in sorted(((c, t) for c in contexts for t in tensors), key=lambda pair: (pair[0] * pair[1], pair[1])):
        if context * tensor != engine.context * engine.tensor and ranks_per_node % (context * tensor):
            continue
        for replicate in copies:
            try:
                found.append(_checked(config, replicate, context, tensor, size, ranks_per_node))
            except ConfigError as error:
                refused.append(error)
    if not found:
        raise refused[0]
    return found


def with_mesh(engine: EngineConfig, mesh: Mesh) -> EngineConfig:
    """Return an engine's settings with the sizes of a mesh."""
    return dataclasses.replace(engine, replicate=mesh.replicate, shard=mesh.shard, context=mesh.context, tensor=mesh.tensor)


def words_of(mesh: Mesh) -> str:
    """Say what the ranks of a mesh share, next to the model."""
    parts = [f"{mesh.replicate} copies"] if mesh.replicate > 1 else []
    shared = {"context": mesh.context, "tensor": mesh.tensor, "expert": mesh.expert}
    parts += [f"{name} {size}" for name, size in shared.items() if size > 1]
    return ", ".join(parts) or "sharding alone"


def _sizes(given: int, ranks_per_node: int) -> list[int]:
    return [given] if given > 1 else [size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0]


def _checked(config: RunConfig, replicate: int, context: int, tensor: int, size: int, ranks_per_node: int) -> Mesh:
    engine = dataclasses.replace(config.engine, replicate=replicate, context=context, tensor=tensor)
    one, mesh = dataclasses.replace(config, engine=engine), mesh_of(engine, size)
    if mesh.same_rows > 1:
        validate_mesh(one)
    check_world(one, size, ranks_per_node)
    return mesh
