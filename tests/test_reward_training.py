"""A run whose head scores documents equals a plain loop over transformers' own class, under any split and both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from command import arguments, launch, tool
from conftest import WORDS, Ranks
from peft_cases import NoTokenizer
from tables import blueprint_for, config_for, pair_table, plain_adamw, ragged_table
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from trainers.batch import Needs
from trainers.config.choices import EngineName, ObjectiveName, PeftMethod, Schedule
from trainers.config.schema import EngineConfig, ObjectiveConfig, PeftConfig
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.engines.build import build_engine
from trainers.loop import train
from trainers.model.blueprint import Blueprint
from trainers.model.export import export
from trainers.model.scores import ScoreHead, with_head
from trainers.peft.base import FullTraining
from trainers.peft.saved import export_adapter, reopen_adapter
from trainers.plan.inputs import read_model
from trainers.plan.simulate import ranks as simulated
from trainers.plan.simulate import simulate
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows, steps
from trainers.scoring import reopen_scores, score_rows, weighted
from trainers.world import World

LENGTHS = [5, 29, 11, 13, 40, 17, 8, 23, 6, 7, 19, 31, 9, 12, 30, 22]
LR, CENTER = 1e-3, 0.05
OBJECTIVES = {
    "reward": ObjectiveConfig(name=ObjectiveName.reward, center=CENTER),
    "scores": ObjectiveConfig(name=ObjectiveName.reward),
    "classify": ObjectiveConfig(name=ObjectiveName.classify, balanced=True),
}
LABELS = ("no", "perhaps", "yes")


def table_for(objective: str, packed: int | None) -> TokenTable:
    """Rows of `reward` are pairs with margins; the others' documents have a score or one of three classes."""
    generator = np.random.default_rng(1)
    if objective == "reward":
        margins = np.repeat(generator.choice([0.0, 1 / 3, 1.0], len(LENGTHS) // 2), 2).astype(np.float32)
        return replace(pair_table(LENGTHS, packed), signals={"margin": margins})
    table = ragged_table(LENGTHS, packed)
    if objective == "scores":
        return replace(table, signals={"score": generator.normal(size=len(LENGTHS)).astype(np.float32)})
    return replace(table, signals={"label": generator.choice(3, len(LENGTHS), p=[0.6, 0.2, 0.2]).astype(np.float32)})


def scorer(model: Path, objective: str, seed: int = 0) -> Blueprint:
    base = blueprint_for(model)
    labels = LABELS if objective == "classify" else ()
    return replace(base, config=with_head(base.config, ScoreHead(labels=labels, pad_id=0)), scores=True, seed=seed)


def engine_for(world: World, run_dir: Path, model: Path, objective: str, fields: dict[str, Any], engine: str, peft: str) -> Engine:
    run_dir.mkdir(exist_ok=True)
    schedule = fields.get("schedule", Schedule.cosine)
    config = config_for(run_dir, model, **{name: value for name, value in fields.items() if name != "schedule"})
    settings = PeftConfig(method=PeftMethod(peft), rank=4, targets=["all-linear"]) if peft != "none" else PeftConfig()
    config = replace(
        config,
        objective=OBJECTIVES[objective],
        engine=EngineConfig(name=EngineName(engine)),
        optim=replace(config.optim, lr=LR, schedule=schedule),
        peft=settings,
    )
    return build_engine(config, world, scorer(model, objective))


def run(
    world: World,
    run_dir: Path,
    model: Path,
    table: TokenTable,
    objective: str,
    fields: dict[str, Any],
    engine: str = "fsdp",
    peft: str = "none",
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], torch.Tensor]:
    """Train through the real loop and export; return the rows of the steps, the weights, and the scores of the documents of row 0."""
    built = engine_for(world, run_dir, model, objective, fields, engine, peft)
    data = Prepared(path=run_dir, train=table, eval=None, report={"labels": LABELS}, reused=True)
    data = weighted(built.config, data)
    loader = Loader(data.train, built.config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(built.config, world, Attempt(run_dir), built, data, loader, 1.0)
    built.train(False)
    with torch.no_grad():
        scores = built.forward(make_batch(table, np.zeros(1, np.int64), 1, 0), Needs(scores=True)).scores
    assert scores is not None
    first, kept, blueprint, tokenizer = world.rank == 0, built.adaptation, scorer(model, objective), cast("Any", NoTokenizer())
    if isinstance(kept, FullTraining):
        export(built.weights(), kept.form, blueprint, tokenizer, [], run_dir / "export", first)
    else:
        export_adapter(built.weights(), kept, tokenizer, run_dir / "export", first, config=blueprint.config)
    weights = {name: tensor.clone() for name, tensor in built.weights()}
    return (steps(read_rows(run_dir)) if first else []), weights, scores


def plain(model_dir: Path, objective: str) -> Any:
    """Return transformers' own model, whose head is the one that a seed of 0 makes."""
    blueprint = scorer(model_dir, objective)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, config=blueprint.config, dtype=torch.float32)
    model.score.weight.data = blueprint.build("cpu").score.weight.data.clone()
    return model


def plain_loss(model: Any, table: TokenTable, objective: str) -> torch.Tensor:
    """Return the loss of all documents, one unpadded row at a time, word by word from the papers."""
    spans = [table.tokens[start:end].astype(np.int64) for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True)]
    scores = torch.cat([model(input_ids=torch.from_numpy(ids)[None]).logits for ids in spans])
    if objective == "reward":
        chosen, rejected = scores[0::2, 0], scores[1::2, 0]
        margin = torch.from_numpy(table.signals["margin"][0::2])
        return (-logsigmoid(chosen - rejected - margin) + CENTER * (chosen + rejected) ** 2).mean()
    if objective == "scores":
        return ((scores[:, 0] - torch.from_numpy(table.signals["score"])) ** 2).mean()
    labels = torch.from_numpy(table.signals["label"]).long()
    counts = torch.bincount(labels, minlength=3)
    weights = len(labels) / (3 * counts)
    return (cross_entropy(scores, labels, reduction="none") * weights[labels]).mean()


