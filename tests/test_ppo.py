"""PPO: advantages of tokens and both losses equal TRL's and their formulas; the critic is trained alike under any split and continues."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from chat_tokenizers import tokenizer_of
from command import arguments, environment, launch, started, tool, trace, wait_for_step, wait_until_gone
from conftest import Ranks
from tables import LENGTHS, LR, blueprint_for, config_for, plain_adamw, ragged_table
from torch._dynamo.backends.registry import lookup_backend
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trainers.batch import IGNORE, Batch, Needs, Output, each_token
from trainers.config.choices import KL, Average, EngineName, Float8, ObjectiveName, PeftMethod, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PeftConfig,
    RunConfig,
    TrainConfig,
)
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable, open_table, save_table
from trainers.engines import compiling
from trainers.engines.build import build_engine
from trainers.health.spikes import TrainingFailed
from trainers.loop import train
from trainers.model.filled import filled_up
from trainers.model.forward import forward
from trainers.model.scores import ScoreHead, with_head
from trainers.objectives import make_objective
from trainers.objectives.advantage import divergence, gae, token_rewards, whitened
from trainers.objectives.base import ADVANTAGE, REFERENCE_LOGPS, RETURNS, REWARD, SAMPLED_LOGPS, VALUES
from trainers.objectives.values import Values
from trainers.rl.critic import Critic, critic_config, outline_critic
from trainers.rl.estimates import estimate
from trainers.rl.measured import label_logps, of_labels
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows, steps
from trainers.scoring import of_each_token
from trainers.step import StepResult
from trainers.world import World

TRL: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "trl_ppo.json").read_text())
PPO = ObjectiveConfig(name=ObjectiveName.ppo, average=Average.tokens, clip_low=0.1, clip_high=0.15, value_clip=0.3, critic_lr=2 * LR)
PPO = replace(PPO, critic_clip=0.25, critic_weight_decay=0.1)
LORA = PeftConfig(method=PeftMethod.lora, lr=LR, rank=4, targets=["q_proj", "v_proj"])


# Formulas.


def test_advantages_are_sums_of_discounted_errors() -> None:
    """Of answers of 3, 0, 1 and 5 tokens, by the sum that GAE is defined as."""
    starts, drawn = np.array([0, 3, 3, 4, 9]), np.random.default_rng(2)
    rewards, values, gamma, lam = drawn.standard_normal(9), drawn.standard_normal(9), 0.9, 0.7
    found = gae(rewards, values, starts, gamma, lam)
    for begin, end in itertools.pairwise(starts):
        after = np.append(values[begin:end], 0.0)[1:]
        errors = rewards[begin:end] + gamma * after - values[begin:end]
        expected = [sum((gamma * lam) ** (later - now) * errors[later] for later in range(now, end - begin)) for now in range(end - begin)]
        np.testing.assert_allclose(found[begin:end], expected, rtol=1e-12, atol=1e-12)
    whole = gae(rewards, values, starts, 1.0, 1.0) + values  # the rewards that are still to come
    np.testing.assert_allclose(whole[:3], rewards[:3][::-1].cumsum()[::-1], rtol=1e-12)
    assert gae(np.zeros(0), np.zeros(0), np.array([0, 0]), 1.0, 0.9).tolist() == []


def test_rewards_come_at_the_last_token_and_cost_the_divergence() -> None:
    found = token_rewards(np.array([2.0, 7.0, -1.0]), np.array([0.1, 0.2, 0.3]), np.array([0, 2, 2, 3]))
    assert found == pytest.approx([-0.1, 1.8, -1.3])
    ratios = np.array([0.5, -0.25])
    assert divergence(ratios, KL.k1).tolist() == ratios.tolist()
    assert divergence(ratios, KL.k3) == pytest.approx([math.exp(-0.5) - 1 + 0.5, math.exp(0.25) - 1 - 0.25])
    values = np.array([1.0, 2.0, 6.0])
    np.testing.assert_allclose(whitened(values), (values - 3) / np.sqrt(values.var(ddof=1) + 1e-8), rtol=1e-12)
    assert whitened(np.array([4.0])).tolist() == [0.0]


@pytest.mark.parametrize("name", TRL["advantages"])
def test_a_rollouts_advantages_and_returns_are_those_of_trl(name: str, tmp_path: Path) -> None:
    case = TRL["advantages"][name]
    typed = {key: KL(value) if key == "kl_estimator" else value for key, value in case["settings"].items()}
    size = len(case["values"][0])
    table = ragged_table([size + 1] * len(case["values"]))
    supervised = np.tile(np.arange(size + 1) > 0, len(case["values"])).astype(np.uint8)
    signals = {key: np.array(case[key], np.float32).reshape(-1, 1) for key in (SAMPLED_LOGPS, REFERENCE_LOGPS, VALUES)}
    save_table(replace(table, supervised=supervised, signals=signals | {REWARD: np.array(case["rewards"], np.float32)}), tmp_path)
    (tmp_path / "run").mkdir()
    told = estimate(tmp_path, replace(PPO, **typed), Attempt(tmp_path / "run"))
    found = open_table(tmp_path).signals
    np.testing.assert_allclose(found[ADVANTAGE][:, 0], np.ravel(case["advantages"]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[RETURNS][:, 0], np.ravel(case["returns"]), rtol=1e-6, atol=1e-6)
    apart = np.ravel(case["returns"]) - np.ravel(case["values"])
    assert told["explained_variance"] == pytest.approx(1 - apart.var() / np.ravel(case["returns"]).var(), rel=1e-5)
    assert estimate(tmp_path, replace(PPO, **typed), Attempt(tmp_path / "run")) == told, "what is there is not made anew"


def batch_of(case: dict[str, Any]) -> Batch:
    """Return an answer a row."""
    rows, size = len(case["logps"]), max(map(len, case["logps"])) + 1
    labels, documents = torch.full((rows, size), IGNORE), torch.full((rows, size), -1)
    signals = {name: torch.zeros(rows, size, 1) for name in (SAMPLED_LOGPS, ADVANTAGE, VALUES, RETURNS)}
    for number, row in enumerate(case["logps"]):
        labels[number, : len(row)], documents[number, : len(row) + 1] = 1, number
        for name, of in {SAMPLED_LOGPS: "sampled_logps", ADVANTAGE: "advantages", VALUES: "values", RETURNS: "returns"}.items():
            signals[name][number, : len(row), 0] = torch.tensor(case[of][number])
    ids = torch.zeros_like(labels)
    fields = {"num_rows": rows, "num_tokens": size, "num_documents": rows, "signals": signals}
    return Batch(input_ids=ids, labels=labels, position_ids=ids, documents=documents, **fields)


def test_both_losses_and_their_gradients_are_those_of_trl() -> None:
    case = TRL["losses"]
    batch, config = batch_of(case), ObjectiveConfig(name=ObjectiveName.ppo, average=Average.tokens, kl_weight=0.3)
    count = int((batch.labels != IGNORE).sum())
    given = {name: torch.zeros(batch.labels.shape) for name in ("logps", "predicted")}
    for name, values in given.items():
        for number, row in enumerate(case[name]):
            values[number, : len(row)] = torch.tensor(row)
        values.requires_grad_()
    policy = make_objective(config, batch.signals)
    loss = policy(Output(logps=given["logps"], entropy=torch.zeros(batch.labels.shape)), batch)
    apart = each_token(batch)
    critic = Values(config)(Output(logps=given["logps"].detach(), scores=given["predicted"].view(-1, 1)), apart)
    for name, found, of in (("policy_loss", loss, "logps"), ("value_loss", critic, "predicted")):
        total = found.total / count
        total.backward()
        assert float(total.detach()) == pytest.approx(case[name], rel=1e-6)
        gradient = given[of].grad
        assert gradient is not None
        expected = [value for row in case[f"{of}_gradient"] for value in row]
        assert gradient[batch.labels != IGNORE].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-8)
        assert not gradient[batch.labels == IGNORE].any()
    assert float(critic.figures["value_clip_share"]) / count == pytest.approx(case["value_clip_share"])


# What a value sees.


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_values_of_a_packed_row_are_those_of_each_document_alone(attention: str, scorer: Path) -> None:
    """With any attention, and in rows that are filled up on the way, as float8 and a compiler ask for."""
    table = ragged_table(LENGTHS, 64)
    batch = make_batch(table, np.arange(len(table)), len(table), 0)
    assert batch.num_documents > len(table)
    blueprint = blueprint_for(scorer, attention)
    model: Any = replace(blueprint, config=with_head(blueprint.config, ScoreHead(pad_id=0)), scores=True).build("cpu")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
    with torch.no_grad():
        found = [forward(model, rows, Needs(scores=True)).scores for rows in (each_token(batch), filled_up(each_token(batch), 80))]
        order = np.concatenate([table.documents(row) for row in range(len(table))])
        for number, document in enumerate(order):
            ids = torch.from_numpy(table.tokens[table.offsets[document] : table.offsets[document + 1]].astype(np.int64))
            alone = plain.score(plain.model(input_ids=ids[None]).last_hidden_state[0])[:, 0]
            for scores in found:
                assert scores is not None
                torch.testing.assert_close(scores[:, 0].view_as(batch.labels)[batch.documents == number], alone, rtol=1e-5, atol=1e-5)


# What stops a run.


def test_a_critic_whose_gradient_stays_without_a_value_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflows of float16 are not counted: half the loss scale may do."""
    norms = iter([math.inf, math.inf, 1.0, math.inf, math.nan, math.inf])
    moved: list[Any] = []
    monkeypatch.setattr("trainers.rl.critic.take_step", lambda *_, **__: StepResult(loss=1.0, grad_norm=next(norms)))
    monkeypatch.setattr("trainers.rl.critic.require_moved", lambda engine, _: moved.append(engine))
    config = RunConfig(objective=PPO, optim=OptimConfig(lr=LR), train=TrainConfig(max_skipped=3))
    engine: Any = SimpleNamespace(scale=None)
    critic, world = Critic(config, engine), cast(World, None)
    for step in range(5):
        critic.step([], world, step, 9, 1)
    assert moved == [engine]
    with pytest.raises(TrainingFailed, match="the critic's gradient norm was not finite in 3 steps in a row"):
        critic.step([], world, 5, 9, 1)
    scaled = Critic(config, cast(Any, SimpleNamespace(scale=SimpleNamespace(factor=2.0))))
    norms = iter([math.inf] * 4)
    for step in range(4):
        scaled.step([], world, step, 9, 1)
    assert not scaled.skipped_in_a_row


