"""Every shipped preset and experiment composes; dry_run is cheap, complete and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import local, torchrun
from launcher.compose import CONF, compose
from launcher.config import LaunchConfig, count_gpus, ranks_per_node, run_config, world_size
from launcher.fields import all_fields
from launcher.help import experiments, fields, presets
from launcher.job import frozen_text, make_job
from trainers import host
from trainers.config.checks import load
from trainers.config.derived import peak_lr
from trainers.config.mesh import Mesh, mesh_of
from trainers.config.schema import plain
from trainers.processes import allocator_environment

ROOT = CONF.parent
METHODS = ("none", "lora", "dora", "ia3")
EXPERIMENTS = sorted(file.stem for file in (CONF / "exp").glob("*.yaml"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def launch(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str, model: Path, tmp_path: Path) -> None:
    extra = [f"model.id={model}"] if name.endswith(("quickstart", "quickstart_dpo", "quickstart_distil", "quickstart_grpo")) else []
    extra += ["evaluation.general=null"] if name == "compare_quickstart" else []  # a run that has not been made
    if name == "llama8b_ppo_rlhf":  # after a run that has not been made
        scorer = tmp_path / "scorer"
        scorer.mkdir()
        (scorer / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
        extra += [f"objective.critic={scorer}", f"reward.score.path={scorer}"]
    job = compose([f"+exp={name}", *extra])
    assert job.name == name
    assert job.run_dir == f"runs/{name}"
    assert job.optim.warmup_steps < 1000
    first = next(line for line in (CONF / "exp" / f"{name}.yaml").read_text().splitlines() if line.startswith("# ") and "@" not in line)
    assert first[2:] in experiments()


PRESETS = sorted(
    file for file in CONF.glob("*/*.yaml") if file.parent.name not in ("exp", "engine", "gate", "curate", "synthesise", "pipeline")
)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_preset_composes(file: Path, model: Path) -> None:
    scratch = ["model.tokenizer=null"] if file.stem == "scratch" else [f"model.id={model}"]
    packs_not = ["data.packing=false"]
    slurm = ["launch.gpus_per_node=8", "train.global_batch=8"]
    more = {"files": ["data.path=org/rows"], "slurm": slurm, "prompt": packs_not, "prefix": packs_not, "ptuning": packs_not}
    more["reasoning_gym"] = ["+data.tasks.chain_sum={}"]
    more |= {name: ["data.packing=false", "reward.right=exact"] for name in ("grpo", "dapo", "gspo", "ppo")}
    job = compose(["data=python_docs", *scratch, f"{file.parent.name}={file.stem}", *more.get(file.stem, [])])
    assert job.seed == 0
    assert file.stem in presets()


def test_a_comparison_is_comparable_by_construction(model: Path) -> None:
    """Its points differ in the method alone, and each has its own rate."""
    jobs = {name: compose(["+exp=compare_quickstart", f"model.id={model}", "evaluation.general=null", f"peft={name}"]) for name in METHODS}
    points = {name: plain(job) for name, job in jobs.items()}
    for name, point in points.items():
        for group, settings in point.items():
            assert group == "peft" or settings == points["none"][group], (name, group)
    rates = {name: peak_lr(job.optim, job.peft).value for name, job in jobs.items()}
    assert rates == {"none": 1e-5 * 100, "lora": 2e-4 * 100, "dora": 2e-4 * 100, "ia3": 3e-3 * 100}
    assert {point["peft"]["method"] for point in points.values()} == {"none", "lora", "dora", "ia3"}


def test_a_run_needs_no_experiment(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    job = compose(["model=hf", f"model.id={model}", "data=files", f"data.path={rows}", f"run_dir={tmp_path}/out"])
    assert (peak_lr(job.optim, job.peft).value, job.optim.schedule, job.train.precision) == (1e-5, "cosine", "bf16")
    assert world_size(job.launch) == max(count_gpus(), 1)


def test_large_experiments_ask_for_the_ranks_they_say() -> None:
    assert world_size(compose(["+exp=llama70b_full"]).launch) == 64
    assert world_size(compose(["+exp=llama8b_full"]).launch) == 8
    assert mesh_of(compose(["+exp=llama70b_full_128k"]).engine, 64) == Mesh(shard=8, context=8)
    assert mesh_of(compose(["+exp=llama405b_full"]).engine, 128) == Mesh(shard=16, tensor=8)
    assert mesh_of(compose(["+exp=qwen3_30b_a3b_full"]).engine, 16) == Mesh(shard=16, expert=8)


def test_frozen_text_is_read_back_unchanged(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "행 = 100%, #1 | 'a' \"b\" \\${x}.jsonl"
    rows.write_text("{}\n")
    escaped = str(rows).replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    job = make_job(compose([f"model.id={model}", f'data.path="{escaped}"', "log.tags=[a b,'1']", f"run_dir={tmp_path}/out"]))
    assert job.run.data.path == str(rows)
    job.run_dir.mkdir()
    job.config_path.write_text(frozen_text(job.run), encoding="utf-8")
    assert load(job.config_path) == job.run
    assert "launch" not in plain(job.run)
    assert "mode" not in plain(job.run)


@pytest.mark.for_real
def test_dry_run_imports_little_and_writes_nothing(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.argv = ['launcher', '+exp=llama70b_full', 'mode=dry_run']\n"
        "try: runpy.run_module('launcher', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'deepspeed', 'peft', 'wandb'} & set(sys.modules)))\n"
        "print(len(sys.modules))"
    )
    done = launch("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert done.stdout.count("-m trainers.agent") == 8
    assert "RANK=63 LOCAL_RANK=7 WORLD_SIZE=64" in done.stdout
    assert yaml.safe_load(done.stdout.partition("# 64 ranks")[0])["optim"]["full_lr"] == 2e-6
    assert "optim: # peak learning rate 2e-06, from optim.full_lr" in done.stdout
    assert "64 rows a step, 1 microbatch of 1 on each of 64 ranks" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert int(done.stdout.split()[-1]) < 700, "modules: 446 take 0.4 s on an idle machine of two cores"


def test_help_names_groups_experiments_fields_and_exit_codes(tmp_path: Path) -> None:
    done = launch("-m", "launcher", "--help", cwd=tmp_path, COLUMNS="300")
    assert done.returncode == 0, done.stderr
    for words in (
        "+exp=quickstart",
        "objective  classify, cpo, cpt, dapo, distil, dpo, grpo, gspo, kto, orpo, ppo, reward, sft, simpo",
        "optim.lr (null)",
        "optim.full_lr (1e-05)",
        "75 ",
        "launch.nodes (1)",
        "dry_run",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_field_has_a_docstring() -> None:
    assert [field.path for field in all_fields().values() if not field.doc] == []
    assert "$" not in fields().replace("$$", "")


def test_own_presets_come_from_config_dir(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine" / "exp").mkdir(parents=True)
    (tmp_path / "mine" / "exp" / "own.yaml").write_text(f"# @package _global_\nname: own\nmodel:\n  id: {model}\n  lrr: 3\n")
    done = launch("-m", "launcher", "--config-dir", "mine", "+exp=own", "mode=dry_run", cwd=tmp_path)
    assert done.returncode == 2
    assert "`model.lrr` = 3" in done.stderr
    assert "own.yaml:5" in done.stderr


@pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("0", 1), ("0,1,5", 3), ("-1", 0), ("0,-1,2", 1), ("GPU-8f,GPU-9a", 2)])
def test_visible_gpus_are_counted(visible: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == gpus
    assert ranks_per_node(LaunchConfig()) == max(gpus, 1)
    assert ranks_per_node(LaunchConfig(gpus_per_node=0, processes=2)) == 2


def test_commands_of_one_several_and_many_machines(model: Path) -> None:
    base = [f"model.id={model}", "data=python_docs", "launch.gpus_per_node=0"]
    one = make_job(compose([*base, "launch.processes=1"]))
    assert local.command(one) == [sys.executable, "-m", "trainers", str(one.config_path)]
    two = local.commands(make_job(compose([*base, "launch.processes=2"])))
    assert "--standalone --nproc-per-node 2 --signals-to-handle SIGTERM,SIGINT,SIGUSR2 --shutdown-timeout 300 -m trainers" in two[0]
    assert len(two) == 3
    many = torchrun.commands(
        make_job(compose([*base, "launch=torchrun", "launch.processes=2", "launch.nodes=4", "launch.rdzv_endpoint=n1:29500"]))
    )
    assert "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint n1:29500" in many[0]
    assert len(many) == 4 + 8
    assert many[0] == many[3]


def test_ranks_get_their_share_of_cores_and_find_the_trainer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = make_job(compose([f"model.id={model}", "data=python_docs", "launch.gpus_per_node=0", "launch.processes=2"]))
    environment = local.environment(job)
    assert int(environment["OMP_NUM_THREADS"]) == max(1, host.cores() // 2)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment.items() >= allocator_environment({}).items()
    assert run_config(compose([f"model.id={model}", "data=python_docs"])).name == "run"
