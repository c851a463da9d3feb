"""The step that is exported: the best by held-out loss where the run keeps it, else the last; all that reads a run names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import arguments, launch, read_rows, tool
from safetensors.torch import load_file
from synthetic import change, make_run

from launcher.report import rows
from tools.compare.gather import load
from tools.evaluate.record import load as read_evaluation
from tools.gate import card
from trainers.config.checks import validate
from trainers.config.choices import DataSource, Export
from trainers.config.derived import best_kept, exports_best
from trainers.config.errors import ConfigError
from trainers.config.schema import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainConfig


def config_of(held_out: bool = True, keep_best: int = 0, **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(architecture={"model_type": "llama"}, train_tokenizer=300),
        data=DataConfig(source=DataSource.python_docs, eval_fraction=0.1 if held_out else 0.0),
        train=TrainConfig(**train),
        checkpoint=CheckpointConfig(keep_best=keep_best),
    )


@pytest.mark.parametrize(
    ("settings", "best", "kept"),
    [
        ({"eval_every": 5}, False, 0),
        ({"eval_every": 5, "patience": 3}, True, 1),
        ({"eval_every": 5, "keep_best": 2}, True, 2),
        ({"eval_every": 5, "export": Export.best}, True, 1),
        ({"eval_every": 5, "patience": 3, "export": Export.last}, False, 0),
        ({"eval_every": 5, "keep_best": 2, "export": Export.last}, False, 2),
        ({"held_out": False, "keep_best": 1}, False, 1),
    ],
    ids=str,
)
def test_the_best_is_exported_where_it_is_kept(settings: dict[str, Any], best: bool, kept: int) -> None:
    config = config_of(**settings)
    validate(config)
    assert (exports_best(config), best_kept(config)) == (best, kept)


@pytest.mark.parametrize(("settings", "remedy"), [({"held_out": False, "eval_every": None}, "data.eval_"), ({}, "train.eval_every=100")])
def test_the_best_of_nothing_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config_of(**settings, export=Export.best))
    assert refused.value.path == "train.export"
    assert remedy in refused.value.remedy


def test_a_run_that_gets_worse_exports_its_best_step(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Early stopping ends after the best step by construction; the export is that step's checkpoint."""
    run = tmp_path / "run"
    more = ["train.steps=40", "optim.lr=0.1", "optim.schedule=constant", "train.eval_every=1", "train.patience=3", "launch.processes=1"]
    said = launch(cache, arguments(base, chats, run, *more))
    losses = {row["step"]: row["eval_loss"] for row in read_rows(run) if "eval_loss" in row and row["step"]}
    best, summary = min(losses, key=lambda step: losses[step]), json.loads((run / "summary.json").read_text())
    assert best < max(losses)
    assert (summary["export_step"], summary["steps"]) == (best, max(losses))
    assert summary["eval_loss_after"] == pytest.approx(losses[best])
    assert summary["eval_loss_last"] == pytest.approx(losses[max(losses)])
    assert "the checkpoint of the lowest held-out loss" in said
    assert f"step {best} is exported" in said
    tool(cache, run, tmp_path / "out", name="export")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run / "export", tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_table_comparison_and_card_name_the_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change(run / "summary.json", export_step=15, eval_loss_after=1.5, eval_loss_last=2.0)
    summary = json.loads((run / "summary.json").read_text())
    assert dict(rows(summary))["exported step"] == "15, of the lowest held-out loss; step 20 has 2.0000"
    found = load(run, "run")
    assert found.loss == 1.5
    assert "exports step 15 of 20, of the lowest held-out loss" in found.notes
    ours = read_evaluation(run / "evaluation", "run")
    assert ours is not None
    assert "exported: step 15, of the lowest held-out loss, 1.5000 nats a token" in card.card(run, ours, None, [], Path("rules.yaml"))
    change(run / "summary.json", export_step=20)
    assert "exported step" not in dict(rows(json.loads((run / "summary.json").read_text())))
    assert not [note for note in load(run, "run").notes if "exports" in note]
