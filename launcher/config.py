"""What the launcher adds to a run's settings, and the schemas that Hydra checks every key and type against."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig
from trainers.plan.request import HardwareConfig, PlanConfig

EARLY_S = 60
"""SLURM looks at time limits every half a minute, and may send a signal so much too early."""
OWN_SBATCH = {"nodes", "ntasks", "ntasks-per-node", "output", "error", "array", "signal", "requeue", "open-mode", "job-name", "time"}
"""Options of sbatch that the launcher must decide."""


class Backend(StrEnum):
    """How ranks are started: on this machine, by torchrun with the same command on every node, or by SLURM."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"


class Mode(StrEnum):
    """Start the run, or print its frozen config and every rank's command, or what it needs and costs, and start nothing."""

    run = "run"
    dry_run = "dry_run"
    plan = "plan"


@dataclass(kw_only=True)
class LaunchConfig:
    """Where ranks run and how they are started; not part of the frozen config, so a continued run may change it."""

    backend: Backend = Backend.local
    """`local` is this machine alone; `torchrun` takes the same command on each of `nodes` machines; `slurm` submits a job of them."""
    processes: int | None = None
    """Ranks on each machine; empty is one a GPU, and 1 without GPUs."""
    nodes: int = 1
    """Machines of the run; more than 1 needs launch=torchrun or launch=slurm."""
    generators: int = 0
    """Further nodes of a SLURM job, each with a process that writes answers (objective=grpo, ppo); 0 has them on the nodes of ranks."""
    gpus_per_node: int | None = None
    """GPUs of a machine; empty counts this machine's (with launch=slurm it must be given); 0 hides them and runs on CPUs."""
    rdzv_endpoint: str | None = None
    """HOST:PORT where the nodes of a torchrun meet: one of them, reachable from all, the same on each; one node needs none."""
    shutdown_s: int = 300
    """Seconds that ranks get to save after a signal before they are killed; raise it for large checkpoints."""
    partition: str | None = None
    """SLURM's partition; empty is the cluster's default."""
    account: str | None = None
    """SLURM's account that pays."""
    qos: str | None = None
    """SLURM's quality of service."""
    time: str | None = None
    """SLURM's time limit, as MINUTES, HH:MM:SS, DAYS-HH or DAYS-HH:MM:SS (1-0 is a day); the job saves before that and is queued again."""
    cpus_per_gpu: int | None = None
    """CPU cores of a rank in a SLURM job; empty is the cluster's default."""
    memory: str | None = None
    """Memory of a node in a SLURM job, as 64G; 0 is all of it, empty the cluster's default."""
    constraint: str | None = None
    """Features that SLURM's nodes must have."""
    exclude: str | None = None
    """Nodes that SLURM must not take."""
    reservation: str | None = None
    """SLURM's reservation to run in."""
    container: str | None = None
    """Image in which pyxis runs the ranks, as srun --container-image."""
    container_mounts: str | None = None
    """Directories that the container sees, as srun --container-mounts; run_dir, checkout and data must be among them."""
    env_file: str | None = None
    """Shell file that a SLURM job reads before its ranks start, such as slurm/env.sh."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that a SLURM job runs before its ranks start, after env_file."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """More of sbatch's options by their long names, as +launch.sbatch.mail-type=END."""
    grace_s: int = 300
    """Seconds before its time limit at which a SLURM job saves and queues itself again."""
    max_requeues: int = 100
    """Times that a SLURM job may queue itself again."""
    requeue_on_failure: bool = False
    """A SLURM job whose run fails queues itself again too, without the node that failed; not for wrong settings or failing training."""
    snapshot: bool = False
    """Copy the code into the run directory and run that: later edits do not reach a job that waits or is queued again."""
    array_parallelism: int = 32
    """Points of a sweep that run at once on SLURM, those of earlier submissions included."""
    force: bool = False
    """Submit to SLURM without looking first whether the run fits the GPUs; mode=plan says more."""
    wait: bool = False
    """Follow a SLURM job's log until it ends, instead of returning once it is submitted; Ctrl-C leaves the job alone."""


@dataclass(kw_only=True)
class JobConfig(RunConfig):
    """All that the command line can set: the run's own fields at top level, `mode` and `launch`."""

    mode: Mode = Mode.run
    """`run` starts the ranks; `dry_run` prints what would be started and writes nothing; `plan` tells memory, time and cost."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def run_config(job: JobConfig) -> RunConfig:
    """Return the part of a job that is frozen and that a rank reads."""
    return RunConfig(**{item.name: getattr(job, item.name) for item in dataclasses.fields(RunConfig)})


@cache
def register() -> None:
    """Put the schema where conf/config.yaml finds it, once; nested groups inherit their types from it."""
    store, node = ConfigStore.instance(), OmegaConf.structured(JobConfig)
    OmegaConf.set_struct(node.data.mix, False)  # a source's name needs no +, nor a reward's
    OmegaConf.set_struct(node.reward, False)
    store.store(name="base_config", node=node, provider="launcher")
    store.store(group="hydra/launcher", name="fulltune", node={"_target_": "hydra_plugins.fulltune.Points"}, provider="launcher")


def count_gpus() -> int:
    """Count this machine's GPUs without importing torch: CUDA_VISIBLE_DEVICES where it is set, else /dev/nvidia0, 1, ..."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((at for at, name in enumerate(names) if name in ("", "-1")), len(names))  # CUDA stops at the first bad one
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[len("nvidia") :].isdigit()])


