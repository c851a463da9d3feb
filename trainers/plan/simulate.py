"""The real engine's step on tensors without values, as one rank of any number: what is allocated when, computed and sent."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainers.batch import Batch, Needs, Output, each_token
from trainers.config.choices import ObjectiveName, Offload, PeftMethod
from trainers.config.derived import compares, microbatches
from trainers.config.errors import ConfigError
from trainers.config.mesh import mesh_of
from trainers.config.schema import RunConfig
from trainers.engines import float8
from trainers.engines.activations import page_locked
from trainers.engines.base import Accepts, Engine
from trainers.engines.build import class_of, end_groups, outline
from trainers.model.blueprint import Blueprint, find_blocks
from trainers.model.experts import one_by_one
from trainers.objectives import Objective, make_objective
from trainers.objectives.base import OF_LABELS, Measured
from trainers.plan.allocator import replay
from trainers.plan.stand_ins import dealt_evenly, few_chunks
from trainers.plan.trace import Kind, Moment, Trace, combine
from trainers.step import take_step
from trainers.world import World

MICROBATCHES = 3
"""The first, which finds no gradients, the last, which may reduce them, and one for all between."""
LR = 1e-3
"""Of the simulated step: no number of a plan depends on it."""


class Alone(World):
    """Rank 0 of many that are not there."""

    def _reduce(self, values: Sequence[float], how: object) -> list[float]:
        return list(values)

    def sum_and_max(self, sums: Sequence[float], maxima: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the values."""
        return list(sums), list(maxima)

    def gather(self, value: Any) -> list[Any]:
        """Return the value, once for each rank."""
        return [value] * self.size

    def from_first(self, value: Any) -> Any:
        """Return the value."""
        return value


@dataclass(kw_only=True)
class Simulation:
    """A step of rank 0, moment by moment; no rank has more."""

    moments: list[Moment]
    state_bytes: dict[str, int]
    """By class, as an engine's `state_bytes`; on the device or not."""
    parameters: int
    trainable: int
    largest: int
    """Elements of the largest tensor, which an export gathers whole."""
    adapter_bytes: int
    """Bytes of the adapter that is exported; 0 where that is a whole model."""
    optimizer_bytes: int
    """Bytes that a checkpoint keeps of the optimizer, over all ranks."""
    update_bytes: int
    """Bytes that the method itself keeps of what is trained, over all ranks, as AdaLoRA its importance."""
    inputs_on_host: int
    """Bytes of blocks' inputs that wait in host memory between forward and backward."""
    slack: int
    """Bytes that torch's allocator needs beyond those of tensors where these are highest."""
    reserved: int | None
    """Bytes that it takes where the device has them; None where two depths tell of all, for it grows with gaps and not in a line."""

    @property
    def peak(self) -> Moment:
        """Return the moment in which the device's memory is highest."""
        return max(self.moments, key=lambda moment: moment.total)


@contextmanager
def ranks(size: int, local_size: int) -> Iterator[World]:
    """Be rank 0 of `size` ranks without the others."""
    before, hook = os.environ.get("LOCAL_RANK"), sys.excepthook  # DeepSpeed wants the one to be set, and torch puts ranks into the other
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield Alone(rank=0, local_rank=0, size=size, local_size=local_size, device=torch.device("cpu"))
    finally:
        end_groups()
        sys.excepthook = hook
        if before is None:
            os.environ.pop("LOCAL_RANK", None)


def simulate(config: RunConfig, blueprint: Blueprint, world: World, seq_len: int, gpus: bool = False) -> Simulation:
    """Take a step of rows of `seq_len` tokens with the config's engine; with `gpus` what is offloaded is not counted on the device.

    Where blocks repeat themselves, two depths are simulated and all numbers continued from there in a straight line.
    Raises ConfigError for what the engine or the method refuses.
    """
    if one_by_one(blueprint.build()):
        reason = "which tokens an expert computes depends on values, and a plan has none"
        remedy = "model.experts=grouped_mm or batched_mm; auto takes eager where the experts' sizes are not multiples of 8"
        raise ConfigError("model.experts", str(config.model.experts), reason, remedy)
    depths = _two_depths(config, blueprint, world)
    if depths is None:
        return _take(config, blueprint, world, seq_len, gpus)
    few, more = (_take(config, shortened(blueprint, depth), world, seq_len, gpus) for depth in (depths.few, depths.few + depths.period))
    return _continued(few, more, depths)


@dataclass(frozen=True)
class _Depths:
    """How a model's blocks repeat themselves: each `period`, in all `full` of them, of which `few` are enough to tell the rest."""

    full: int
    few: int
    period: int

    @property
    def edge(self) -> int:
        """Return how many blocks are taken as they are at the beginning; the others of `few` are at the end."""
        return self.few // 2


