"""Pickled weights (pytorch_model.bin) as safetensors, made once into the cache. Nothing in them runs: torch loads tensors alone."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainers.cache import build_once, content_key, home
from trainers.config.errors import ConfigError
from trainers.model.safetensors_files import INDEX
from trainers.processes import raise_exhausted

log = logging.getLogger("fulltune")
BIN_INDEX = "pytorch_model.bin.index.json"


def converted(folder: Path) -> Path:
    """Return a directory with the files of `folder`, its weights as safetensors; raises ConfigError where they are not tensors alone.

    Shards stay shards: one is in memory at a time, and twice what of it shares memory.
    """
    names = _bins(folder)
    marks = [(name, info.st_size, info.st_mtime_ns) for name in names for info in [(folder / name).stat()]]
    key = content_key(str(folder.resolve()), marks)
    return build_once(home() / "converted", f"weights-{key}", lambda made: _convert(folder, names, made), "the converted weights")[0]


def _bins(folder: Path) -> list[str]:
    index = folder / BIN_INDEX
    names = ["pytorch_model.bin"] if not index.is_file() else sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    if lost := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise ConfigError("model.convert", True, f"{folder} has no file {lost[0]}", "fetch the files again")
    return names


def _convert(folder: Path, names: list[str], made: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in (".bin", ".safetensors") and path.name not in (BIN_INDEX, INDEX):
            shutil.copyfile(path, made / path.name)
    placed: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        file = "model.safetensors" if len(names) == 1 else f"model-{number:05d}-of-{len(names):05d}.safetensors"
        tensors = _tensors(folder / name)
        save_file(tensors, made / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
    if len(names) > 1:
        (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    log.info("converted %s of %s to safetensors, once: %s", ", ".join(names[:2]), folder, made.parent)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Load a file of tensors by name; tensors that share memory each get their own."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise_exhausted(error)
        reason = f"{path} holds more than tensors, or is damaged: {str(error).strip().splitlines()[0]}"
        raise ConfigError("model.convert", True, reason, "weights from somewhere else: nothing in this file was run") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError("model.convert", True, f"{path} is not a table of tensors by name", "weights in Hugging Face form")
    storages = [value.untyped_storage().data_ptr() for value in found.values()]
    alone = {place for place in storages if storages.count(place) == 1}
    return {
        name: value.contiguous() if place in alone else value.clone().contiguous()
        for (name, value), place in zip(found.items(), storages, strict=True)
    }
