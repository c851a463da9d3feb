"""What a plan is asked for: runs, where they would be started, and the devices they would run on. No torch: the launcher writes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from trainers.config.errors import ConfigError

VERSION = 6
"""Of plan.json and what its numbers mean: raise it when either changes."""
UNFIT = 3
"""Exit code of trainers.plan where a run does not fit; 1 is that of a process that failed."""


@dataclass(kw_only=True)
class HardwareConfig:
    """A kind of device, and the node it is in; bandwidths in GB/s, 10^9 bytes, in one direction."""

    name: str = "any"
    """`any` compares the memory with each device that is known; every other name estimates time and cost, too."""
    memory_gib: float = 0.0
    """Memory of a device as torch reports it, in GiB."""
    tflops: float = 0.0
    """Peak of dense matrix products in bf16, or in fp16, in TFLOP/s."""
    tflops_fp32: float = 0.0
    """The same in fp32 without TF32."""
    tflops_fp8: float = 0.0
    """The same in float8; 0 where the device has none."""
    memory_gb_s: float = 0.0
    """Bandwidth of the device's memory."""
    link_gb_s: float = 0.0
    """Bandwidth of a device to the others of its node."""
    network_gb_s: float = 0.0
    """Bandwidth between nodes for each device; change it to what your cluster has."""
    host_link_gb_s: float = 0.0
    """Bandwidth between a device and its host's memory."""
    host_memory_gib: float = 0.0
    """Memory of a node, in GiB; 0 is unknown."""
    overhead_gib: float = 0.0
    """What a rank takes of its device outside torch's allocator: the CUDA context, and NCCL's buffers."""
    storage_gb_s: float = 2.0
    """What all nodes together write to the run directory in a second."""
    price: float | None = None
    """Price of a device for an hour, in any currency."""


@dataclass(kw_only=True)
class PlanConfig:
    """What a plan cannot find out by itself."""

    tokens: float | None = None
    """Tokens of one pass over the training data, where they are not prepared on this machine."""
    changes: bool = True
    """Look for changes that make a run fit that does not, each tried in the same way."""


def validate_hardware(hardware: HardwareConfig, plan: PlanConfig) -> None:
    """Raise ConfigError for numbers that nothing can be made of."""
    if plan.tokens is not None and not 0 < plan.tokens < math.inf:
        raise ConfigError("plan.tokens", plan.tokens, "must be a number greater than 0")
    for item in fields(HardwareConfig):
        value = getattr(hardware, item.name)
        if item.name == "name" or value is None:
            continue
        may_be_zero = hardware.name == "any" or item.name in ("overhead_gib", "host_memory_gib", "price", "tflops_fp8")
        if not (0 <= value < math.inf) or (value == 0 and not may_be_zero):
            remedy = "hardware=NAME of conf/hardware, and what differs from it" if value == 0 else ""
            raise ConfigError(f"hardware.{item.name}", value, f"must be a number greater than 0 for hardware.name={hardware.name}", remedy)
        if hardware.name == "any" and value != item.default:
            raise ConfigError(
                f"hardware.{item.name}", value, "is of a device, and none is named", f"hardware=h100 hardware.{item.name}={value}"
            )


@dataclass(kw_only=True)
class Place:
    """Where a run would be started."""

    nodes: int
    ranks_per_node: int
    gpus: bool
    """Ranks have a GPU each; otherwise they share the node's processors and memory."""
    save_s: float
    """Seconds between the signal to stop and the kill."""
    is_here: bool = True
    """Ranks run on this machine."""
    memory_gib: float = 0.0
    """Host memory of a node that the job asks for, in GiB; 0 where it names none."""
    generators: int = 0
    """Further nodes, each for a generator alone; 0 has one on each node of ranks."""

    @property
    def size(self) -> int:
        """Return the ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def devices(self) -> int:
        """Return the GPUs that the run takes, or the ranks without GPUs that its nodes are for."""
        return (self.nodes + self.generators) * self.ranks_per_node


@dataclass(kw_only=True)
class Variant:
    """A run at a place, as `overrides` on top of the one that was asked for make it."""

    run: dict[str, Any]
    """A RunConfig as config.yaml holds it."""
    place: Place
    overrides: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Request:
    """One run to plan, and the changes to try where it does not fit, the cheapest first."""

    base: Variant
    hardware: list[HardwareConfig]
    """The device that was named, or all that are known."""
    plan: PlanConfig
    changes: list[Variant] = field(default_factory=list)
    write: bool = True
    """Write plan.json and plan.svg into the run directory."""
    notes: list[str] = field(default_factory=list)
    """What the launcher knows of the run, for the plan's own notes."""


def from_dict(values: dict[str, Any]) -> Request:
    """Return a request that `dataclasses.asdict` has made plain."""

    def variant(item: dict[str, Any]) -> Variant:
        return Variant(run=item["run"], place=Place(**item["place"]), overrides=item["overrides"])

    return Request(
        base=variant(values["base"]),
        hardware=[HardwareConfig(**item) for item in values["hardware"]],
        plan=PlanConfig(**values["plan"]),
        changes=[variant(item) for item in values["changes"]],
        write=values["write"],
        notes=values["notes"],
    )
