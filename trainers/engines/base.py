"""What the loop asks of an engine."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trainers import host
from trainers.batch import Batch, Needs, Output
from trainers.config.choices import Activations, Offload, OptimizerName, OptimizerState, Precision
from trainers.config.derived import logits_chunk
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.config.optimizers import LARGEST, PAGED, bytes_per_parameter
from trainers.config.schema import OptimConfig, RunConfig
from trainers.health.spikes import TrainingFailed
from trainers.model.blueprint import Blueprint
from trainers.model.forward import Head, gives_scores
from trainers.model.safetensors_files import listed
from trainers.model.weights import Origin
from trainers.peft.base import Adaptation
from trainers.peft.update import Update
from trainers.units import in_bytes
from trainers.world import World

if TYPE_CHECKING:
    from trainers.engines.activations import HostInputs
    from trainers.engines.scaling import LossScale

log = logging.getLogger("fulltune")
NVME_BUFFERS = 5
"""Partitions that DeepSpeed may have in memory at once on their way from NVMe; its own default."""
HOST = "in host memory"
BEGINS_AT_ZERO = re.compile(r"\.lora_(B|E|embedding_A)\b")
"""Names of the tensors that let an adapter begin without an effect, and that every update moves."""
COMPUTE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


Accepts = Callable[[float], bool]
"""Whether a step of this gradient norm is to be taken."""


def accepts_all(norm: float) -> bool:
    """Take every step."""
    return True


@dataclass(frozen=True)
class Placed:
    """Live tensors of one kind."""

    kind: Literal["parameters", "gradients", "optimizer", "activations", "buffers"]
    """What they are for; `buffers` are those between ranks."""
    home: Offload
    """Where they are between uses; `none` is the device."""
    tensors: list[Tensor]


class Engine(Protocol):
    """A model, its gradients and its optimizer, sharded over ranks. Every method is collective: all ranks call it."""

    config: RunConfig
    mesh: Mesh
    """How the ranks are arranged."""
    model: PreTrainedModel
    adaptation: Adaptation
    """What is trained and what is exported."""
    blocks: list[nn.Module]
    """The model's repeated blocks, in their order."""
    scale: LossScale | None
    """What the loss is multiplied by in float16; `step` changes it. None in the other types."""
    settling_steps: int
    """How many first steps differ from those after them in what is allocated when."""

    def __init__(self, config: RunConfig, world: World, blueprint: Blueprint) -> None:
        """Build on meta, adapt and shard: all that needs neither values nor memory for them."""
        ...

    @staticmethod
    def require_parts(config: RunConfig) -> None:
        """Have what the engine needs on this machine; raises ConfigError. Not collective."""
        ...

    @staticmethod
    def reach(config: RunConfig, blocks: Sequence[nn.Module]) -> int:
        """Return how many blocks the engine gathers ahead, or keeps, next to the one that computes."""
        ...

    @staticmethod
    def on_host(config: RunConfig) -> dict[str, int]:
        """Return bytes a trainable parameter takes in host memory where state is offloaded, by part."""
        ...

    @staticmethod
    def steps_on_device(config: RunConfig) -> bool:
        """Tell whether the optimizer's step is taken on the device, wherever its state is between steps."""
        ...

    def fill(self, origin: Origin | None) -> None:
        """Give this rank's parts memory, with the values of `origin`, and make the optimizer.

        Without an origin nothing has values, and other ranks need not exist: a plan does this under FakeTensorMode.
        """
        ...

    def forward(self, batch: Batch, needs: Needs = ...) -> Output:
        """Return the log-probabilities of the labels, with a graph while training, and what else is needed."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar; `last` marks the step's last microbatch. Gradients sum over ranks."""
        ...

    def squares(self) -> Tensor | None:
        """Return the sum of this rank's squared gradients after the last backward, () float64 on the device, without waiting for it.

        The sum over ranks is the square of the global norm. None where the engine finds the norm in its own `step`. Not collective.
        """
        ...

    def step(self, lr: float, accepts: Accepts = ..., norm: float | None = None) -> float:
        """Clip, update, clear gradients; return the global gradient norm before clipping: `norm`, where it is known from `squares`.

        A norm that is not finite, or that `accepts` denies, updates nothing. All ranks must be given the same answer.
        """
        ...

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, as torch.distributed.checkpoint writes it: the live tensors, which the next step changes."""
        ...

    def load(self, folder: Path, part: str | None = None) -> None:
        """Restore `state` from a directory of torch.distributed.checkpoint, at any world size; `part` names it where that holds several."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export by name, whole and on the CPU, one at a time."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of all tensors of the model, tied ones once."""
        ...

    def tensors(self) -> list[Placed]:
        """Return this rank's live tensors by what they are for, and where they are between uses."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Return this rank's bytes by class: frozen weights, what is trained, its gradients at their peak, the optimizer's state."""
        ...

    def report(self) -> dict[str, str]:
        """Return the precision and memory statements for the start-up table, checked on the live tensors."""
        ...

    def close(self) -> None:
        """Remove what this run has put outside its run directory."""
        ...


