"""What a method may do around an optimizer's update: look at gradients before it and at parameters after it, and keep state of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(kw_only=True)
class Part:
    """This rank's elements of a trained tensor: those from `start` of the flattened whole, (elements,) float32."""

    value: Tensor
    """The master weights themselves: what is written here is trained on."""
    grad: Tensor
    """The gradient summed over ranks: what is added before the update counts, after it this is what the optimizer took."""
    start: int


class Update(Protocol):
    """The hook of a method, which an engine calls around each update. It sees this rank's elements and knows no engine."""

    name: str
    """What its state is, for the start-up table."""
    names: Collection[str]
    """The trained tensors that it looks at."""
    elements: Mapping[str, Mapping[str, Tensor]]
    """Its state of this rank's elements, by tensor and kind, (elements,) float32, on the device of the master weights."""
    bytes_per_element: int
    """Bytes of `elements` for each element that it looks at."""

    def at(self, step: int, num_steps: int) -> None:
        """Say which step is next, counted from 0, of how many; raises ConfigError where the method does not fit in so many."""
        ...

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Make `elements` for this rank's elements of each tensor, (elements,), before the first step."""
        ...

    def before(self, parts: Mapping[str, Part], gather: Callable[[str], Tensor]) -> None:
        """Look at the gradients of a step before they are clipped, and add to them. `gather` returns a whole parameter; collective."""
        ...

    def after(self, parts: Mapping[str, Part], total: Callable[[list[float]], list[float]]) -> bool:
        """Look at the clipped gradients and the new values; return whether any value was changed. Collective.

        Not called for a step that was skipped. `total` sums over the ranks that hold different elements.
        """
        ...

    def state(self, placed: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """Return what a checkpoint keeps, by keys of its own; `placed` makes of a tensor's elements what the engine saves of it."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with what `state` returned, read again at any world size."""
        ...
