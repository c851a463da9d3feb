"""engine.mesh=auto takes the fastest mesh that fits, says why, and keeps it for the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import arguments, launch, read_rows, stop_at_step

from launcher.__main__ import dry_run
from launcher.compose import compose
from launcher.job import frozen_text, make_job
from launcher.meshes import settled
from launcher.plan import known_hardware, plain
from launcher.proposals import changes_of
from tools.bench.plan import Case
from trainers.config.choices import Activations, MeshChoice, PeftMethod, Precision
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.config.meshes import meshes, with_mesh, words_of
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, PeftConfig, RunConfig, TrainConfig, parse
from trainers.plan.meshes import choose
from trainers.plan.request import HardwareConfig, Place, PlanConfig, Request, Variant
from trainers.rundir import paths
from trainers.units import GIB

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
}


def run_of(global_batch: int, engine: EngineConfig | None = None, method: PeftMethod = PeftMethod.none) -> RunConfig:
    return RunConfig(
        model=ModelConfig(architecture=LLAMA, train_tokenizer=300),
        data=DataConfig(path="unused"),
        engine=engine or EngineConfig(mesh=MeshChoice.auto),
        peft=PeftConfig(method=method),
        train=TrainConfig(global_batch=global_batch),
    )


def test_what_is_tried_goes_with_the_run_and_keeps_sizes_that_are_named() -> None:
    def tried(config: RunConfig, nodes: int = 2) -> list[str]:
        return [words_of(mesh) for mesh in meshes(config, nodes, 4)]

    every = ["sharding alone", "2 copies", "context 2", "2 copies, context 2", "tensor 2", "2 copies, tensor 2", "context 4"]
    every += ["2 copies, context 4", "context 2, tensor 2", "2 copies, context 2, tensor 2"]
    assert tried(run_of(8)) == every, "two key-value heads do not divide over four"
    assert tried(run_of(4)) == every[2:], "eight groups do not share four rows"
    assert tried(run_of(8), nodes=1) == every[::2]
    assert tried(run_of(8, method=PeftMethod.dora)) == [words for words in every if "tensor" not in words]
    assert tried(run_of(8, EngineConfig(mesh=MeshChoice.auto, context=2))) == [words for words in every if "context 2" in words]
    assert tried(run_of(8, EngineConfig(mesh=MeshChoice.auto, shard=4))) == ["2 copies", "context 2", "tensor 2"]
    assert tried(run_of(8, EngineConfig(mesh=MeshChoice.auto, context=8))) == ["context 8"], "over two nodes where that is named"
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        meshes(run_of(3), 2, 4)
    with pytest.raises(ConfigError, match="do not divide into groups"):
        meshes(run_of(8, EngineConfig(mesh=MeshChoice.auto, context=3)), 2, 4)


def test_experts_are_dealt_out_where_a_model_has_some() -> None:
    def tried(config: RunConfig, known: dict[str, Any] | None = None) -> list[str]:
        return [words_of(mesh) for mesh in meshes(config, 1, 4, known)]

    mixture = LLAMA | {"model_type": "qwen3_moe", "num_experts": 6}
    run = replace(run_of(8), model=ModelConfig(architecture=mixture, train_tokenizer=300))
    every = ["sharding alone", "expert 2", "context 2", "context 2, expert 2", "context 4", "context 4, expert 2"]
    assert tried(run) == every, "six experts do not divide over four, and layers of a mixture are not split"
    assert tried(replace(run, engine=EngineConfig(mesh=MeshChoice.auto, expert=2))) == [words for words in every if "expert 2" in words]
    selective = replace(run, train=TrainConfig(global_batch=8, activations=Activations.selective))
    assert tried(selective) == tried(replace(run, peft=PeftConfig(method=PeftMethod.dora))) == every[::2]
    hub = replace(run, model=ModelConfig(id="owner/name"))
    assert tried(hub, mixture | {"num_experts": 4})[:4] == ["sharding alone", "expert 2", "context 2", "expert 4"]
    assert tried(hub, LLAMA)[:3] == ["sharding alone", "context 2", "tensor 2"]
    assert {"expert 4", "tensor 4", "context 4, expert 4"} <= set(tried(hub)), "nobody has read its config yet"


def test_words_of_a_mesh_name_all_that_is_shared() -> None:
    assert words_of(Mesh(shard=8)) == "sharding alone"
    assert words_of(Mesh(shard=8, expert=8)) == "expert 8"
    assert words_of(Mesh(replicate=2, shard=4, context=2, expert=4)) == "2 copies, context 2, expert 4"


def test_a_size_that_is_refused_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two cannot be planned, and of those of four one is faster than none."""

    def planned(variant: Variant, *_: object) -> Any:
        engine = parse(variant.run).engine
        if engine.context * engine.tensor == 2:
            raise ConfigError("engine.context", 2, "is not planned", "engine.context=1")
        seconds = 1.0 if engine.context == 4 else 2.0
        return SimpleNamespace(verdict="fits", step_seconds=(seconds, seconds), most_needed=1.0, capacity={"h100": 80 * GIB}, peak={})

    monkeypatch.setattr("trainers.plan.meshes.plan_of", planned)
    place = Place(nodes=1, ranks_per_node=4, gpus=True, save_s=300)
    request = Request(base=Variant(run=plain(run_of(8)), place=place), hardware=[], plan=PlanConfig())
    assert choose(request, {})["context"] == 4


