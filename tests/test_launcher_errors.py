"""Bad input ends with one message that names the field, the value, where it was set and the nearest valid name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.compose import UnknownSettingError, compose, refuse_unknown
from launcher.config import JobConfig
from launcher.errors import THEIR_NAMES, nearest
from launcher.fields import all_fields
from launcher.named import require_named
from launcher.presets import CONF
from trainers.config.choices import RewardKind
from trainers.config.errors import ConfigError
from trainers.config.schema import RewardConfig, RlConfig, RunConfig

ROOT = CONF.parent
BASE = ["+exp=quickstart_base"]
BAD = [
    # overrides, words that the message must have
    (["optim.lrr=1e-4"], ["`optim.lrr`", "0.0001", "command line: optim.lrr=1e-4", "nearest optim.lr"]),
    (["+optim.lrr=1e-4"], ["`optim.lrr`", "nearest optim.lr"]),
    (["++train.global_batc=8"], ["`train.global_batc` = 8", "nearest train.global_batch"]),
    (["optim={lrr: 1}"], ["`optim.lrr` = 1", "nearest optim.lr"]),
    (["optm.lr=1"], ["`optm.lr` = 1", "nearest optim.lr"]),
    (["lr=1"], ["`lr` = 1", "nearest optim.lr"]),
    (["+method=lora"], ["`method` is now `peft`", "command line: +method=lora", "try     peft=lora"]),
    (["method=full"], ["`method` is now `peft`", "try     peft=none"]),
    (["peft=lorra"], ["there is no conf/peft/lorra.yaml", "nearest peft=lora"]),
    (["peft.method=houlsby"], ["`peft.method` = 'houlsby'", "must be one of none, freeze, lora, dora"]),
    (["peft=compacter"], ["`peft` = 'compacter'", "there are: adalora"]),
    (["peft.method=lora"], ["`peft.lr` = null", "peft.method=lora has no learning rate of its own", "try     peft=lora", "optim.lr=2e-4"]),
    (["peft=lora", "optim=sgd"], ["`optim.lr` = null", "is a rate for adamw", "try     optim.lr="]),
    (["peft.lr=1e-4"], ["`peft.lr` = 0.0001", "it is for lora, dora"]),
    (["batch_size=8"], ["`batch_size` = 8", "train.global_batch"]),
    (["learning_rate=8"], ["optim.lr"]),
    (["warmup_ratio=0.03"], ["nearest optim.warmup_fraction, optim.warmup_steps"]),
    (["+train.gradient_accumulation_steps=4"], ["16 rows a step, 1 microbatch of 8 on each of 2 ranks", "train.global_batch=64"]),
    (["gradient_accumulation_steps=${x}"], ["it follows from train.global_batch"]),
    (["gradient_accumulation_steps=4", "engine.context=3"], ["it follows from train.global_batch"]),
    (["resume_from_checkpoint=true"], ["the same command again continues"]),
    (["modell=hf"], ["`modell` = 'hf'", "nearest model"]),
    (["+modell=hf"], ["`modell` = 'hf'", "nearest model"]),
    (["model.id.x=1"], ["`model.id.x` = 1", "`model.id` holds no fields"]),
    (["model.architecture.hidden=1"], ["takes any key", "try     +model.architecture.hidden=VALUE"]),
    (["model.architecture.rope.theta=1"], ["takes any key", "try     +model.architecture.rope.theta=VALUE"]),
    (
        ["engine=zero3", "engine.overrides.foo=1"],
        ["`engine.overrides.foo` = 1", "engine.overrides has: zero_optimization, aio, comms_logger"],
    ),
    (["engine=zero3", "engine.overrides.aio.foo=1"], ["`engine.overrides.aio.foo` = 1", "engine.overrides.aio has: block_size"]),
    (["engine=zero3", "engine.overrides.aio.queue_depth=8"], ["a new one needs a +", "try     +engine.overrides.aio.queue_depth=VALUE"]),
    (["engine=fsdpp"], ["`engine` = 'fsdpp'", "command line: engine=fsdpp", "nearest engine=fsdp"]),
    (["launch=slurn"], ["`launch` = 'slurn'", "there are: local"]),
    (["+model=hf"], ["`model` is already chosen", "try     model=hf"]),
    (["optim=3"], ["takes the name of a preset", "adamw"]),
    (["=3"], ["write FIELD=VALUE"]),
    (["optim.lr=fast"], ["`optim.lr` = 'fast'", "must be a number", "command line: optim.lr=fast"]),
    (["optim.lr=[1]"], ["`optim.lr` = [1]", "must be a number"]),
    (["train.steps=1.5"], ["`train.steps` = 1.5", "must be a whole number"]),
    (["data.packing=maybe"], ["`data.packing` = 'maybe'", "true or false"]),
    (["objective.name=stf"], ["one of sft, cpt", "nearest objective.name=sft"]),
    (["optim.betas=[a,b]"], ["`optim.betas`", "list of numbers"]),
    (["seed=null"], ["`seed` = null", "whole number"]),
    (["data=null.x"], ["`data`"]),
    (["name=${nothing}"], ["`name`", "nothing"]),
    (["optim.lr=-1"], ["`optim.lr` = -1.0", "greater than 0", "command line: optim.lr=-1"]),
    (["data.eval_fraction=0.9"], ["`data.eval_fraction` = 0.9", "from 0 to 0.5"]),
    (["optim.lr=1,2"], ["'optim.lr=1,2'", "one value is expected"]),
    (["data.path=a b=c"], ["cannot be read", "try     'data.path=\"a b=c\"'"]),
    (["data.path"], ["sets nothing", "try     data.path=VALUE"]),
    (["data.pth"], ["sets nothing", "data.path=VALUE"]),
    (["train.global_batch=3", "train.microbatch=1"], ["`train.global_batch` = 3", "not divisible by 2 ranks", "command line", "2 or 4"]),
    (["reward.right=exakt"], ["`reward.right.kind` = 'exakt'", "expected one of [exact,", "command line: reward.right=exakt"]),
    (["launch.processes=3"], ["`train.global_batch` = 16", "3 ranks", "conf/exp/quickstart_base.yaml:"]),
    (["launch.nodes=2"], ["`launch.nodes` = 2", "launch=torchrun"]),
    (["launch.nodes=0"], ["`launch.nodes` = 0", "1 or greater"]),
    (["launch.rdzv_endpoint=n1"], ["`launch.rdzv_endpoint` = 'n1'", "HOST:PORT"]),
    (["model=hf", "model.id=nowhere/at/all"], ["`model.id`", "nowhere/at/all", "command line"]),
    (["data=files", "data.path=./nothing.jsonl"], ["`data.path` = './nothing.jsonl'", "no such file", "command line"]),
    (["train.epochs=2"], ["`train.epochs` = 2.0", "train.steps"]),
    (["optim=adamw", "optim.warmup_steps=5000"], ["`optim.warmup_steps` = 5000", "command line"]),
    (["~optim.lr"], ["`optim.lr` is not set", "command line: ~optim.lr"]),
    (["~optim.full_lr"], ["`optim.full_lr`"]),
]


def message(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        compose(overrides)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(overrides) for overrides, _ in BAD])
def test_bad_input_names_field_value_place_and_remedy(overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = message(BASE + overrides, capsys)
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *[("lora_r", "peft.rank"), ("lora_alpha", "peft.alpha"), ("lora_dropout", "peft.dropout"), ("target_modules", "peft.targets")],
        *[("use_rslora", "peft.rank_stabilised"), ("load_in_4bit", "peft=qlora"), ("quantize", "peft=qlora")],
        *[("per_device_train_batch_size", "train.microbatch"), ("max_seq_length", "data.seq_len"), ("num_train_epochs", "train.epochs")],
        *[("train_on_inputs", "data.supervise"), ("gradient_checkpointing", "train.activations"), ("use_dora", "peft=dora")],
    ],
)
def test_a_name_of_another_trainer_is_answered_with_ours(theirs: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides in ([f"{theirs}=1"], [f"+train.{theirs}=1"], [theirs]):
        said = message([*BASE, *overrides], capsys)
        assert re.search(rf"(nearest|try) +{re.escape(ours)}\b", said), said


def test_every_name_of_another_trainer_leads_to_a_setting_or_a_preset() -> None:
    assert "gradient_accumulation_steps" not in THEIR_NAMES
    for ours, theirs in THEIR_NAMES.items():
        group, equals, preset = ours.partition("=")
        assert ours in all_fields() or (CONF / group).is_dir(), ours
        assert not equals or (CONF / group / f"{preset}.yaml").is_file(), ours
        assert theirs.split()
        assert not set(theirs.split()) & all_fields().keys(), ours


MODULES = {
    "own/__init__.py": "",
    "own/games.py": "raise SystemExit('imported')\nclass Guess: ...\ndef score(row): ...\n",
    "own/open.py": "from os import *\n",
}
ABSENT = {
    "games:Guess": "there is no module `games` in ",
    "own.game:Guess": "there is no module `own.game` in ",
    "own.games:Gues": "games.py has no `Gues`",
    "own.Guess": "__init__.py has no `Guess`",
    "score": "names no module",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with modules that nobody may import: one would end this process."""
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_function(path: str) -> RunConfig:
    return RunConfig(reward={"own": RewardConfig(kind=RewardKind.function, path=path)})


