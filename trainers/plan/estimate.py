"""Seconds of a step on a kind of device, as a range between two sets of assumptions; and what a run costs with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from trainers.config.choices import Offload, Precision
from trainers.config.optimizers import host_bytes
from trainers.config.schema import RunConfig
from trainers.engines.build import class_of
from trainers.plan.request import HardwareConfig, Place
from trainers.plan.trace import Moment

GIGA = 1e9


@dataclass(frozen=True)
class Share:
    """How much of a device's peaks a step reaches."""

    products: float
    """Of the peak of matrix products."""
    memory: float
    """Of the bandwidth of memory."""
    wires: float
    """Of the bandwidth between devices."""
    host: float
    """GB/s at which a rank's part of the host's cores reads and writes state that is offloaded."""
    launch: float
    """Seconds from one operator's start to the next where a device has little to compute, as for one token."""


FAST = Share(products=0.80, memory=0.90, wires=0.85, host=20.0, launch=5e-6)
SLOW = Share(products=0.55, memory=0.60, wires=0.50, host=5.0, launch=20e-6)
ASSUMPTIONS = (
    f"fast: {FAST.products:.0%} of the matrix peak, {FAST.memory:.0%} of the memory's bandwidth, {FAST.wires:.0%} of that between "
    "devices, which work while the step computes",
    f"slow: {SLOW.products:.0%}, {SLOW.memory:.0%}, {SLOW.wires:.0%}, one after another",
    "each operator other than a matrix product reads and writes its tensors once, as it does without a compiler",
    "all ranks of a node share its network; loading data, evaluation and checkpoints are left out",
)


def repeats(microbatches: int) -> dict[int | None, int]:
    """Return how often a step has the moments of each microbatch that was simulated: of three the middle one counts for all between."""
    return {None: 1, 0: 1, 1: max(1, microbatches - 2), 2: 1}


def totals(moments: Iterable[Moment], microbatches: int) -> tuple[float, float, dict[str, float]]:
    """Return a rank's FLOPs, bytes moved and bytes sent of a whole step."""
    times = repeats(microbatches)
    flops = moved = 0.0
    sent: dict[str, float] = defaultdict(float)
    for moment in moments:
        if moment.name not in ("evaluation", "export"):
            count = times[moment.microbatch]
            flops += count * moment.flops
            moved += count * moment.moved
            for key, size in moment.sent.items():
                sent[key] += count * size
    return flops, moved, sent


def spans_nodes(group: str, place: Place) -> bool:
    """Tell whether the ranks of `FIRST:END:COUNT` are on several nodes."""
    first, end, _ = map(int, group.split(":"))
    return first // place.ranks_per_node != (end - 1) // place.ranks_per_node


def bandwidth(group: str, place: Place, hardware: HardwareConfig) -> float:
    """Return GB/s at which each rank of a group sends: its link, or between nodes the network of the group's ranks on a node."""
    if not spans_nodes(group, place):
        return hardware.link_gb_s
    first, end, count = map(int, group.split(":"))
    nodes = (end - 1) // place.ranks_per_node - first // place.ranks_per_node + 1
    return min(hardware.link_gb_s, hardware.network_gb_s * max(1, count // nodes))


FORWARD = ("embedding", "forward", "logits and loss")
"""Moments of a microbatch's forward."""


def forward_seconds(
    config: RunConfig, place: Place, hardware: HardwareConfig, moments: list[Moment], share: Share, trained: float, frozen_bytes: float
) -> float:
    """Return the seconds of one microbatch's forward, as a reference takes it; weights on the host are fetched."""
    own = [moment for moment in moments if moment.microbatch == 0 and moment.name in FORWARD]
    alone = replace(config, engine=replace(config.engine, offload_optimizer=Offload.none, offload_param=Offload.none))
    fetched = trained * 4 + frozen_bytes if config.engine.offload_param is not Offload.none else 0.0
    return step_seconds(alone, place, hardware, own, 1, share, 0.0) + fetched / (GIGA * hardware.host_link_gb_s * share.wires)


def step_seconds(
    config: RunConfig,
    place: Place,
    hardware: HardwareConfig,
    moments: list[Moment],
    microbatches: int,
    share: Share,
    trained: float,
    frozen_bytes: float = 0.0,
    inputs_on_host: float = 0.0,
) -> float:
    """Return the seconds of an optimizer step; `trained`, `frozen_bytes` and the bytes of a microbatch's inputs are a rank's own."""
    flops, moved, sent = totals(moments, microbatches)
    float8 = sum(repeats(microbatches)[moment.microbatch] * moment.flops_float8 for moment in moments if moment.flops_float8)
    peak = hardware.tflops_fp32 if config.train.precision is Precision.fp32 else hardware.tflops
    products = (flops - float8) / peak + (float8 / hardware.tflops_fp8 if float8 else 0.0)
    compute = products / (1e12 * share.products) + moved / (GIGA * hardware.memory_gb_s * share.memory)
    wires = sum(size / (GIGA * bandwidth(key.split()[1], place, hardware) * share.wires) for key, size in sent.items())
    engine, host, fetched = config.engine, 0.0, 2 * microbatches * inputs_on_host  # which go to the host and come back
    state = host_bytes(config.optim)
    if engine.offload_optimizer is not Offload.none and class_of(config).steps_on_device(config):  # moments come to the device and go back
        fetched += trained * 2 * state
    elif engine.offload_optimizer is not Offload.none:  # the host reads gradient and state and writes state; weights come back
        host = trained * (2 * (4 + state) + 4) / (GIGA * share.host)
        fetched += trained * 4 * 2
    if engine.offload_param is not Offload.none:  # forward and backward fetch what a rank holds
        fetched += 2 * microbatches * (trained * 4 + frozen_bytes)
    wires += fetched / (GIGA * hardware.host_link_gb_s * share.wires)
    return host + (max(compute, wires) if share is FAST else compute + wires)
