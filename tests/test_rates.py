"""The learning rate belongs to the method: which one a run takes does not depend on the order of words, and it says so."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import ROOT

from launcher.changes import differences
from launcher.compose import compose, compose_with, unchecked
from launcher.freeze import freeze, require_joinable
from launcher.job import Job, frozen_text, make_job
from launcher.presets import CONF
from launcher.proposals import changes_of
from trainers.config.choices import OptimizerName, PeftMethod
from trainers.config.derived import PRESET_OF, Peak, learning_rate, microbatches, peak_lr, warmup_steps
from trainers.config.errors import ConfigError
from trainers.config.schema import OptimConfig, PeftConfig, TrainConfig, read

EXPERIMENTS = sorted(file.stem for file in (CONF / "exp").glob("*.yaml"))
PRESETS = sorted(file.stem for file in (CONF / "peft").glob("*.yaml"))
OF_PRESETS = {
    "lora": 2e-4,
    "lora_experts": 1e-4,
    "qlora": 2e-4,
    "dora": 2e-4,
    "loftq": 1e-4,
    "loraplus": 5e-5,
    "pissa": 2e-5,
    "adalora": 5e-4,
    "ia3": 3e-3,
    "prompt": 3e-2,
    "prefix": 5e-5,
    "ptuning": 1e-4,
    "houlsby": 3e-4,
    "pfeiffer": 3e-4,
    "parallel": 3e-4,
}
OF_EXPERIMENTS = {
    "llama8b_full": 5e-6,
    "llama8b_kto": 2e-5,
    "llama8b_mix": 5e-6,
    "llama8b_distil": 5e-6,
    "quickstart_distil": 2e-3,
    "quickstart_dpo": 1e-4,
    "qwen3_8b_simpo": 4e-5,
    "tulu3_8b_dpo": 2e-5,
    "llama70b_full": 2e-6,
    "llama70b_full_128k": 2e-6,
    "llama405b_full": 2e-6,
    "qwen3_8b_full": 7e-6,
    "qwen3_8b_grpo_gsm8k": 4e-5,
    "qwen3_8b_rlvr_math": 4e-5,
    "qwen3_30b_a3b_full": 1e-5,
    "qwen3_30b_a3b_lora": 1e-5,
    "qwen3_235b_a22b_lora": 1e-5,
    "gpt_oss_120b_lora": 1e-5,
    "llama8b_compare": 1e-5,
    "llama8b_ppo_rlhf": 1.2e-5,
    "llama8b_reward": 3e-6,
    "quickstart": 2e-3,
    "quickstart_base": 5e-3,
    "quickstart_digits": 2e-3,
    "quickstart_grpo": 2e-3,
    "compare_quickstart": 1e-5,
    "flan_t5_small": 3e-4,
}
FACTORS = {"compare_quickstart": 100.0} | dict.fromkeys(
    ("llama8b_kto", "llama8b_ppo_rlhf", "qwen3_8b_grpo_gsm8k", "qwen3_8b_rlvr_math", "qwen3_8b_simpo", "tulu3_8b_dpo"), 0.025
)


def expected(experiment: str, preset: str) -> float:
    return OF_PRESETS.get(preset, OF_EXPERIMENTS[experiment]) * FACTORS.get(experiment, 1.0)


def first_steps(words: list[str], num_steps: int = 2000) -> tuple[float, float]:
    """The rates of the first step and of the first one after warm-up."""
    job = unchecked(words)
    warmup, peak = warmup_steps(job.optim, num_steps), peak_lr(job.optim, job.peft).value
    first, top = (learning_rate(job.optim, peak, step, num_steps) for step in (0, warmup))
    assert first == (top / warmup if warmup else top)
    return first, top


def pairs() -> list[object]:
    """Each preset with one experiment and each experiment with LoRA; the table below has all others, in one order of words."""
    sampled = {(EXPERIMENTS[number % len(EXPERIMENTS)], preset) for number, preset in enumerate(PRESETS)}
    sampled |= {(experiment, "lora") for experiment in EXPERIMENTS}
    every = [(experiment, preset) for experiment in EXPERIMENTS for preset in PRESETS]
    return [pytest.param(*pair, marks=() if pair in sampled else pytest.mark.soak) for pair in every]


@pytest.mark.parametrize(("experiment", "preset"), pairs())
def test_the_first_step_takes_the_rate_of_its_method_in_any_order_of_words(experiment: str, preset: str) -> None:
    words = [f"+exp={experiment}", f"peft={preset}"]
    there, back = first_steps(words), first_steps(words[::-1])
    assert there == back
    assert there[1] == expected(experiment, preset)


def test_every_preset_and_experiment_is_in_these_tables() -> None:
    assert {*OF_PRESETS, "none", "freeze"} == set(PRESETS)
    assert set(OF_EXPERIMENTS) == set(EXPERIMENTS)
    for preset in OF_PRESETS:
        line = next(line for line in (CONF / "peft" / f"{preset}.yaml").read_text().splitlines() if line.startswith("lr:"))
        assert "#" in line, f"{preset}: a rate has its source"


def test_a_given_rate_wins_in_any_order_of_words() -> None:
    words = ["+exp=llama8b_full", "peft=lora", "optim.lr=3e-5", "optim.lr_factor=2"]
    for given in (words, words[::-1]):
        job = unchecked(given)
        assert peak_lr(job.optim, job.peft) == Peak("optim.lr", 3e-5, 2.0)
    assert str(peak_lr(job.optim, job.peft)) == "6e-05, from optim.lr 3e-05 x optim.lr_factor 2"


def test_a_method_without_a_rate_is_refused_unless_one_is_given() -> None:
    for method in set(PeftMethod) - {PeftMethod.none, PeftMethod.freeze}:
        with pytest.raises(ConfigError, match=f"peft={PRESET_OF.get(method, method)}, which is that preset"):
            peak_lr(OptimConfig(), PeftConfig(method=method))
        assert peak_lr(OptimConfig(lr=1e-3), PeftConfig(method=method)).value == 1e-3
    with pytest.raises(ConfigError, match=r"peft.lr = 0.0002 is a rate for adamw"):
        peak_lr(OptimConfig(name=OptimizerName.sgd), PeftConfig(method=PeftMethod.lora, lr=2e-4))
    assert peak_lr(OptimConfig(), PeftConfig(method=PeftMethod.freeze)) == Peak("optim.full_lr", 1e-5, 1.0)


def test_what_a_planner_proposes_has_the_methods_rate() -> None:
    """Also where a rate is given, which was meant for all weights."""
    for given, more in (([], []), (["optim.lr=1e-6"], ["optim.lr=null"])):
        line = ["+exp=llama70b_full", *given]
        adapters = [change for change in changes_of(make_job(compose(line))) if any(word.startswith("peft=") for word in change)]
        assert adapters == [["peft=lora", *more], ["peft=qlora", *more]]
        for change in adapters:
            job = compose_with(line, change)
            assert job is not None
            assert peak_lr(job.optim, job.peft) == Peak("peft.lr", 2e-4, 1.0)


def job_in(folder: Path, *overrides: str) -> Job:
    return make_job(compose(["+exp=quickstart_base", f"run_dir={folder}/out", *overrides]))


def test_the_frozen_config_says_the_rate_and_is_read_back_unchanged(tmp_path: Path) -> None:
    job = job_in(tmp_path, "peft=lora", "optim.lr_factor=100")
    assert "\noptim: # peak learning rate 0.02, from peft.lr 0.0002 x optim.lr_factor 100\n" in frozen_text(job.run)
    freeze(job)
    assert read(job.config_path) == job.run


def test_a_run_from_before_methods_had_rates_continues_with_the_same_words(tmp_path: Path) -> None:
    """Its config.yaml has optim.lr, and neither peft.lr nor optim.full_lr."""
    job = job_in(tmp_path, "peft=lora")
    freeze(job)
    settings = yaml.safe_load(job.config_path.read_text())
    del settings["optim"]["full_lr"], settings["peft"]["lr"]
    settings["optim"]["lr"] = 2e-4
    job.config_path.write_text(yaml.safe_dump(settings))
    before = job.config_path.read_bytes()
    assert differences(settings, yaml.safe_load(frozen_text(job.run))) != []
    freeze(job)
    assert job.config_path.read_bytes() == before
    old = read(job.config_path)
    assert peak_lr(old.optim, old.peft) == Peak("optim.lr", 2e-4, 1.0)
    freeze(dataclasses.replace(job, run=dataclasses.replace(job.run, limits=dataclasses.replace(job.run.limits, save_s=7.0))))
    assert read(job.config_path).limits.save_s == 7.0
    (job.run_dir / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 0, "eval_loss": 1.0}\n')
    with pytest.raises(ConfigError) as refused:
        require_joinable(job_in(tmp_path, "peft=lora", "peft.lr=1e-4"))
    assert refused.value.reason.splitlines()[1:] == ["    optim.lr: 0.0002 -> 0.0001"]


def test_microbatches_are_what_a_rank_accumulates() -> None:
    assert microbatches(TrainConfig(global_batch=24, microbatch=1), 8) == 3
    assert microbatches(TrainConfig(global_batch=16, microbatch=8), 2) == 1


@pytest.mark.slow
@pytest.mark.for_real
def test_the_table_of_all_rates_is_printed_without_torch() -> None:
    program = """
import runpy, sys
sys.argv = ['tools.rates']
try:
    runpy.run_module('tools.rates', run_name='__main__')
finally:
    print('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    head, _, *rows = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    assert head == ["experiment", *PRESETS]
    assert {row[0]: [float(cell) for cell in row[1:]] for row in rows} == {
        experiment: pytest.approx([expected(experiment, preset) for preset in PRESETS], rel=1e-5) for experiment in EXPERIMENTS
    }
    assert "- from optim.full_lr: freeze, none" in done.stdout
    assert "- x optim.lr_factor 100: compare_quickstart" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
