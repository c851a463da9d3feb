"""The clipped policy loss equals TRL's and a plain loop's under any split, engine and adapter; advantages are their formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks, save_tiny
from tables import LENGTHS, LR, blueprint_for, config_for, plain_adamw, ragged_table
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from trainers import host
from trainers.batch import IGNORE, Batch, Output
from trainers.config.choices import Advantage, Average, EngineName, ObjectiveName, Offload, PeftMethod, Ratio
from trainers.config.errors import ConfigError
from trainers.config.objectives import validate_objective
from trainers.config.schema import EngineConfig, ObjectiveConfig, PeftConfig
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable, open_table, save_table
from trainers.engines.base import Engine, host_memory
from trainers.engines.build import build_engine, outline
from trainers.health.spikes import TrainingFailed
from trainers.loop import train
from trainers.objectives import make_objective
from trainers.objectives.advantage import EPS, advantages, same_rewards
from trainers.objectives.base import ADVANTAGE, OLD_LOGPS, REFERENCE_LOGPS, SAMPLED_LOGPS, per_target
from trainers.plan.simulate import most_of
from trainers.rl.measured import build_reference, keep_signal, label_logps, measure
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows, steps
from trainers.world import World

TRL: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text())["policies"]
TYPED = {"name": ObjectiveName, "average": Average, "ratio": Ratio}
GRPO = ObjectiveConfig(name=ObjectiveName.grpo, clip_low=0.1, clip_high=0.15, kl_weight=0.2)
KINDS = {
    "grpo": GRPO,
    "dapo": replace(GRPO, average=Average.tokens, importance_cap=1.2),
    "dr_grpo": replace(GRPO, average=Average.constant, constant=30),
    "gspo": replace(GRPO, ratio=Ratio.sequence),
}


def batch_of(case: dict[str, Any]) -> tuple[Output, Batch]:
    """Return two answers a row, as a forward of the model would."""
    rows = (len(case["logps"]) + 1) // 2
    size = 2 * (max(map(len, case["logps"])) + 1)
    names = ["logps", *case["signals"]]
    values = {name: torch.zeros(rows, size) for name in names}
    labels, documents = torch.full((rows, size), IGNORE), torch.full((rows, size), -1)
    for number, row in enumerate(case["logps"]):
        place = number // 2, slice(number % 2 * size // 2, number % 2 * size // 2 + len(row))
        for name in names:
            values[name][place] = torch.tensor((case if name == "logps" else case["signals"])[name][number])
        labels[place], documents[place] = 1, number
    signals = {name: values[name][..., None] for name in case["signals"]} | {ADVANTAGE: torch.tensor(case["advantages"])}
    ids = torch.zeros_like(labels)
    fields = {"num_rows": rows, "num_tokens": size, "num_documents": len(case["logps"])}
    batch = Batch(input_ids=ids, labels=labels, position_ids=ids, documents=documents, signals=signals, **fields)
    return Output(logps=values["logps"].requires_grad_(), entropy=torch.ones_like(values["logps"])), batch


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    case = TRL[name]
    config = ObjectiveConfig(**{key: TYPED.get(key, lambda value: value)(value) for key, value in case["settings"].items()})
    validate_objective(config)
    output, batch = batch_of(case)
    objective = make_objective(config, batch.signals)
    loss = objective(output, batch)
    total = loss.total / objective.targets(batch.sizes())
    total.backward()
    assert float(total.detach()) == pytest.approx(case["loss"], rel=1e-6)
    assert output.logps.grad is not None
    found = output.logps.grad[batch.labels != IGNORE].tolist()
    assert found == pytest.approx([value for row in case["gradient"] for value in row], rel=1e-6, abs=1e-8)
    assert loss.each is not None
    assert float(loss.each[0].sum() / loss.each[1].sum()) == pytest.approx(case["loss"], rel=1e-6)


def test_figures_are_means_over_the_tokens_of_answers() -> None:
    """By hand, of two answers of one and two tokens."""
    case = {
        "logps": [[math.log(0.5)], [math.log(0.2), math.log(0.4)]],
        "signals": {
            SAMPLED_LOGPS: [[math.log(0.25)], [math.log(0.25), math.log(0.4)]],
            REFERENCE_LOGPS: [[math.log(0.5)], [math.log(0.4)] * 2],
        },
        "advantages": [1.0, -1.0],
    }
    output, batch = batch_of(case)
    config = replace(GRPO, kl_weight=0.5)
    loss = make_objective(config, batch.signals)(output, batch)
    ratios = [2.0, 0.8, 1.0]
    k3 = [0.0, 2 - 1 - math.log(2), 0.0]  # reference / policy is 2 at the second token
    expected = -1.15 * 1.0 + (0.9 + 1.0 + 0.5 * sum(k3)) / 2
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)
    figures = per_target({name: float(value) for name, value in loss.sums().items()}, 99)
    mismatch = [ratio - 1 - math.log(ratio) for ratio in ratios]
    assert figures == pytest.approx(
        {"ratio": sum(ratios) / 3, "clip_share": 2 / 3, "kl": sum(k3) / 3, "mismatch_kl": sum(mismatch) / 3, "entropy": 1.0}, rel=1e-5
    )


def test_an_advantage_may_be_one_a_token() -> None:
    """As of PPO: with the same number at each token of an answer nothing changes."""
    output, batch = batch_of(TRL["dapo"])
    of_tokens = batch.signals[ADVANTAGE][batch.documents.clamp(min=0)][..., None]
    objective = make_objective(replace(GRPO, average=Average.tokens, kl_weight=0.0), batch.signals)
    totals = [
        objective(output, replace(batch, signals=batch.signals | {ADVANTAGE: some})).total for some in (batch.signals[ADVANTAGE], of_tokens)
    ]
    assert totals[0].item() == totals[1].item()


# Advantages.


def test_advantages_are_their_formulas() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0, 0.5], [3.0, 3.0, 3.0, 3.0, 3.0], [0.0, 2.0, -1.0, 0.25, 4.0]])
    found = {kind: advantages(rewards, kind) for kind in Advantage}
    everything = rewards.ravel()
    for row, group in enumerate(rewards):
        own = group - group.mean()
        np.testing.assert_allclose(found[Advantage.grpo][row], own / (group.std(ddof=1) + EPS), rtol=1e-12)
        np.testing.assert_allclose(found[Advantage.dr_grpo][row], own, rtol=1e-12)
        others = [np.delete(group, number).mean() for number in range(len(group))]
        np.testing.assert_allclose(found[Advantage.rloo][row], group - others, rtol=1e-12, atol=1e-12)
        whole = (group - everything.mean()) / (everything.std(ddof=1) + EPS)
        np.testing.assert_allclose(found[Advantage.reinforce_pp][row], whole, rtol=1e-12)
    centred = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(found[Advantage.reinforce_pp_baseline], centred / (centred.std(ddof=1) + EPS), rtol=1e-12)
    assert same_rewards(rewards).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", Advantage)
def test_an_answer_without_a_reward_is_as_if_it_were_not_there(kind: Advantage) -> None:
    rewards = np.array([[1.0, np.nan, 0.0, 2.0], [np.nan, 1.0, 3.0, 5.0]])
    found = advantages(rewards, kind)
    known = ~np.isnan(rewards)
    np.testing.assert_allclose(found[known].reshape(2, 3), advantages(rewards[known].reshape(2, 3), kind), rtol=1e-12, atol=1e-12)
    assert not found[~known].any()
    alone = np.array([[np.nan, 1.0], [np.nan, np.nan]])
    assert np.isfinite(advantages(alone, kind)).all()
    assert same_rewards(alone).tolist() == [True, True]


# Any split.


def sampled_table(packed: int | None, masked: tuple[int, ...] = ()) -> TokenTable:
    """Answers with random advantages, sampled by something near the model that the tests train."""
    table, random = ragged_table(LENGTHS, packed, masked), np.random.default_rng(5)
    count = int(table.label_starts[-1])
    near = -math.log(33) + 0.3 * random.standard_normal((3, count, 1))
    signals = dict(zip((SAMPLED_LOGPS, OLD_LOGPS, REFERENCE_LOGPS), near.astype(np.float32), strict=True))
    return replace(table, signals=signals | {ADVANTAGE: random.standard_normal(len(LENGTHS)).astype(np.float32)})


def run_policy(
    world: World, run_dir: Path, model: Path, table: TokenTable, fields: dict[str, Any], kind: str, engine: str, lora: bool
) -> list[dict[str, Any]]:
    """Train through the real loader and loop; return what metrics.jsonl says of the steps."""
    run_dir.mkdir(exist_ok=True)
    config = config_for(run_dir, model, **fields)
    adapter = PeftConfig(method=PeftMethod.lora, lr=LR, rank=4, targets=["q_proj", "v_proj"]) if lora else PeftConfig()
    config = replace(config, objective=KINDS[kind], engine=EngineConfig(name=EngineName(engine)), peft=adapter)
    data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
    built = build_engine(config, world, blueprint_for(model))
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(config, world, Attempt(run_dir), built, data, loader, 1.0)
    return steps(read_rows(run_dir)) if world.rank == 0 else []


def plain_loss(logits: torch.Tensor, ids: torch.Tensor, signals: dict[str, torch.Tensor], config: ObjectiveConfig) -> torch.Tensor:
    """Return the loss of one answer, divided as its kind says but for the answers or tokens of the step."""
    logps = log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]
    sampled, old, reference = (signals[name][:, 0] for name in (SAMPLED_LOGPS, OLD_LOGPS, REFERENCE_LOGPS))
    weights = torch.ones(())
    if config.importance_cap is not None:
        weights, sampled = torch.exp(old - sampled).clamp(max=config.importance_cap), old
    ratio = torch.exp(logps - sampled)
    if config.ratio is Ratio.sequence:
        ratio = torch.exp((logps - sampled).mean())
    surrogates = [ratio * signals[ADVANTAGE], ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * signals[ADVANTAGE]]
    apart = reference - logps
    loss = -torch.min(*surrogates) * weights + config.kl_weight * (torch.exp(apart) - apart - 1)
    return loss.mean() if config.average is Average.answers else loss.sum() / (config.constant or 1)


def plain_steps(model_dir: Path, table: TokenTable, num_steps: int, kind: str) -> list[tuple[float, float]]:
    """One process, plain transformers and torch, one unpadded answer at a time: loss and gradient norm of each step."""
    model, config = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), KINDS[kind]
    plain_step = plain_adamw(model, LR, num_steps)
    count = int(table.label_starts[-1]) if config.average is Average.tokens else len(LENGTHS)
    found = []
    for _ in range(num_steps):
        total = torch.zeros(())
        for document in range(len(table.offsets) - 1):
            part = slice(table.offsets[document], table.offsets[document + 1])
            ids = torch.from_numpy(table.tokens[part].astype(np.int64))
            kept = torch.from_numpy(table.supervised[part][1:] > 0)
            own = slice(*table.label_starts[document : document + 2])
            signals = {name: torch.from_numpy(table.signals[name][own]) for name in (SAMPLED_LOGPS, OLD_LOGPS, REFERENCE_LOGPS)}
            signals[ADVANTAGE] = torch.tensor(table.signals[ADVANTAGE][document])
            total = total + plain_loss(model(input_ids=ids[None]).logits[0, :-1][kept], ids[1:][kept], signals, config)
        (total / count).backward()
        found.append((float(total.detach()) / count, plain_step()))
    return found


SPLITS = [(3, 1, 64, "fsdp", "dapo"), (2, 1, 64, "zero3", "grpo")]
SLOW = [
    *[(3, 2, None, "zero3", "dapo"), (2, 2, None, "fsdp", "grpo"), (1, 1, 64, "fsdp", "dr_grpo")],
    *[(1, 8, None, "fsdp", "gspo"), (2, 1, 64, "fsdp", "gspo"), (2, 4, None, "zero3", "dr_grpo")],
]


@pytest.mark.parametrize(
    ("size", "microbatch", "packed", "engine", "kind"), [*SPLITS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_split_equals_a_plain_loop(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, size: int, microbatch: int, packed: int | None, engine: str, kind: str
) -> None:
    table = sampled_table(packed)
    fields = {"steps": 3, "global_batch": len(table), "microbatch": microbatch}
    rows = ranks(size).call(run_policy, tmp_path / "run", tiny_llama, table, fields, kind, engine, False)[0]
    losses, norms = zip(*plain_steps(tiny_llama, table, 3, kind), strict=True)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=2e-6, abs=2e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
    assert 0.1 < rows[-1]["clip_share"] < 0.9, "nothing was clipped, or all"


@pytest.mark.slow
def test_lora_trains_alike_under_any_split(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    found = []
    for size, microbatch, packed, engine in ((1, 8, None, "fsdp"), (2, 1, 64, "fsdp"), (3, 1, 64, "zero3")):
        table = sampled_table(packed)
        fields = {"steps": 3, "global_batch": len(table), "microbatch": microbatch}
        rows = ranks(size).call(run_policy, tmp_path / f"{size}", tiny_llama, table, fields, "grpo", engine, True)[0]
        found.append([(row["loss"], row["grad_norm"], row["kl"], row["entropy"]) for row in rows])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)


def measured(world: World, run_dir: Path, model: Path, engine: EngineConfig, lora: bool) -> list[np.ndarray]:
    """Return each label's log-probability under policy and reference, before training and after it."""
    run_dir.mkdir(exist_ok=True)
    table = sampled_table(None)
    config = config_for(run_dir, model, steps=3, global_batch=len(table), microbatch=1)
    adapter = PeftConfig(method=PeftMethod.lora, lr=LR, rank=4, targets=["q_proj", "v_proj"]) if lora else PeftConfig()
    config = replace(config, objective=GRPO, engine=engine, peft=adapter)
    policy = build_engine(config, world, blueprint_for(model))
    reference = build_reference(config, world, blueprint_for(model), policy)
    found = [label_logps(each, table, world, 3, 0) for each in (policy, reference)]
    data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
    loader = Loader(table, config.train, seed=0, pad_id=0, **policy.mesh.share_of(world.rank))
    train(config, world, Attempt(run_dir), policy, data, loader, 1.0)
    found += [label_logps(each, table, world, 3, 0) for each in (policy, reference)]
    if world.rank == 0:
        given = {name: table.signals[name] for name in (ADVANTAGE, SAMPLED_LOGPS)}  # what every rollout is written with
        save_table(replace(table, signals=given), run_dir / "rollout-0")
    world.barrier()
    return [*found, *kept_signals(world, run_dir, policy, reference)]