def gpus_per_node(launch: LaunchConfig) -> int:
    """Return the GPUs of one machine: this one's where none are named."""
    return count_gpus() if launch.gpus_per_node is None else launch.gpus_per_node


def ranks_per_node(launch: LaunchConfig) -> int:
    """Return the ranks of one machine."""
    return launch.processes or max(gpus_per_node(launch), 1)


def world_size(launch: LaunchConfig) -> int:
    """Return the ranks of the whole run."""
    return launch.nodes * ranks_per_node(launch)


def is_plain(launch: LaunchConfig) -> bool:
    """Tell whether there is one rank only, and nowhere that it must meet others: a process without torchrun."""
    return world_size(launch) == 1 and launch.rdzv_endpoint is None


def validate_launch(launch: LaunchConfig) -> None:
    """Check what can be known before starting, on any machine; raises ConfigError."""
    for name in ("processes", "nodes", "shutdown_s", "cpus_per_gpu", "grace_s", "array_parallelism"):
        if (value := getattr(launch, name)) is not None and value < 1:
            raise ConfigError(f"launch.{name}", value, "must be 1 or greater")
    if launch.gpus_per_node is not None and launch.gpus_per_node < 0:
        raise ConfigError("launch.gpus_per_node", launch.gpus_per_node, "must be 0 or greater")
    if launch.nodes > 1 and launch.backend is Backend.local:
        raise ConfigError("launch.nodes", launch.nodes, "launch=local runs on this machine alone", "launch=slurm or launch=torchrun")
    if launch.backend is Backend.slurm:
        _validate_slurm(launch)
    if launch.processes is not None and 0 < (gpus := gpus_per_node(launch)) < launch.processes:
        remedy = f"launch.processes={gpus}, or launch.gpus_per_node=0 for CPU ranks"
        raise ConfigError("launch.processes", launch.processes, f"a machine has {plural(gpus, 'GPU')}, and each rank needs its own", remedy)
    if launch.rdzv_endpoint is not None:
        host, _, port = launch.rdzv_endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError("launch.rdzv_endpoint", launch.rdzv_endpoint, "must be HOST:PORT", "launch.rdzv_endpoint=node1:29500")


def _validate_slurm(launch: LaunchConfig) -> None:
    if launch.gpus_per_node is None:
        remedy = "launch.gpus_per_node=8, or launch.gpus_per_node=0 launch.processes=2 for CPU nodes"
        raise ConfigError("launch.gpus_per_node", None, "must be given: this machine's GPUs say nothing of the job's nodes", remedy)
    if launch.time is not None and minutes(launch.time) * 60 <= launch.grace_s + EARLY_S:
        reason = f"leaves no time to train: {launch.grace_s} s before it the job saves, and SLURM may be {EARLY_S} s early"
        raise ConfigError("launch.time", launch.time, reason, "a longer launch.time, or a smaller launch.grace_s")
    if launch.max_requeues < 0:
        raise ConfigError("launch.max_requeues", launch.max_requeues, "must be 0 or greater")
    if launch.env_file is not None and not Path(launch.env_file).expanduser().is_file():
        raise ConfigError("launch.env_file", launch.env_file, "there is no such file")
    if launch.container_mounts is not None and launch.container is None:
        raise ConfigError("launch.container_mounts", launch.container_mounts, "mounts are of a container", "launch.container=IMAGE")
    for name in sorted(OWN_SBATCH & {name.replace("_", "-") for name in launch.sbatch}):
        raise ConfigError(f"launch.sbatch.{name}", launch.sbatch.get(name), "the launcher sets this itself", "the field of launch for it")


def minutes(time: str) -> int:
    """Return a time limit as SLURM takes it in whole minutes, rounded up; raises ConfigError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?", time.strip())
    if found is None:
        forms = "MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH, DAYS-HH:MM or DAYS-HH:MM:SS"
        raise ConfigError("launch.time", time, "is not a valid time limit", forms)
    days, *parts = (int(part or 0) for part in found.groups())
    first, second = (3600, 60) if found[1] is not None or found[4] is not None else (60, 1)
    return -(-(86_400 * days + first * parts[0] + second * parts[1] + parts[2]) // 60)


def validate_machine(launch: LaunchConfig) -> None:
    """Check a launch against the machine it is about to use; raises ConfigError."""
    if launch.backend is Backend.slurm:
        return  # other machines are used
    wanted, found = launch.gpus_per_node, count_gpus()
    if wanted is not None and wanted > found:
        remedy = "launch.gpus_per_node=null takes what is there, or start it on a machine that has them"
        raise ConfigError("launch.gpus_per_node", wanted, f"this machine has {plural(found, 'GPU')}", remedy)
    if launch.nodes > 1 and launch.rdzv_endpoint is None:
        remedy = "launch.rdzv_endpoint=HOST:29500, HOST being one of the nodes, the same on each"
        raise ConfigError("launch.rdzv_endpoint", None, f"{launch.nodes} nodes need a place to meet", remedy)
