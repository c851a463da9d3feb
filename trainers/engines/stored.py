"""Read a checkpoint of torch.distributed.checkpoint that may be somebody else's: it runs no code and names no file outside its folder.

torch unpickles `.metadata` without limits, and every value that is not a tensor.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

KNOWN = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "BytesStorageMetadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size")}
"""What a table of contents consists of, next to dtypes and one path. None of them runs anything when it is made."""


class Foreign(pickle.UnpicklingError):
    """A checkpoint names something that no checkpoint needs."""


class _Contents(pickle.Unpickler):
    """Unpickles a table of contents, by the manual's way of restricting globals."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of KNOWN; raises Foreign for any other."""
        if (module, name) in KNOWN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module.partition(".")[0] == "pathlib" and name.removeprefix("Pure") in (
            "PosixPath",
            "WindowsPath",
        ):  # where it was saved, which nobody reads
            return PurePath
        raise Foreign(f"its .metadata names {module}.{name}, which no checkpoint needs and which is not run")


def read_contents(folder: Path) -> metadata.Metadata:
    """Return a checkpoint's table of contents; raises UnpicklingError where it holds anything else, OSError where it cannot be read."""
    with (folder / ".metadata").open("rb") as file:
        found = _Contents(file).load()
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise Foreign("its .metadata is not a table of contents")
    names = {str(place.relative_path) for place in found.storage_data.values()}
    if outside := sorted(name for name in names if name != os.path.basename(name) or name in ("", ".", "..")):
        raise Foreign(f"its .metadata names {outside[0]}, which is not a file of its folder")
    return found


class _Reader(dcp.FileSystemReader):
    """torch's reader with a table of contents that is only one."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the table of contents."""
        found = read_contents(Path(self.path))
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    """torch's planner, for which a value that is not a tensor is a plain one."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load numbers, texts and lists of them; what torch then unpickles are bytes of this process."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load_state(state: dict[str, Any], folder: Path, part: str | None = None) -> None:
    """Fill `state` from a checkpoint, or from the part of it that has a name, resharded as torch.distributed.checkpoint does.

    Collective; raises CheckpointException.
    """
    dcp.load(state if part is None else {part: state}, storage_reader=_Reader(folder), planner=_Planner())
