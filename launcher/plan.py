"""mode=plan, and the gate before SLURM: what runs need and cost, told by trainers.plan in a process of its own, which may load torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from launcher.config import Backend, JobConfig, LaunchConfig, gpus_per_node, ranks_per_node
from launcher.freeze import require_joinable
from launcher.job import ROOT, Job, make_job
from launcher.presets import CONF
from launcher.process import leftovers
from launcher.proposals import changes_of
from trainers.config.choices import MeshChoice
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import plain
from trainers.plan.request import UNFIT, VERSION, HardwareConfig, Place, Request, Variant, validate_hardware
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.ending import Exit
from trainers.rundir.files import try_json
from trainers.units import in_bytes

HARDWARE = CONF / "hardware"
UNREACHABLE = ("model.id", "model.tokenizer")
"""Fields whose files the compute nodes may reach where this machine does not."""
SIZES = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}

Compose = Callable[[list[str]], JobConfig | None]
"""Composes the command line with more overrides; None where they do not go together."""


class NotPlanned(Exception):
    """The planner failed: nothing is known of the run."""


def plan(jobs: Sequence[Job], compose: Compose | None = None) -> int:
    """Print what runs need and cost, and write plan.json and plan.svg into their directories; returns 0 where all fit, 1 where not.

    With `compose`, changes that would make a single run fit are looked for. Raises ConfigError for what cannot be planned. A
    directory that holds something else stays as it is.
    """
    requests = []
    for job in jobs:
        requests.append(request_of(job))
        try:
            require_joinable(job)
        except ConfigError as error:
            requests[-1].write = False
            print(f"no plan.json is written: {error.path} {error.reason.splitlines()[0]}", file=sys.stderr, flush=True)
    try:
        fits = _ask("plan", requests)
        if not fits and compose is not None and len(jobs) == 1 and jobs[0].plan.changes:
            requests[0].changes = _variants(jobs[0], compose)
            _ask("changes", requests)
    except NotPlanned as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.failed
    return Exit.done if fits else Exit.failed


def require_fit(jobs: Sequence[Job], compose: Compose | None = None) -> None:
    """Raise ConfigError where a run does not fit the GPUs that it would be submitted to; what cannot be known stops nothing.

    A run that has begun is not planned, nor is one whose plan is in its directory already, of the same settings and code.
    """
    for job in jobs:
        require_joinable(job)
    jobs = [job for job in jobs if not job.launch.force and _place(job.launch).gpus and not (job.run_dir / paths.LOGS).exists()]
    wanted = [(job, request_of(job)) for job in jobs]
    new = [request for job, request in wanted if not _known(job, request)]
    if new:
        print(f"planning {plural(len(new), 'run')} before submitting; launch.force=true leaves this out", file=sys.stderr, flush=True)
        _plan_what_can_be(new)
    for job, request in wanted:
        found = _known(job, request)
        if found.get("verdict") == "does not fit":
            if compose is not None and job.plan.changes:
                request.changes = _variants(job, compose)
                _ask("changes", [request])
            raise _refused(job, found)
    if wanted:
        _say_fitting(_known(*wanted[0]))


def _plan_what_can_be(requests: list[Request]) -> None:
    """Plan all in one process, which makes the same simulation once; where that fails each alone: one keeps no other from it."""
    try:
        _ask("gate", requests)
    except (NotPlanned, ConfigError) as error:
        if len(requests) > 1:
            for request in requests:
                _plan_what_can_be([request])
        elif isinstance(error, NotPlanned):
            print(f"warning: {error}", file=sys.stderr, flush=True)
        elif error.path in UNREACHABLE:
            print(f"warning: not planned: {error}", file=sys.stderr, flush=True)
        else:
            raise


def _refused(job: Job, found: dict[str, Any]) -> ConfigError:
    """Return what keeps a run from fitting: its host memory, or that of its GPUs."""
    force = "python -m launcher ... mode=plan says what would make it fit; launch.force=true submits it all the same"
    if found["host_short"]:
        memory = job.launch.memory
        return ConfigError("launch.memory", memory, f"{job.run_dir.name} does not fit: {found['host_short']}", force)
    if found["generator_short"] and any(found["needed"][name] <= found["capacity"][name] for name in found["verdicts"]):
        return ConfigError("hardware", job.hardware.name, f"{job.run_dir.name} does not fit: {found['generator_short']}", force)
    devices = [f"{name} has {in_bytes(found['capacity'][name])}" for name in found["verdicts"]]
    needed = in_bytes(max(found["needed"].values()))
    reason = f"{job.run_dir.name} does not fit: a rank needs {needed} of its GPU, and {', '.join(devices)}"
    return ConfigError("hardware", job.hardware.name, reason, force)


def _say_fitting(found: dict[str, Any]) -> None:
    fits = [name for name, verdict in found.get("verdicts", {}).items() if verdict != "does not fit"]
    if fits:
        print(f"planned: a rank needs {in_bytes(max(found['needed'].values()))} of its GPU: fits {', '.join(fits)}", flush=True)


def _known(job: Job, request: Request) -> dict[str, Any]:
    """Return the plan in a run directory if it answers this request; empty where it does not."""
    found = try_json(job.run_dir / paths.PLAN)
    return found if found.get("asked") == asdict(request) and found.get("version") == VERSION else {}


def request_of(job: Job) -> Request:
    """Return what is asked about a job: its settings, place, and the device that is named, or all that are known; raises ConfigError."""
    validate_hardware(job.hardware, job.plan)
    if job.hardware.name != "any" and not _place(job.launch).gpus:
        reason = "no rank has a GPU: launch.gpus_per_node is empty or 0, and this machine has none"
        raise ConfigError("hardware", job.hardware.name, reason, "launch.gpus_per_node=8")
    hardware = [job.hardware] if job.hardware.name != "any" else known_hardware()
    notes = [f"engine.mesh=auto: {job.mesh}"] if job.mesh else []
    return Request(base=_variant(job), hardware=hardware, plan=job.plan, notes=notes)


def known_hardware() -> list[HardwareConfig]:
    """Return the devices of conf/hardware, the smallest first."""
    found = [HardwareConfig(**yaml.safe_load(file.read_text("utf-8"))) for file in sorted(HARDWARE.glob("*.yaml"))]
    return sorted((item for item in found if item.name != "any"), key=lambda item: (item.memory_gib, item.name))


def _variant(job: Job, overrides: Sequence[str] = ()) -> Variant:
    return Variant(run=plain(job.run), place=_place(job.launch), overrides=list(overrides))


def _place(launch: LaunchConfig) -> Place:
    save_s = launch.grace_s if launch.backend is Backend.slurm else launch.shutdown_s
    memory = re.fullmatch(r"(\d+)([KMGT]?)B?", (launch.memory or "0").upper())
    gib = int(memory[1]) * SIZES[memory[2] or "M"] if memory else 0.0
    here = launch.nodes == 1 and launch.backend is not Backend.slurm
    return Place(
        nodes=launch.nodes,
        ranks_per_node=ranks_per_node(launch),
        gpus=gpus_per_node(launch) > 0,
        save_s=save_s,
        is_here=here,
        memory_gib=gib,
        generators=launch.generators,
    )


def meshes_of(requests: list[Request]) -> list[dict[str, Any]]:
    """Return the sizes of the mesh that each run gets, and the `reason`; raises what `_ask` raises."""
    found: list[dict[str, Any]] = json.loads(_answer("meshes", requests, subprocess.PIPE)[1].splitlines()[-1])
    return found


def _ask(command: str, requests: list[Request]) -> bool:
    """Let trainers.plan answer on our standard output; tells whether all fit, or a change was found.

    Raises the ConfigError that it found, KeyboardInterrupt once it is gone, and NotPlanned where it failed.
    """
    return _answer(command, requests)[0] == Exit.done


def _answer(command: str, requests: list[Request], stdout: int | None = None) -> tuple[int, str]:
    """Return the exit code of trainers.plan, 0 or UNFIT, and what it says where standard output is a pipe; raises as `_ask`."""
    with tempfile.TemporaryDirectory() as folder:
        error = Path(folder) / "error.json"
        asked = {"command": command, "error": str(error), "requests": [asdict(request) for request in requests]}
        sys.stdout.flush()
        line = [sys.executable, "-m", "trainers.plan"]
        child = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=stdout, text=True, env=_environment(), start_new_session=True, preexec_fn=prepare_child()
        )
        try:
            said, _ = child.communicate(json.dumps(asked))
        finally:
            child.kill()
            child.wait()
        if child.returncode == Exit.bad_input and error.exists():
            raise ConfigError(**json.loads(error.read_text("utf-8")))
    if child.returncode not in (Exit.done, UNFIT):
        raise NotPlanned(f"the planner failed (exit code {child.returncode}), as it says above: nothing is known of the run")
    return child.returncode, said or ""


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name not in leftovers()}
    return kept | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def _variants(job: Job, compose: Compose) -> list[Variant]:
    """Return the changes that go together with the command line; a mesh that was chosen stays, on more nodes with more shards."""
    made = []
    for overrides in changes_of(job):
        config = compose(overrides)
        if config is not None and config.engine.mesh is MeshChoice.auto:
            engine = job.run.engine
            sizes = {name: getattr(engine, name) for name in ("replicate", "context", "tensor", "expert")}
            config = compose([*overrides, "engine.mesh=given", *(f"engine.{name}={size}" for name, size in sizes.items())])
        if config is not None:
            made.append(_variant(make_job(config), overrides))
    return made
