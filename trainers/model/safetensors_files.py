"""The safetensors files of a model directory: their headers checked, their tensors read slice by slice."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from trainers.config.errors import ConfigError
from trainers.processes import raise_exhausted

INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
TYPES = FLOATS | INTEGERS | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file, its type as safetensors names it, its shape and its first byte."""

    path: Path
    type: str
    shape: tuple[int, ...]
    begin: int


class Weights:
    """The safetensors files of a model directory. Read by pread: a mapping's pages would count as this process's memory."""

    def __init__(self, folder: Path, file: str = "model.safetensors") -> None:
        """Read every file's header, by the index or `file` alone.

        Raises one ConfigError that names all files that are missing or damaged and keys that are lost.
        """
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        placed = _placed(folder / INDEX)
        wrong = []
        for name in sorted(set(placed.values())) or [file]:
            try:
                self.stored |= _header(folder / name)
            except FileNotFoundError:
                wrong.append(f"{name} is missing")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever bytes other than a header parse to
                raise_exhausted(error)
                wrong.append(f"{name} is damaged or truncated: {error}")
        lost = [key for key in placed if key not in self.stored]
        if lost and not wrong:
            wrong.append(f"{INDEX} promises {listed(lost)}, which {listed(sorted({placed[key] for key in lost}))} does not hold")
        if wrong:
            converts = not self.stored and list(folder.glob("pytorch_model*.bin"))
            remedy = "model.convert=true reads its pytorch_model.bin, once" if converts else "fetch the files again"
            raise ConfigError("model.id", str(folder), "; ".join(wrong), remedy)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the block of `shape` at `offset` of a tensor, in the type it has on disk; nothing else is read."""
        stored = self.stored[key]
        dtype, whole = TYPES[stored.type], stored.shape
        cut = max((dim for dim in range(len(whole)) if shape[dim] != whole[dim]), default=0)
        strides = [math.prod(whole[dim + 1 :]) * dtype.itemsize for dim in range(len(whole))]
        block = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        view, run = memoryview(block.numpy().data), math.prod(shape[cut:]) * dtype.itemsize
        leading = itertools.product(*(range(start, start + size) for start, size in zip(offset[:cut], shape[:cut], strict=True)))
        with stored.path.open("rb", buffering=0) as file:
            for number, index in enumerate(leading if run else ()):
                at = sum(i * stride for i, stride in zip((*index, *offset[cut:]), strides, strict=True))
                _fill(view[number * run : (number + 1) * run], file, stored.begin + at)
        return block.view(dtype).view(tuple(shape))

    def read_whole(self, key: str) -> Tensor:
        """Return a whole tensor."""
        shape = self.stored[key].shape
        return self.read(key, (0,) * len(shape), shape)

    def pieces(self, key: str) -> Iterator[Tensor]:
        """Yield a tensor in consecutive pieces: some of its rows at a time, PIECE_BYTES or one row."""
        shape = self.stored[key].shape
        if not shape:
            yield self.read_whole(key)
            return
        row = math.prod(shape[1:]) * TYPES[self.stored[key].type].itemsize
        step = max(1, PIECE_BYTES // max(1, row))
        for start in range(0, shape[0], step):
            yield self.read(key, (start, *(0 for _ in shape[1:])), (min(step, shape[0] - start), *shape[1:]))


def _fill(view: memoryview, file: FileIO, at: int) -> None:
    while view:
        count = os.preadv(file.fileno(), [view[: 1 << 30]], at)
        if not count:
            raise ConfigError("model.id", str(file.name), "has become shorter while it is read", "fetch the files again")
        view, at = view[count:], at + count


def _placed(index: Path) -> dict[str, str]:
    """Return the file of each key by the index; empty where there is none."""
    if not index.is_file():
        return {}
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return dict(placed)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("model.id", str(index.parent), f"{index.name} is damaged: {error!r}", "fetch the files again") from error


def _header(path: Path) -> dict[str, Stored]:
    """Return what a file holds: 8 bytes of length, that much JSON, the data. Raises ValueError where the parts do not fit."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"it has {size:,} bytes, its header alone {8 + length:,}")
        entries = {key: entry for key, entry in json.loads(file.read(length)).items() if key != "__metadata__"}
    ends = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if ends != size:
        raise ValueError(f"it has {size:,} bytes and should have {ends:,}")
    return {key: Stored(path, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0]) for key, e in entries.items()}


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message, the first few and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
