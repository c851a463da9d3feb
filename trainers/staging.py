"""A copy of the training state in host memory, which a checkpoint is written from while training continues."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainers import host
from trainers.units import in_bytes
from trainers.world import World

log = logging.getLogger("fulltune")


class HostCopy:
    """Host memory for a state's tensors, kept from save to save."""

    def __init__(self, world: World) -> None:
        """Take no memory yet."""
        self.world = world
        self.tensors: dict[tuple[object, ...], Tensor] = {}  # by their place in the nested state
        self.is_short = False

    def has_no_room(self, num_bytes: int) -> bool:
        """Tell whether some node has no room for copies of its ranks' states, half of what is free left alone; logged once. Collective."""
        if not self.tensors and not self.is_short:
            needed, free = num_bytes * self.world.local_size, host.memory_available()
            [self.is_short] = self.world.any(needed > free // 2)
            if self.is_short:
                words = "checkpoints are written while training waits: a copy of the state takes %s a node, and %s of host memory are free"
                log.warning(words, in_bytes(needed), in_bytes(free))
        return self.is_short

    def of(self, state: Any, path: tuple[object, ...] = ()) -> Any:
        """Return a nested state with its tensors copied to host memory, page-locked next to a GPU; the copies may still be under way.

        torch's own DefaultStager copies whole storages, of which a flat parameter is a view, and fails on them.
        """
        if isinstance(state, dict):
            return {key: self.of(value, (*path, key)) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return [self.of(value, (*path, number)) for number, value in enumerate(state)]
        if isinstance(state, DTensor):
            return DTensor(self.of(state.to_local(), path), state._spec, requires_grad=False)
        if not isinstance(state, Tensor):
            return state
        if path not in self.tensors:
            self.tensors[path] = torch.empty(state.shape, dtype=state.dtype, pin_memory=self.world.device.type == "cuda")
        return self.tensors[path].copy_(state.detach(), non_blocking=True)


def bytes_of(state: Any) -> int:
    """Return the bytes of this rank's parts of the tensors in a nested dictionary."""
    if isinstance(state, dict):
        return sum(bytes_of(value) for value in state.values())
    if isinstance(state, DTensor):
        state = state.to_local()
    return state.nbytes if isinstance(state, Tensor) else 0