def test_a_model_without_a_head_of_scores_is_refused_as_the_critic() -> None:
    model = ModelConfig(architecture={"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8})
    with pytest.raises(ConfigError, match="no sequence classification on this architecture") as refused:
        outline_critic(RunConfig(objective=PPO, model=model), tokenizer_of("chatml"), "cpu")
    assert refused.value.path == "objective.critic"
    assert "nothing would open the export" not in refused.value.reason


# Any split.


def sampled_table(packed: int | None) -> TokenTable:
    table, drawn = ragged_table(LENGTHS, packed), np.random.default_rng(5)
    count = int(table.label_starts[-1])
    near = -math.log(33) + 0.3 * drawn.standard_normal((count, 1))
    more = {name: drawn.standard_normal((count, 1)) for name in (ADVANTAGE, VALUES, RETURNS)}
    return replace(table, signals={name: values.astype(np.float32) for name, values in (more | {SAMPLED_LOGPS: near}).items()})


@pytest.fixture(scope="module")
def scorer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of one score, as a reward model is exported."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1, pad_token_id=0, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    folder = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(folder)
    return folder


def built(world: World, run_dir: Path, model: Path, scorer: Path, engine: str, lora: bool, **fields: Any) -> tuple[RunConfig, Any, Critic]:
    """Return a run's config, its policy and its critic."""
    run_dir.mkdir(exist_ok=True)
    config = replace(config_for(run_dir, model, **fields), objective=PPO, engine=EngineConfig(name=EngineName(engine)))
    config = replace(config, peft=LORA if lora else PeftConfig(), checkpoint=CheckpointConfig(every=2, keep_last=3, asynchronous=False))
    of_critic = critic_config(config)
    blueprint = blueprint_for(scorer)
    headed = replace(blueprint, config=with_head(blueprint.config, ScoreHead(pad_id=0)), scores=True)
    return config, build_engine(config, world, blueprint_for(model)), Critic(of_critic, build_engine(of_critic, world, headed))


def run_ppo(
    world: World, run_dir: Path, model: Path, scorer: Path, table: TokenTable, fields: dict[str, Any], engine: str, lora: bool
) -> list[dict[str, Any]]:
    """Train both through the real loader and loop; return what metrics.jsonl says of the steps."""
    config, policy, critic = built(world, run_dir, model, scorer, engine, lora, **fields)
    data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(config, world, Attempt(run_dir), policy, data, loader, 1.0, critic=critic)
    return steps(read_rows(run_dir)) if world.rank == 0 else []


def plain_steps(model_dir: Path, scorer: Path, table: TokenTable, num_steps: int) -> list[tuple[float, ...]]:
    """One process, plain transformers and torch, one unpadded answer at a time: loss and gradient norm of both models in each step."""
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
    take, count = (plain_adamw(policy, LR, num_steps), plain_adamw(critic, 2 * LR, num_steps, 0.25)), int(table.label_starts[-1])
    found = []
    for _ in range(num_steps):
        totals = [torch.zeros(()), torch.zeros(())]
        for document in range(len(LENGTHS)):
            part = slice(table.offsets[document], table.offsets[document + 1])
            ids = torch.from_numpy(table.tokens[part].astype(np.int64))
            kept = torch.from_numpy(table.supervised[part][1:] > 0)
            own = slice(*table.label_starts[document : document + 2])
            signals = {name: torch.from_numpy(table.signals[name][own][:, 0]) for name in table.signals}
            logps = policy(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[kept, 0]
            ratio, worth = torch.exp(logps - signals[SAMPLED_LOGPS]), signals[ADVANTAGE]
            totals[0] = totals[0] - torch.min(ratio * worth, ratio.clamp(0.9, 1.15) * worth).sum()
            hidden = critic.model(input_ids=ids[None]).last_hidden_state[0, :-1]
            values, old, wanted = critic.score(hidden)[kept, 0], signals[VALUES], signals[RETURNS]
            bounded = old + (values - old).clamp(-0.3, 0.3)
            totals[1] = totals[1] + 0.5 * torch.max((values - wanted) ** 2, (bounded - wanted) ** 2).sum()
        numbers = []
        for total, step in zip(totals, take, strict=True):
            (total / count).backward()
            numbers += [float(total.detach()) / count, step()]
        found.append(tuple(numbers))
    return found


TOLD = ("loss", "grad_norm", "value_loss", "critic_grad_norm")
SPLITS = [(2, 1, 64, "fsdp")]
SLOW = [(3, 1, 64, "zero3"), (1, 4, None, "fsdp"), (2, 2, None, "zero3")]


@pytest.mark.parametrize(
    ("size", "microbatch", "packed", "engine"), [*SPLITS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_split_equals_a_plain_loop(
    ranks: Callable[[int], Ranks],
    tiny_llama: Path,
    scorer: Path,
    tmp_path: Path,
    size: int,
    microbatch: int,
    packed: int | None,
    engine: str,
) -> None:
    table = sampled_table(packed)
    fields = {"steps": 3, "global_batch": len(table), "microbatch": microbatch}
    rows = ranks(size).call(run_ppo, tmp_path / "run", tiny_llama, scorer, table, fields, engine, False)[0]
    for row, plain in zip(rows, plain_steps(tiny_llama, scorer, table, 3), strict=True):
        assert [row[name] for name in TOLD] == pytest.approx(plain, rel=1e-5, abs=2e-6)
    assert 0.1 < rows[-1]["value_clip_share"] < 0.9, "no value was held back, or all"


@pytest.mark.slow
def test_adapters_train_alike_and_a_checkpoint_holds_both_models(
    ranks: Callable[[int], Ranks], tiny_llama: Path, scorer: Path, tmp_path: Path
) -> None:
    """A run that is continued is the same to the bit on as many ranks, and alike on others and the other engine."""
    table, found = sampled_table(64), {}
    fields = {"global_batch": len(table), "microbatch": 1}
    for size, engine in ((2, "fsdp"), (1, "fsdp"), (3, "zero3")):
        found[size] = ranks(size).call(run_ppo, tmp_path / f"{size}", tiny_llama, scorer, table, fields | {"steps": 4}, engine, True)[0]
        for ours, theirs in zip(found[size], found[2], strict=True):
            assert [ours[name] for name in TOLD] == pytest.approx([theirs[name] for name in TOLD], rel=1e-5, abs=2e-6)
    for number in (1, 2):
        cut = shutil.copytree(tmp_path / "2", tmp_path / f"cut-{number}", ignore=shutil.ignore_patterns("step-000004"))
        again = ranks(number).call(run_ppo, cut, tiny_llama, scorer, table, fields | {"steps": 4}, "fsdp", True)[0]
        whole = [[row[name] for name in TOLD] for row in found[2][2:]]
        assert [[row[name] for name in TOLD] for row in again[2:]] == (
            whole if number == 2 else [pytest.approx(row, rel=1e-5) for row in whole]
        )


# How blocks compute.


def run_measured(
    world: World, run_dir: Path, model: Path, scorer: Path, table: TokenTable, fields: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Measure a table with both models and train them; return what metrics.jsonl says of the steps, and what was measured."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return cast(Callable[..., Any], lookup_backend("aot_eager")(graph, inputs))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiling, "BACKEND", backend)
        config, policy, critic = built(world, run_dir, model, scorer, "fsdp", False, **fields)
        found = [label_logps(policy, table, world, 2, 0), of_labels(critic.engine, table, world, 2, 0, of_each_token)]
        data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
        loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
        train(config, world, Attempt(run_dir), policy, data, loader, 1.0, critic=critic)
    blocks = [block for engine in (policy, critic.engine) for block in engine.blocks]
    assert {block._compiled_call_impl is not None for block in blocks} == {config.train.compile}, "of both models"
    assert bool(graphs) is config.train.compile
    return steps(read_rows(run_dir)), found


BLOCKS: dict[str, tuple[dict[str, Any], float, float]] = {
    "fp16": ({"precision": Precision.fp16, "loss_scale": 64.0}, 4e-2, 2e-2),
    "compiled": ({"compile": True}, 2e-5, 1e-5),
    "float8": ({"precision": Precision.bf16, "float8": Float8.rowwise}, 0.4, 0.5),
}
"""Settings, how far a log-probability or a value may be from float32, and the share by which losses and norms may be."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_both_models_compute_as_the_run_asks(
    ranks: Callable[[int], Ranks], tiny_llama: Path, scorer: Path, tmp_path: Path, name: str
) -> None:
    """In float16, compiled, or with products in float8: what is measured and trained is that of float32, as near as they are."""
    fields, nats, apart = BLOCKS[name]
    table, one = sampled_table(64), ranks(1)
    common = {"steps": 4, "global_batch": len(table), "microbatch": 2}
    plain, wanted = one.call(run_measured, tmp_path / "plain", tiny_llama, scorer, table, common)[0]
    rows, found = one.call(run_measured, tmp_path / "run", tiny_llama, scorer, table, common | fields)[0]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (np.abs(ours - theirs).max() > 1e-4) == (name != "compiled"), "of both models"
        np.testing.assert_allclose(ours, theirs, atol=nats)
    for row, other in zip(rows, plain, strict=True):
        assert [row[name] for name in TOLD] == pytest.approx([other[name] for name in TOLD], rel=apart, abs=apart / 10)
    if name == "fp16":  # whose state has a loss scale for each
        cut = shutil.copytree(tmp_path / "run", tmp_path / "cut", ignore=shutil.ignore_patterns("step-000004"))
        again, _ = one.call(run_measured, cut, tiny_llama, scorer, table, common | fields)[0]
        assert [[row[key] for key in TOLD] for row in again] == [[row[key] for key in TOLD] for row in rows]


# A whole run, by the command line.


def told(run_dir: Path) -> list[Any]:
    """What of a run must be the same to the bit: its trace, both losses, and all that its rollouts hold."""
    names = ("reward", "value_loss", "critic_grad_norm", "explained_variance", "reference_kl", "value", "return")
    rows = [tuple(row.get(name) for name in names) for row in steps(read_rows(run_dir))]
    files = [path for path in sorted((run_dir / "rollouts").rglob("*")) if path.suffix in (".npy", ".jsonl")]
    return [*trace(run_dir), *rows, *((str(path.relative_to(run_dir)), path.read_bytes()) for path in files)]


@pytest.mark.slow
def test_a_run_learns_with_a_critic_and_continues_to_the_bit(base: Path, cache: Path, tmp_path: Path) -> None:
    """Two steps a rollout, with a reference; the launcher is killed in the middle. The export is the policy alone."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"cat {word}", "answer": "x"}) + "\n" for word in ("home", "sat", "far", "on") * 4))
    asked = ("objective=ppo", "objective.critic_lr=1e-2", "reward.short.kind=length", "reward.short.max=2", "reward.short.soft=6")
    asked += ("data.packing=false", "rl.group_size=1", "rl.batch=6", "rl.max_new_tokens=8", "rl.steps_per_rollout=2", "train.steps=6")
    asked += ("train.global_batch=8", "train.microbatch=2", "checkpoint.every=2", "optim.lr=3e-3", "data.eval_fraction=0")

    def line(run_dir: Path) -> list[str]:
        return arguments(base, prompts, run_dir, *asked, "train.eval_every=null", "train.sample_tokens=4")

    said = launch(cache, line(tmp_path / "whole"))
    assert "the critic on each rank" in said
    found = steps(read_rows(tmp_path / "whole"))
    assert ["measuring_seconds" in row for row in found] == [True, False] * 3
    assert found[0]["reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(found[4]["reference_kl"]) > 1e-4
    tool(cache, tmp_path / "whole", tmp_path / "again", name="export")
    files = [folder / "model.safetensors" for folder in (tmp_path / "again", tmp_path / "whole" / "export")]
    assert files[0].read_bytes() == files[1].read_bytes(), "of a checkpoint of both models the policy"
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "export")
    assert not [name for name in export.state_dict() if "score" in name]
    signals = open_table(tmp_path / "whole" / "rollouts" / "step-000001").signals
    assert {ADVANTAGE, RETURNS, VALUES, REWARD, REFERENCE_LOGPS, SAMPLED_LOGPS} == signals.keys()
    assert float(signals[ADVANTAGE].mean()) == pytest.approx(0.0, abs=1e-6)
    cut = tmp_path / "cut"
    with started(line(cut), environment(cache)) as process:
        wait_for_step(cut, 3, process)
        process.kill()
        process.wait(20)
        wait_until_gone(cut)
    launch(cache, line(cut))
    assert told(cut) == told(tmp_path / "whole")
