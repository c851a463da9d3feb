"""A process uses the cores and the memory it was granted, and a run that cannot fit is refused with figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainers import host
from trainers.config.choices import Offload
from trainers.config.errors import ConfigError
from trainers.config.schema import EngineConfig, RunConfig
from trainers.engines.base import host_memory, require_host
from trainers.engines.deepspeed import settings as deepspeed
from trainers.engines.fsdp import state as fsdp
from trainers.host import HostMemory, Limit
from trainers.units import GIB, MIB, in_bytes

ROOT = Path(__file__).parents[1]


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {60 * GIB // 1024} kB"
V2 = {"proc/self/cgroup": "0::/slurm/job_7/step_0", "proc/meminfo": MEMINFO, "sys/fs/cgroup/cgroup.procs": ""}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n8:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:cpuset:/\n0::/",
    "proc/meminfo": MEMINFO,
    "sys/fs/cgroup/memory/cgroup.procs": "",
    "sys/fs/cgroup/cpu,cpuacct/cgroup.procs": "",
}


def test_the_tightest_cgroup_of_the_whole_path_limits_memory(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/slurm"
    root = write(
        tmp_path, V2 | {f"{folder}/memory.max": 8 * GIB, f"{folder}/job_7/memory.max": "max", f"{folder}/job_7/step_0/memory.max": 16 * GIB}
    )
    assert host.memory_limit(root=root, environment={}) == Limit(8 * GIB, f"cgroup {root / folder / 'memory.max'}")


def test_page_cache_counts_as_free(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/slurm/job_7/step_0"
    files = {
        "memory.max": 10 * GIB,
        "memory.current": 9 * GIB,
        "memory.stat": f"anon {2 * GIB}\ninactive_file {5 * GIB}\nactive_file {GIB}",
    }
    root = write(tmp_path, V2 | {f"{folder}/{name}": text for name, text in files.items()})
    assert host.memory_available(root=root, environment={}) == 7 * GIB


def test_cgroup_v1_limits_too_and_its_unlimited_is_none(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    stat = f"inactive_file 5\ntotal_inactive_file {2 * GIB}\ntotal_active_file {GIB}"
    files = {"memory.limit_in_bytes": 6 * GIB, "memory.usage_in_bytes": 5 * GIB, "memory.stat": stat}
    root = write(tmp_path, V1 | {f"{folder}/memory.limit_in_bytes": 9223372036854771712})
    assert host.memory_limit(root=root, environment={}) == Limit(64 * GIB, "physical memory")
    assert host.memory_available(root=root, environment={}) == 60 * GIB
    write(tmp_path, {f"{folder}/docker/abc/{name}": text for name, text in files.items()})
    assert host.memory_limit(root=root, environment={}).bytes == 6 * GIB
    assert host.memory_available(root=root, environment={}) == 4 * GIB


def test_a_container_that_does_not_see_its_own_path_has_its_group_at_the_mount(tmp_path: Path) -> None:
    root = write(tmp_path, V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": 3 * GIB})
    assert host.memory_limit(root=root, environment={}).bytes == 3 * GIB


@pytest.mark.parametrize(
    ("environment", "mib", "source"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4096, "SLURM_MEM_PER_NODE"),
        ({"SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_ON_NODE": "6"}, 6000, "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE"),
        ({"SLURM_MEM_PER_NODE": "0"}, 64 * 1024, "physical memory"),
        ({"SLURM_MEM_PER_NODE": "9999999"}, 64 * 1024, "physical memory"),
    ],
)
def test_slurm_grants_in_mib(tmp_path: Path, environment: dict[str, str], mib: int, source: str) -> None:
    root = write(tmp_path, V2)
    assert host.memory_limit(root=root, environment=environment) == Limit(mib * MIB, source)
    assert host.memory_available(root=root, environment=environment) == min(mib * MIB, 60 * GIB)


@pytest.mark.parametrize(("quota", "at_most"), [("max 100000", 99), ("100000 100000", 1), ("50000 100000", 1), ("100001 100000", 2)])
def test_cpu_quota_is_rounded_up(tmp_path: Path, quota: str, at_most: int) -> None:
    root = write(tmp_path, V2 | {"sys/fs/cgroup/slurm/cpu.max": quota})
    assert host.cores(root) == min(len(os.sched_getaffinity(0)), at_most)


@pytest.mark.parametrize(("quota", "at_most"), [(-1, 99), (100000, 1)])
def test_cpu_quota_of_cgroup_v1(tmp_path: Path, quota: int, at_most: int) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    root = write(tmp_path, V1 | {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": 100000})
    assert host.cores(root) == min(len(os.sched_getaffinity(0)), at_most)


def test_this_machine_has_a_core_and_memory() -> None:
    assert host.cores() >= 1
    assert host.threads_per_rank(10_000) == 1
    assert 0 < host.memory_available() <= host.memory_limit().bytes < 1 << 50


def test_a_real_process_sees_its_affinity_and_its_ulimit() -> None:
    program = """
