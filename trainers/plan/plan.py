"""A plan: whether a run fits, where its memory goes, what it sends, saves and costs. Plain numbers, as plan.json holds them."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from trainers import host
from trainers.config.choices import Activations, Float8, ObjectiveName, Offload
from trainers.config.derived import SAMPLED, microbatches, peak_lr
from trainers.config.errors import ConfigError
from trainers.config.mesh import mesh_of
from trainers.config.optimizers import PAGED
from trainers.config.schema import CheckpointConfig, DataConfig, RunConfig, parse, plain
from trainers.engines.base import nvme_buffers
from trainers.engines.build import attending, attention_of, class_of
from trainers.model.backends import stand_in
from trainers.model.blueprint import Blueprint
from trainers.objectives import CHOICES, REFERENCE
from trainers.plan.answers import ASSUMPTIONS as OF_ANSWERS
from trainers.plan.answers import Answers, answers_of, not_timed, seconds_of, step_of
from trainers.plan.critic import read_critic, together
from trainers.plan.estimate import ASSUMPTIONS, FAST, SLOW, forward_seconds, spans_nodes, step_seconds, totals
from trainers.plan.inputs import Data, read_data, read_model
from trainers.plan.request import VERSION, HardwareConfig, Place, PlanConfig, Variant
from trainers.plan.simulate import Simulation, ranks, simulate
from trainers.plan.trace import Kind, Moment
from trainers.rl.critic import about_critic, critic_config
from trainers.units import GIB, in_bytes

TIGHT = 0.9
"""Share of a device's memory above which a run that fits is tight: a longer row than expected, or another NCCL, ends it."""
WORDS = {
    Kind.parameters: "parameters",
    Kind.gradients: "gradients",
    Kind.optimizer: "optimizer state",
    Kind.activations: "activations",
    Kind.logits: "logits",
    Kind.buffers: "all-gather and reduce buffers",
}


@dataclass(kw_only=True)
class Reference:
    """What a reference costs that is measured before the first step, and what a second model would cost instead."""

    disk_bytes: int | None
    """Of the numbers that are kept; None where nobody knows how many documents there are."""
    second_model_bytes: int
    """Of a rank's device: the weights of a frozen copy in the type of its files, sharded as the model is. The pass itself keeps nothing."""
    seconds: tuple[float, float] | None = None
    """Of the pass, with the fast and the slow set of assumptions; None where rows or devices are not known."""


@dataclass(kw_only=True)
class Critic:
    """What PPO's critic is; its bytes, FLOPs and seconds are in those of the run."""

    parameters: int
    trainable: int
    learning_rate: str


