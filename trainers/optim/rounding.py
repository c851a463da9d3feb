"""Stochastic rounding to bfloat16 with noise that is a function of element and step, whatever rank holds the element."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements that are rounded at once: temporary memory stays small."""


def salt(name: str, step: int) -> int:
    """Return the number that tells a tensor and a step from all others, as an int32."""
    mixed = (zlib.crc32(name.encode()) ^ (step * 0x9E3779B1)) & 0xFFFFFFFF
    return mixed - (1 << 32) if mixed >> 31 else mixed


def noise(like: Tensor, start: int, salt: int) -> Tensor:
    """Return 32 random bits for each element of `like`, which is flat and begins at element `start` of its tensor; int32.

    The hash is lowbias32 (Wellons, "Prospecting for Hash Functions", 2018).
    """
    bits = like.new_empty(like.numel(), dtype=torch.int64)
    torch.arange(start, start + like.numel(), out=bits)
    bits = bits.to(torch.int32).bitwise_xor_(salt)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return bits


def round_into(out: Tensor, values: Tensor, bits: Tensor) -> None:
    """Write float32 `values` to bfloat16 `out`, up or down with the odds of what is cut off; `bits` are 16 random ones each.

    A bfloat16 number is the upper half of a float32, so adding noise below it and cutting rounds up as often as it should.
    """
    out.copy_((values.view(torch.int32) + bits).bitwise_and_(-65536).view(torch.float32))