def scale_of(config: RunConfig) -> LossScale | None:
    """Return what scales the loss, None where the run does not compute in float16."""
    if config.train.precision is not Precision.fp16:
        return None
    from trainers.engines.scaling import INITIAL, STEPS, LossScale

    return LossScale(factor=config.train.loss_scale or INITIAL, interval=config.train.loss_scale_steps or STEPS)


def require_moved(engine: Engine, world: World) -> None:
    """Raise TrainingFailed after the first update where a part of an adapter that begins at zero still is: no gradient reaches it.

    Collective.
    """
    names = sorted(name for name in engine.adaptation.trained if BEGINS_AT_ZERO.search(name))
    if not names:
        return
    state = engine.state()["model"]
    parts = [state[name] for name in names]
    moved = world.max([float((part.to_local() if isinstance(part, DTensor) else part).any()) for part in parts])
    if still := [name for name, any_moved in zip(names, moved, strict=True) if not any_moved]:
        raise TrainingFailed(
            f"{listed(still)} is zero after the first update: no gradient reaches it; leave its module out of peft.targets"
        )


def keep_for_backward(blocks: Sequence[nn.Module], config: RunConfig, pin_memory: bool) -> HostInputs | None:
    """Let blocks keep what train.activations names, before they are compiled or sharded; returns where their inputs wait, if elsewhere."""
    if config.train.activations is Activations.keep:
        return None
    from trainers.engines.activations import keep_for_backward

    return keep_for_backward(blocks, config.train.activations, pin_memory)


def activations_statement(config: RunConfig) -> dict[str, str]:
    """Say what of a block is kept for backward, where it is not all."""
    if config.train.activations is Activations.keep:
        return {}
    from trainers.engines.activations import WORDS

    return {"activations": WORDS[config.train.activations]}


def inputs_on_host(config: RunConfig, model: PreTrainedModel, num_blocks: int, device: torch.device) -> int:
    """Return the bytes of a rank's inputs of blocks that wait on the host."""
    if config.train.activations is not Activations.offload:
        return 0
    from trainers.engines.activations import bytes_on_host

    pinned = config.engine.pin_memory and device.type == "cuda"
    return bytes_on_host(config, num_blocks, model.config.get_text_config().hidden_size, COMPUTE[config.train.precision].itemsize, pinned)