def plain_losses(
    model_dir: Path, table: TokenTable, num_steps: int, objective: str, adapted: Callable[[Any], Any] | None = None
) -> tuple[list[float], list[float]]:
    model = plain(model_dir, objective) if adapted is None else adapted(plain(model_dir, objective))
    plain_step = plain_adamw(model, LR, num_steps)
    losses, norms = [], []
    for _ in range(num_steps):
        loss = plain_loss(model, table, objective)
        loss.backward()
        losses.append(loss.item())
        norms.append(plain_step())
    return losses, norms


SPLITS = [("reward", 1, 8, None, "fsdp"), ("reward", 2, 2, 64, "zero3"), ("reward", 3, 1, 64, "fsdp"), ("classify", 2, 4, 64, "fsdp")]
SLOW = [
    *(("reward", 3, 1, None, "zero3"), ("scores", 2, 1, 64, "fsdp"), ("scores", 3, 2, None, "zero3")),
    *(("classify", 3, 1, 64, "zero3"), ("classify", 1, 16, None, "zero3"), ("classify", 3, 2, None, "fsdp")),
]


@pytest.mark.parametrize(
    ("objective", "size", "microbatch", "packed", "engine"), [*SPLITS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_split_equals_a_plain_loop(
    ranks: Callable[[int], Ranks],
    tiny_llama: Path,
    tmp_path: Path,
    objective: str,
    size: int,
    microbatch: int,
    packed: int | None,
    engine: str,
) -> None:
    table = table_for(objective, packed)
    fields = {"steps": 3, "global_batch": len(table), "microbatch": microbatch}
    rows, *_ = ranks(size).call(run, tmp_path / "run", tiny_llama, table, objective, fields, engine)[0]
    losses, norms = plain_losses(tiny_llama, table, 3, objective)
    rounding = 5e-6 if objective == "scores" else 1e-6  # a step moves squared errors of 3 to 1, and their rounding with them
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=rounding)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)


def first_weights(world: World, *arguments: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine_for(world, *arguments).weights()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_an_adapter_with_its_head_learns_as_in_plain_peft(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, engine: str
) -> None:
    import peft

    table = table_for("reward", 64)
    fields = {"steps": 4, "global_batch": len(table), "microbatch": 1}
    begun = ranks(2).call(first_weights, tmp_path / "begun", tiny_llama, "reward", fields, engine, "lora")[0]
    rows, *_ = ranks(2).call(run, tmp_path / "run", tiny_llama, table, "reward", fields, engine, "lora")[0]

    def adapted(model: Any) -> Any:
        settings = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "modules_to_save": ["score"]}
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **settings))  # type: ignore[arg-type]
        found = peft.set_peft_model_state_dict(made, begun)
        assert not found.unexpected_keys
        assert not [name for name in found.missing_keys if "lora" in name or "modules_to_save" in name]
        return made

    losses, norms = plain_losses(tiny_llama, table, 4, "reward", adapted)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "packed", "engine", "peft"),
    [
        ("classify", 64, "fsdp", "none"),
        ("reward", None, "zero3", "lora"),
        pytest.param("reward", 64, "zero3", "none", marks=pytest.mark.slow),
        pytest.param("classify", 64, "fsdp", "lora", marks=pytest.mark.slow),
        pytest.param("reward", 64, "fsdp", "dora", marks=pytest.mark.slow),
    ],
)
def test_plain_libraries_open_the_export_with_the_same_scores(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, objective: str, packed: int | None, engine: str, peft: str
) -> None:
    table = table_for(objective, packed)
    fields = {"steps": 3, "global_batch": len(table), "microbatch": 1}
    rows, weights, scores = ranks(2).call(run, tmp_path / "run", tiny_llama, table, objective, fields, engine, peft)[0]
    folder = tmp_path / "run" / "export"
    if peft == "none":
        model = reopen_scores(folder, False)
        assert weights["score.weight"].shape == (3 if objective == "classify" else 1, 32)
        assert "lm_head.weight" not in weights
    else:
        model = reopen_adapter(folder, reopen_scores(tiny_llama, False, scorer(tiny_llama, objective)))
        assert weights["base_model.model.score.weight"].any()
    again = score_rows(model, table, table.documents(0))
    assert again == pytest.approx(scores.numpy(), abs=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_labels, config.pad_token_id) == (3 if objective == "classify" else 1, 0)
    assert list(config.id2label.values()) == (list(LABELS) if objective == "classify" else ["score"])


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_that_is_continued_is_the_same_to_the_bit(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, engine: str
) -> None:
    table = table_for("reward", 64)
    fields = {"global_batch": 2, "microbatch": 1, "schedule": Schedule.constant}
    whole = ranks(2).call(run, tmp_path / "whole", tiny_llama, table, "reward", fields | {"steps": 6}, engine)[0]
    ranks(2).call(run, tmp_path / "parts", tiny_llama, table, "reward", fields | {"steps": 3}, engine)
    parts = ranks(2).call(run, tmp_path / "parts", tiny_llama, table, "reward", fields | {"steps": 6}, engine)[0]
    keys = ("step", "loss", "grad_norm", "accuracy", "rows_hash")
    assert [[row[key] for key in keys] for row in parts[0]] == [[row[key] for key in keys] for row in whole[0]]
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in parts[1].items())


