"""engine.mesh=auto: of the meshes that a run may have, the fastest that fits by its plan, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.config.meshes import meshes, with_mesh, words_of
from trainers.config.schema import parse, plain
from trainers.plan.auto import plan_of
from trainers.plan.inputs import read_model
from trainers.plan.plan import Plan, Simulations
from trainers.plan.request import Request
from trainers.units import in_bytes

RANKING = ("fits", "unknown", "tight", "does not fit")
STATE = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True)
class Tried:
    """A mesh, and the plan of the run on it for the one device of a request."""

    mesh: Mesh
    plan: Plan

    @property
    def cost(self) -> tuple[int, float]:
        """Order by verdict, then by seconds of a step where they are known; what does not fit by what it lacks."""
        fits = self.plan.verdict != "does not fit"
        seconds = self.plan.step_seconds
        return RANKING.index(self.plan.verdict), (seconds[1] if seconds else 0.0) if fits else self.plan.most_needed

    def words(self) -> str:
        """Say what a rank needs on this mesh, and how long a step takes."""
        seconds = self.plan.step_seconds
        took = "" if seconds is None else f", {seconds[0]:.3g} to {seconds[1]:.3g} s a step"
        return f"{words_of(self.mesh)} needs {in_bytes(self.plan.most_needed)}{took}"


def choose(request: Request, known: Simulations) -> dict[str, Any]:
    """Return the sizes of the mesh that a run gets on its one device, and the `reason`; raises ConfigError where it cannot be planned.

    Groups that share rows, layers or experts become larger until the run fits, and then as long as that makes a step faster.
    """
    config, place = parse(request.base.run), request.base.place
    model = read_model(config)[0].config.get_text_config().to_dict()
    best: Tried | None = None
    tried: list[Tried] = []
    refused: list[ConfigError] = []
    for _, level in groupby(meshes(config, place.nodes, place.ranks_per_node, model), key=lambda mesh: mesh.same_rows * mesh.expert):
        found: list[Tried] = []
        for mesh in level:
            if found and _no_room(mesh, found[-1]):
                continue
            try:
                found.append(Tried(mesh, _plan(request, mesh, known)))
            except ConfigError as error:
                refused.append(error)
        if not found:  # a larger group may be planned
            continue
        tried += found
        least = min(found, key=lambda one: one.cost)
        if best is not None and best.plan.verdict in ("fits", "unknown") and least.cost >= best.cost:
            break
        best = least if best is None or least.cost < best.cost else best
    if best is None:
        raise refused[0]
    return dataclasses.asdict(best.mesh) | {"reason": _why(best, tried)}


def _plan(request: Request, mesh: Mesh, known: Simulations) -> Plan:
    config = parse(request.base.run)
    run = plain(dataclasses.replace(config, engine=with_mesh(config.engine, mesh)))
    return plan_of(dataclasses.replace(request.base, run=run), request.hardware, request.plan, known)


def _no_room(mesh: Mesh, fewer: Tried) -> bool:
    """Tell whether more copies than those of a mesh that was tried need more for their state than a device has."""
    more = mesh.replicate // fewer.mesh.replicate
    same = (mesh.same_rows, mesh.tensor, mesh.expert) == (fewer.mesh.same_rows, fewer.mesh.tensor, fewer.mesh.expert)
    state = more * sum(fewer.plan.peak.get(kind, 0.0) for kind in STATE)
    return same and more > 1 and state > max(fewer.plan.capacity.values())


def _why(best: Tried, tried: list[Tried]) -> str:
    """Say what was chosen, and what the others would take."""
    [(device, capacity)] = best.plan.capacity.items()
    verdicts = {"tight": "is tight", "does not fit": "does not fit and lacks least"}
    how = verdicts.get(best.plan.verdict, "fits" if capacity else "shares least")
    fast = ", the fastest" if best.plan.step_seconds is not None and best.plan.verdict != "does not fit" and len(tried) > 1 else ""
    of = f" ({device}, {in_bytes(capacity)} a rank)" if capacity else ""
    return "; ".join([f"{words_of(best.mesh)} {how}{fast}{of}", *(one.words() for one in tried)])
