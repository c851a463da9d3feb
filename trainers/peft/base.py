"""What a parameter-efficient method makes of a model: what is trained, where values come from, what is exported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainers.config.local import looks_local
from trainers.config.schema import RunConfig
from trainers.model.saved_form import SavedForm
from trainers.model.weights import Origin
from trainers.peft.update import Update

ADAPTER = "default"
"""peft's name for the one adapter, which is in the names of live tensors and not in those of the export."""
FILE = "adapter_model.safetensors"


class Adaptation(Protocol):
    """What a method made of a model: where values come from, what is trained, and what is exported."""

    origin: Origin
    trained: set[str]
    """Names of the parameters that are trained."""
    unreached: set[str]
    """Names of the parameters that no row of the data reaches; they are frozen."""
    notes: dict[str, str]
    """What the start-up table says of what is trained, by title."""
    packed: dict[str, tuple[int, ...]]
    """Shapes of the frozen matrices that are stored in 4 bits, by name."""
    dtype: torch.dtype
    """Type of the export."""
    library_config: Any
    """peft's own config; None where the export is a whole model."""
    update: Update | None
    """What the method does around each update of the optimizer."""

    def contents(self) -> dict[str, Tensor]:
        """Return the tensors of the export on `meta`, as they would be saved now."""
        ...

    def lr_scale(self, name: str) -> float:
        """Return a parameter's learning rate over the run's."""
        ...

    def exported(self, gather: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the export's tensors whole, one at a time, on the CPU; collective where `gather` is, which returns a live one."""
        ...


@dataclass(kw_only=True)
class FullTraining:
    """All of a model is trained, or all that is not frozen; the export is a whole model."""

    origin: Origin
    trained: set[str]
    form: SavedForm
    """How the model is written."""
    live: Collection[str]
    """Those that are taken from the engine; the rest is in `origin` as it was."""
    dtype: torch.dtype
    unreached: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    packed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    library_config: Any = None
    update: Update | None = None

    def contents(self) -> dict[str, Tensor]:
        """Return what the export's files hold, on `meta`."""
        return self.form.contents

    def lr_scale(self, name: str) -> float:
        """Return 1.0: all is trained at the run's learning rate."""
        return 1.0

    def exported(self, gather: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield what is trained as it is, what is frozen as the base has it, under the names that the model has for them."""
        for name in self.form.live:
            yield name, _in_type(gather(name) if name in self.live else read_whole(self.origin, name), self.form.live[name].dtype)


@dataclass(kw_only=True)
class Adapter:
    """Trained tensors next to the layers of a frozen model: LoRA and what is like it."""

    origin: Origin
    trained: set[str]
    names: dict[str, str]
    """The tensors of the export by their names in the model, with the names they are saved under."""
    contents: Callable[[], dict[str, Tensor]]
    """Returns the tensors of the export on `meta`, as they would be saved now."""
    as_saved: Callable[[str, Tensor], Tensor]
    """Makes an exported tensor of a live one."""
    library_config: Any
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Learning rates over the run's, where they differ."""
    update: Update | None = None
    unreached: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    packed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def lr_scale(self, name: str) -> float:
        """Return a parameter's learning rate over the run's."""
        return self.lr_scales.get(name, 1.0)

    def exported(self, gather: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter's tensors under the names that peft gives them."""
        for name, key in self.names.items():
            whole = read_whole(self.origin, name) if name in self.unreached else gather(name)
            yield key, _in_type(self.as_saved(name, whole), self.dtype)


@dataclass(kw_only=True)
class VirtualTokens:
    """Trained tokens in front of every row of a frozen model; the export holds what the trained tensors make together."""

    origin: Origin
    trained: set[str]
    expected: dict[str, Tensor]
    """The tensors of the export on `meta`."""
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Makes the tensors of the export of all trained ones."""
    library_config: Any
    unreached: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    packed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    update: Update | None = None

    @property
    def names(self) -> dict[str, str]:
        """Return where an adapter directory holds each trained tensor, where there is one that makes nothing but itself."""
        return dict.fromkeys(self.trained, next(iter(self.expected)))

    def contents(self) -> dict[str, Tensor]:
        """Return what the trained tensors make, on `meta`."""
        return self.expected

    def lr_scale(self, name: str) -> float:
        """Return 1.0: all is trained at the run's learning rate."""
        return 1.0

    def exported(self, gather: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield what the trained tensors make, all of them gathered."""
        yield from self.make({name: gather(name) for name in sorted(self.trained)}).items()


def _in_type(whole: Tensor, dtype: torch.dtype) -> Tensor:
    return (whole.to(dtype) if whole.is_floating_point() else whole).cpu()


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


def library() -> Any:
    """Return the peft library with the method that we add to it, so that directories of all methods can be opened."""
    import peft

    from trainers.peft import bottleneck_adapter  # noqa: F401  # it registers itself

    return peft


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw random numbers that are a function of (seed, name) alone."""
    digest = hashlib.sha256(f"{seed} adapter {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
        yield