@dataclass(kw_only=True)
class Plan:
    """What plan.json holds. Bytes are of one rank unless they say otherwise."""

    name: str
    run_dir: str
    version: int = VERSION
    verdicts: dict[str, str] = field(default_factory=dict)
    """By device: `fits`, `tight`, `does not fit`, or `unknown` where nobody says how much memory there is."""
    capacity: dict[str, float] = field(default_factory=dict)
    """Bytes by device."""
    needed: dict[str, float] = field(default_factory=dict)
    """Bytes of the device by device: the tensors, the allocator's slack, and what is outside of it."""
    peak: dict[str, float]
    """Bytes by kind where tensors are highest."""
    peak_at: str
    slack: int
    state: dict[str, int]
    """Bytes of what a rank keeps between steps, by class, wherever it is kept."""
    parameters: int
    trainable: int
    model: str
    engine: str
    method: str
    precision: str
    attention: str = ""
    """The backend and why it is that one."""
    learning_rate: str
    """At the end of warm-up, and the setting that gives it."""
    place: Place
    data: Data
    microbatch: int
    global_batch: int
    steps: int | None
    flops: float
    """Of a step's training, over all ranks, with what is computed again for backward."""
    sent: dict[str, float]
    """Bytes that a rank sends in a step, by collective and whether between nodes."""
    host: dict[str, int]
    """Bytes of a node's memory by part."""
    staged: int
    """Bytes of a node's memory that copies of the state take while they are saved, where there is room for them."""
    host_limit: float = 0.0
    """Bytes of a node's memory; 0 where it is not known."""
    checkpoint_bytes: int
    """Of all ranks together."""
    export_bytes: int
    save_seconds: float | None = None
    step_seconds: tuple[float, float] | None = None
    """With the fast and the slow set of assumptions, answers included; None where no device is named."""
    reference: Reference | None = None
    """The pass that measures the model that training begins with; None where the objective needs none."""
    answers: Answers | None = None
    """What a run's own answers take, where it learns from them."""
    critic: Critic | None = None
    """The second model that PPO trains."""
    price: float | None = None
    activations: dict[str, str] = field(default_factory=dict)
    """By device: what train.activations=auto takes; empty where the setting names it."""
    generator_short: str = ""
    """What a generator on a node of its own lacks, on the smallest device; empty where it fits all."""
    host_short: str = ""
    """What host memory lacks, in words."""
    notes: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    moments: list[dict[str, Any]] = field(default_factory=list)
    """The step, moment by moment: `name`, `microbatch`, `block`, and bytes by kind where memory is highest in each."""
    overrides: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Return the verdict of the named device, or the best of all."""
        return next((word for word in ("fits", "tight", "unknown") if word in self.verdicts.values()), "does not fit")

    @property
    def most_needed(self) -> float:
        """Return the bytes that a device must have."""
        return max(self.needed.values())

    def tokens_per_day(self) -> tuple[float, float] | None:
        """Return the tokens of a day where all rows are full, slow and fast."""
        if self.step_seconds is None:
            return None
        tokens = self.global_batch * self.data.row_tokens * 86_400.0
        return tokens / self.step_seconds[1], tokens / self.step_seconds[0]

    def run_seconds(self) -> tuple[float, float] | None:
        """Return the seconds of all steps and of the reference, fast and slow; None where steps or devices are not known."""
        if self.step_seconds is None or self.steps is None:
            return None
        before = (self.reference.seconds if self.reference is not None else None) or (0.0, 0.0)
        return self.steps * self.step_seconds[0] + before[0], self.steps * self.step_seconds[1] + before[1]


Simulations = dict[str, Simulation]
Size = TypeVar("Size", int, float)


def make_plan(variant: Variant, hardware: list[HardwareConfig], settings: PlanConfig, known: Simulations) -> Plan:
    """Plan one run; `known` holds the simulations so far, and takes this one's.

    Raises ConfigError for what cannot be planned as it is: the model's config could not be loaded, or the engine refuses.
    """
    began = time.monotonic()
    config, place = parse(variant.run), variant.place
    one = hardware[0] if len(hardware) == 1 else None
    if one is not None and one.name != "any" and not one.tflops_fp8 and config.train.float8 is not Float8.none:
        raise ConfigError("train.float8", str(config.train.float8), f"hardware={one.name} multiplies no float8", "train.float8=none")
    blueprint, notes = read_model(config)
    data = read_data(config, settings)
    attention = attention_of(config, blueprint, "cuda" if place.gpus else "cpu")
    blueprint = attending(blueprint, stand_in(attention))
    simulation = _simulated(config, place, blueprint, data.seq_len, known)
    saved = blueprint.saved_dtype.itemsize
    critic = _simulated_critic(config, place, data.seq_len, known) if config.objective.name is ObjectiveName.ppo else None
    moments = simulation.moments if critic is None else together(simulation.moments, critic.moments)
    moments = [*moments, *_export(config, simulation, moments[-1], saved)]
    plan = _describe(variant, config, data, simulation, moments, saved)
    if critic is not None:
        _add_critic(plan, config, critic)
    plan.attention = str(attention)
    if REFERENCE in CHOICES[config.objective.name](config.objective).signals:
        copies = simulation.parameters * saved * config.engine.replicate // place.size
        plan.reference = Reference(disk_bytes=data.measured and round(4 * data.measured[1]), second_model_bytes=copies)
    if config.objective.name in SAMPLED:
        plan.answers = answers_of(config, place, blueprint, simulation.parameters, plan.export_bytes)
        if plan.answers.reference_bytes and plan.answers.has_reference_on_host:
            plan.host = _sum(plan.host, {"frozen parameters": plan.answers.reference_bytes * place.ranks_per_node // place.size})
        plan.notes += not_timed(config)
    plan.notes += notes
    if config.engine.expert > 1:
        plan.notes.append("tokens are dealt evenly here: a rank whose experts are chosen more often holds more of them, and others wait")
    if config.train.compile:
        plan.notes.append("train.compile: memory and time are those of the step as it is without a compiler, which takes more of both")
    plan.host_limit = _host_limit(place, one)
    _decide(plan, place, hardware, _highest(moments))
    if one is not None and place.gpus:
        plan.save_seconds = plan.checkpoint_bytes / (1e9 * one.storage_gb_s)
    if Offload.nvme in (config.engine.offload_param, config.engine.offload_optimizer):
        plan.notes.append("no time is estimated: how fast NVMe is read and written is not known")
    elif one is not None and place.gpus and one.tflops:
        _price(plan, config, one, simulation, moments if critic is None else simulation.moments, critic)
    plan.seconds = time.monotonic() - began
    return plan


def _simulated(config: RunConfig, place: Place, blueprint: Blueprint, seq_len: int, known: Simulations) -> Simulation:
    key = _key(config, place, seq_len, blueprint.scores)
    if key not in known:
        with ranks(place.size, place.ranks_per_node) as world:
            known[key] = simulate(config, blueprint, world, seq_len, place.gpus)
    return known[key]


def _simulated_critic(config: RunConfig, place: Place, seq_len: int, known: Simulations) -> Simulation:
    """Take the step of PPO's critic, an engine like the policy's."""
    with about_critic(config.objective.critic):
        config, blueprint = read_critic(config)
        blueprint = attending(blueprint, stand_in(attention_of(config, blueprint, "cuda" if place.gpus else "cpu")))
        return _simulated(config, place, blueprint, seq_len, known)


def _add_critic(plan: Plan, config: RunConfig, critic: Simulation) -> None:
    """Add what the critic takes of all but a rank's moments: its work, what it sends, and what is kept and saved of it."""
    place, config = plan.place, critic_config(config)
    flops, _, sent = totals(critic.moments, _microbatches(config, place))
    own = _checkpoint_bytes(critic)
    plan.critic = Critic(parameters=critic.parameters, trainable=critic.trainable, learning_rate=str(peak_lr(config.optim, config.peft)))
    plan.flops += flops * place.size
    plan.slack = max(plan.slack, critic.slack if place.gpus else 0)
    plan.checkpoint_bytes += own
    plan.staged += _staged(config, place, own)
    plan.state, plan.host = _sum(plan.state, critic.state_bytes), _sum(plan.host, _host(config, place, critic, process_bytes=0))
    plan.sent = _sum(plan.sent, _by_collective(sent, place))


