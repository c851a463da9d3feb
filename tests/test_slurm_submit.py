"""What a SLURM job is made of, without a cluster: the text that sbatch gets, and which rank a task is. Real jobs: tests/test_slurm.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import generators, local, slurm, task
from launcher.compose import compose
from launcher.config import Backend, LaunchConfig, minutes, validate_launch
from launcher.job import Job, make_job
from launcher.presets import CONF
from launcher.topology import from_slurm
from trainers.config.errors import ConfigError
from trainers.generate.elsewhere import is_apart, seat_of
from trainers.rundir.attempt import Attempt

ROOT = CONF.parent
GOLDEN = Path(__file__).parent / "golden" / "slurm"
ALLOCATED = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_ID": "4711"}
HOSTS = ["node2", "node3"]


def settings(**more: Any) -> LaunchConfig:
    return LaunchConfig(**{"backend": Backend.slurm, "nodes": 2, "processes": 2, "gpus_per_node": 0} | more)


def test_a_task_is_the_rank_that_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    place = from_slurm(ALLOCATED | {"SLURM_RESTART_COUNT": "2", "RANK": "3", "MASTER_ADDR": "node2"}, settings(), HOSTS)
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node2", "MASTER_PORT": "24711"}
    assert (place.environment(), place.restarts) == (expected, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert from_slurm(ALLOCATED, settings(gpus_per_node=2, processes=None), HOSTS) == from_slurm(ALLOCATED, settings(), HOSTS)


@pytest.mark.parametrize(
    ("changed", "launch", "hosts", "sources"),
    [
        ({}, {"nodes": 3}, HOSTS, ["SLURM_NNODES is 2", "launch.nodes is 3"]),
        ({}, {"processes": 1}, HOSTS, ["SLURM_NTASKS is 4", "launch.nodes x ranks of a node is 2"]),
        ({"SLURM_NTASKS": "2"}, {}, HOSTS, ["SLURM_NTASKS is 2", "launch.nodes x ranks of a node is 4"]),
        ({}, {}, ["node2"], ["SLURM_NNODES is 2", "SLURM_JOB_NODELIST (node2) is 1"]),
        ({"RANK": "0"}, {}, HOSTS, ["RANK is 0", "SLURM_PROCID is 3"]),
        ({"LOCAL_RANK": "0"}, {}, HOSTS, ["LOCAL_RANK is 0", "SLURM_LOCALID is 1"]),
        ({"WORLD_SIZE": "1"}, {}, HOSTS, ["WORLD_SIZE is 1", "SLURM_NTASKS is 4"]),
        ({"MASTER_ADDR": "localhost"}, {}, HOSTS, ["MASTER_ADDR is localhost", "first node is node2"]),
        ({"MASTER_PORT": "29500"}, {}, HOSTS, ["MASTER_PORT is 29500", "port of this job is 24711"]),
        ({"SLURM_PROCID": "4"}, {}, HOSTS, ["4, 1", "4, 2"]),
        ({}, {"gpus_per_node": 2}, HOSTS, ["launch.gpus_per_node is 2", "CUDA_VISIBLE_DEVICES, /dev/nvidia*) is 1"]),
        ({"SLURM_PROCID": "a"}, {}, HOSTS, ["SLURM_PROCID is 'a', no number"]),
        ({"SLURM_JOB_ID": None}, {}, HOSTS, ["SLURM_JOB_ID is not set"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and " is " in value[0] else "",
)
def test_contradictions_name_both_sources(
    changed: dict[str, str | None], launch: dict[str, Any], hosts: list[str], sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    environment = {name: value for name, value in (ALLOCATED | changed).items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        from_slurm(environment, settings(**launch), hosts)
    assert all(source in str(refused.value) for source in sources)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"gpus_per_node": None}, "launch.gpus_per_node=8"),
        ({"time": "6"}, "leaves no time to train"),
        ({"time": "an hour"}, "DAYS-HH:MM:SS"),
        ({"container_mounts": "/data"}, "launch.container=IMAGE"),
        ({"env_file": "absent.sh"}, "there is no such file"),
        ({"sbatch": {"array": "0-3"}}, "the launcher sets this itself"),
        ({"sbatch": {"ntasks_per_node": 3}}, "the launcher sets this itself"),
        ({"max_requeues": -1}, "must be 0 or greater"),
        ({"cpus_per_gpu": 0}, "must be 1 or greater"),
    ],
)
def test_wrong_settings_are_refused_before_submission(launch: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        validate_launch(settings(**launch))


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    """sbatch(1), --time."""
    limits = {"90": 90, "90:30": 91, "1:30:00": 90, "2-0": 2880, "1-02:30": 1590, "1-02:30:01": 1591}
    assert {limit: minutes(limit) for limit in limits} == limits


CASES = {
    "gpus": [
        "launch.nodes=8",
        "launch.gpus_per_node=8",
        "launch.time=1-0",
        "launch.partition=h100",
        "launch.account=lab",
        "launch.qos=high",
    ],
    "cpus": ["launch.nodes=2", "launch.gpus_per_node=0", "launch.processes=2", "launch.cpus_per_gpu=4", "launch.memory=64G"],
    "all": [
        *("launch.gpus_per_node=2", "launch.constraint=a100|h100", "launch.exclude='node[3-4],node9'", "launch.reservation=course"),
        *("launch.container=/images/fulltune.sqsh", "launch.container_mounts='/data:/data,/runs'", "launch.env_file=slurm/env.sh"),
        *(
            'launch.setup=["module load cuda/12.4","export NCCL_DEBUG=INFO"]',
            "+launch.sbatch.mail-type=END",
            "+launch.sbatch.exclusive=true",
        ),
        *("launch.grace_s=120", "launch.snapshot=true", "launch.time=2:00:00"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_text_that_sbatch_gets(name: str) -> None:
    """GOLDEN=write makes the files anew; they were read by eye, and each parsed by sbatch on the virtual cluster."""
    line = [
        sys.executable,
        "-m",
        "launcher",
        "+exp=quickstart_base",
        "run_dir=/runs/one",
        "launch=slurm",
        "launch.processes=null",
        "mode=dry_run",
        *CASES[name],
    ]
    rows = ["train.global_batch=64", "train.microbatch=1"]
    done = subprocess.run(
        [*line, *rows], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    text = "#!/bin/bash" + done.stdout.partition("#!/bin/bash")[2]
    text = text.replace(sys.executable, "PYTHON").replace(str(ROOT), "CHECKOUT")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("RANK=")).rstrip() + "\n"
    assert done.stdout.count("\nRANK=") == int(re.findall(r"# (\d+) rank", done.stdout)[0])
    if os.environ.get("GOLDEN") == "write":
        (GOLDEN / f"{name}.sbatch").write_text(text)
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


def test_ranks_that_share_rows_are_neighbours(tmp_path: Path) -> None:
    given = [
        "+exp=quickstart_base",
        f"run_dir={tmp_path / 'run'}",
        "launch=slurm",
        "launch.gpus_per_node=8",
        "train.global_batch=64",
        "launch.processes=null",
    ]
    given_by = ["engine.context=4", "+launch.sbatch.distribution=cyclic"]
    for more, found in (
        ([], False),
        (["engine.context=4"], True),
        (["engine.tensor=4"], True),
        (["engine.expert=4"], True),
        (given_by, False),
    ):
        [text, *_] = slurm.commands(make_job(compose([*given, *more])))
        assert ("--distribution=block" in text) is found


APART = ["objective=grpo", "reward.right=exact", "data.packing=false", "data.too_long=truncate", "rl.max_new_tokens=64", "rl.batch=8"]
NODES = ["launch=slurm", "launch.gpus_per_node=0", "launch.nodes=1", "launch.processes=2"]


def test_generators_have_nodes_after_those_of_ranks(tmp_path: Path) -> None:
    given = ["launch=slurm", "launch.gpus_per_node=0", "launch.nodes=2", "launch.processes=2", "train.global_batch=32"]
    job = make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path / 'run'}", *given, *APART, "launch.generators=3"]))
    [text, *lines] = slurm.commands(job)
    assert "#SBATCH --nodes=5\n" in text
    assert "--relative=0 --nodes=2 --ntasks=4 " in text
    assert len([line for line in lines if line.startswith("RANK=")]) == 4
    assert [line.partition(": ")[0] for line in lines[4:]] == [f"# generator {number}, asked by rank {number}" for number in range(3)]
    assert "--nodelist=<node 3 of the job> " in lines[4]


def test_ranks_leave_no_cores_to_a_generator_that_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local.host, "threads_per_rank", lambda processes: processes)
    job = make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path / 'run'}", *NODES, *APART, "rl.staleness=1"]))
    assert local.additions(job)["OMP_NUM_THREADS"] == "3"
    assert local.additions(replace(job, launch=replace(job.launch, generators=1)))["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("count", "path", "value"), [(4, "rl.batch", 5), (20, "rl.batch", 1), (21, "launch.generators", 3)])
def test_generators_with_nothing_to_do_are_refused_with_what_works(count: int, path: str, value: int, tmp_path: Path) -> None:
    """Of 20 answers, 8 at once. More generators than answers need ranks that share rows."""
    given = [*NODES, *APART, "train.global_batch=20", "train.microbatch=1", "rl.group_size=4"]
    config = compose(["+exp=quickstart_base", f"run_dir={tmp_path / 'run'}", *given])
    wrong = replace(config, launch=replace(config.launch, processes=24, generators=count))
    with pytest.raises(ConfigError, match=f"some would write none\n.*{path}={value}, or launch.generators=0"):
        generators.require_place(wrong)
    part, name = path.split(".")
    generators.require_place(replace(wrong, **{part: replace(getattr(wrong, part), **{name: value})}))


def test_the_first_ranks_are_told_of_a_generator_each() -> None:
    """Ranks that are told of none ask none, on any machine."""
    hosts = generators.apart(settings(generators=2), [*HOSTS, "node4", "node5"], HOSTS)
    assert hosts == ["node4", "node5"]
    found = [generators.variable(rank, hosts) for rank in range(3)]
    assert [is_apart(each) for each in (*found, {})] == [True, True, True, False]
    seats = [seat_of(each) for each in found]
    assert [seat and seat.host for seat in seats] == ["node4", "node5", None]
    assert seats[0] is not None
    assert (seats[0].words[0], "--nodelist=node4" in seats[0].words) == ("srun", True)
    with pytest.raises(ConfigError, match=r"the job has 1 node without ranks \(node4\): two sources contradict"):
        generators.apart(settings(generators=2), [*HOSTS, "node4"], HOSTS)


def job_in(folder: Path) -> Job:
    given = ["launch=slurm", "launch.gpus_per_node=0", "launch.nodes=2", "launch.processes=2", "train.global_batch=32"]
    return make_job(compose(["+exp=quickstart_base", f"run_dir={folder / 'run'}", *given]))


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("Invalid account or account/partition combination specified", "launch.account"),
        ("Invalid qos specification", "launch.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "launch.time"),
        ("invalid partition specified: absent", "launch.partition"),
        ("Memory specification can not be satisfied", "launch.memory"),
        ("Invalid feature specification", "launch.constraint"),
        ("Invalid generic resource (gres) specification", "launch.gpus_per_node"),
        ("The reservation is not available", "launch.reservation"),
        ("Node count specification invalid", "launch.nodes"),
    ],
)
def test_sbatch_s_words_name_the_field_to_change(said: str, field: str, tmp_path: Path) -> None:
    """Its own words, from slurm_errno.c: a cluster without accounting refuses no account."""
    error = slurm._refused(job_in(tmp_path), f"sbatch: error: Batch job submission failed: {said}\nsubmitit: more\n")
    assert error.path == field
    assert said in str(error)


@pytest.mark.parametrize(
    ("error", "node"),
    [
        ({"rank": 3, "host": "node3"}, "node3"),
        ({"rank": 3, "host": "node3.cluster.example"}, "node3"),
        ({"rank": 1, "host": "node3"}, "node3"),  # ranks may be dealt out in turns
        ({"rank": 0, "host": "node2", "ranks": [0, 1, 2, 3]}, ""),  # a hang that nobody in particular is to blame for
        ({"rank": 3, "host": "node3", "ranks": [3]}, "node3"),
        ({"rank": 0, "host": "node5"}, "node5"),  # its generator's, which has no rank
        ({"rank": 3, "host": None, "ranks": [3]}, ""),
        ({"message": "no rank began"}, ""),
    ],
)
def test_the_node_that_failed_is_the_one_that_the_error_names(error: dict[str, Any], node: str) -> None:
    assert task.failed_node(error, [*HOSTS, "node4", "node5"]) == node


@pytest.mark.parametrize(
    ("error", "requeues"),
    [
        ([{"message": "x"}] * 3, 2),  # the third time without a new checkpoint
        ([{"message": "x", "setting": {}}], 0),
        ([{"message": "x", "of_node": False}], 0),
    ],
)
def test_what_would_fail_again_is_not_queued_again(
    error: list[dict[str, Any]], requeues: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, asked = job_in(tmp_path), []
    job.run_dir.mkdir(parents=True)
    monkeypatch.setattr(task, "requeue", lambda *given: asked.append(given))
    for one in error:
        Attempt(job.run_dir).record_failure(one, 1.0)
        task.requeue_elsewhere(job, from_slurm(ALLOCATED, job.launch, HOSTS), [*HOSTS, "node5"])
    assert len(asked) == requeues


def test_a_rank_0_that_does_not_end_with_its_run_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may be stopped; SLURM would end its task, which then could not queue the job again."""
    job, now = job_in(tmp_path), [100.0]
    job.run_dir.mkdir(parents=True)
    attempt = Attempt(job.run_dir)
    monkeypatch.setattr(task.time, "monotonic", lambda: now[0])
    is_lost = task.is_beyond_help(job, attempt)
    attempt.record_failure({"message": "x"}, 1.0)
    for now[0], lost in ((102.0, False), (116.0, False), (118.0, True)):
        assert is_lost() is lost, now


def test_a_job_that_cannot_be_queued_again_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On a node without scontrol: the checkpoint is there, and what to do is said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(task.signal, "signal", lambda *given: None)  # this process goes on
    job = job_in(tmp_path)
    task.requeue(job, from_slurm(ALLOCATED, job.launch, HOSTS), "stopped with a checkpoint")
    said = capfd.readouterr().err
    assert "could not be queued again" in said
    assert "scontrol" in said
    assert "the same launcher command submits it anew" in said


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    """And imports no torch, so that it costs a second."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules |= dict.fromkeys(['torch', 'transformers', 'datasets'])\n")
    line = [
        sys.executable,
        "-m",
        "launcher",
        "+exp=quickstart_base",
        f"run_dir={tmp_path / 'run'}",
        "launch=slurm",
        "launch.gpus_per_node=0",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/nowhere"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "no SLURM cluster" in done.stderr
    assert "Traceback" not in done.stderr
