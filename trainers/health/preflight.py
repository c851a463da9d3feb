"""Before weights are read, on every attempt: each rank tries its device, disks, clock and links, and a bad or slow node is named."""

from __future__ import annotations

import logging
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainers.config.errors import plural
from trainers.config.mesh import Mesh
from trainers.host import PROCESS_BYTES, memory_available
from trainers.rundir import paths
from trainers.rundir.files import write_json
from trainers.units import GIB, in_bytes
from trainers.world import World

log = logging.getLogger("fulltune")
TRIES = 5
"""Of what is timed: the best counts, and the first also connects and warms up."""
LINK_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
"""Sent to the next rank: a millisecond and more on a GPU's links, where starting the transfer takes tens of microseconds."""
SLICE_S = {"cuda": 0.0, "cpu": 0.005}
"""What the scheduler of a busy host may add to what a CPU does: less than that says nothing about the node."""
WARM_UP_S = {"cuda": 0.2, "cpu": 0.0}
"""For a GPU to leave its idle clocks, which GPUs do not do at one speed."""
CLOCK_S = 2.0
"""Clocks further apart put failures of different nodes in the wrong order; NTP keeps them within 0.1 s."""
DISK_BYTES = 2 * GIB
"""Less than logs, staged files and the smallest checkpoints take."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one rank found."""

    rank: int
    host: str
    local_size: int = 1
    kind: str = "cpu"
    """cuda or cpu."""
    device: str = "CPU"
    gpus: int = 0
    """That this process sees."""
    product_s: float | None = None
    """Of the known product, the best of TRIES; None where the device failed."""
    device_fault: str = ""
    memory_free_bytes: int = 1 << 60
    run_dir_free_bytes: int | None = None
    """None where the file system does not say."""
    cache_free_bytes: int | None = None
    write_fault: str = ""
    """Why the attempt's log folder cannot be written there."""
    clocks: tuple[tuple[float, float], ...] = ()
    """Times of day just after barriers, and the seconds that each barrier took."""
    link_s: float | None = None
    """To receive LINK_BYTES from the rank before, while all do so; None where the ranks were not connected."""
    links: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By dimension of the mesh, where it is not of all ranks: the rank before in this rank's group of it, and the seconds of the same."""
    link_fault: str = ""


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where."""

    rank: int
    host: str
    what: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.what}"


class BadNode(Exception):
    """A node cannot take part: says which rank of which host first, and why."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        """Keep the first for status.json, and all in the message."""
        super().__init__(f"pre-flight, before weights were read: {'; '.join(map(str, findings))}")
        self.first = findings[0]

    def parts(self) -> dict[str, Any]:
        """Return what status.json says of it, whichever rank writes it."""
        return {"message": str(self), "rank": self.first.rank, "host": self.first.host}


class Product:
    """A·Aᵀ of a fixed matrix with a known result: about a millisecond on a GPU and 40 MB there, ten on a core, and no random numbers.

    Not less on a core: whoever runs in turns with others is found out only by what takes longer than its turn.

    A[i, k] = (i + k) mod 3 - 1, of `size` = 3 x 2^n rows. The sum over k of A[i, k] A[j, k] is 2 size/3 where i - j is divisible
    by 3, else -size/3: both are powers of two, so that the result is exact in bf16 too.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the matrix."""
        gpu = device.type == "cuda"
        self.device, self.size, self.repeats = device, 3072 if gpu else 768, 8 if gpu else 1
        self.rows = torch.arange(self.size, device=device, dtype=torch.int16)
        self.left = ((self.rows[:, None] + self.rows) % 3 - 1).to(torch.bfloat16 if gpu else torch.float32)
        self.result = torch.empty_like(self.left)

    @torch.no_grad()
    def seconds(self) -> float:
        """Return the seconds that the device takes once it is idle."""
        self._wait()
        began = time.perf_counter()
        for _ in range(self.repeats):
            torch.mm(self.left, self.left.T, out=self.result)
        self._wait()
        return time.perf_counter() - began

    def is_right(self) -> bool:
        """Tell whether the last result is the known one."""
        alike = (self.rows[:, None] - self.rows) % 3 == 0
        return bool(torch.equal(self.result, torch.where(alike, 2 * self.size // 3, -self.size // 3).to(self.result.dtype)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def require_gpu(world: World) -> None:
    """Raise BadNode where this node has fewer GPUs than ranks, which would fail in words that name neither."""
    seen = torch.cuda.device_count()
    if world.device.type == "cuda" and world.local_rank >= seen:
        ranks, gpus = plural(world.local_size, "rank"), plural(seen, "GPU")
        what = f"it is number {world.local_rank} of {ranks} on this machine, where {gpus} can be seen: look at nvidia-smi"
        raise BadNode([Finding(world.rank, socket.gethostname(), what, fatal=True)])


def check(world: World, mesh: Mesh, folder: Path, cache: Path, slow: float) -> tuple[list[Reading], list[Finding]]:
    """Let every rank try its node, and its links in each group of the mesh; return what they found and what to warn of. Collective.

    Rank 0 leaves all measurements in `folder`/preflight.json. Raises BadNode on every rank where a node cannot take part; links are not
    tried then, which would only hang.
    """
    own = inspect(world, folder, cache)
    readings = world.gather(own)
    findings = find_faults(readings, slow)
    if world.size > 1 and not any(finding.fatal for finding in findings):
        readings = world.gather(replace(own, clocks=_read_clocks(world), **_try_links(world, mesh)))
        findings = find_faults(readings, slow)
    fatal = [finding for finding in findings if finding.fatal]
    if world.rank == 0 and not readings[0].write_fault:
        ranks = [asdict(reading) | {"clock_off_s": clock_off(readings[0], reading)} for reading in readings]
        write_json(folder / paths.PREFLIGHT, {"found": [asdict(finding) for finding in findings], "ranks": ranks})
    if fatal:
        raise BadNode(fatal)
    return readings, findings


def inspect(world: World, folder: Path, cache: Path) -> Reading:
    """Try this rank's device and look at its host: memory, and the disks of the run and of the prepared data."""
    cuda, seconds, fault = world.device.type == "cuda", None, ""
    try:
        product, warm = Product(world.device), time.monotonic() + WARM_UP_S[world.device.type]
        while time.monotonic() < warm:
            product.seconds()
        seconds = min(product.seconds() for _ in range(TRIES))
        fault = "" if product.is_right() else "multiplies two matrices wrongly"
    except RuntimeError as error:  # whatever CUDA says of a device that is lost
        fault = f"does not work: {str(error).splitlines()[0]}"
    return Reading(
        rank=world.rank,
        host=socket.gethostname(),
        local_size=world.local_size,
        kind=world.device.type,
        device=torch.cuda.get_device_name(world.device) if cuda else "CPU",
        gpus=torch.cuda.device_count(),
        product_s=seconds,
        device_fault=fault,
        memory_free_bytes=memory_available(),
        run_dir_free_bytes=_free_bytes(folder),
        cache_free_bytes=_free_bytes(cache),
        write_fault=_try_writing(folder, world.rank),
    )


