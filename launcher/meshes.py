"""engine.mesh=auto: the mesh of a run is planned before it begins, and stays with it."""

from __future__ import annotations

import dataclasses

from launcher.config import ranks_per_node, world_size
from launcher.freeze import has_results
from launcher.job import Job
from launcher.plan import NotPlanned, meshes_of, request_of
from trainers.config.choices import MeshChoice
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh, mesh_of
from trainers.config.meshes import meshes, with_mesh
from trainers.config.schema import EngineConfig, read
from trainers.rundir import paths
from trainers.rundir.files import try_json


def settled(jobs: list[Job]) -> list[Job]:
    """Return jobs with the sizes of their meshes where engine.mesh=auto asks for them; raises ConfigError where none can be planned.

    A run that has begun keeps its own, unless it has other ranks.
    """
    kept = [_with_its_own(job) if job.run.engine.mesh is MeshChoice.auto else job for job in jobs]
    new = [number for number, job in enumerate(kept) if job.run.engine.mesh is MeshChoice.auto and not job.mesh]
    if new:
        for number, mesh, reason in zip(new, *_chosen([kept[number] for number in new]), strict=True):
            kept[number] = _with(kept[number], with_mesh(kept[number].run.engine, mesh), reason)
    return kept


def _with(job: Job, engine: EngineConfig, reason: str) -> Job:
    return dataclasses.replace(job, run=dataclasses.replace(job.run, engine=engine), mesh=reason)


def _with_its_own(job: Job) -> Job:
    """Return a job with the mesh and the reason that are in its run directory; as it is where there is none, or it may not have it now.

    So it is planned again on other ranks or nodes, or with other sizes.
    """
    if not job.config_path.exists() or not has_results(job.run_dir):
        return job
    reason = str(try_json(job.run_dir / paths.MANIFEST).get("mesh", ""))
    try:
        own = read(job.config_path).engine
        mesh = mesh_of(own, world_size(job.launch))
        may = meshes(job.run, job.launch.nodes, ranks_per_node(job.launch))
    except ConfigError:
        return job
    if own.mesh is not MeshChoice.auto or mesh not in may:
        return job
    return _with(job, with_mesh(job.run.engine, mesh), reason)


def _chosen(jobs: list[Job]) -> tuple[list[Mesh], list[str]]:
    """Ask the planner for the mesh of each job, and why; raises ConfigError where no device is named, or it fails."""
    requests = [request_of(job) for job in jobs]
    if any(request.base.place.gpus and len(request.hardware) > 1 for request in requests):
        reason = "chooses by the memory and the links of a device, and none is named"
        raise ConfigError("engine.mesh", "auto", reason, "hardware=h100, or engine.mesh=given")
    try:
        found = meshes_of(requests)
    except NotPlanned as error:
        raise ConfigError("engine.mesh", "auto", str(error), "engine.mesh=given") from error
    reasons = [str(item.pop("reason")) for item in found]
    return [Mesh(**item) for item in found], reasons
