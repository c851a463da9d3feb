"""Files from somebody else run no code, and reach nothing outside their folder: docs/security.md says what is tested where."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from synthetic import change, make_run
from torch.distributed.checkpoint.api import CheckpointException

from launcher.config import JobConfig
from launcher.freeze import freeze
from launcher.job import frozen_text, make_job
from tools import export
from tools.compare.methods import compare
from tools.compare.page import page
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig, read
from trainers.data import masks
from trainers.data.formats import BadRow
from trainers.data.table import open_table
from trainers.data.template import Template
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


HOSTILE_TEXT = """<script>document.title='ran'</script><img src=x onerror="document.title='ran'">$\\frac{&'"</style></svg>"""


def test_hostile_names_and_answers_are_text_in_a_page(tmp_path: Path) -> None:
    for number, name in enumerate(("peft=none", "peft=lora<script>alert(1)</script>".replace("/", "_"))):
        run = make_run(tmp_path / "sweep" / name, "none" if number == 0 else "lora", better=0.5, seed=number)
        change(run / "config.yaml", name=HOSTILE_TEXT, model__id=HOSTILE_TEXT)
        change(run / "manifest.json", command=["python", HOSTILE_TEXT])
        rows = (run / "evaluation" / "run.jsonl").read_text()
        (run / "evaluation" / "run.jsonl").write_text(rows.replace("#### ", json.dumps(HOSTILE_TEXT)[1:-1] + "#### "))
    text = page(compare([tmp_path / "sweep"], None), [HOSTILE_TEXT])
    assert "onerror" in text
    assert not re.search(r"<(?:script|img)", text)
    assert "Content-Security-Policy" in text.partition("<title>")[0]


TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
    "functions": "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "formats": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changes": "{{ messages.append(messages[0]) }}",
    "files": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path: Path, case: str) -> None:
    marker = tmp_path / "ran"
    jinja = TEMPLATES[case].replace("MARKER", str(marker)) + "{{ messages[0]['content'] }}"
    with pytest.raises((BadRow, ConfigError)):
        masks.render(Template(jinja=jinja, name="data.template", variables={}, tokens=None), [{"role": "user", "content": "a"}])
    assert not marker.exists()


def test_prepared_arrays_hold_numbers_only(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.save(tmp_path / "tokens.npy", np.array([Calls(os.mkdir, str(marker))], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"Python objects|allow_pickle"):
        open_table(tmp_path)
    assert not marker.exists()


def test_a_frozen_config_makes_no_objects_and_reads_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, marker = tmp_path / "config.yaml", tmp_path / "ran"
    file.write_text(f"name: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(file)
    assert not marker.exists()
    monkeypatch.setenv("MY_SECRET", "tiger")
    for value in ("${oc.env:MY_SECRET}", "a ${oc.env:MY_SECRET} b", "${run_dir}"):
        file.write_text(f"name: {json.dumps(value)}\n")
        with pytest.raises(ConfigError, match="which no frozen config does"):
            read(file)
    for value in ("${oc.env:MY_SECRET}", "\\${x}", "\\\\", "a$b"):
        file.write_text(frozen_text(RunConfig(name=value)))
        assert read(file).name == value


def test_pickled_adapters_run_no_code(tmp_path: Path) -> None:
    from peft.utils.save_and_load import load_peft_weights

    marker = tmp_path / "ran"
    torch.save({"weight": torch.zeros(1), "more": Calls(os.mkdir, str(marker))}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load_peft_weights(str(tmp_path), device="cpu")
    assert not marker.exists()


def test_a_file_of_a_run_directory_that_leads_out_of_it_is_refused(tmp_path: Path) -> None:
    run_dir, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("mine")
    job = make_job(JobConfig(run_dir=str(run_dir)))
    freeze(job)
    for name in ("metrics.jsonl", f".launcher-{socket.gethostname()}.lock", "logs/rank-0.log"):
        link = run_dir / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(precious)
        with pytest.raises(ConfigError, match=f"is a link to {precious}"):
            freeze(job)
        link.unlink()
    (run_dir / "latest").symlink_to("config.yaml")
    (run_dir / "wandb" / "run" / "logs").mkdir(parents=True)
    (run_dir / "wandb" / "run" / "logs" / "debug-core.log").symlink_to(precious)  # as W&B makes one
    (run_dir / "checkpoints").symlink_to(tmp_path)  # a folder on another disk
    freeze(job)
    assert precious.read_text() == "mine"
