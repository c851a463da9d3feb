"""Which rank a task of a SLURM job is and where ranks meet: decided here alone, from the job's allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.config import LaunchConfig, count_gpus, ranks_per_node, world_size
from trainers.config.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 20_000
"""Below the ports that systems hand out by themselves, and as many job ids in a row have one of their own."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A rank among all."""

    rank: int
    local_rank: int
    world_size: int
    master: str
    port: int
    job_id: int
    hosts: tuple[str, ...]
    """SLURM's names of the job's nodes, in the order of their ranks."""
    restarts: int
    """Times that the job was queued again."""

    def environment(self) -> dict[str, str]:
        """Return what torch reads."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size // len(self.hosts)),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }


def from_slurm(environment: Mapping[str, str], launch: LaunchConfig, hosts: Sequence[str]) -> Topology:
    """Return what SLURM made of this task, one of `launch`'s ranks on the job's nodes `hosts`.

    Raises ConfigError where sources contradict each other: SLURM's own variables, those that torch reads (left in the environment
    by whoever submitted), the settings, and the GPUs that are there. Source: srun(1), OUTPUT ENVIRONMENT VARIABLES.
    """
    rank, local_rank, tasks, nodes, job_id = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_ID")
    )
    _require_equal("SLURM_NNODES", nodes, "launch.nodes", launch.nodes)
    _require_equal("SLURM_NTASKS", tasks, "launch.nodes x ranks of a node", world_size(launch))
    _require_equal("SLURM_NNODES", nodes, f"the nodes of SLURM_JOB_NODELIST ({','.join(hosts)})", len(hosts))
    for name, value, source in (
        ("RANK", rank, "SLURM_PROCID"),
        ("LOCAL_RANK", local_rank, "SLURM_LOCALID"),
        ("WORLD_SIZE", tasks, "SLURM_NTASKS"),
    ):
        if name in environment:
            _require_equal(name, _number(environment, name), source, value)
    if environment.get("MASTER_ADDR", hosts[0]) != hosts[0]:
        _refuse("MASTER_ADDR", environment["MASTER_ADDR"], "the job's first node", hosts[0])
    port = FIRST_PORT + job_id % PORTS
    if "MASTER_PORT" in environment:
        _require_equal("MASTER_PORT", _number(environment, "MASTER_PORT"), "the port of this job", port)
    if rank >= tasks or local_rank >= ranks_per_node(launch):
        _refuse("SLURM_PROCID, SLURM_LOCALID", f"{rank}, {local_rank}", "ranks, ranks of a node", f"{tasks}, {ranks_per_node(launch)}")
    gpus = count_gpus()
    if launch.gpus_per_node and gpus < ranks_per_node(launch):
        _refuse("launch.gpus_per_node", launch.gpus_per_node, "GPUs that this task sees (CUDA_VISIBLE_DEVICES, /dev/nvidia*)", gpus)
    restarts = _number(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
    return Topology(
        rank=rank,
        local_rank=local_rank,
        world_size=tasks,
        master=hosts[0],
        port=port,
        job_id=job_id,
        hosts=tuple(hosts),
        restarts=restarts,
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None:
        raise ConfigError(
            "launch.backend", "slurm", f"{name} is not set: this is not a task of a SLURM job", "python -m launcher ... launch=slurm"
        )
    if not value.isdigit():
        raise ConfigError("launch.backend", "slurm", f"{name} is {value!r}, no number")
    return int(value)


def _require_equal(name: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        _refuse(name, value, other, expected)


def _refuse(name: str, value: object, other: str, expected: object) -> None:
    reason = f"{name} is {value}, and {other} is {expected}: two sources contradict each other"
    raise ConfigError("launch.backend", "slurm", reason, "unset what was left in the environment, or correct launch")
