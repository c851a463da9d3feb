"""Sweeps on this machine: every point a run of its own; the same command again runs what is missing or has failed."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from command import ROOT, arguments, environment, launch, read_rows, tool, wait_for_step, wait_until_gone
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from launcher.compose import CONF, typed
from launcher.config import register
from launcher.sweep import PointLoader


def states(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["state"] for path in sorted(folder.glob("*/status.json"))}


def command(base: Path, chats: Path, folder: Path, *more: str) -> list[str]:
    line = [word for word in arguments(base, chats, folder) if not word.startswith(("run_dir=", "optim.lr=", "launch.processes="))]
    return [*line[:3], "-m", *line[3:], f"hydra.sweep.dir={folder}", "launch.processes=1", "train.eval_every=null", *more]


@pytest.mark.slow
def test_a_failing_point_stops_no_other(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """The middle one diverges; the same command again starts that alone, and single runs of the others have the same figures."""
    folder = tmp_path / "sweep"
    line = command(base, chats, folder, "optim.lr=1e-2,1e38,3e-3", "train.max_skipped=1", "train.steps=3", "data.eval_fraction=0")
    said = launch(cache, line, expect=1)
    assert states(folder) == {"optim.lr=0.003": "done", "optim.lr=0.01": "done", "optim.lr=1e+38": "failed"}
    assert said.index("point 1 of 3") < said.index("point 2 of 3") < said.index("point 3 of 3")
    assert said.count("/export") >= 2
    again = launch(cache, line, expect=1)
    assert again.count("is done already") == 2
    alone = [word for word in line if word not in ("-m", f"hydra.sweep.dir={folder}") and not word.startswith("optim.lr=")]
    launch(cache, [*alone, "optim.lr=3e-3", f"run_dir={tmp_path / 'alone'}"])
    figures = [[(row["loss"], row["grad_norm"]) for row in read_rows(run)] for run in (tmp_path / "alone", folder / "optim.lr=0.003")]
    assert figures[0] == figures[1]
    assert json.loads((folder / "optim.lr=0.003" / "manifest.json").read_text())["wandb_id"]


def test_a_dry_run_prints_every_point_and_leaves_nothing(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    said = launch(cache, command(base, chats, tmp_path / "sweep", "optim.lr=1e-2,1e-3", "mode=dry_run"))
    assert said.count("-m trainers ") == 2
    assert said.count("# peak learning rate 0.01, from optim.lr") == 1
    assert not (tmp_path / "sweep").exists()


def test_each_method_of_a_sweep_trains_at_its_own_rate(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """The first step takes the rate of the preset, and the start-up table of the ranks says where it is from."""
    folder = tmp_path / "sweep"
    said = launch(cache, command(base, chats, folder, "peft=none,lora,ia3", "train.steps=1", "data.eval_fraction=0", "optim.full_lr=3e-3"))
    rates = {"none": ("optim.full_lr", 3e-3), "lora": ("peft.lr", 2e-4), "ia3": ("peft.lr", 3e-3)}
    assert states(folder) == {f"peft={name}": "done" for name in sorted(rates)}
    for name, (setting, rate) in rates.items():
        assert [row["lr"] for row in read_rows(folder / f"peft={name}")] == [rate]
        assert f"{rate:g}, from {setting}" in said


def references(cache: Path) -> set[Path]:
    return {path for path in (cache / "prepared").glob("reference-*") if path.is_dir()}


@pytest.mark.slow
def test_a_sweep_over_objectives_prepares_once_and_measures_one_reference(base: Path, cache: Path, tmp_path: Path) -> None:
    """Each point has the values of its preset and the rate of full fine-tuning; a sweep over beta reads the reference again."""
    file, folder = tmp_path / "pairs.jsonl", tmp_path / "sweep"
    rows = [{"prompt": f"the cat {number}", "chosen": "sat on a mat", "rejected": f"far home {number}"} for number in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("train.steps=1", "data.eval_fraction=0", "optim.full_lr=3e-3")
    before = references(cache)
    launch(cache, command(base, file, folder, "objective=dpo,simpo,orpo", *more))
    assert states(folder) == {f"objective={name}": "done" for name in ("dpo", "orpo", "simpo")}
    settings = {name: yaml.safe_load((folder / f"objective={name}" / "config.yaml").read_text()) for name in ("dpo", "simpo", "orpo")}
    assert {name: (found["objective"]["beta"], found["objective"]["margin"]) for name, found in settings.items()} == {
        "dpo": (0.1, 0.0),
        "simpo": (2.5, 1.375),
        "orpo": (0.1, 0.0),
    }
    assert [row["lr"] for name in settings for row in read_rows(folder / f"objective={name}")] == [3e-3] * 3
    assert len({json.loads((run / "manifest.json").read_text())["prepared"] for run in folder.glob("objective=*")}) == 1
    assert [run.parent.name for run in folder.glob("*/reference")] == ["objective=dpo"]
    kept = references(cache) - before
    assert len(kept) == 1
    tool(cache, folder, "--rows", "0", "--path", file)
    said = tool(cache, folder, name="compare")
    assert "3 methods, 3 runs" in said
    assert "preference accuracy" in said
    assert "not compared" not in said
    again = tmp_path / "betas"
    launch(cache, command(base, file, again, "objective=dpo", "objective.beta=0.1,0.5", *more))
    assert references(cache) - before == kept
    files = [run / "reference" / "train.npy" for run in (folder / "objective=dpo", *sorted(again.glob("objective.beta=*")))]
    assert [found.read_bytes() for found in files] == [files[0].read_bytes()] * 3


@pytest.mark.slow
def test_ctrl_c_stops_the_sweep_and_the_same_command_goes_on(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    line = command(base, chats, folder, "seed=1,2", "train.steps=60", "checkpoint.every=60", "data.eval_fraction=0")
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(folder / "seed=1", 3, process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    wait_until_gone(folder / "seed=1")
    assert states(folder)["seed=1"] == "preempted"
    launch(cache, line)
    assert states(folder) == {"seed=1": "done", "seed=2": "done"}
    assert [row["step"] for row in read_rows(folder / "seed=1")] == list(range(1, 61))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["optim.lr=1e-2,-1"], ["optim.lr", "greater than 0"]),
        (["run_dir=runs/a,runs/b"], ["run_dir", "hydra.sweep.dir=DIR"]),
        (["optim.lr=1e-2,0.01"], ["two points have this folder"]),
        (["launch.shutdown_s=1,2"], ["one sweep for each launch"]),
        (["optim.lr=1e-2,1e-3", "launch=torchrun"], ["launch=local or launch=slurm"]),
    ],
    ids=lambda value: value[0],
)
def test_wrong_points_are_refused_before_any_has_started(
    more: list[str], words: list[str], base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    said = launch(cache, command(base, chats, tmp_path / "sweep", *more), expect=2)
    assert all(word in said for word in words)
    assert "Traceback" not in said
    assert not (tmp_path / "sweep").exists()


def test_values_arrive_unchanged(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Spaces, =, %, |, #, quotes and Korean letters; each value has a folder whose name any shell takes."""
    folder, values = tmp_path / "sweep", ["a b=c 50%|x#y d'e 한글", "plain"]
    quoted = ",".join('"' + value + '"' for value in values)
    launch(cache, command(base, chats, folder, f"name={quoted}", "train.steps=1", "data.eval_fraction=0"))
    found = {path.parent.name: yaml.safe_load(path.read_text())["name"] for path in folder.glob("*/config.yaml")}
    assert sorted(found.values()) == sorted(values)
    assert all(name.isascii() and not set(name) & set(" %|#'\"") for name in found)