def _two_depths(config: RunConfig, blueprint: Blueprint, world: World) -> _Depths | None:
    """Find two smaller numbers of blocks that tell of all; None where there are too few blocks, or they do not repeat themselves.

    A block at either end differs from those between, and so does each that gathers ahead, or that is kept for backward.
    """
    if config.peft.method is PeftMethod.freeze or any(part.isdigit() for name in config.peft.targets for part in name.split(".")):
        return None
    blocks = find_blocks(blueprint.build())
    kinds = [_signature(block) for block in blocks]
    full = len(kinds)
    if not full:
        return None
    edge = 1 + class_of(config).reach(config, blocks)
    for period in range(1, 9):
        alone = next((n + 1 for n in range(full - period - 1, -1, -1) if kinds[n] != kinds[n + period]), 0)  # those at the front
        few = 2 * (edge + alone + period)
        few += (full - few) % period
        if few + period >= full:
            continue
        if [_signature(block) for block in find_blocks(shortened(blueprint, few + period).build())] == kinds[: few + period]:
            return _Depths(full, few, period)
    return None


def _signature(block: nn.Module) -> str:
    parameters = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    kinds = [
        (type(module).__name__, getattr(module, "is_sliding", None), getattr(module, "layer_type", None)) for module in block.modules()
    ]
    return repr((parameters, kinds))


def shortened(blueprint: Blueprint, depth: int) -> Blueprint:
    """Return a Blueprint of the first `depth` blocks."""
    config = copy.deepcopy(blueprint.config)
    text = config.get_text_config()
    full, text.num_hidden_layers = text.num_hidden_layers, depth
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(text, name, value[:depth])
    return dataclasses.replace(blueprint, config=config)


def _continued(few: Simulation, more: Simulation, depths: _Depths) -> Simulation:
    """Continue each number of two depths to the full one: blocks at the ends as they are there, those between in a straight line."""
    slope = (depths.full - depths.few) / depths.period

    def line(a: float, b: float) -> float:
        return a + (b - a) * slope

    deeper = {_place(moment, depths.few + depths.period, depths.edge): moment for moment in more.moments}
    moments: list[Moment] = []
    group: list[Moment] = []
    for moment in [*few.moments, None]:
        if group and (moment is None or (moment.name, moment.microbatch) != (group[0].name, group[0].microbatch)):
            moments += _all_blocks(group, depths)
            group = []
        if moment is not None:
            made = combine([moment, deeper[_place(moment, depths.few, depths.edge)]], lambda values: line(values[0], values[1]))
            if moment.block is not None and moment.block >= depths.edge:
                made.block = moment.block + depths.full - depths.few
            group.append(made)
    return Simulation(
        moments=moments,
        state_bytes={name: round(line(value, more.state_bytes[name])) for name, value in few.state_bytes.items()},
        parameters=round(line(few.parameters, more.parameters)),
        trainable=round(line(few.trainable, more.trainable)),
        largest=max(few.largest, more.largest),
        adapter_bytes=round(line(few.adapter_bytes, more.adapter_bytes)),
        optimizer_bytes=round(line(few.optimizer_bytes, more.optimizer_bytes)),
        update_bytes=round(line(few.update_bytes, more.update_bytes)),
        inputs_on_host=round(line(few.inputs_on_host, more.inputs_on_host)),
        slack=max(few.slack, more.slack),
        reserved=None,
    )


def _all_blocks(group: list[Moment], depths: _Depths) -> list[Moment]:
    """Fill in the blocks between those at the ends, each on the line between the nearest two of its kind; in the order of the group."""
    known = {moment.block: moment for moment in group if moment.block is not None}
    if not known:
        return group
    for block in range(depths.edge, depths.full - depths.few + depths.edge):
        begin = depths.edge - 1 - (depths.edge - 1 - block) % depths.period
        end = next(n for n in range(depths.full - depths.few + depths.edge, depths.full) if (n - block) % depths.period == 0)
        share = (block - begin) / (end - begin)
        made = combine([known[begin], known[end]], lambda values, share=share: values[0] + (values[1] - values[0]) * share)  # type: ignore[misc]
        made.block = block
        known[block] = made
    return [known[block] for block in sorted(known, reverse=group[0].block != 0)]


def _place(moment: Moment, depth: int, edge: int) -> tuple[str, int | None, int | None]:
    """Return a moment's name, microbatch and block; from the end, below 0, for those after the first `edge` blocks."""
    block = moment.block if moment.block is None or moment.block < edge else moment.block - depth
    return moment.name, moment.microbatch, block


