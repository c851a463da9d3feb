"""A run continues on the base that it began with, or says that it has changed; for a hub's model on the same commit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig, PeftConfig, RunConfig
from trainers.rundir.base import base_of, fingerprint, pinned, require_same_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a config."""
    folder = tmp_path / "base"
    folder.mkdir()
    for part in range(2):
        tensors = {f"layers.{part}.{name}": torch.randn(40, 64) for name in ("up", "down")}
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model-1.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def scale_one_layer(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"layers.1.up": tensors["layers.1.up"] * 1.001}))


def change_the_end_of_a_tensor(folder: Path) -> None:
    """As a row that was added to an embedding and trained."""
    rewrite(folder, lambda tensors: tensors["layers.1.down"][-1].zero_())


def rename_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"layers.1.gate": tensors.pop("layers.1.up")}))


def cut_a_file(folder: Path) -> None:
    file = folder / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_safetensors_at_all(folder: Path) -> None:
    (folder / "model-0.safetensors").write_bytes(b"\xff" * 200)


def change_the_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 5}')


def take_a_shard_away(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()


CHANGES = (
    *(scale_one_layer, change_the_end_of_a_tensor, rename_a_tensor, cut_a_file, no_safetensors_at_all),
    *(change_the_config, take_a_shard_away),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_weights_of_the_same_shapes_are_seen(change: Callable[[Path], None], folder: Path) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_a_copy_is_the_same_base(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "config.json", (1, 1))
    for name in ("README.md", "generation_config.json", "tokenizer_config.json"):  # the tokenizer has a fingerprint of its own
        (tmp_path / "copy" / name).write_text("{}")
    assert fingerprint(tmp_path / "copy") == before


def begun(run_dir: Path, **base: Any) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "manifest.json").write_text(json.dumps({"base": base}))
    return run_dir


def test_a_changed_base_and_a_changed_adapter_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(id=str(folder)), peft=PeftConfig(adapter=str(folder)))
    run_dir = begun(tmp_path / "run", **base_of(config, folder, None))
    require_same_base(run_dir, base_of(config, folder, None))
    now = base_of(config, folder, None)
    for mark, field in (("weights", "model.id"), ("adapter", "peft.adapter")):
        with pytest.raises(ConfigError, match=f"`{field}`.*weights have changed") as error:
            require_same_base(run_dir, now | {mark: "other"})
        assert f"run_dir={run_dir}-new" in error.value.remedy
    require_same_base(begun(tmp_path / "of an older version"), now)
    assert "weights" not in base_of(RunConfig(), None, None)


def test_a_changed_critic_is_refused_and_its_commit_is_kept(tmp_path: Path) -> None:
    own = {"id": "org/critic", "asked": None, "commit": "abc", "weights": "of then"}
    run_dir = begun(tmp_path / "run", id="org/model", asked=None, commit="def", critic=own)
    now = {"id": "org/model", "critic": own}
    require_same_base(run_dir, now)
    require_same_base(run_dir, {"id": "org/model"})
    with pytest.raises(ConfigError, match=r"`objective.critic`.*weights have changed"):
        require_same_base(run_dir, now | {"critic": own | {"weights": "of now"}})
    assert pinned(RunConfig(model=ModelConfig(id="org/critic")), run_dir, "critic").model.revision == "abc"
    assert pinned(RunConfig(model=ModelConfig(id="org/other")), run_dir, "critic").model.revision is None


@pytest.mark.parametrize(
    ("asked", "model", "takes"),
    [
        (None, ModelConfig(id="org/model"), "abc"),
        ("main", ModelConfig(id="org/model", revision="main"), "abc"),
        (None, ModelConfig(id="org/model", revision="v2"), "v2"),
        (None, ModelConfig(id="org/other"), None),
    ],
)
def test_a_later_attempt_takes_the_commit_of_the_first(asked: str | None, model: ModelConfig, takes: str | None, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", id="org/model", asked=asked, commit="abc")
    assert pinned(RunConfig(model=model), run_dir).model.revision == takes
    begun(tmp_path / "run", id="org/model", asked=asked, commit=None)
    assert pinned(RunConfig(model=model), run_dir).model == model