CONSTANT = ("model=hf", "model.id=x", "data=files", "data.path=y", "run_dir=z", "train={steps: 3}")
POINTS = [
    ("seed=1", "optim.lr=1e-2"),
    ("seed=2", "optim.lr=3e-3"),
    ("peft=lora", "peft.rank=4", "seed=1"),
    ("peft=lora", "peft.rank=16", "seed=2"),
    ("peft=ia3", "seed=1"),
    ("train.steps=7", "seed=1"),
    ("peft=lora", "peft.targets=[q_proj,v_proj]", "seed=3"),
    ("name='a, b'", "data.eval_path=null"),
    ("+launch.sbatch.qos=low", "seed=1"),
    ("++model.architecture.vocab_size=8", "seed=1"),
    ("evaluation.rows=5", "train.sample_tokens=0"),
]


def test_points_composed_once_and_copied_are_those_that_hydra_composes() -> None:
    """Files are merged once for each choice of files, and each point is equal to Hydra's own in every field."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = Counted(GlobalHydra.instance().config_loader())
        master = loader.load_configuration("config", [], RunMode.MULTIRUN)
        points = PointLoader(loader, {text.partition("=")[0] for text in CONSTANT})
        for given in POINTS:
            found = points.load_sweep_config(master, [*CONSTANT, *given])
            expected = loader.load_sweep_config(master, [*CONSTANT, *given])
            with read_write(expected), open_dict(expected):
                del expected["hydra"]
            assert OmegaConf.to_container(found, resolve=True) == OmegaConf.to_container(expected, resolve=True)
            assert typed(found) == typed(expected)
        loader.count = 0
        for number in range(50):
            assert points.load_sweep_config(master, [*CONSTANT, f"seed={number}", "optim.lr=2e-3"]).seed == number
        assert loader.count == 0
        with pytest.raises(HydraException, match=r"seed"):
            points.load_sweep_config(master, [*CONSTANT, "seed=few"])


class Counted:
    """Hydra's loader, which counts the points that it composes."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.count = loader, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, *arguments: Any) -> DictConfig:
        self.count += 1
        return self.loader.load_sweep_config(*arguments)
