"""A plan of a run that learns from its own answers: a generator's memory is that of a real one, and times are their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import blueprint_for, save_tiny
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.compose import compose
from launcher.job import make_job
from launcher.plan import _refused, known_hardware, request_of
from launcher.proposals import changes_of
from trainers.config.checks import validate
from trainers.config.choices import ObjectiveName, Offload, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, RlConfig, RunConfig, TrainConfig, plain
from trainers.plan.answers import Answers, Work, answers_of, not_timed, seconds_of, step_of, traced
from trainers.plan.estimate import FAST, SLOW
from trainers.plan.plan import _generator_fits, make_plan
from trainers.plan.request import Place, PlanConfig, Variant
from trainers.plan.say import say

H100 = next(item for item in known_hardware() if item.name == "h100")
FREQUENCIES = 256
"""Bytes of rotary embeddings, at most."""
BATCH, PROMPT, ANSWER = 3, 11, 6
HERE = Place(nodes=2, ranks_per_node=4, gpus=True, save_s=300)


def config_of(**rl: Any) -> RunConfig:
    """Return a run whose steps have 12 answers."""
    return RunConfig(
        model=ModelConfig(id="a/model"),
        data=DataConfig(path="unused", packing=False, seq_len=PROMPT + ANSWER),
        objective=ObjectiveConfig(name=ObjectiveName.grpo),
        reward={"right": "math", "form": {"kind": "length"}},
        rl=RlConfig(**{"max_new_tokens": ANSWER, "group_size": 4, "batch": BATCH, "redraws": 0} | rl),
        train=TrainConfig(global_batch=12, precision=Precision.fp32, steps=4),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_generators_cache_and_products_are_those_of_a_real_one(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny(tmp_path, tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    real = model(torch.zeros(BATCH, PROMPT + ANSWER - 1, dtype=torch.int64), use_cache=True).past_key_values
    parts = traced(blueprint_for(folder), torch.float32, BATCH, PROMPT, ANSWER)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in real.layers)
    assert cache <= parts["last token"].kept <= cache + FREQUENCIES
    config = model.config
    matrices = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name)
    head = model.get_output_embeddings().weight.numel()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def flops(tokens: int, cached: int) -> float:
        """Of products, attention whole: the head sees one token of each prompt."""
        attention = 4 * config.num_hidden_layers * width * tokens * (cached + tokens)
        return BATCH * (2 * (matrices - head * (not tied)) * tokens + 2 * head + attention)

    assert parts["prompt"].work.flops == flops(PROMPT, 0)
    assert parts["first token"].work.flops == flops(1, PROMPT)
    assert parts["last token"].work.flops == flops(1, PROMPT + ANSWER - 2)
    assert parts["prompt"].highest > parts["prompt"].kept > 0


def test_a_generator_answers_its_share_of_a_rollout_in_rounds(tmp_path: Path) -> None:
    blueprint = blueprint_for(save_tiny(tmp_path, tied=True))
    found = answers_of(config_of(steps_per_rollout=3), HERE, blueprint, 1000, 77)
    assert (found.generators, found.answers, found.batch, found.rounds) == (2, 12, 3, 6)  # 12 x 3 / 2 answers, 3 at once
    assert (found.weights_bytes, found.sync_bytes) == (4000, 77)
    assert found.bytes == found.weights_bytes + found.cache_bytes + found.work_bytes
    config = config_of()
    kept = replace(config, objective=replace(config.objective, kl_weight=0.1))
    assert [answers_of(each, HERE, blueprint, 1000, 77).reference_bytes for each in (config, kept)] == [0, 4000]
    offloaded = replace(kept, engine=EngineConfig(offload_param=Offload.cpu))
    assert [answers_of(each, HERE, blueprint, 1000, 77).reference_of_rank(HERE) for each in (kept, offloaded)] == [4000 / 8, 0]
    assert answers_of(config_of(batch=64), HERE, blueprint, 1000, 77).batch == 6, "no more than there are"


def test_generators_on_nodes_of_their_own_take_whole_batches_and_no_memory_of_ranks(tmp_path: Path) -> None:
    """12 x 3 answers are 12 batches of 3, of which two generators write six each; their nodes are paid for too."""
    blueprint, place = blueprint_for(save_tiny(tmp_path, tied=True)), replace(HERE, generators=5)
    found = answers_of(config_of(steps_per_rollout=3), place, blueprint, 1000, 77)
    assert (found.generators, found.batch, found.rounds) == (5, 3, 3)
    assert (found.of_rank(place), found.of_rank(HERE)) == (0, found.bytes / 4)
    assert (place.size, place.devices) == (8, 28)
    parts = {"sampling": (2.0, 3.0), "scoring": (0.5, 1.0), "training": (4.0, 3.5)}
    ahead = config_of(staleness=1)
    assert (step_of(parts, ahead), step_of(parts, ahead, is_apart=True)) == ((4.0, 7.5), (4.0, 4.0))


def test_a_generator_that_does_not_fit_its_own_node_is_named(tmp_path: Path) -> None:
    place = Place(nodes=1, ranks_per_node=2, gpus=True, save_s=300, generators=1)
    config = replace(config_of(), model=ModelConfig(id=str(save_tiny(tmp_path, tied=True))), train=replace(config_of().train, microbatch=1))
    small = replace(H100, memory_gib=1.0, overhead_gib=0.5)
    known: dict[str, Any] = {}
    plans = [make_plan(Variant(run=plain(config), place=place), [device], PlanConfig(), known) for device in (H100, small)]
    beside = make_plan(Variant(run=plain(config), place=replace(place, generators=0)), [H100], PlanConfig(), {})
    assert [plan.verdict for plan in plans] == ["fits", "fits"]
    assert plans[0].needed["h100"] < beside.needed["h100"]
    assert plans[0].answers is not None
    plans[1].answers = replace(plans[0].answers, weights_bytes=2 << 30)
    assert not _generator_fits(plans[1], 0.0, 2.0**29, "each GPU of its node, and h100")
    assert _generator_fits(plans[1], 0.0, 2.0**40, "each GPU of its node, and a larger one"), "which leaves what was said of the smaller"
    found = {"host_short": "", "generator_short": plans[1].generator_short, "verdicts": {"h100": "does not fit"}}
    job: Any = SimpleNamespace(run_dir=Path("run"), hardware=H100)
    for needed, words in ((1 << 28, "run does not fit: a generator needs"), (1 << 31, "run does not fit: a rank needs 2.0 GiB")):
        assert words in str(_refused(job, found | {"needed": {"h100": needed}, "capacity": {"h100": 1 << 29}}))
    console = Console(record=True, width=200)
    say(plans[1], console)
    text = console.export_text()
    assert "note: a generator needs 1.0 GiB of each GPU of its node, and h100 has 0.5 GiB" in text
    assert "on 1 node of 2 GPUs, and 1 node for generators" in text
    assert "by one generator, on a node of its own" in text


def test_a_plan_that_does_not_fit_proposes_fewer_answers_at_once() -> None:
    def proposed(*overrides: str) -> list[list[str]]:
        return changes_of(make_job(compose(["model=hf", "model.id=a/b", "data.path=c/d", "train.steps=1", *overrides])))

    grpo = ["objective=grpo", "reward.right=exact", "data.packing=false", "rl.max_new_tokens=64"]
    assert proposed(*grpo, "rl.batch=8")[:2] == [["rl.batch=4"], ["rl.batch=2"]]
    assert proposed(*grpo, "rl.batch=2")[0] == ["rl.batch=1"]
    assert not any("rl.batch" in " ".join(change) for change in [*proposed(), *proposed(*grpo, "rl.batch=1")])


def test_times_are_their_formulas() -> None:
    config = config_of(steps_per_rollout=2)
    prompt, token = Work(3e12, 5e9, 10), Work(2e9, 4e9, 1000)
    fields = {
        "generators": 2,
        "answers": 12,
        "batch": 3,
        "rounds": 4,
        "cache_bytes": 0,
        "work_bytes": 0,
        "reference_bytes": 0,
        "has_reference_on_host": False,
        "judges_bytes": 0,
    }
    found = Answers(**fields, weights_bytes=8 * 10**9, sync_bytes=6 * 10**9, prompt=prompt, token=token)
    parts = seconds_of(found, config, H100, (0.25, 0.5), (1.5, 2.5))
    assert parts["sync"][0] == pytest.approx((6 + 2 * 8) / H100.storage_gb_s / 2)
    for share, seconds in zip((FAST, SLOW), parts["sampling"], strict=True):
        each = [
            w.flops / (H100.tflops_fp32 * 1e12 * share.products) + w.moved / (H100.memory_gb_s * 1e9 * share.memory)
            for w in (prompt, token)
        ]
        expected = each[0] + (ANSWER - 1) * max(each[1], 1000 * share.launch)
        assert seconds == pytest.approx(4 * expected / 2)
    assert parts["scoring"] == pytest.approx((12 * (2e-3 + 1e-5), 12 * (5e-2 + 1e-3)))
    assert (parts["measuring"], parts["training"]) == ((0.0, 0.0), (1.5, 2.5))
    kept = replace(config, objective=replace(config.objective, kl_weight=0.1, importance_cap=2.0))
    assert seconds_of(found, kept, H100, (0.25, 0.5), (1.5, 2.5))["measuring"] == (0.5, 1.0), "two passes"
    fast, slow = (sum(seconds) for seconds in zip(*parts.values(), strict=True))
    assert step_of(parts, config) == (fast, slow)
    meanwhile = min(parts["sampling"][0] + parts["scoring"][0], parts["training"][0])
    assert step_of(parts, replace(config, rl=replace(config.rl, staleness=1))) == (fast - meanwhile, slow)
    config.reward |= RunConfig(reward={"judge": {"kind": "judge"}}).reward
    assert "scoring by judge" in not_timed(config)[0]
    assert seconds_of(found, config, H100, (0.25, 0.5), (1.5, 2.5))["scoring"] == parts["scoring"]


@pytest.mark.slow
def test_a_plan_has_the_generators_memory_and_the_parts_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3 8B on two nodes: bf16 weights, keys and values of 36 blocks with 8 heads of 128, for all that is written at once."""
    job = make_job(compose(["+exp=qwen3_8b_grpo_gsm8k", "hardware=h100", "mode=plan"]))
    request = request_of(job)
    plan = make_plan(request.base, request.hardware, request.plan, {})
    assert plan.answers is not None
    assert plan.answers.weights_bytes == 2 * 8_190_735_360
    cache = 512 * (1536 - 1) * 36 * 2 * 8 * 128 * 2
    assert cache <= plan.answers.cache_bytes <= cache + FREQUENCIES
    assert plan.answers.rounds == 1280 * 4 / 2 / 512
    trainer = sum(plan.peak.values()) + plan.slack + 2 * H100.overhead_gib * 2**30
    assert plan.needed["h100"] == pytest.approx(trainer + plan.answers.bytes / 8 + plan.answers.reference_bytes / 16)
    assert plan.step_seconds == pytest.approx([sum(seconds) for seconds in zip(*plan.answers.seconds.values(), strict=True)])
    say(plan, Console(width=140))
    said = capsys.readouterr().out
    assert "by 2 generators, one a node" in said
    assert all(f"{name} " in said for name in ("sync", "sampling", "scoring", "training"))