def head_of(model: PreTrainedModel, config: RunConfig, compute: torch.dtype) -> tuple[Head | None, str]:
    """Return what reads the output layer of a model on `meta` a few tokens at a time, None where logits are whole; and this in words."""
    if gives_scores(model):
        return None, "none: scores of documents alone"
    vocab_size, automatic = model.config.get_text_config().vocab_size, config.train.logits_chunk is None
    tokens = logits_chunk(config, vocab_size, compute.itemsize)
    if not tokens:
        return None, "whole"
    from trainers.model import head

    if (reason := head.why_not(model)) is not None:
        log.warning("the logits of %s are made whole: its output layer is not understood (%s)", type(model).__name__, reason)
        return None, "whole: the output layer is not understood"
    return head.Head(model, tokens), f"of {tokens:,} tokens at once, made again in backward{' (by their size)' if automatic else ''}"


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring a model's buffers to a device; its parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def require_host(config: RunConfig, world: World, built: Engine, next_to: Sequence[Engine] = ()) -> None:
    """Refuse an offloading run, before weights are read, where host memory cannot hold it; say what it takes of the host.

    What the engines that it is `next_to` take of it is counted too.
    """
    engine, inputs = config.engine, inputs_on_host(config, built.model, len(built.blocks), world.device)
    if engine.offload_optimizer is Offload.none and engine.offload_param is Offload.none and not inputs:
        return
    log.info("offloading: %d threads each for %d ranks on %d cores", torch.get_num_threads(), world.local_size, host.cores())
    needed = host_memory(config, world, built)
    for other in next_to:
        needed += host_memory(other.config, world, other, process_bytes=0)
    refused = None
    field = ("train.activations", "offload") if inputs else ("engine.offload_optimizer", str(engine.offload_optimizer))
    try:
        host.require_host_memory(needed, host.memory_limit(world.local_size), *field)
    except ConfigError as error:
        refused = (error.path, error.value, error.reason, error.remedy)
    for parts in world.gather(refused):  # each node has a limit of its own, and no rank may continue alone
        if parts is not None:
            raise ConfigError(*parts)  # type: ignore[misc]
    log.info("host memory: about %s a node (%s)", in_bytes(needed.total), needed)


def host_memory(config: RunConfig, world: World, built: Engine, process_bytes: int = host.PROCESS_BYTES) -> host.HostMemory:
    """Return what a node's host memory holds of an engine: of each copy of the model, with all of its experts, an equal part a rank."""
    engine, shapes = config.engine, built.shapes()
    frozen = {name: p for name, p in built.model.named_parameters() if not p.requires_grad and engine.offload_param is Offload.cpu}
    is_whole = shapes.keys() - built.adaptation.packed.keys()
    return host.host_bytes_needed(
        parameters=sum(math.prod(shape) for name, shape in shapes.items() if name in built.adaptation.trained),
        local_ranks=world.local_size,
        world_size=world.size // engine.replicate,
        on_host=built.on_host(config),
        frozen_bytes=sum(p.itemsize * math.prod(shapes[name]) if name in is_whole else p.nbytes for name, p in frozen.items()),
        buffers=nvme_buffers(config, world.size, [p.numel() for p in built.model.parameters()]),
        inputs=inputs_on_host(config, built.model, len(built.blocks), world.device),
        process_bytes=process_bytes,
    )


