"""What this process may use of its machine: cores and memory as affinity, cgroups, SLURM and ulimits allow. No torch."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.units import GIB, MIB, in_bytes

ROOT = Path("/")
UNLIMITED = 1 << 60
"""Bytes from which a limit means that there is no limit: cgroup v1 writes 2^63 rounded down to a page, and no host has an exbibyte."""
PROCESS_BYTES = int(1.2 * GIB)
"""Host memory of a rank before any tensor.

Measured with torch 2.13, transformers 5.23 and DeepSpeed 0.19.8 imported, CPU build: 0.35 GiB resident; the rest is room for
what a GPU run adds and we could not measure here: CUDA's libraries and context, NCCL's buffers, W&B's process on rank 0.
"""


@dataclass(frozen=True)
class Limit:
    """An amount of memory in bytes, and what sets it."""

    bytes: int
    source: str


@dataclass(frozen=True)
class HostMemory:
    """What a node's host memory must hold, in bytes, part by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return the sum of the parts in bytes."""
        return sum(self.parts.values())

    def __add__(self, other: HostMemory) -> HostMemory:
        return HostMemory({name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in (self.parts | other.parts)})

    def __str__(self) -> str:
        return " + ".join(f"{in_bytes(amount)} {name}" for name, amount in self.parts.items() if amount)


def cores(root: Path = ROOT) -> int:
    """Return the CPUs this process may run on: its affinity, bounded by the CPU quotas of its cgroups rounded up; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [-(-quota // period) for quota, period in _cpu_quotas(root)]
    return max(1, min([affinity, *quotas]))


def threads_per_rank(local_ranks: int, root: Path = ROOT) -> int:
    """Return the threads each of a node's ranks may start so that together they fill its cores; at least 1."""
    return max(1, cores(root) // local_ranks)


def memory_limit(local_ranks: int = 1, root: Path = ROOT, environment: Mapping[str, str] | None = None) -> Limit:
    """Return the tightest limit on the memory of this node's `local_ranks` processes together, and where it comes from.

    Cgroups v2 and v1 up to the root of their tree, SLURM's grant, RLIMIT_AS (which is of each process) and physical memory.
    """
    found = [Limit(_meminfo(root).get("MemTotal", UNLIMITED), "physical memory")]
    found += [Limit(level.limit, f"cgroup {level.file}") for level in _memory_levels(root)]
    found += _slurm_grants(os.environ if environment is None else environment)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found.append(Limit(address_space * local_ranks, "RLIMIT_AS (ulimit -v)" + (f" x {local_ranks} ranks" if local_ranks > 1 else "")))
    return min(found, key=lambda limit: limit.bytes)


def memory_available(root: Path = ROOT, environment: Mapping[str, str] | None = None) -> int:
    """Return bytes still free under the limits: what the page cache holds of a cgroup counts as free, as the kernel gives it back."""
    free = [_meminfo(root).get("MemAvailable", UNLIMITED), memory_limit(root=root, environment=environment).bytes]
    free += [level.limit - level.in_use for level in _memory_levels(root)]
    return max(0, min(free))


def host_bytes_needed(
    *,
    parameters: int,
    local_ranks: int,
    world_size: int,
    on_host: Mapping[str, int],
    frozen_bytes: int = 0,
    buffers: int = 0,
    inputs: int = 0,
    process_bytes: int = PROCESS_BYTES,
) -> HostMemory:
    """Estimate the host memory of a node in bytes.

    `parameters` counts all trainable ones, of which the node keeps local_ranks / world_size; `on_host` is the bytes of each by
    part; `frozen_bytes` are those of offloaded frozen parameters over all nodes; `buffers` those of one rank's pinned buffers, `inputs`
    those of its blocks' inputs between forward and backward.
    """
    parts = {name: -(-parameters * size * local_ranks // world_size) for name, size in on_host.items()}
    parts["frozen parameters"] = -(-frozen_bytes * local_ranks // world_size)
    parts["pinned buffers"] = buffers * local_ranks
    parts["blocks' inputs"] = inputs * local_ranks
    parts[f"for {local_ranks} processes"] = process_bytes * local_ranks
    return HostMemory({name: size for name, size in parts.items() if size})


def require_host_memory(needed: HostMemory, limit: Limit, path: str = "engine.offload_optimizer", value: object = "cpu") -> None:
    """Raise ConfigError, with the parts and the remedies, where a node cannot hold what its ranks put into host memory."""
    if needed.total <= limit.bytes:
        return
    reason = f"a node needs about {in_bytes(needed.total)} of host memory ({needed}), and may use {in_bytes(limit.bytes)} ({limit.source})"
    raise ConfigError(path, value, reason, "more nodes, engine=zero3_nvme, peft=lora, fewer ranks a node, or a larger memory limit")


@dataclass(frozen=True)
class _Level:
    """One cgroup that limits memory: bytes allowed, bytes in use without page cache, and the file that says so."""

    limit: int
    in_use: int
    file: Path


def _memory_levels(root: Path) -> Iterator[_Level]:
    for folder in _cgroup_folders(root, "memory"):
        for limit, usage, prefix in (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")):
            words = read_text(folder / limit).split()
            if words and words[0].isdigit() and int(words[0]) < UNLIMITED:
                used = read_text(folder / usage).strip()
                stat = dict(line.split()[:2] for line in read_text(folder / "memory.stat").splitlines() if len(line.split()) > 1)
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield _Level(int(words[0]), max(0, int(used) - cache) if used.isdigit() else 0, folder / limit)


def _cpu_quotas(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (quota, period) in microseconds of each cgroup of this process that has one."""
    for folder in _cgroup_folders(root, "cpu"):
        v2 = read_text(folder / "cpu.max").split()
        v1 = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for words in (v2, v1):
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[0]) > 0 and int(words[1]) > 0:
                yield int(words[0]), int(words[1])


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield this process's cgroups that may hold `controller`, v2 and v1, each with its ancestors up to the root of the mount.

    In a container the path in /proc is often the host's and not there; the mount's root is then the container's own group.
    """
    mounts = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names == "":
            bases = [mounts, mounts / "unified"]
        elif controller in names.split(","):
            bases = [mounts / names, mounts / controller]
        else:
            continue
        base = next((base for base in bases if (base / "cgroup.procs").exists()), bases[0])
        folder = base / path.lstrip("/")
        yield from (level for level in (folder, *folder.parents) if level == base or base in level.parents)


def _slurm_grants(environment: Mapping[str, str]) -> list[Limit]:
    """Return what SLURM granted on this node; its variables are in MiB, and 0 means all of the node."""
    number = {name: int(value) for name, value in environment.items() if name.startswith("SLURM_") and value.isdigit()}
    grants = {
        "SLURM_MEM_PER_NODE": number.get("SLURM_MEM_PER_NODE", 0),
        "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE": number.get("SLURM_MEM_PER_CPU", 0) * number.get("SLURM_CPUS_ON_NODE", 0),
    }
    return [Limit(mib * MIB, name) for name, mib in grants.items() if mib]


def _meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    rows = (line.split() for line in read_text(root / "proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in rows if len(words) > 2 and words[1].isdigit()}


def read_text(file: Path) -> str:
    """Return what a file holds, or nothing where it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
