"""Files from somebody else run no code, and reach nothing outside their folder: docs/security.md says what is tested where."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tools import export
from trainers.engines.stored import load_state, read_contents

State = dict[str, Any]


class Calls:
    """Calls a function where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def make_state() -> State:
    return {"model": {"weight": torch.arange(6.0).view(2, 3)}, "optimizer": {"step": 3, "betas": (0.9, 0.95), "names": ["weight"]}}


def empty_state() -> State:
    return {"model": {"weight": torch.zeros(2, 3)}, "optimizer": {"step": 0, "betas": (0.0, 0.0), "names": []}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save(make_state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def test_a_checkpoint_loads_as_torch_loads_it(saved: Path) -> None:
    mine, theirs = empty_state(), empty_state()
    load_state(mine, saved)
    dcp.load(theirs, checkpoint_id=saved, no_dist=True)
    assert torch.equal(mine["model"]["weight"], make_state()["model"]["weight"])
    assert mine["optimizer"] == theirs["optimizer"] == make_state()["optimizer"]
    assert read_contents(saved).state_dict_metadata == dcp.FileSystemReader(saved).read_metadata().state_dict_metadata


def global_of(module: str, name: str, argument: str) -> bytes:
    """Pickle a call of a global by its name alone, such as `torch` `serialization.os.system`, which getattr would follow."""
    encoded = [b"\x8c" + bytes([len(value)]) + value.encode() for value in (module, name, argument)]
    return b"\x80\x04" + encoded[0] + encoded[1] + b"\x93" + encoded[2] + b"\x85R."


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "a call": lambda marker: pickle.dumps(Calls(os.mkdir, str(marker))),
    "eval": lambda marker: pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(marker)!r})")),
    "protocol 0": lambda marker: pickle.dumps(Calls(os.mkdir, str(marker)), protocol=0),
    "a dotted name": lambda marker: global_of("torch", "serialization.os.mkdir", str(marker)),
    "a dotted known class": lambda marker: global_of("torch.distributed.checkpoint.metadata", "os.mkdir", str(marker)),
    "torch.load": lambda marker: global_of("torch", "load", str(marker)),
    "a private part of torch": lambda marker: global_of("torch.serialization", "_get_layout.__globals__", str(marker)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_table_of_contents_calls_nothing(saved: Path, tmp_path: Path, case: str) -> None:
    marker = tmp_path / "ran"
    (saved / ".metadata").write_bytes(HOSTILE[case](marker))
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
        read_contents(saved)
    with pytest.raises(CheckpointException, match="which no checkpoint needs"):
        load_state(empty_state(), saved)
    with pytest.raises(export.Damaged, match="is not a checkpoint"):
        export.Stored(saved)
    assert not marker.exists()


def test_code_next_to_a_real_table_of_contents_is_refused(saved: Path, tmp_path: Path) -> None:
    found, marker = read_contents(saved), tmp_path / "ran"
    found.planner_data = [Calls(os.mkdir, str(marker))]
    (saved / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointException, match=r"names posix\.mkdir"):
        load_state(empty_state(), saved)
    assert not marker.exists()


def test_a_value_that_is_no_tensor_calls_nothing(tmp_path: Path) -> None:
    marker, state = tmp_path / "ran", make_state()
    state["optimizer"]["step"] = Calls(os.mkdir, str(marker))
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        load_state(empty_state(), tmp_path / "saved")
    assert not marker.exists()
    dcp.load(empty_state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    assert marker.exists()  # torch's own loading would have run it


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ""])
def test_a_checkpoint_names_no_file_outside_its_folder(saved: Path, name: str) -> None:
    found = read_contents(saved)
    for place in found.storage_data.values():
        object.__setattr__(place, "relative_path", name)
    (saved / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointException, match="which is not a file of its folder"):
        load_state(empty_state(), saved)
    with pytest.raises(export.Damaged, match="which is not a file of its folder"):
        export.Stored(saved)
