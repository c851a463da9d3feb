"""How ranks are arranged: copies of the model, the ranks that shard one, that share rows and that split layers. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainers.config.errors import ConfigError, plural
from trainers.config.schema import EngineConfig


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ranks by what they share; rank = ((copy x shard + part of a copy) x context + slice) x tensor + part of each layer.

    So the ranks that split layers are consecutive, and those that share rows. A copy of the model is split over `shard` x `context` x
    `tensor` ranks; `replicate` x `shard` groups have rows of their own. Of a copy's ranks `expert` consecutive ones have all experts.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self.replicate * self.copy_size

    @property
    def copy_size(self) -> int:
        """Return the ranks that one copy of the model is split over."""
        return self.shard * self.same_rows

    @property
    def same_rows(self) -> int:
        """Return how many ranks have the same rows."""
        return self.context * self.tensor

    @property
    def data_size(self) -> int:
        """Return how many groups of ranks have rows of their own."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Return which of these groups a rank is in: the ranks of one get the same rows."""
        return rank // self.same_rows

    def share_of(self, rank: int) -> dict[str, Any]:
        """Return the `rank` and `world_size` of those that deal out rows: a rank's group among all that have rows of their own."""
        return {"rank": rank // (self.context * self.tensor), "world_size": self.replicate * self.shard}

    def slice_rank(self, rank: int) -> int:
        """Return which slice of its group's rows a rank has."""
        return rank // self.tensor % self.context

    def groups_of(self, rank: int) -> dict[str, range]:
        """Return the ranks of a rank's group of each dimension, without those that all ranks or no others are in."""
        strides = {
            "tensor": (1, self.tensor),
            "context": (self.tensor, self.context),
            "shard": (self.tensor, self.shard * self.context if self.shard > 1 else 1),
            "replicate": (self.copy_size, self.replicate),
            "expert": (1, self.expert),
            "expert shard": (self.expert, self.copy_size // self.expert if self.expert > 1 else 1),  # those that have the same experts
        }
        found = {}
        for name, (stride, size) in strides.items():
            if 1 < size < self.size:
                first = rank - rank // stride % size * stride
                found[name] = range(first, first + size * stride, stride)
        return found


def words_of_group(kind: str, ranks: Sequence[int]) -> str:
    """Say which ranks a group has, such as `the context group of ranks 2-3` without its article; of more than four those first."""
    words = f"{kind} group of ranks".lstrip()
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{words} {ranks[0]}-{ranks[-1]}"
    return f"{words} {', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''}"


def mesh_of(engine: EngineConfig, world_size: int) -> Mesh:
    """Return the mesh of a number of ranks; raises ConfigError unless the sizes that `engine` names make that number."""
    copies, context, tensor = engine.replicate, engine.context, engine.tensor
    mesh = Mesh(replicate=copies, shard=world_size // copies // context // tensor, context=context, tensor=tensor, expert=engine.expert)
    if mesh.shard * copies * context * tensor != world_size or engine.shard not in (None, mesh.shard) or mesh.copy_size % mesh.expert:
        _refuse(engine, world_size, mesh.shard)
    return mesh


def shard_of(engine: EngineConfig, shard: int) -> str:
    """Return what a remedy that changes the mesh says of `engine.shard`: nothing where that follows."""
    return "" if engine.shard is None else f" engine.shard={shard}"


def _refuse(engine: EngineConfig, world_size: int, shard: int) -> None:
    _require_divisor("tensor", engine.tensor, world_size, "do not divide into groups of that size")
    _require_divisor("context", engine.context, world_size // engine.tensor, "do not divide into groups of that size", engine.tensor)
    same_rows = engine.tensor * engine.context
    _require_divisor("replicate", engine.replicate, world_size // same_rows, "cannot be divided into as many copies", same_rows)
    if engine.shard in (None, shard):
        _require_divisor("expert", engine.expert, shard * same_rows, "of a copy do not divide into groups of that size")
    others = (("context", engine.context), ("tensor", engine.tensor))
    by = f"engine.replicate {engine.replicate}" + "".join(f" / engine.{name} {size}" for name, size in others if size > 1)
    reason = f"{plural(world_size, 'rank')} / {by} are {plural(shard, 'rank')} a copy"
    raise ConfigError("engine.shard", engine.shard, reason, f"engine.shard={shard}")


MOST_SEATS = 64


def seats_of(mesh: Mesh, ranks_per_node: int) -> list[str]:
    """Return a table of which ranks are on which nodes and what they have, a line for each group that shares something; plain: none.

    A line is of the ranks that have the same rows or all experts together, or else of those that share a copy of the model.
    """
    if mesh.replicate * mesh.same_rows * mesh.expert == 1:
        return []
    size = math.lcm(mesh.same_rows, mesh.expert) if mesh.same_rows * mesh.expert > 1 else mesh.copy_size
    parts = {"parts of layers": mesh.tensor, "parts of experts": mesh.expert}
    more = {name: _span(0, count - 1) for name, count in parts.items() if count > 1}
    table = [("ranks", "nodes", "copy", "rows of group", "slices", *more)]
    for first in range(0, mesh.size, size)[:MOST_SEATS]:
        ends = first, first + size - 1
        spans = ends, tuple(rank // ranks_per_node for rank in ends), tuple(map(mesh.data_rank, ends)), tuple(map(mesh.slice_rank, ends))
        ranks, nodes, rows, slices = (_span(*span) for span in spans)
        table.append((ranks, nodes, str(first // mesh.copy_size), rows, slices, *more.values()))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["# " + "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in table]
    others = mesh.size // size - MOST_SEATS
    return [*lines, f"# and {others:,} more in the same way"] if others > 0 else lines


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _require_divisor(name: str, wanted: int, count: int, how: str, each: int = 1) -> None:
    if count % wanted:
        near = [str(number) for number in range(1, count + 1) if count % number == 0]
        what = plural(count, "rank") if each == 1 else f"{plural(count, 'group')} of {each} ranks"
        raise ConfigError(f"engine.{name}", wanted, f"{what} {how}", f"engine.{name}={' or '.join(near)}")