def test_tokens_of_answers_that_are_not_written_are_refused() -> None:
    job = make_job(compose(["+exp=qwen3_8b_grpo_gsm8k", "plan.tokens=1e6", "mode=plan"]))
    validate(job.run)
    request = request_of(job)
    with pytest.raises(ConfigError, match="nobody knows their tokens") as refused:
        make_plan(request.base, [H100], request.plan, {})
    assert refused.value.path == "plan.tokens"


@pytest.mark.slow
def test_a_plan_has_an_offloaded_reference_on_the_host(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "policy", tied=False)
    count = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(model).parameters())
    place, hosts = Place(nodes=1, ranks_per_node=2, gpus=False, save_s=300), []
    for weight in (0.0, 0.1):
        config = replace(config_of(), model=ModelConfig(id=str(model)), engine=EngineConfig(offload_param=Offload.cpu))
        config = replace(config, objective=replace(config.objective, kl_weight=weight))
        hosts.append(make_plan(Variant(run=plain(config), place=place, overrides=[]), [], PlanConfig(), {}).host)
    assert hosts[1] == hosts[0] | {"frozen parameters": 4 * count}


def test_a_plan_of_ppo_has_the_critic_and_the_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint holds both models; each waits while the other computes. The reward model's weights are those of its files."""
    policy = save_tiny(tmp_path / "policy", tied=False)
    scorer = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=0, dtype=torch.float32)
    scorer.save_pretrained(tmp_path / "scorer")
    count = sum(parameter.numel() for parameter in scorer.parameters())
    place, plans = Place(nodes=1, ranks_per_node=2, gpus=False, save_s=300), {}
    for name in (ObjectiveName.grpo, ObjectiveName.ppo):
        config = replace(config_of(), model=ModelConfig(id=str(policy)), objective=ObjectiveConfig(name=name))
        config.reward |= RunConfig(reward={"score": {"kind": "model", "path": str(tmp_path / "scorer")}}).reward
        plans[name] = make_plan(Variant(run=plain(config), place=place, overrides=[]), [], PlanConfig(), {})
    both, alone = plans[ObjectiveName.ppo], plans[ObjectiveName.grpo]
    assert both.answers is not None
    assert both.critic is not None
    assert both.critic.parameters == both.critic.trainable == count
    assert 12 * count <= both.checkpoint_bytes - alone.checkpoint_bytes < 12 * count + 1024, "weights, two moments, a counter each"
    assert 4 * count < both.answers.judges_bytes < 4 * count + 8 * (PROMPT + ANSWER) * 4 * 4096
    assert 12 * count / 2 <= both.needed["cpu"] - alone.needed["cpu"] < 16 * count
    assert both.export_bytes == alone.export_bytes
    assert both.flops > 1.5 * alone.flops
    assert both.host["for 2 processes"] == alone.host["for 2 processes"], "both models are in the same processes"
    say(both, Console(width=140))
    said = capsys.readouterr().out
    assert "the critic" in said
    assert "reward models, on the first rank" in said
