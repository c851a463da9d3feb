"""What a parameter-efficient method makes of a model: what is trained, where values come from, what is exported."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.config.checks import looks_local
from trainers.config.schema import RunConfig
from trainers.model.weights import Origin
from trainers.peft.adalora import Allocator

ADAPTER = "default"
"""peft's name for the one adapter, which stands in the names of live tensors and not in those of the export."""
FILE = "adapter_model.safetensors"


@dataclass(kw_only=True)
class Adaptation:
    """What a method made of a model: where values come from, what is trained, and what is exported under which name."""

    origin: Origin
    trained: set[str]
    """Names of the parameters that are trained."""
    names: dict[str, str]
    """Tensors of the export by their names in the model, with the names they are saved under."""
    live: Collection[str]
    """Those of `names` that are taken from the engine; the rest stands in `origin` as it was."""
    dtype: torch.dtype
    """Type of the export."""
    lr_ratio: float = 1.0
    """Learning rate of LoRA's B matrices over that of the rest."""
    vectors: set[str] = field(default_factory=set)
    """Trained parameters of one dimension, which LoRA+ trains as fast as B."""
    library_config: Any = None
    """peft's own config; None where the export is a whole model."""
    expected: dict[str, Tensor] = field(default_factory=dict)
    """An adapter's tensors on `meta`, as they are saved."""
    packed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the frozen matrices that are stored in 4 bits, by name."""
    as_saved: Callable[[str, Tensor], Tensor] | None = None
    """Makes an exported tensor of a live one, where they differ."""
    made_of_all: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """Makes the export of all trained tensors at once, where it holds what they make instead of them."""
    allocator: Allocator | None = None
    """AdaLoRA's, which an engine calls around each update."""

    def at(self, step: int, num_steps: int) -> None:
        """Say which step is next, counted from 0, of how many; raises ConfigError where the method does not fit in so many."""
        if self.allocator is not None:
            self.allocator.at(step, num_steps)

    def plan(self) -> dict[str, Tensor]:
        """Return an adapter's tensors on `meta`, as they are saved now: AdaLoRA's ranks are known only late."""
        allocator = self.allocator
        return self.expected if allocator is None else {key: allocator.as_saved(key, tensor) for key, tensor in self.expected.items()}

    def lr_scale(self, name: str) -> float:
        """Return a parameter's learning rate over the run's, divided as peft's create_loraplus_optimizer does."""
        return self.lr_ratio if "lora_B" in name or name in self.vectors else 1.0

    def numel(self, name: str, stored: int) -> int:
        """Return how many parameters a tensor stands for, of which `stored` elements are kept."""
        return math.prod(self.packed[name]) if name in self.packed else stored

    def exported(self, gather: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the export's tensors whole, one at a time, on the CPU; collective where `gather` is, which returns a live one."""
        if self.made_of_all is not None:
            yield from self.made_of_all({name: gather(name) for name in sorted(self.trained)}).items()
            return
        for name, key in self.names.items():
            whole = gather(name) if name in self.live else read_whole(self.origin, name)
            whole = whole if self.as_saved is None else self.as_saved(name, whole)
            yield key, (whole.to(self.dtype) if whole.is_floating_point() else whole).cpu()


def read_whole(origin: Origin, name: str) -> Tensor:
    """Return a whole tensor of an origin."""
    shape = origin.shape(name)
    return origin.read(name, (0,) * len(shape), shape)


def base_name(config: RunConfig) -> str | None:
    """Return what an adapter calls its base: a hub id, or a directory wherever it is loaded from; None for random weights."""
    name = config.model.id
    return str(Path(name).resolve()) if name is not None and looks_local(name) else name


def plain_list(names: Any) -> Any:
    """Return a set of names as a sorted list."""
    return sorted(names) if isinstance(names, (set, list)) else names


def near(name: str, names: Iterable[str]) -> str:
    """Return a remedy that names what is spelt alike, or nothing."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), 3)
    return f"did you mean {', '.join(close)}?" if close else ""


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw random numbers that are a function of (seed, name) alone."""
    digest = hashlib.sha256(f"{seed} adapter {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
        yield