def nvme_buffers(config: RunConfig, world_size: int, numels: list[int]) -> int:
    """Return the bytes of a rank's buffers between NVMe and the device: parameters, and four tensors of the largest sub-group."""
    engine, parameters, optimizer = config.engine, 0, 0
    if engine.offload_param is Offload.nvme:
        parameters = NVME_BUFFERS * COMPUTE[config.train.precision].itemsize * -(-max(numels) // world_size)
    if engine.offload_optimizer is Offload.nvme:
        optimizer = 4 * 4 * min(engine.sub_group_size + max(numels) // world_size, sum(numels) // world_size)
    return parameters + optimizer


def counted(total: int, trained: int) -> str:
    """Say how many parameters there are, and how many are trained."""
    return f"{total:,}, " + ("all trained" if trained == total else f"{trained:,} trained ({trained / total:.3%})")


def unpacked_numel(adaptation: Adaptation, name: str, stored: int) -> int:
    """Return how many parameters a tensor represents, of which `stored` elements are kept."""
    return math.prod(adaptation.packed[name]) if name in adaptation.packed else stored


def update_tensors(update: Update | None) -> list[Tensor]:
    """Return what the method keeps of this rank's elements."""
    return [tensor for kinds in update.elements.values() for tensor in kinds.values()] if update is not None else []


def update_statement(update: Update | None, where: str) -> dict[str, str]:
    """Say type, bytes a rank and place of what the method keeps of this rank's elements, by its name; nothing where it keeps none."""
    kept = update_tensors(update)
    if update is None or not kept:
        return {}
    return {update.name: statement(update.name, kept, torch.float32, sum(tensor.nbytes for tensor in kept), where)}


def frozen_statement(frozen: Iterable[tuple[Tensor, Tensor]], compute: torch.dtype, where: str) -> str:
    """Say types, bytes a rank and place of frozen weights, each given with this rank's part of it.

    Raises RuntimeError if one has another type, or a gradient.
    """
    frozen = list(frozen)
    if any(tensor.grad is not None for tensor, _ in frozen):
        raise RuntimeError("a frozen weight has a gradient")
    packed = [part for _, part in frozen if part.dtype is torch.uint8]
    rest = [part for _, part in frozen if part.dtype is not torch.uint8]
    parts = [f"nf4, {_a_rank(packed)}" + (f" {where}" if where else "")] if packed else []
    parts += [statement("frozen weights", rest, compute, sum(tensor.nbytes for tensor in rest), where)] if rest else []
    return "; ".join(parts) or "none"


def _a_rank(tensors: Iterable[Tensor]) -> str:
    return f"{in_bytes(sum(tensor.nbytes for tensor in tensors))} a rank"


def statement(what: str, live: Iterable[Tensor], wanted: torch.dtype, num_bytes: int, where: str) -> str:
    """Say type, bytes a rank and place of one kind of state; raises RuntimeError if a live tensor has another type or place."""
    require_type(what, live, wanted, where)
    return f"{in_short(wanted)}, {in_bytes(num_bytes)} a rank" + (f" {where}" if where else "")


def home_of_state(config: RunConfig) -> Offload:
    """Return where the optimizer's state lives between steps; paged state leaves the device to what else needs it."""
    return Offload.cpu if config.optim.name in PAGED else config.engine.offload_optimizer


def table_parameters(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of embeddings and head, whose rows are tokens or positions."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), *embeddings)
    return {id(p) for module in ends if module is not None for p in module.parameters()}


def require_state_bytes(optim: OptimConfig, found: int, parameters: int) -> None:
    """Raise RuntimeError where this rank's optimizer state does not have the bytes that its parameters make; SGD's has none."""
    each = bytes_per_parameter(optim)
    padded = optim.name in PAGED  # whose state is of elements alone, and a partition may end with padding
    if found > LARGEST * parameters * 1.1 if each is None or padded else found not in (0, each * parameters):
        raise RuntimeError(f"the optimizer state takes {found:,} bytes on this rank, which has {parameters:,} trained parameters")


def state_statement(optim: OptimConfig, live: list[Tensor], num_bytes: int, where: str) -> str:
    """Say types, bytes a rank and place of the optimizer's state, and which optimizer it is of where that is not AdamW."""
    if not num_bytes:
        return f"none ({str(optim.name).upper()})"
    wanted = torch.bfloat16 if optim.state is OptimizerState.bf16 else torch.float32
    coded = [tensor for tensor in live if tensor.dtype is torch.uint8]
    require_type("optimizer state", [tensor for tensor in live if tensor.dtype is not torch.uint8], wanted, where)
    words = ["8 bits in blocks of 256, float32 for small tensors and embeddings" if coded else in_short(wanted)]
    words += ["stochastically rounded"] if wanted is torch.bfloat16 else []
    words += [f"{in_bytes(num_bytes)} a rank" + (f" {where}" if where else "")]
    return ", ".join(words) + (f" ({optim.name})" if optim.name is not OptimizerName.adamw else "")


def require_type(what: str, live: Iterable[Tensor], wanted: torch.dtype, where: str = "") -> None:
    """Raise RuntimeError if a tensor is of another type, or not in host memory where `where` says so."""
    live = list(live)
    away = [tensor.device for tensor in live if where == HOST and tensor.device.type != "cpu"]
    if away:
        raise RuntimeError(f"the {what} must be {HOST}, and some are on {away[0]}")
    found = {tensor.dtype for tensor in live} - {wanted}
    if found:
        raise RuntimeError(f"the {what} must be {in_short(wanted)}, and some are {', '.join(map(in_short, found))}")


def in_short(dtype: torch.dtype) -> str:
    """Return a type's name as torch prints it, without `torch.`."""
    return str(dtype).removeprefix("torch.")