def _sum(sizes: dict[str, Size], more: dict[str, Size]) -> dict[str, Size]:
    return sizes | {name: sizes.get(name, 0) + size for name, size in more.items()}  # type: ignore[misc]


def _checkpoint_bytes(simulation: Simulation) -> int:
    return simulation.trainable * 4 + simulation.optimizer_bytes + simulation.update_bytes


def _staged(config: RunConfig, place: Place, checkpoint: int) -> int:
    return checkpoint * place.ranks_per_node * config.engine.replicate // place.size if config.checkpoint.asynchronous else 0


def _highest(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def _microbatches(config: RunConfig, place: Place) -> int:
    return microbatches(config.train, mesh_of(config.engine, place.size).data_size)


def _describe(variant: Variant, config: RunConfig, data: Data, simulation: Simulation, moments: list[Moment], saved_bytes: int) -> Plan:
    """Return a plan with what the run is and what its step takes, without verdicts, times and price."""
    place, peak = variant.place, _highest(moments)
    flops, _, sent = totals(simulation.moments, _microbatches(config, place))
    checkpoint = _checkpoint_bytes(simulation)
    return Plan(
        name=config.name,
        run_dir=config.run_dir,
        peak={str(kind): size for kind, size in peak.peak.items() if kind is not Kind.host},
        peak_at=words_of(peak, _depth(moments)),
        slack=simulation.slack if place.gpus else 0,
        state=simulation.state_bytes,
        parameters=simulation.parameters,
        trainable=simulation.trainable,
        model=config.model.id or str(config.model.architecture.get("model_type")),
        engine=_engine_words(config),
        method=_method_words(config),
        precision=_precision_words(config),
        learning_rate=str(peak_lr(config.optim, config.peft)),
        place=place,
        data=data,
        microbatch=config.train.microbatch,
        global_batch=config.train.global_batch,
        steps=data.steps(config),
        flops=flops * place.size,
        sent=_by_collective(sent, place),
        host=_host(config, place, simulation),
        staged=_staged(config, place, checkpoint),
        checkpoint_bytes=checkpoint,
        export_bytes=simulation.adapter_bytes or simulation.parameters * saved_bytes,
        overrides=variant.overrides,
        moments=[_as_json(moment) for moment in moments],
    )


def _as_json(moment: Moment) -> dict[str, Any]:
    sizes = {str(kind): size for kind, size in moment.peak.items()}
    return {"name": moment.name, "microbatch": moment.microbatch, "block": moment.block, "bytes": sizes}


def _rank_of(config: RunConfig, place: Place, simulation: Simulation) -> tuple[float, float, float]:
    """Return what is trained on a rank, its bytes of frozen weights, and those of a microbatch's inputs on the host."""
    own = config.engine.replicate / place.size
    return simulation.trainable * own, float(simulation.state_bytes["frozen"]), float(simulation.inputs_on_host)


def _price(
    plan: Plan, config: RunConfig, device: HardwareConfig, simulation: Simulation, moments: list[Moment], critic: Simulation | None
) -> None:
    """Add the seconds of a step on a device, and the device's price."""
    rank = _rank_of(config, plan.place, simulation)
    microbatches = _microbatches(config, plan.place)
    fast, slow = (step_seconds(config, plan.place, device, moments, microbatches, share, *rank) for share in (FAST, SLOW))
    plan.step_seconds, plan.price, plan.assumptions = (fast, slow), device.price, list(ASSUMPTIONS)
    if plan.answers is not None:
        forward = [forward_seconds(config, plan.place, device, moments, share, *rank[:2]) * microbatches for share in (FAST, SLOW)]
        plan.answers.seconds = seconds_of(plan.answers, config, device, (forward[0], forward[1]), (fast, slow))
        if critic is not None:
            of, other = critic_config(config), _rank_of(config, plan.place, critic)
            each = [step_seconds(of, plan.place, device, critic.moments, microbatches, share, *other) for share in (FAST, SLOW)]
            plan.answers.seconds["critic"] = each[0], each[1]
        plan.step_seconds = step_of(plan.answers.seconds, config, plan.place.generators > 0)
        plan.assumptions = [*plan.assumptions, *OF_ANSWERS]
    if plan.reference is not None and (rows := plan.data.measured[0] if plan.data.measured else plan.data.rows):
        each = [forward_seconds(config, plan.place, device, moments, share, *rank[:2]) for share in (FAST, SLOW)]
        passes = math.ceil(rows / (mesh_of(config.engine, plan.place.size).data_size * config.train.microbatch))
        plan.reference.seconds = passes * each[0], passes * each[1]


def _key(config: RunConfig, place: Place, seq_len: int, scores: bool = False) -> str:
    """Return what two runs must share to need the same memory."""
    kept = replace(config, name="", run_dir="", data=DataConfig(), checkpoint=CheckpointConfig(), log=type(config.log)(), seed=0)
    settings = plain(kept)
    settings["optim"] = {name: settings["optim"][name] for name in ("name", "state")}
    del settings["peft"]["lr"]
    for name in ("steps", "epochs", "eval_every", "patience", "compile"):
        settings["train"].pop(name)
    return json.dumps([settings, asdict(place), seq_len, scores], sort_keys=True)


def _decide(plan: Plan, place: Place, hardware: list[HardwareConfig], peak: Moment) -> None:
    """Compare what is needed with what each device has; ranks without a GPU share this machine's memory."""
    answers = 0.0 if plan.answers is None else plan.answers.of_rank(place)
    is_beside = plan.answers is not None and not place.generators
    if not place.gpus:
        limit = _host_limit(place, None) / place.ranks_per_node
        answers += host.PROCESS_BYTES / place.ranks_per_node if is_beside else 0.0
        plan.capacity["cpu"], plan.needed["cpu"] = limit, peak.total + host.PROCESS_BYTES + answers
        plan.verdicts["cpu"] = _verdict(plan.needed["cpu"], limit) if limit else "unknown"
        if limit and not _generator_fits(plan, host.PROCESS_BYTES / place.ranks_per_node, limit, "its part of a node, which"):
            plan.verdicts["cpu"] = "does not fit"
        return
    on_host = sum(plan.host.values())
    if plan.host_limit and on_host > plan.host_limit:
        plan.host_short = f"a node needs {in_bytes(on_host)} of host memory and has {in_bytes(plan.host_limit)}"
    elif plan.host_limit and on_host + plan.staged > plan.host_limit / 2 and plan.staged:
        plan.notes.append(f"checkpoints wait for the disk: a node has no room for a copy of the state ({in_bytes(plan.staged)})")
    for device in hardware:
        outside = device.overhead_gib * GIB * (2 if is_beside else 1)  # a generator has a context of its own
        capacity, needed = device.memory_gib * GIB, peak.total + plan.slack + outside + answers
        plan.capacity[device.name], plan.needed[device.name] = capacity, needed
        fits = (
            _generator_fits(plan, device.overhead_gib * GIB, capacity, f"each GPU of its node, and {device.name}") and not plan.host_short
        )
        plan.verdicts[device.name] = _verdict(needed, capacity) if fits else "does not fit"


def _generator_fits(plan: Plan, outside: float, capacity: float, of: str) -> bool:
    """Tell whether a generator on a node of its own has the memory that it needs, and note where not."""
    if plan.answers is None or not plan.place.generators:
        return True
    needed = plan.answers.bytes / plan.place.ranks_per_node + outside
    if needed > capacity:
        plan.generator_short = plan.generator_short or f"a generator needs {in_bytes(needed)} of {of} has {in_bytes(capacity)}"
    return needed <= capacity


def _verdict(needed: float, capacity: float) -> str:
    return "fits" if needed <= TIGHT * capacity else "tight" if needed <= capacity else "does not fit"


def _host_limit(place: Place, device: HardwareConfig | None) -> float:
    if place.memory_gib:
        return place.memory_gib * GIB
    if not place.gpus:
        return float(host.memory_limit(place.ranks_per_node).bytes) if place.is_here else 0.0
    return device.host_memory_gib * GIB if device is not None else 0.0


def _host(config: RunConfig, place: Place, simulation: Simulation, process_bytes: int = host.PROCESS_BYTES) -> dict[str, int]:
    """Return bytes of a node's memory by part; those of offloaded state by the rules by which a run is refused.

    A second model in the same processes adds no `process_bytes`.
    """
    engine, parameters = config.engine, config.engine.offload_param is Offload.cpu
    sizes = [simulation.largest, simulation.parameters - simulation.largest]
    needed = host.host_bytes_needed(
        parameters=simulation.trainable,
        local_ranks=place.ranks_per_node,
        world_size=place.size // engine.replicate,
        on_host=class_of(config).on_host(config),
        frozen_bytes=simulation.state_bytes["frozen"] * place.size // engine.replicate if parameters else 0,
        buffers=nvme_buffers(config, place.size, sizes),
        inputs=simulation.inputs_on_host,
        process_bytes=process_bytes,
    )
    paged = simulation.state_bytes["optimizer"] * place.ranks_per_node if config.optim.name in PAGED else 0
    return needed.parts | ({"paged optimizer state": paged} if paged else {})


def _export(config: RunConfig, simulation: Simulation, end: Moment, saved: int) -> list[Moment]:
    """Return the moment in which the largest tensor is whole on a device to be written; those of adapters are small."""
    if config.engine.offload_param is not Offload.none or simulation.adapter_bytes:
        return []
    largest = simulation.largest * (4 + saved)
    return [Moment("export", None, None, {**end.end, Kind.buffers: end.end.get(Kind.buffers, 0.0) + largest})]


def _by_collective(sent: dict[str, float], place: Place) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, size in sent.items():
        word, group = key.split()
        name = f"{word}, {'between nodes' if spans_nodes(group, place) else 'inside a node'}"
        found[name] = found.get(name, 0.0) + size
    return {name: size for name, size in found.items() if size}


def _depth(moments: list[Moment]) -> int:
    return max((moment.block for moment in moments if moment.block is not None), default=-1) + 1


def words_of(moment: Moment, depth: int) -> str:
    """Say which part of a step a moment is."""
    words = moment.name if moment.block is None else f"{moment.name} of block {moment.block + 1} of {depth}"
    return words + (", second microbatch" if moment.microbatch else "")


def _engine_words(config: RunConfig) -> str:
    engine = config.engine
    words = [str(engine.name)]
    words += [f"parameters on {engine.offload_param}"] if engine.offload_param is not Offload.none else []
    words += [f"optimizer on {engine.offload_optimizer}"] if engine.offload_optimizer is not Offload.none else []
    words += [f"{engine.replicate} copies"] if engine.replicate > 1 else []
    words += [f"{engine.context} ranks share each row"] if engine.context > 1 else []
    words += [f"{engine.tensor} ranks split each layer"] if engine.tensor > 1 else []
    words += [f"experts dealt over {engine.expert} ranks"] if engine.expert > 1 else []
    words += [f"activations={config.train.activations}"] if config.train.activations is not Activations.keep else []
    return ", ".join(words)


def _precision_words(config: RunConfig) -> str:
    how = config.train.float8
    return str(config.train.precision) + (f" with float8 {how}" if how is not Float8.none else "")


def _method_words(config: RunConfig) -> str:
    peft = config.peft
    return str(peft.method) + (f" on {peft.quantise}" if str(peft.quantise) != "none" else "")