def kept_signals(world: World, run_dir: Path, policy: Engine, reference: Engine) -> list[np.ndarray]:
    """Return what is kept of a rollout: what is there is not measured again, and the trainer's own not after a step."""
    folder, attempt = run_dir / "rollout-0", Attempt(run_dir)
    engines = {OLD_LOGPS: policy, REFERENCE_LOGPS: reference}
    assert measure(folder, engines, attempt, world, 3, 0, True) == [OLD_LOGPS, REFERENCE_LOGPS]
    assert measure(folder, engines, attempt, world, 3, 0, False) == []
    found = [open_table(folder).signals[name][:, 0].copy() for name in engines]
    world.barrier()
    if world.rank == 0:
        for name in engines:
            (folder / "signals" / f"{name}.npy").unlink()
    world.barrier()
    assert measure(folder, {REFERENCE_LOGPS: reference}, attempt, world, 3, 0, False) == [REFERENCE_LOGPS]
    with pytest.raises(TrainingFailed, match=r"old_logps\.npy is gone"):
        measure(folder, {OLD_LOGPS: policy}, attempt, world, 3, 0, False)
    return [*found, open_table(folder).signals[REFERENCE_LOGPS][:, 0].copy()]


def test_a_signal_that_a_kill_left_half_written_goes_with_the_next_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is put into place its attempt looks whether it is the newest; who has looked too early finds nothing to put there."""
    folder = tmp_path / "rollouts" / "step-000001"
    folder.mkdir(parents=True)
    older = Attempt(tmp_path)
    older.claim()
    monkeypatch.setattr(older, "require_current", lambda: Attempt(tmp_path).claim())
    with pytest.raises(FileNotFoundError):
        keep_signal(folder, ADVANTAGE, np.zeros(3), older)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".npy")]


def offloaded(world: World, run_dir: Path, model: Path) -> str:
    """Return why a reference is refused where the node holds one model."""
    config = replace(config_for(run_dir, model), objective=GRPO, engine=EngineConfig(offload_param=Offload.cpu))
    policy = outline(config, world, blueprint_for(model))
    limit = host.Limit(host_memory(config, world, policy).total + 1, "this test")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host, "memory_limit", lambda *_: limit)
        with pytest.raises(ConfigError) as refused:
            build_reference(config, world, blueprint_for(model), policy)
    return str(refused.value)


def test_a_node_must_hold_the_reference_next_to_the_policy(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    [said] = ranks(1).call(offloaded, tmp_path, tiny_llama)
    assert "of host memory" in said
    assert "this test" in said


@pytest.mark.parametrize(
    ("size", "engine", "lora"),
    [
        (2, EngineConfig(), False),
        (2, EngineConfig(tensor=2), False),
        pytest.param(2, EngineConfig(context=2), False, marks=pytest.mark.slow),
        pytest.param(2, EngineConfig(name=EngineName.zero3), False, marks=pytest.mark.slow),
        pytest.param(3, EngineConfig(), True, marks=pytest.mark.slow),
    ],
)
def test_the_reference_stays_what_training_began_with(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, size: int, engine: EngineConfig, lora: bool
) -> None:
    """Each label has its own number, that of plain transformers, on every rank."""
    folder = save_tiny(tmp_path / "model", tied=True, vocab_size=36) if engine.tensor > 1 else tiny_llama
    table, model = sampled_table(None), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = []
    for begin, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        ids, kept = torch.from_numpy(table.tokens[begin:end].astype(np.int64)), torch.from_numpy(table.supervised[begin:end][1:] > 0)
        with torch.no_grad():
            logps = log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        plain += logps.gather(-1, ids[1:, None])[kept, 0].tolist()
    for first, start, last, end, kept_old, *kept_reference in ranks(size).call(measured, tmp_path / "run", folder, engine, lora):
        np.testing.assert_allclose(first, plain, atol=1e-5)
        np.testing.assert_allclose(start, plain, atol=1e-5)
        np.testing.assert_array_equal(start, end)
        assert np.abs(last - first).max() > 0.01, "nothing was trained"
        for kept, now in ((kept_old, last), *((again, start) for again in kept_reference)):
            np.testing.assert_array_equal(kept, now)


def test_a_table_of_rollouts_comes_back_from_its_files(tmp_path: Path) -> None:
    """Each label keeps its own number, also of an answer without labels, and of rows in any order."""
    table = sampled_table(64, masked=(2,))
    save_table(table, tmp_path / "rollouts")
    read = open_table(tmp_path / "rollouts")
    batch = make_batch(read, np.array([len(read) - 1, 0]), 2, 0)
    documents = read.documents_of(np.array([len(read) - 1, 0]))
    expected = np.concatenate([read.signals[SAMPLED_LOGPS][read.label_starts[d] : read.label_starts[d + 1], 0] for d in documents])
    np.testing.assert_array_equal(batch.signals[SAMPLED_LOGPS][batch.labels != IGNORE][:, 0].numpy(), expected)
    objective = make_objective(replace(GRPO, kl_weight=0.0), batch.signals)
    output = Output(logps=torch.where(batch.labels == IGNORE, 0.0, -1.0), entropy=torch.zeros(batch.labels.shape))
    assert math.isfinite(float(objective(output, batch).total)), "an answer without labels"


def test_a_plan_carries_the_signals_of_rollouts(tiny_llama: Path, tmp_path: Path) -> None:
    planned = most_of(replace(config_for(tmp_path, tiny_llama), objective=GRPO), 4, 24, 33)
    batch = make_batch(sampled_table(None), np.arange(4), 4, 0)
    assert set(planned.signals) == {ADVANTAGE, SAMPLED_LOGPS, REFERENCE_LOGPS}
    for name, signal in planned.signals.items():
        assert signal.ndim == batch.signals[name].ndim
        assert signal.dtype == batch.signals[name].dtype


def test_rows_that_nobody_sampled_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"reads advantage, reference_logps, sampled_logps, which the rows"):
        make_objective(GRPO, [])
