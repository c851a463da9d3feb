"""What the launcher adds to a run's settings, and the schemas that Hydra checks every key and type against."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hydra.core.config_store import ConfigStore

from trainers.config import ConfigError, RunConfig


class Backend(StrEnum):
    """How ranks are started: on this machine, or by torchrun, the same command on every node."""

    local = "local"
    torchrun = "torchrun"


class Mode(StrEnum):
    """Start the run, or print its frozen config and every rank's command and start nothing."""

    run = "run"
    dry_run = "dry_run"


@dataclass(kw_only=True)
class LaunchConfig:
    """Where ranks run and how they are started; not part of the frozen config, so a continued run may change it."""

    backend: Backend = Backend.local
    """`local` is this machine alone; `torchrun` takes the same command on each of `nodes` machines."""
    processes: int | None = None
    """Ranks on each machine; empty is one a GPU, and 1 without GPUs."""
    nodes: int = 1
    """Machines of the run; more than 1 needs launch=torchrun."""
    gpus_per_node: int | None = None
    """GPUs of a machine; empty counts this machine's; 0 hides them and runs on CPUs."""
    rdzv_endpoint: str | None = None
    """HOST:PORT where the nodes of a torchrun meet: one of them, reachable from all, the same on each; one node needs none."""
    shutdown_s: int = 300
    """Seconds that ranks get to save after a signal before they are killed; raise it for large checkpoints."""


@dataclass(kw_only=True)
class JobConfig(RunConfig):
    """All that the command line can set: the run's own fields at top level, `mode` and `launch`."""

    mode: Mode = Mode.run
    """`run` starts the ranks; `dry_run` prints what would be started and writes nothing."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def run_config(job: JobConfig) -> RunConfig:
    """Return the part of a job that is frozen and that a rank reads."""
    return RunConfig(**{item.name: getattr(job, item.name) for item in dataclasses.fields(RunConfig)})


def register() -> None:
    """Put the schema where conf/config.yaml finds it; nested groups inherit their types from it."""
    ConfigStore.instance().store(name="base_config", node=JobConfig, provider="launcher")


def count_gpus() -> int:
    """Count this machine's GPUs without importing torch: CUDA_VISIBLE_DEVICES where it is set, else /dev/nvidia0, 1, ..."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((at for at, name in enumerate(names) if name in ("", "-1")), len(names))  # CUDA stops at the first bad one
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[len("nvidia") :].isdigit()])


def ranks_per_node(launch: LaunchConfig) -> int:
    """Return the ranks of one machine."""
    gpus = count_gpus() if launch.gpus_per_node is None else launch.gpus_per_node
    return launch.processes or max(gpus, 1)


def world_size(launch: LaunchConfig) -> int:
    """Return the ranks of the whole run."""
    return launch.nodes * ranks_per_node(launch)


def is_plain(launch: LaunchConfig) -> bool:
    """Tell whether there is one rank only, and nowhere that it must meet others: a process without torchrun."""
    return world_size(launch) == 1 and launch.rdzv_endpoint is None


def validate_launch(launch: LaunchConfig) -> None:
    """Check what can be known before starting, on any machine; raises ConfigError."""
    for name in ("processes", "nodes", "shutdown_s"):
        value = getattr(launch, name)
        if value is not None and value < 1:
            raise ConfigError(f"launch.{name}", value, "must be 1 or greater")
    if launch.gpus_per_node is not None and launch.gpus_per_node < 0:
        raise ConfigError("launch.gpus_per_node", launch.gpus_per_node, "must be 0 or greater")
    if launch.nodes > 1 and launch.backend is Backend.local:
        raise ConfigError("launch.nodes", launch.nodes, "launch=local runs on this machine alone", "launch=torchrun")
    gpus = count_gpus() if launch.gpus_per_node is None else launch.gpus_per_node
    if launch.processes is not None and 0 < gpus < launch.processes:
        remedy = f"launch.processes={gpus}, or launch.gpus_per_node=0 for CPU ranks"
        raise ConfigError("launch.processes", launch.processes, f"a machine has {gpus} GPU(s), and each rank needs its own", remedy)
    if launch.rdzv_endpoint is not None:
        host, _, port = launch.rdzv_endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError("launch.rdzv_endpoint", launch.rdzv_endpoint, "must be HOST:PORT", "launch.rdzv_endpoint=node1:29500")


def validate_machine(launch: LaunchConfig) -> None:
    """Check a launch against the machine it is about to use; raises ConfigError."""
    wanted, found = launch.gpus_per_node, count_gpus()
    if wanted is not None and wanted > found:
        remedy = "launch.gpus_per_node=null takes what is there, or start it on a machine that has them"
        raise ConfigError("launch.gpus_per_node", wanted, f"this machine has {found} GPU(s)", remedy)
    if launch.nodes > 1 and launch.rdzv_endpoint is None:
        remedy = "launch.rdzv_endpoint=HOST:29500, HOST being one of the nodes, the same on each"
        raise ConfigError("launch.rdzv_endpoint", None, f"{launch.nodes} nodes need a place to meet", remedy)
