"""train.activations=auto at a rank's start: the cheapest with which the run fits the memory that there is, kept for the whole run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from typing import Any

import torch

from trainers import host
from trainers.config.activations import offered
from trainers.config.choices import Activations
from trainers.config.schema import RunConfig, plain
from trainers.plan.request import HardwareConfig, Place, PlanConfig, Request, Variant
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.files import read_json
from trainers.units import GIB
from trainers.world import World

log = logging.getLogger("fulltune")
PLAN_S = 900.0
"""For the planner to answer; a model of 405B takes it a minute for each choice."""
NCCL_GIB = 1.5
"""What NCCL takes of a device later, as conf/hardware assumes."""
OF_MEMORY = (
    *("replicate", "shard", "context", "tensor", "expert", "prefetch", "offload_param", "offload_optimizer"),
    *("reshard_after_forward", "reshard_after_backward", "sync_each_microbatch"),
)
"""Settings of fsdp that a continued run may have changed, and that leave another room for activations."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def settled(config: RunConfig, world: World, attempt: Attempt) -> RunConfig:
    """Return the config with a choice instead of `auto`, made once a run and said with the reason; collective.

    A continued run keeps it, unless ranks, microbatch or settings of the engine are others, with which it may no longer fit.
    """
    free = -world.max([-_free_bytes(world)])[0]
    found: dict[str, Any] = {}
    if world.rank == 0:
        manifest = read_json(attempt.run_dir / paths.MANIFEST)
        found = manifest.get("activations") or {}
        split = {"ranks": world.size, "microbatch": config.train.microbatch} | {name: getattr(config.engine, name) for name in OF_MEMORY}
        if found.get("chosen") not in list(offered(config)) or {key: found.get(key) for key in split} != split:
            found = _choice(config, world, free) | split
            attempt.write_json(attempt.run_dir / paths.MANIFEST, manifest | {"activations": found})
        log.info("train.activations=auto: %s", found["reason"])
    chosen = Activations(world.from_first(found.get("chosen", "")))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, activations=chosen))


def _free_bytes(world: World) -> float:
    """Return what is free of this rank's device; 0 without one, where the node's memory decides."""
    return float(torch.cuda.mem_get_info(world.device)[0]) if world.device.type == "cuda" else 0.0


def _choice(config: RunConfig, world: World, free: float) -> dict[str, str]:
    """Ask the planner in a process of its own, as it is rank 0 of a process group without others; returns `chosen` and `reason`."""
    memory = host.memory_limit(world.local_size).bytes / GIB
    name = torch.cuda.get_device_name(world.device) if free else "this machine"
    device = HardwareConfig(name=name, memory_gib=free / GIB, host_memory_gib=memory, overhead_gib=NCCL_GIB)
    place = Place(nodes=world.size // world.local_size, ranks_per_node=world.local_size, gpus=free > 0, save_s=0.0)
    request = Request(base=Variant(run=plain(config), place=place), hardware=[device], plan=PlanConfig(), write=False)
    asked = {"command": "choose", "error": os.devnull, "requests": [dataclasses.asdict(request)]}
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_RANK and not key.startswith("TORCHELASTIC_")}
    try:
        line = [sys.executable, "-m", "trainers.plan"]
        child = subprocess.run(
            line,
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=PLAN_S,
            env=environment | {"OMP_NUM_THREADS": "1"},
            preexec_fn=prepare_child(),
        )
        found: dict[str, str] = json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        chosen = next(how for how in (Activations.block, Activations.keep) if how in offered(config))
        found = {"chosen": str(chosen), "reason": f"{chosen}, as the planner failed ({type(error).__name__})"}
    return found