def test_a_mesh_stays_with_a_run_where_it_may_have_it(tmp_path: Path) -> None:
    """Another shape of as many ranks, and another number of ranks that deal out experts, are planned again: here no device is named."""

    line = ["+exp=llama8b_full", "engine.mesh=auto", "data.path=absent/set", f"run_dir={tmp_path}", "launch.backend=slurm"]
    line += ["train.activations=block", "train.microbatch=1", "train.global_batch=64"]

    def continued(tensor: int, *more: str) -> str:
        job = make_job(compose([*line, *more]))
        own = replace(with_mesh(job.run.engine, Mesh(shard=16 // tensor, tensor=tensor)), expert=1)
        (tmp_path / paths.CONFIG).write_text(frozen_text(replace(job.run, engine=own)))
        (tmp_path / paths.MANIFEST).write_text(json.dumps({"mesh": "as it was said"}))
        try:
            return settled([job])[0].mesh
        except ConfigError as error:
            return error.reason

    (tmp_path / paths.METRICS).write_text('{"step": 1, "loss": 1.0}\n')
    two, four = ["launch.nodes=2", "launch.gpus_per_node=8"], ["launch.nodes=4", "launch.gpus_per_node=4"]
    assert continued(8, *two) == continued(4, *four) == "as it was said"
    again = "chooses by the memory and the links of a device, and none is named"
    assert continued(8, *four) == again
    assert continued(1, *two) == "as it was said"
    assert continued(1, *two, "engine.expert=8") == again


def test_a_device_is_named() -> None:
    line = ["+exp=llama8b_full", "engine.mesh=auto", "data.path=absent/set", "launch.gpus_per_node=8"]
    with pytest.raises(ConfigError, match=r"hardware=h100, or engine\.mesh=given"):
        settled([make_job(compose(line))])


def test_proposals_share_experts_before_rows_and_rows_before_layers() -> None:
    line = ["+exp=llama8b_full", "data.path=absent/set", "launch.gpus_per_node=4"]
    mesh = ("engine.expert", "engine.context", "engine.tensor")

    def proposed(*more: str) -> list[str]:
        changes = changes_of(make_job(compose([*line, *more])))
        return [" ".join(words) for words in ([word for word in change if word.startswith(mesh)] for change in changes) if words]

    both = ["engine.context=2", "engine.context=4", "engine.tensor=2", "engine.tensor=4", "engine.context=2 engine.tensor=2"]
    assert proposed() == both
    assert proposed("engine.tensor=2") == ["engine.context=2", "engine.tensor=4"]
    assert proposed("engine.mesh=auto", "hardware=h100") == []
    experts = ["engine.expert=2", "engine.expert=4"]
    assert proposed("model.id=owner/name")[:6] == [*experts, *both[:4]], "nobody has read its config yet"
    assert not any("expert=2 engine.tensor" in words or "expert=4 engine.tensor" in words for words in proposed("model.id=owner/name"))
    line = ["+exp=qwen3_30b_a3b_full", "data.path=absent/set", "launch.nodes=1", "launch.gpus_per_node=4", "engine.expert=1"]
    shared = ["engine.expert=2 engine.context=2", "engine.expert=2 engine.context=4"]
    shared.insert(1, "engine.expert=4 engine.context=2")
    assert sorted(proposed()) == sorted([*experts, *both[:2], *shared, "engine.expert=4 engine.context=4"])
    assert proposed()[:2] == experts
    assert proposed("engine.expert=4") == both[:2]


@pytest.mark.slow
def test_the_fastest_that_fits_is_chosen_and_the_reason_has_all() -> None:
    """Of a model that two ranks on a node train; a device with room for all of it, for half of its rows or layers, and for nothing."""
    case = Case(2, "even", precision=Precision.fp32, seq_len=512)
    config = case.config(".")
    config.data.path, config.model.train_tokenizer, config.engine.mesh = "unused", 33, MeshChoice.auto
    place = Place(nodes=1, ranks_per_node=2, gpus=True, save_s=300)
    known: dict[str, object] = {}
    [h100] = [item for item in known_hardware() if item.name == "h100"]

    def of(size: float, run: RunConfig = config) -> dict[str, object]:
        device = replace(h100, memory_gib=size / GIB, overhead_gib=0.0) if size else HardwareConfig(name="d", memory_gib=1.0)
        return choose(Request(base=Variant(run=plain(run), place=place), hardware=[device], plan=PlanConfig()), known)  # type: ignore[arg-type]

    roomy = of(1e12)
    assert (roomy["replicate"], roomy["shard"], roomy["context"], roomy["tensor"]) == (1, 2, 1, 1)
    assert str(roomy["reason"]).startswith("sharding alone fits, the fastest (h100, ")
    assert "s a step; context 2 needs" in str(roomy["reason"])
    assert len(known) == 3, "each mesh is simulated once"
    alone = max(simulation.peak.total for simulation in known.values())  # type: ignore[attr-defined]
    halved = of(0.95 * alone)
    assert halved["shard"] == 1
    assert 2 in (halved["context"], halved["tensor"])
    assert "does not fit" in str(of(0.1 * alone)["reason"])
    one_of_two = replace(config, train=replace(config.train, global_batch=2))
    assert of(1e12, one_of_two)["shard"] == 1, "one microbatch is for both ranks"


@pytest.mark.slow
def test_a_run_keeps_the_mesh_that_was_chosen(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """One row a step leaves two ranks nothing else than to share it: planned once, frozen, and the same when it continues."""
    run_dir = tmp_path / "run"
    line = [*arguments(base, chats, run_dir, "engine.mesh=auto", "checkpoint.every=2"), "train.global_batch=1"]
    launch(cache, [*line, "mode=plan"])
    assert any(note.startswith("engine.mesh=auto: context 2 fits") for note in json.loads((run_dir / paths.PLAN).read_text())["notes"])
    stop_at_step(cache, line, run_dir, 3)
    frozen, manifest = (run_dir / paths.CONFIG).read_text(), json.loads((run_dir / paths.MANIFEST).read_text())
    assert "mesh: auto" in frozen
    assert "context: 2" in frozen
    assert manifest["mesh"].startswith("context 2 fits")
    (run_dir / paths.MANIFEST).write_text(json.dumps(manifest | {"mesh": "as it was said"}))
    said = launch(cache, line)
    assert "as it was said" in said
    assert "continuing from" in said
    assert (run_dir / paths.CONFIG).read_text() == frozen
    assert [row["step"] for row in read_rows(run_dir) if "loss" in row] == list(range(1, 9))


def test_a_dry_run_says_why() -> None:
    job = replace(
        make_job(compose(["+exp=llama8b_full", "engine.context=2", "data.path=absent/set", "launch.gpus_per_node=4"])), mesh="as it fits"
    )
    assert "# engine.mesh=auto: as it fits" in dry_run(job, ["command"]).splitlines()
