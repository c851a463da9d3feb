"""A frozen base in 4 bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), sharded as any other tensor.

Values and rounding are torchao's NF4Tensor's. What differs is their place: a matrix is cut into groups of at most 256 blocks of
64 values, and a group, with its scales, is one row of bytes. Any number of ranks under either engine shards rows of bytes, and a rank
quantises its own rows alone; torchao's tensor splits only where blocks divide by the ranks, and takes one mean of a whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.model.forward import SCORE, gives_scores
from trainers.model.weights import Origin, read_elements
from trainers.peft.base import Adaptation

BLOCK, GROUP = 64, 256
"""Values that share a scale, and scales that share a scale of their own."""
LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
"""The 16 values of NormalFloat, as torchao has them."""
CHUNK = 1 << 22
"""Values that are unpacked at once: what is in float32 in addition to the result."""


def packed_shape(numel: int) -> tuple[int, int]:
    """Return (groups, bytes a group) of `numel` values: half a byte each, a byte a block, 8 bytes a group; the last one is padded."""
    blocks = blocks_of(numel)
    return -(-numel // (blocks * BLOCK)), blocks * (BLOCK // 2 + 1) + 8


def blocks_of(numel: int) -> int:
    """Return the blocks of a group, at most GROUP: as many groups as that takes, evenly filled."""
    blocks = -(-numel // BLOCK)
    return -(-blocks // -(-blocks // GROUP))


def quantise(values: Tensor, blocks: int) -> Tensor:
    """Return values (groups x blocks x 64, any shape) as (groups, bytes) uint8: codes, then the blocks' scales in int8, then two float32.

    A block's scale is its largest magnitude, `scale / factor + mean` of what is stored; a group of nothing but zeros has factor 1.
    """
    grouped = values.float().reshape(-1, blocks, BLOCK)
    scales = grouped.abs().amax(-1)
    mean = scales.mean(-1, keepdim=True)
    spread = (scales - mean).abs().amax(-1, keepdim=True)
    factor = torch.where(spread > 0, 256 / (2 * spread), 1.0)
    stored = ((scales - mean) * factor).round().clamp(-128, 127).to(torch.int8)
    levels = torch.tensor(LEVELS)
    within = grouped / torch.where(scales > 0, scales, 1.0)[..., None]
    codes = torch.bucketize(within, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(1)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.cat([pairs, stored.view(torch.uint8), torch.cat([factor, mean], 1).view(torch.uint8)], 1)


def chunks_of(packed: Tensor, step: int) -> Iterable[Tensor]:
    """Return the groups of a matrix, `step` at a time."""
    parts: Sequence[Tensor] = packed.split(step)
    return parts


def dequantise(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the values of (groups, bytes) uint8 in a shape and type, calculated in float32 a chunk at a time."""
    numel = math.prod(shape)
    blocks = blocks_of(numel)
    whole = torch.empty(len(packed) * blocks * BLOCK, dtype=dtype, device=packed.device)
    levels = torch.tensor(LEVELS, device=packed.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1)
    step = max(1, CHUNK // (blocks * BLOCK))
    for number, part in enumerate(chunks_of(packed, step)):
        codes, stored, ends = part.split([blocks * BLOCK // 2, blocks, 8], 1)
        factor, mean = ends.clone(memory_format=torch.contiguous_format).view(torch.float32).split(1, 1)
        scales = stored.contiguous().view(torch.int8) / factor + mean
        values = nn.functional.embedding(codes.int(), pairs).view(len(part), blocks, BLOCK) * scales[..., None]
        start = number * step * blocks * BLOCK
        whole[start : start + values.numel()] = values.view(-1)
    return whole[:numel].view(tuple(shape))


class _Product(torch.autograd.Function):
    """Inputs times a packed matrix, which is unpacked again in backward: nothing of its size is kept between the two."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Inputs (..., in) -> (..., out)."""
        ctx.packed, ctx.shape = packed, shape  # the parameter itself, whose values an engine frees and gathers again
        return inputs @ dequantise(packed, shape, inputs.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the inputs; the matrix is frozen."""
        return grads[0] @ dequantise(ctx.packed, ctx.shape, grads[0].dtype), None, None


class NF4Linear(nn.Linear):
    """nn.Linear whose frozen weight is bytes, (groups, bytes a group)."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take the place of a layer on `meta`, its bias included."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.empty(packed_shape(linear.weight.numel()), dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs (..., in) as (..., out) in their type."""
        made: Tensor = _Product.apply(inputs, self.weight, (self.out_features, self.in_features))  # type: ignore[no-untyped-call]
        return made if self.bias is None else made + self.bias


def pack_base(model: PreTrainedModel, adaptation: Adaptation) -> None:
    """Store every frozen linear layer of a model on `meta` in NF4, but for the head; norms, embeddings and biases stay as they are."""
    for path, layer in list(_frozen_layers(model)):
        parent, _, leaf = path.rpartition(".")
        adaptation.packed[f"{path}.weight"] = (layer.out_features, layer.in_features)
        setattr(model.get_submodule(parent), leaf, NF4Linear(layer))
    adaptation.origin = Packed(adaptation.origin, adaptation.packed)


def _frozen_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_submodule(SCORE) if gives_scores(model) else model.get_output_embeddings()
    kept = set() if head is None else set(head.modules())
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if plain and module not in kept and not module.weight.requires_grad:
            yield path, module


class Packed:
    """The Origin of a model whose matrices in `shapes` are stored in NF4: a rank reads and quantises the rows it asks for."""

    def __init__(self, origin: Origin, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the origin of the values, and the shapes of what is packed."""
        self.origin, self.shapes = origin, shapes

    def names(self) -> list[str]:
        """Return the names of the origin."""
        return self.origin.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the model has, packed or not."""
        return packed_shape(math.prod(self.shapes[name])) if name in self.shapes else self.origin.shape(name)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of bytes, or of what is not packed."""
        if name not in self.shapes:
            return self.origin.read(name, offset, shape)
        numel = math.prod(self.shapes[name])
        blocks = blocks_of(numel)
        group = blocks * BLOCK
        start, end = offset[0] * group, (offset[0] + shape[0]) * group
        values = read_elements(self.origin, name, self.shapes[name], min(start, numel), min(end, numel)).float()
        rows = quantise(nn.functional.pad(values, (0, end - start - len(values))), blocks)
        return rows[:, offset[1] : offset[1] + shape[1]]

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """What is trained decides: bytes are bytes."""
        return self.origin.is_exact_in(dtype)


@torch.no_grad()
def round_base(model: PreTrainedModel, adaptation: Adaptation) -> PreTrainedModel:
    """Give a base as it is on disk the values that it was trained with: its packed matrices rounded, in the type they have."""
    for name in adaptation.packed:
        weight = model.get_parameter(name.replace(".base_layer.", "."))
        weight.copy_(round_trip(weight))
    return model


def round_trip(weight: Tensor) -> Tensor:
    """Return the float32 values that a matrix has once it is stored in NF4."""
    blocks = blocks_of(weight.numel())
    short = packed_shape(weight.numel())[0] * blocks * BLOCK - weight.numel()
    return dequantise(quantise(nn.functional.pad(weight.float().flatten(), (0, short)), blocks), weight.shape, torch.float32)