def _free_bytes(folder: Path) -> int | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def _try_writing(folder: Path, rank: int) -> str:
    probe = folder / f".preflight-{rank}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return ""


def _read_clocks(world: World) -> tuple[tuple[float, float], ...]:
    clocks = []
    for _ in range(TRIES):
        world.barrier()  # all come to the next one at once, and it is short
        began = time.perf_counter()
        world.barrier()
        clocks.append((time.time(), time.perf_counter() - began))
    return tuple(clocks)


def rings(mesh: Mesh, rank: int) -> dict[str, tuple[int, int]]:
    """Return the ranks before and after one in its group of each dimension of a mesh; none of a dimension that all ranks are in."""
    groups = mesh.groups_of(rank)
    places = {name: group.index(rank) for name, group in groups.items()}
    return {name: (group[places[name] - 1], group[(places[name] + 1) % len(group)]) for name, group in groups.items()}


def _try_links(world: World, mesh: Mesh) -> dict[str, Any]:
    """Send LINK_BYTES around the ring of all ranks and around those of the mesh, sum as much over all, and look at what comes."""
    sent = torch.full((LINK_BYTES[world.device.type] // 4,), world.rank + 1.0, device=world.device)
    link_s, fault = _try_ring(world, sent, (world.rank - 1) % world.size, (world.rank + 1) % world.size)
    links = {}
    for name, (before, behind) in rings(mesh, world.rank).items():
        took, wrong = _try_ring(world, sent, before, behind)
        links[name], fault = (before, took), fault or (wrong and f"in its {name} group {wrong}")
    dist.all_reduce(sent)
    if not bool((sent == world.size * (world.size + 1) / 2).all()):
        fault = "it gets a wrong sum over all ranks"
    return {"link_s": link_s, "links": links, "link_fault": fault}


def _try_ring(world: World, sent: torch.Tensor, before: int, behind: int) -> tuple[float, str]:
    """Send a tensor to the next rank while all do so; return the seconds of the best try, and what is wrong with what comes."""
    received, times = torch.zeros_like(sent), []
    for _ in range(TRIES):
        world.barrier()
        began = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, behind), dist.P2POp(dist.irecv, received, before)]):
            work.wait()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - began)
    wrong = not bool((received == before + 1).all())
    return min(times), f"what it receives from rank {before} is not what that sent" if wrong else ""


def find_faults(readings: Sequence[Reading], slow: float) -> list[Finding]:
    """Name what is wrong, then what is slow, which is `slow` x the median of all. What is of a node is said once, of its first rank."""
    kind = "cuda" if any(reading.kind == "cuda" for reading in readings) else "cpu"
    findings = [Finding(reading.rank, reading.host, what, fatal=True) for reading in readings for what in _faults(reading, kind)]
    products = {reading.rank: reading.product_s for reading in readings if reading.product_s is not None}
    for rank, factor in outliers(products, slow, SLICE_S[kind]).items():
        what = f"its device ({readings[rank].device}) takes {products[rank] * 1e3:.3g} ms for a product, {factor:.1f} x the median of all"
        findings.append(Finding(rank, readings[rank].host, what))
    findings += _slow_links(readings, slow, SLICE_S[kind]) if len(readings) > 1 else []
    for reading in _first_of_nodes(readings):
        findings += [Finding(reading.rank, reading.host, what) for what in _shortages(reading, readings[0])]
    return sorted(findings, key=lambda finding: (not finding.fatal, finding.rank))