def _take(config: RunConfig, blueprint: Blueprint, world: World, seq_len: int, gpus: bool = False) -> Simulation:
    """Take the first step that is like those after it, as it is without a compiler."""
    config = _in_memory(dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False)))
    with _float8_of(gpus):
        engine = outline(config, world, blueprint)
    objective = objective_of(config, blueprint)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    trace = Trace(blueprint.config.get_text_config().vocab_size // config.engine.tensor, fake, config.engine.context > 1)
    count = min(MICROBATCHES, microbatches(config.train, mesh_of(config.engine, world.size).data_size))
    vocab_size = blueprint.config.get_text_config().vocab_size
    batches = [most_of(config, config.train.microbatch, seq_len, vocab_size, objective) for _ in range(count)]
    rows = config.train.eval_microbatch or 0
    evaluated = most_of(config, rows, seq_len, vocab_size, objective) if rows > config.train.microbatch else None
    has_dtensors = any(isinstance(p, DTensor) for p in engine.model.parameters())
    stepping: Callable[[], AbstractContextManager[Any]] = unset_fake_temporarily if has_dtensors else nullcontext  # DTensor has its own
    with warnings.catch_warnings(), few_chunks(trace), dealt_evenly(), fake, trace:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        engine.fill(None)
        for _ in range(engine.settling_steps + 1):
            trace.restart()
            without_values = [batch.map(fake.from_tensor) for batch in batches]
            marked = Marked(engine, trace, stepping, gpus)
            first = without_values if isinstance(objective, Measured) else ()  # as long and as many as what is trained, about
            take_step(marked, objective, without_values, world, lr=LR, targets=1, first=first)  # type: ignore[arg-type]
        if evaluated is not None:
            trace.mark("evaluation")
            engine.train(False)
            with torch.no_grad():
                engine.forward(evaluated.map(fake.from_tensor), objective.needs)
        size = engine.state_bytes()
        with stepping():
            saved = bytes_of_whole(engine.state()["optimizer"])
    shapes = engine.shapes()
    adaptation = engine.adaptation
    replayed, update = replay(trace), adaptation.update
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return Simulation(
        moments=trace.moments(),
        state_bytes=size,
        parameters=sum(numels.values()),
        trainable=sum(numel for name, numel in numels.items() if name in adaptation.trained),
        largest=max(numels.values()),
        adapter_bytes=0 if adaptation.library_config is None else sum(tensor.nbytes for tensor in adaptation.contents().values()),
        optimizer_bytes=saved,
        update_bytes=sum(numels[name] for name in update.names) * update.bytes_per_element if update is not None else 0,
        inputs_on_host=marked.inputs_on_host,
        slack=replayed.slack,
        reserved=replayed.reserved,
    )


def bytes_of_whole(state: Any) -> int:
    """Return the bytes of all ranks' parts of a nested state, without its numbers."""
    if isinstance(state, dict):
        return sum(bytes_of_whole(value) for value in state.values())
    return state.numel() * state.itemsize if isinstance(state, Tensor) and state.ndim else 0


@contextmanager
def _float8_of(gpus: bool) -> Iterator[None]:
    """Let float8 be multiplied as GPUs do it, where the run has them, and as a CPU emulates it elsewhere."""
    float8.EMULATED = not gpus
    try:
        yield
    finally:
        float8.EMULATED = None


def _in_memory(config: RunConfig) -> RunConfig:
    """Return a config with host memory in the place of NVMe: what is on its way to files has no values to write."""
    engine = config.engine
    swapped: dict[str, Any] = {
        name: Offload.cpu for name in ("offload_param", "offload_optimizer") if getattr(engine, name) is Offload.nvme
    }
    return dataclasses.replace(config, engine=dataclasses.replace(engine, nvme_path=None, **swapped)) if swapped else config


class Marked:
    """An engine that notes the moments of a step, on tensors with or without values; the step is taken by `trainers.step.take_step`.

    `stepping` is the context of the optimizer's own step; `gpus` says that what is offloaded is elsewhere than the rest.
    """

    def __init__(
        self, engine: Engine, trace: Trace, stepping: Callable[[], AbstractContextManager[Any]] = nullcontext, gpus: bool = False
    ) -> None:
        """Mark the blocks from now on, until the optimizer's step is done."""
        self.engine, self.trace, self.stepping, self.gpus, self.number = engine, trace, stepping, gpus, 0
        self.measured = 0
        self.inputs_on_host = 0
        self.mesh = engine.mesh
        self.marks = _Marks(trace, engine.blocks)
        _label(engine, trace, gpus)

    def forward(self, batch: Batch, needs: Needs) -> Output:
        """Mark where the microbatch begins."""
        if torch.is_grad_enabled():
            self.marks.begin_microbatch(self.number)
        else:
            self.marks.measure(self.measured)
            self.measured += 1
        output: Output = self.engine.forward(batch, needs)
        return output

    def backward(self, loss: Tensor, last: bool) -> None:
        """Mark where backward begins, and label what it left."""
        self._note_inputs()
        self.marks.turn()
        self.engine.backward(loss, last=last)
        self.number += 1
        _label(self.engine, self.trace, self.gpus)

    def _note_inputs(self) -> None:
        """Label the inputs of blocks that wait on the host for backward, and count them, on a GPU as page-locked memory is given."""
        inputs = [tensor for placed in self.engine.tensors() if placed.kind == "activations" for tensor in placed.tensors]
        pinned = self.gpus and self.engine.config.engine.pin_memory
        self.inputs_on_host = sum(page_locked(tensor.nbytes) if pinned else tensor.nbytes for tensor in inputs)
        self.trace.label(inputs, Kind.host if self.gpus else Kind.activations)

    def squares(self) -> Tensor | None:
        """Mark where the optimizer's step begins."""
        self.trace.mark("optimizer step")
        with self.stepping():
            return self.engine.squares()

    def step(self, lr: float, accepts: Accepts, norm: float | None) -> float:
        """Mark where the optimizer's step ends."""
        with self.stepping():
            norm = self.engine.step(lr, accepts, norm)
        _label(self.engine, self.trace, self.gpus)
        self.trace.mark("after the step")
        self.marks.remove()
        return norm


def _label(engine: Engine, trace: Trace, gpus: bool) -> None:
    """Say which of the storages that are there hold state, and which of them a GPU run has in host memory."""
    for placed in engine.tensors():
        trace.label(placed.tensors, Kind.host if gpus and placed.home is not Offload.none else Kind[placed.kind])


class _Marks:
    """Hooks that mark where each block begins, forward and backward."""

    def __init__(self, trace: Trace, blocks: Sequence[nn.Module]) -> None:
        self.trace, self.blocks, self.forward, self.microbatch = trace, blocks, True, 0
        self.hooks = [block.register_forward_pre_hook(self._before(number), prepend=True) for number, block in enumerate(blocks)]
        self.hooks += [block.register_forward_hook(self._after(number)) for number, block in enumerate(blocks)]

    def begin_microbatch(self, number: int) -> None:
        self.forward, self.microbatch = True, number
        self._mark("embedding")

    def measure(self, number: int) -> None:
        """Begin a forward without gradients, for a statistic of the step: one moment as a whole."""
        self.forward, self.microbatch = True, number
        self._mark("statistic")
        self.forward = False

    def turn(self) -> None:
        """Go from forward to backward."""
        self.forward = False
        self._mark("backward of the loss")

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _mark(self, name: str, block: int | None = None) -> None:
        self.trace.mark(name, self.microbatch, block)

    def _before(self, number: int) -> Any:
        def mark(*_: Any) -> None:
            if self.forward:
                self._mark("forward", number)

        return mark

    def _after(self, number: int) -> Any:
        def mark(_module: nn.Module, _given: Any, output: Any) -> None:
            if not self.forward:
                return  # computed again
            made = output[0] if isinstance(output, tuple) else output
            if made.requires_grad:
                made.register_hook(lambda _: self._mark("backward", number))
            if number == len(self.blocks) - 1:
                self._mark("logits and loss")

        return mark


def objective_of(config: RunConfig, blueprint: Blueprint) -> Objective:
    """Return what a model of a run is trained on: the run's objective, and of PPO's critic the values."""
    if config.objective.name is ObjectiveName.ppo and blueprint.scores:
        from trainers.objectives.values import Values

        return Values(config.objective)
    return make_objective(config.objective, None, config.train.balance_loss)


def most_of(config: RunConfig, rows: int, seq_len: int, vocab_size: int, trained: Objective | None = None) -> Batch:
    """Return the most that a microbatch of so many rows takes, with its signals; of pairs that are not packed both answers."""
    objective = config.objective
    in_row = 2 if compares(objective.name) and not config.data.packing else 1
    batch = whole_batch(in_row * rows, seq_len, (trained or make_objective(objective, None)).signals)
    if config.model.encoder_decoder:
        from trainers.plan.inputs import most_of_sources

        return most_of_sources(config, batch)
    if objective.name is ObjectiveName.ppo and trained is not None and trained.needs.scores:
        return each_token(batch)
    if objective.name is not ObjectiveName.distil:
        return batch
    from trainers.teacher import as_taught

    return as_taught(batch, objective, vocab_size)


def whole_batch(rows: int, seq_len: int, signals: Collection[str] = ()) -> Batch:
    """Return rows of two documents each without a gap, every token trained: the most that a microbatch takes."""
    ids = torch.zeros(rows, seq_len, dtype=torch.int64)
    positions = torch.arange(seq_len) % max(1, seq_len // 2)
    batch = Batch.of(ids, ids.clone(), positions.repeat(rows, 1))
    sizes = {name: (rows, seq_len, 1) if name in OF_LABELS else (batch.num_documents,) for name in signals}
    return dataclasses.replace(batch, signals={name: torch.zeros(size) for name, size in sizes.items()})