def test_what_is_named_by_module_must_be_there(modules: Path) -> None:
    for path, reason in ABSENT.items():
        with pytest.raises(ConfigError, match=re.escape(reason)) as refused:
            require_named(of_function(path))
        near = "reward.own.path=own.games:Guess"
        assert refused.value.remedy == (near if "Gues`" in reason else "module:function, in this folder or in PYTHONPATH")
    with pytest.raises(ConfigError, match="module:Class, in this folder"):
        require_named(RunConfig(rl=RlConfig(environment="games:Guess")))
    for path in ("own.games:score", "own.games.score", "own.open:anything", "os.path:join", "math:sqrt", "launcher.named:require_named"):
        require_named(of_function(path))
    assert not {"own", "own.games"} & sys.modules.keys()


def test_the_command_names_a_class_that_is_not_there(modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where a container may have it."""
    field = "rl.environment"
    answers = ["objective=grpo", "data.packing=false", "data.too_long=truncate", "rl.max_new_tokens=64", f"{field}=own.games:Gues"]
    said = message([*BASE, *answers], capsys)
    for words in (f"`{field}` = 'own.games:Gues'", "games.py has no `Gues`", f"command line: {field}", f"{field}=own.games:Guess"):
        assert words in said
    compose([*BASE, *answers, "launch=slurm", "launch.gpus_per_node=0", "launch.processes=2", "launch.container=image"])


def test_exp_needs_its_plus(capsys: pytest.CaptureFixture[str]) -> None:
    assert "try     +exp=quickstart" in message(["exp=quickstart"], capsys)
    assert "nearest +exp=quickstart" in message(["+exp=quikstart"], capsys)


@pytest.mark.parametrize(("name", "base"), [("quickstart", "quickstart_base"), ("quickstart_grpo", "quickstart_digits")])
def test_an_experiment_without_its_base_says_what_to_run(
    name: str, base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = message([f"+exp={name}"], capsys)
    assert f"conf/exp/{name}.yaml:" in said
    assert f"python -m launcher +exp={base}" in said


def test_a_model_directory_without_config_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = message(["data=python_docs", f"model.id={tmp_path}"], capsys)
    assert "config.json" in said
    assert "command line" in said


def test_each_misspelt_field_is_nearest_to_its_right_name() -> None:
    assert not [path for path in all_fields() if path not in nearest(path + path[-1])]


@pytest.mark.parametrize("path", {path.rpartition(".")[0]: path for path in all_fields()}.values())
def test_a_misspelt_field_of_each_group_fails_with_its_right_name(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = path + path[-1]
    said = message([*BASE, f"{wrong}=1"], capsys)
    assert f"`{wrong}` = 1" in said
    assert path in said.partition("nearest ")[2].split("\n")[0].split(", "), said


@pytest.mark.slow
def test_each_misspelt_field_fails_with_a_plus_too() -> None:
    for path in all_fields():
        config = OmegaConf.structured(JobConfig)
        OmegaConf.update(config, path + path[-1], 1, force_add=True)  # what Hydra makes of +FIELD=1
        with pytest.raises(UnknownSettingError, match=f"^{re.escape(path + path[-1])}$"):
            refuse_unknown(config)


@pytest.mark.parametrize(
    ("group", "text", "words"),
    [
        ("exp", "# @package _global_\noptim:\n  lrr: 3\n", ["`optim.lrr` = 3", "bad.yaml:3", "optim.lr"]),
        ("exp", "# @package _global_\noptim:\n  lr: fast\n", ["`optim.lr` = 'fast'", "bad.yaml:3", "a number"]),
        ("exp", "# @package _global_\noptimm:\n  lr: 3\n", ["`optimm", "nearest"]),
        ("exp", "# @package _global_\ndefaults:\n  - override /engine: fsdq\n", ["`engine` = 'fsdq'", "fsdp"]),
        ("exp", "# @package _global_\noptim: [\n", ["bad.yaml"]),
        ("optim", "lr: fast\n", ["`optim.lr` = 'fast'", "bad.yaml:1"]),
        ("optim", "lrr: 3\n", ["`optim.lrr` = 3", "bad.yaml:1"]),
    ],
)
def test_bad_files_are_named_with_their_line(group: str, text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "bad.yaml").write_text(text)
    choice = "+exp=bad" if group == "exp" else f"{group}=bad"
    done = run("--config-dir", str(tmp_path), choice, "mode=dry_run", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], cwd=cwd, env=everything, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_line_says_it_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run("+exp=quickstart_base", "optim.lrr=1", cwd=tmp_path, PYTHONPATH=f"{blocked}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: `optim.lrr` = 1: there is no such setting",
        "  set by  command line: optim.lrr=1",
        "  nearest optim.lr",
    ]


def test_full_error_shows_the_traceback(tmp_path: Path) -> None:
    done = run("+exp=quickstart_base", "optim.lrr=1", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_no_arguments_says_what_to_type(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "--help" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_nodes_or_gpus_are_said_before_anything_is_written(tmp_path: Path) -> None:
    base = ["+exp=quickstart_base", "train.microbatch=1", f"run_dir={tmp_path}/out"]
    alone = run(*base, "launch=torchrun", "launch.nodes=2", cwd=tmp_path)
    assert (alone.returncode, "`launch.rdzv_endpoint` = null" in alone.stderr) == (2, True)
    gpus = run(*base, "launch.gpus_per_node=8", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (gpus.returncode, "this machine has 0 GPUs" in gpus.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