def _faults(reading: Reading, kind: str) -> list[str]:
    faults = [f"its device ({reading.device}) {reading.device_fault}"] if reading.device_fault else []
    if reading.kind != kind:
        faults.append("no GPU is seen there, and others have one: look at nvidia-smi")
    return faults + [fault for fault in (reading.write_fault, reading.link_fault) if fault]


def _slow_links(readings: Sequence[Reading], slow: float, least_s: float) -> list[Finding]:
    """Compare links between nodes with each other, and one within a node with those in the same place of other nodes.

    Links within a node differ by design: GPUs bridged in pairs, or on two sockets. So two nodes are too few to say which is slow.
    """
    groups: dict[str, dict[int, float]] = {}
    senders: dict[tuple[str, int], Reading] = {}
    seen: Counter[str] = Counter()
    for reading in readings:
        place, seen[reading.host] = seen[reading.host], seen[reading.host] + 1
        for name, (before, seconds) in _links_of(reading).items():
            sender = readings[before]
            where = f"of {name}link {place} within nodes" if sender.host == reading.host else f"of {name}links between nodes"
            groups.setdefault(where, {})[reading.rank], senders[where, reading.rank] = seconds, sender
    findings: dict[tuple[int, int], Finding] = {}
    for where, alike in groups.items():
        for rank, factor in outliers(alike, slow, least_s).items() if "between" in where or len(alike) > 2 else ():
            sender = senders[where, rank]
            speed = LINK_BYTES[readings[rank].kind] / alike[rank] / 1e9
            what = f"receives {speed:.2g} GB/s from rank {sender.rank} on {sender.host}, {factor:.1f} x the time of the median {where}"
            findings[rank, sender.rank] = Finding(rank, readings[rank].host, what)  # once, of the mesh's dimension where it is in one
    return list(findings.values())


def _links_of(reading: Reading) -> dict[str, tuple[int, float]]:
    """Return a rank's links by the dimension that they are of, the ring of all ranks first: the sender, and the seconds."""
    if reading.link_s is None:
        return {}
    return {"": (reading.rank - 1, reading.link_s)} | {f"{name} ": link for name, link in reading.links.items()}


def _shortages(reading: Reading, first: Reading) -> list[str]:
    off, unsure = clock_off(first, reading)
    said = []
    if abs(off) - unsure > CLOCK_S:
        said.append(f"its clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} that of rank 0 on {first.host}: is NTP running?")
    if reading.memory_free_bytes < PROCESS_BYTES * reading.local_size:
        said.append(
            f"{in_bytes(reading.memory_free_bytes)} of host memory are free for {plural(reading.local_size, 'rank')}, before any weights"
        )
    for name, free in (("run_dir", reading.run_dir_free_bytes), ("the prepared data", reading.cache_free_bytes)):
        if free is not None and free < DISK_BYTES:
            said.append(f"{in_bytes(free)} are free on the disk of {name}")
    return said


def clock_off(first: Reading, other: Reading) -> tuple[float, float]:
    """Return how far a rank's clock is ahead of rank 0's, and by how much that may be wrong, in seconds.

    Nobody leaves a barrier before all have come to it. So two ranks leave one at most as far apart as the longer was in it.
    """
    both = [(theirs - ours, max(one, two)) for (ours, one), (theirs, two) in zip(first.clocks, other.clocks, strict=True)]
    return min(both, key=lambda pair: pair[1], default=(0.0, 0.0))


def outliers(seconds: Mapping[int, float], slow: float, least_s: float) -> dict[int, float]:
    """Return times the median for the ranks above `slow` x it, and `least_s` above it; of two ranks the faster is the median."""
    if not seconds:
        return {}
    usual = max(statistics.median_low(seconds.values()), 1e-9)
    return {rank: value / usual for rank, value in seconds.items() if value > max(slow * usual, usual + least_s)}


def _first_of_nodes(readings: Sequence[Reading]) -> list[Reading]:
    return list({reading.host: reading for reading in reversed(readings)}.values())


def say(readings: Sequence[Reading], findings: Sequence[Finding]) -> None:
    """Log what to warn of, or one line where all is well."""
    for finding in findings:
        log.warning("pre-flight: %s", finding)
    if not findings:
        nodes, products = len(_first_of_nodes(readings)), [1e3 * (reading.product_s or 0.0) for reading in readings]
        links = [LINK_BYTES[reading.kind] / reading.link_s / 1e9 for reading in readings if reading.link_s]
        figures = f"products in {min(products):.2g} to {max(products):.2g} ms"
        figures += f", links of {min(links):.2g} to {max(links):.2g} GB/s" if links else ""
        log.info("pre-flight: nodes %d, ranks %d on %s: %s", nodes, len(readings), readings[0].device, figures)