import os, resource
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from trainers import host
one, eight = host.memory_limit(), host.memory_limit(local_ranks=2)
print(host.cores(), one.bytes, one.source, eight.bytes, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == f"1|{1 << 30}|RLIMIT_AS (ulimit -v)|{2 << 30}"


@pytest.mark.for_real
def test_importing_it_is_light() -> None:
    program = "import sys, trainers.host; print(sorted({'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("on_host", "bytes_each"),
    [
        (deepspeed.bytes_on_host(optimizer=True, parameters=False), 20),
        (deepspeed.bytes_on_host(optimizer=True, parameters=True), 22),
        (deepspeed.bytes_on_host(optimizer=True, parameters=True, compute_bytes=4), 24),
        (deepspeed.bytes_on_host(optimizer=True, parameters=False, state=0), 12),
        (deepspeed.bytes_on_host(optimizer=False, parameters=True), 2),
        (deepspeed.bytes_on_host(optimizer=False, parameters=False, swapped=True), 16),
        (fsdp.bytes_on_host(optimizer=True, parameters=True), 16),
        (fsdp.bytes_on_host(optimizer=True, parameters=True, state=0), 8),
        (fsdp.bytes_on_host(optimizer=True, parameters=False), 8),
        (fsdp.bytes_on_host(optimizer=False, parameters=False), 0),
    ],
)
def test_host_memory_in_closed_form(on_host: dict[str, int], bytes_each: int) -> None:
    """8 billion parameters on 4 nodes of 8 ranks: each node holds a quarter."""
    needed = host.host_bytes_needed(
        parameters=8_000_000_000, local_ranks=8, world_size=32, on_host=on_host, frozen_bytes=400, buffers=7, process_bytes=1000
    )
    assert needed.total == 2_000_000_000 * bytes_each + 100 + 8 * 7 + 8 * 1000


def test_a_run_that_cannot_fit_is_refused_with_its_parts() -> None:
    on_host = deepspeed.bytes_on_host(optimizer=True, parameters=True)
    needed = host.host_bytes_needed(parameters=8_000_000_000, local_ranks=8, world_size=8, on_host=on_host)
    host.require_host_memory(needed, Limit(needed.total, "physical memory"))
    with pytest.raises(ConfigError) as refused:
        host.require_host_memory(needed, Limit(needed.total - 1, "SLURM_MEM_PER_NODE"))
    said = str(refused.value)
    assert "`engine.offload_optimizer` = 'cpu'" in said
    assert "173.5 GiB" in said  # 22 x 8e9 / 2^30 = 163.9, and 8 processes of 1.2
    assert "59.6 GiB optimizer state" in said
    assert "9.6 GiB for 8 processes" in said
    assert "SLURM_MEM_PER_NODE" in said
    assert "zero3_nvme" in refused.value.remedy


def built_on(config: RunConfig) -> Any:
    """What is asked of an engine: a trained matrix, and a frozen stack of which this rank has half of the experts."""
    model = torch.nn.ParameterDict({"matrix": torch.zeros(4, 4), "experts": torch.zeros(2, 4, 8)})
    model["experts"].requires_grad_(False)
    adaptation = SimpleNamespace(trained={"matrix"}, packed={})
    shapes = {"matrix": (4, 4), "experts": (4, 4, 8)}
    more: dict[str, Any] = {"shapes": lambda: shapes, "on_host": lambda _: {"optimizer state": 8}}
    return SimpleNamespace(config=config, model=model, blocks=[], adaptation=adaptation, **more)


def test_an_engine_needs_host_memory_of_each_copy_with_all_experts_next_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: Any = SimpleNamespace(size=8, local_size=4, device=torch.device("cpu"), gather=lambda value: [value])
    for replicate in (1, 2):
        config = RunConfig(engine=EngineConfig(offload_param=Offload.cpu, replicate=replicate))
        one = host_memory(config, ranks, built_on(config), process_bytes=10)
        assert one.parts == {
            "optimizer state": 16 * 8 * replicate // 2,
            "frozen parameters": 4 * 4 * 8 * 4 * replicate // 2,
            "for 4 processes": 40,
        }
    whole = host_memory(config, ranks, built_on(config))
    monkeypatch.setattr(host, "memory_limit", lambda local_ranks: Limit(whole.total, "this test"))
    require_host(config, ranks, built_on(config))
    with pytest.raises(ConfigError, match=r"a node needs about .* optimizer state"):
        require_host(config, ranks, built_on(config), [built_on(config)])


def test_parts_of_nothing_are_not_named() -> None:
    assert str(HostMemory({"optimizer state": 3 * GIB, "pinned buffers": 0})) == "3.0 GiB optimizer state"
    assert in_bytes(5 * MIB) == "5.0 MiB"
