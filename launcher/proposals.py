"""Changes to try for a run that does not fit, in the order of what they cost: time, then GPUs, then what is trained."""

from __future__ import annotations

import itertools
import math

from launcher.config import Backend, ranks_per_node
from launcher.job import Job
from trainers.config.activations import offered
from trainers.config.choices import Activations, EngineName, MeshChoice, Offload, OptimizerName, PeftMethod, Quantisation
from trainers.config.derived import SAMPLED
from trainers.config.expert import experts_of
from trainers.config.schema import RunConfig
from trainers.config.sharding import known_config

Change = list[str]
"""Overrides of the command line that go together."""
EIGHT_BIT = "adamw_8bit"
SHARED = ("expert", "context", "tensor")
"""What ranks may have a part of each, by the names of `engine`."""
OFFLOADED = [f"train.activations={Activations.offload}"]


def changes_of(job: Job) -> list[Change]:
    """Return overrides that need less memory, the cheapest first."""
    run, nodes = job.run, job.launch.nodes
    rows, kept, small = _fewer_rows(run), _less_kept(run), _smaller_state(run)
    light = [how for how in kept if how != OFFLOADED]
    parts = ["train.logits_chunk=null"] if run.train.logits_chunk == 0 else []
    few = [*parts, *_last(rows)]
    lean = [*few, *_last(light)]
    answers = _fewer_answers(run)
    found = [*answers, parts, *rows[:1], *light[:1], *rows[1:], *light[1:]]
    found += [[*row, *how] for row in rows for how in light]
    found += [*small, [*lean, *_last(small)]]
    found += [[*lean, *change] for change in _shared(job)]
    found += [[*lean, *answers[-1]]] if answers else []
    found += [how for how in kept if how == OFFLOADED]
    least = [*few, *_last(kept)]
    found.append(least)
    found += [[*least, *change] for change in _elsewhere(run)]
    if job.launch.backend is not Backend.local:
        found += [[*least, f"launch.nodes={nodes * more}"] for more in (2, 4, 8)]
    found += _trains_less(run, lean)
    return [list(item) for item in dict.fromkeys(map(tuple, found)) if item]


def _last(changes: list[Change]) -> Change:
    return changes[-1] if changes else []


def _fewer_rows(run: RunConfig) -> list[Change]:
    """Return smaller microbatches: the same step, its products less wide."""
    sizes = dict.fromkeys([run.train.microbatch // 2, 1])
    return [[f"train.microbatch={size}"] for size in sizes if 0 < size < run.train.microbatch]


def _fewer_answers(run: RunConfig) -> list[Change]:
    """Return fewer answers that a generator writes at once: each has keys and values, as long as it may be."""
    if run.objective.name not in SAMPLED or run.rl.servers:
        return []
    sizes = dict.fromkeys([run.rl.batch // 2, run.rl.batch // 4])
    return [[f"rl.batch={size}"] for size in sizes if size]


def _less_kept(run: RunConfig) -> list[Change]:
    """Return what may be kept of a block instead of what is: computed again, or moved to the host and back."""
    now, ways = run.train.activations, offered(run)
    if now is Activations.auto or now not in ways:
        return []
    return [[f"train.activations={how}"] for how in ways[ways.index(now) + 1 :]]


def _smaller_state(run: RunConfig) -> list[Change]:
    """Return an optimizer whose state takes a quarter of the bytes, where there is one."""
    known = {str(name) for name in OptimizerName}
    if EIGHT_BIT not in known or run.optim.name is not OptimizerName.adamw or run.engine.offload_optimizer is not Offload.none:
        return []
    return [[f"optim.name={EIGHT_BIT}"]]


def _shared(job: Job) -> list[Change]:
    """Return more ranks for the experts, for each row, for each layer, then for two of these; a mesh that was chosen has all it can.

    Ranks that deal out experts keep rows of their own, and those that split layers wait for each other twice as often as those that share
    rows. What does not go with the run is refused as it is composed, or as it is planned where its model is not known here.
    """
    engine, node = job.run.engine, ranks_per_node(job.launch)
    if engine.name is not EngineName.fsdp or engine.mesh is MeshChoice.auto:
        return []
    from trainers.plan.shapes import SHAPES  # a run that fits asks for none

    known = known_config(job.run.model) or SHAPES.get(job.run.model.id or "", {})
    mixture, now = experts_of(known) > 1, (engine.expert, engine.context, engine.tensor)
    most = (8 if mixture or not known else 1, 8, 1 if mixture else 8)
    sizes = [{size, *(more for more in (2, 4, 8) if size < more <= end and node % more == 0)} for size, end in zip(now, most, strict=True)]

    def cost(group: tuple[int, ...]) -> tuple[int, ...]:
        expert, context, tensor = (size > before for size, before in zip(group, now, strict=True))
        return expert + context + tensor, tensor, context, math.prod(group), group[2]

    found: list[Change] = []
    for group in sorted(itertools.product(*sizes), key=cost):
        change = [f"engine.{name}={size}" for name, size, before in zip(SHARED, group, now, strict=True) if size != before]
        found += [change] if change and node % (group[1] * group[2]) == 0 and min(group[0], group[2]) == 1 else []
    return found


def _elsewhere(run: RunConfig) -> list[Change]:
    """Return where state may be instead of on the device, or in fewer copies."""
    engine, found = run.engine, []
    if engine.replicate > 1:
        found.append(["engine.replicate=1", "engine.shard=null"])
    if engine.name is EngineName.fsdp and engine.offload_optimizer is Offload.none:
        found.append(["engine.offload_optimizer=cpu"])
    if engine.offload_param is Offload.none:
        found.append([f"engine={engine.name}_offload"])
    return found


def _trains_less(run: RunConfig, lean: Change) -> list[Change]:
    """Return adapters in the place of the whole model, and a base in 4 bits."""
    peft, found = run.peft, []
    own_rate = ["optim.lr=null"] if run.optim.lr is not None and peft.method is PeftMethod.none else []  # it was full fine-tuning's
    if peft.method is PeftMethod.none:
        found += [["peft=lora", *own_rate], [*lean, "peft=lora", *own_rate]]
    if peft.method in (PeftMethod.none, PeftMethod.lora) and peft.quantise is Quantisation.none:
        found.append([*lean, "peft=qlora", *own_rate])
    return found