@pytest.mark.parametrize("objective", ["reward", "classify"])
def test_the_plan_knows_the_head(tiny_llama: Path, tmp_path: Path, objective: str) -> None:
    config = replace(config_for(tmp_path, tiny_llama, steps=1, global_batch=2), objective=OBJECTIVES[objective])
    config = replace(config, objective=replace(config.objective, labels=list(LABELS) if objective == "classify" else []))
    with simulated(2, 2) as world:
        simulation = simulate(config, read_model(config)[0], world, 64)
    model = plain(tiny_llama, objective)
    assert simulation.parameters == simulation.trainable == sum(p.numel() for p in model.parameters())


def scores_of(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Score texts padded together, as a user does; each alone gives the same."""
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in texts])
    assert together.numpy() == pytest.approx(alone.numpy(), abs=1e-5)
    return cast("torch.Tensor", together)


TEXTS = [
    f"<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n{words}<|im_end|>" for words in ("sat on a mat", "ran", "far home again")
]


@pytest.mark.slow
def test_the_command_makes_a_reward_model_that_plain_transformers_and_the_evaluation_open(base: Path, cache: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pairs = [
        {"prompt": f"the {word}", "chosen": " ".join(random.choice(WORDS[:8], 4)), "rejected": " ".join(random.choice(WORDS[8:], 6))}
        for word in WORDS * 5
    ]
    file, run_dir = tmp_path / "pairs.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    said = launch(cache, arguments(base, file, run_dir, "objective=reward"))
    assert "export reopened with plain transformers" in said
    measured = [row for row in read_rows(run_dir) if "eval_accuracy" in row]
    assert [row["step"] for row in measured] == [0, 4, 8]
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "export").eval()
    scores_of(model, AutoTokenizer.from_pretrained(run_dir / "export"), TEXTS)
    tool(cache, run_dir, tmp_path / "again", name="export")
    files = [folder / "model.safetensors" for folder in (tmp_path / "again", run_dir / "export")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tool(cache, run_dir)
    found = json.loads((run_dir / "evaluation" / "run.json").read_text())["figures"]
    assert found["preference_accuracy"]["value"] == pytest.approx(measured[-1]["eval_accuracy"])
    assert found["preference_scores"] == "reward"


@pytest.mark.slow
def test_the_command_makes_a_classifier_that_plain_peft_opens(base: Path, cache: Path, tmp_path: Path) -> None:
    import peft

    random = np.random.default_rng(0)
    rows = [
        {"messages": [{"role": "user", "content": " ".join([word, *random.choice(WORDS[6:], 4)])}], "label": word}
        for word in ["cat", "mat", "dogs"] * 20
    ]
    file, run_dir = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("objective=classify", "objective.balanced=true", "peft=lora", "engine=zero3")
    assert "export reopened with plain peft" in launch(cache, arguments(base, file, run_dir, *more))
    assert {"eval_accuracy", "eval_macro_f1", "eval_calibration_error"} <= read_rows(run_dir)[-1].keys() | read_rows(run_dir)[0].keys()
    tool(cache, run_dir, "--processes", "2", "--batch", "3")
    figures, last = json.loads((run_dir / "evaluation" / "run.json").read_text())["figures"], read_rows(run_dir)[-1]
    for name, trained in (("accuracy", "eval_accuracy"), ("macro_f1", "eval_macro_f1"), ("calibration_error", "eval_calibration_error")):
        assert figures[name]["value"] == pytest.approx(last[trained], abs=1e-5)
    assert figures["f1"].keys() == {"cat", "mat", "dogs"}
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] != "cat"))
    tool(cache, run_dir, "--path", other)
    told = json.loads((run_dir / "evaluation" / "run.json").read_text())["figures"]
    assert (told["accuracy"]["documents"], told["f1"].keys()) == (40, {"mat", "dogs"})
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        run_dir / "export", num_labels=3, pad_token_id=tokenizer.pad_token_id
    )
    assert scores_of(model.eval(), tokenizer, TEXTS).shape == (3, 3)
