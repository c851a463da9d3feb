"""AdaLoRA beside what holds of every method: its ranks survive a stop, a skipped step and the way into the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command import arguments, launch, stop_at_step, trace
from conftest import Ranks, blueprint_for, save_tiny
from peft_cases import (
    CASES,
    LR,
    STEPS,
    NoTokenizer,
    batch_of,
    config_for,
    config_for_method,
    rows_of_steps,
)

from trainers.config.checks import validate
from trainers.config.choices import Offload, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.schema import PeftConfig
from trainers.engines.build import build_engine
from trainers.peft.adalora import Pruning, _pull_to_orthogonal
from trainers.peft.saved import export_adapter, reopen_adapter
from trainers.peft.update import Part
from trainers.world import World

OPEN, LAST = 7, 18
"""Steps after which a run is saved: while it prunes, and at its end, with its ranks final."""


def train(world: World, folder: Path, engine_name: str, out: Path, start: int) -> dict[str, Any]:
    """Train from the checkpoint at `start`, or from the beginning and save, to the end."""
    engine: Any = build_engine(config_for(folder, "adalora", engine_name), world, blueprint_for(folder))
    if start:
        engine.load(out / f"step-{start}")
    norms = []
    for step, (ids, labels) in enumerate(rows_of_steps()):
        if step == LAST:
            break
        if step < start:
            continue
        mine = slice(world.rank, None, world.size)
        engine.backward(-engine.forward(batch_of(ids[mine], labels[mine])).logps.sum() / 30, last=True)
        engine.adaptation.update.at(step, STEPS)
        norms.append(engine.step(LR))
        if not start and step + 1 in (OPEN, LAST):
            dcp.save(engine.state(), checkpoint_id=out / f"step-{step + 1}")
        if not start and step + 1 == OPEN:
            export_adapter(engine.weights(), engine.adaptation, NoTokenizer(), out / "early", write=world.rank == 0)
    weights = {name: tensor.numpy() for name, tensor in engine.weights()}
    return {"weights": weights, "norms": norms, "pattern": engine.adaptation.library_config.rank_pattern, "report": engine.report()}


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_continues_exactly_while_and_after_ranks_are_dealt_out(ranks: Callable[[int], Ranks], tmp_path: Path, engine: str) -> None:
    folder = save_tiny(tmp_path / "base", tied=False, num_hidden_layers=1)
    whole = ranks(2).call(train, folder, engine, tmp_path, 0)
    for start in (OPEN, LAST):
        again = ranks(2).call(train, folder, engine, tmp_path, start)[0]
        assert again["norms"] == whole[0]["norms"][start:]
        assert again["pattern"] == whole[0]["pattern"]
        for name, tensor in whole[0]["weights"].items():
            assert (again["weights"][name] == tensor).all(), name
    other = ranks(3).call(train, folder, engine, tmp_path, OPEN)[0]
    assert other["pattern"] == whole[0]["pattern"]
    for name, tensor in whole[0]["weights"].items():
        torch.testing.assert_close(torch.from_numpy(other["weights"][name]), torch.from_numpy(tensor), rtol=1e-5, atol=1e-6)
    assert sum(sum(kept) for kept in whole[0]["pattern"].values()) == 3 * len(whole[0]["pattern"])
    assert whole[0]["report"]["importance"].startswith("float32")
    early = json.loads((tmp_path / "early" / "adapter_config.json").read_text())
    assert early["rank_pattern"] is None
    opened: Any = reopen_adapter(tmp_path / "early", blueprint_for(folder).build("cpu"))
    values = torch.cat([p for name, p in opened.named_parameters() if "lora_E" in name])
    assert len(values) == 6 * len(whole[0]["pattern"])
    assert 0 < (values == 0).sum() < len(values) // 2


def test_the_regulariser_has_the_gradient_of_pefts_term() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, rows in (((3, 8), True), ((8, 3), False)):
        matrix = torch.randn(shape, generator=generator, requires_grad=True)
        square = matrix @ matrix.T if rows else matrix.T @ matrix
        (torch.norm(square - torch.eye(3), p="fro")).backward()
        torch.testing.assert_close(_pull_to_orthogonal(matrix.detach(), rows), matrix.grad)
    assert not _pull_to_orthogonal(torch.eye(3, 8), True).any()


def test_ranks_become_final_in_the_first_step_that_is_not_skipped() -> None:
    settings = PeftConfig(method=PeftMethod.adalora, rank=4, target_rank=2, tinit=1, tfinal=3)
    shapes = {f"layer.lora_{kind}.default": shape for kind, shape in (("A", (4, 5)), ("E", (4, 1)), ("B", (6, 4)))}
    generator = torch.Generator().manual_seed(0)
    pruning = Pruning(shapes, settings, PeftConfig())
    pruning.begin({name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()})

    def take(step: int) -> Any:
        parts = {
            name: Part(value=torch.rand(torch.Size(shape).numel(), generator=generator) + 0.1, grad=torch.ones(1), start=0)
            for name, shape in shapes.items()
        }
        pruning.at(step, 10)
        touched = pruning.after(parts, list)
        assert touched == (step > 1)
        return parts["layer.lora_E.default"].value

    for step in range(7):
        value = take(step)
        assert pruning.kept is None
    assert int((value == 0).sum()) == 2
    take(8)  # 7, in which they should have been, did not happen
    assert pruning.kept is not None
    assert int(pruning.kept.sum()) == 2
    assert torch.equal(take(9) != 0, pruning.kept)
    continued = Pruning(shapes, settings, PeftConfig())
    continued.load(pruning.state(lambda _, elements: elements))
    assert continued.kept is not None
    assert torch.equal(continued.kept, pruning.kept)


def test_a_schedule_that_cannot_be_is_refused() -> None:
    config = config_for_method(PeftMethod.adalora)
    config.peft.tinit, config.peft.tfinal, config.train.steps = 6, 4, 10
    with pytest.raises(ConfigError, match=r"`peft.tinit` = 6: with peft.tfinal = 4 it leaves none of the run's 10 steps"):
        validate(config)
    config.train.steps = 11
    validate(config)
    pruning = Pruning({}, config.peft, PeftConfig())
    with pytest.raises(ConfigError, match=r"peft\.tinit=1 peft\.tfinal=4"):
        pruning.at(0, 8)  # of a run counted in epochs
    config.engine.offload_optimizer = Offload.nvme
    with pytest.raises(ConfigError, match="these would be in files"):
        validate(config)


RUN = [
    "peft=adalora",
    "peft.rank=4",
    "peft.target_rank=2",
    "peft.tinit=2",
    "peft.tfinal=5",
    "train.steps=20",
    "checkpoint.every=3",
    "launch.processes=1",
]


@pytest.fixture(scope="module")
def finished(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the command a user types."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    said = launch(cache, arguments(base, chats, run_dir, *RUN, "train.eval_every=10"))
    assert "export reopened with plain peft" in said
    assert "importance" in said
    return run_dir


def test_a_run_exports_the_ranks_that_it_ended_with(finished: Path) -> None:
    config = json.loads((finished / "export" / "adapter_config.json").read_text())
    assert config["total_step"] == 20
    assert sum(sum(kept) for kept in config["rank_pattern"].values()) == 2 * len(config["rank_pattern"])
    assert len({sum(kept) for kept in config["rank_pattern"].values()}) > 1


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(base: Path, chats: Path, cache: Path, finished: Path, tmp_path: Path) -> None:
    """Stopped while it prunes; the engines' own test of it is above."""
    line = arguments(base, chats, tmp_path / "parts", *RUN, "train.eval_every=10")
    stop_at_step(cache, line, tmp_path / "parts", 5)
    assert "continuing from" in launch(cache, line)
    assert trace(tmp_path / "parts") == trace(finished)
    same = [(folder / "export" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "parts", finished)]
    assert same[0] == same[1]


def test_the_case_prunes_while_it_is_saved() -> None:
    case = CASES["adalora"]
    assert case["tinit"] + 1 < OPEN < STEPS - case["tfinal"] < LAST
