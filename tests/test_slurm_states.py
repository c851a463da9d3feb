"""What a command makes of a run whose job waits, has ended before a rank began, or was refused: on a real cluster, training nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from command import ROOT, arguments, environment, tool

from trainers.rundir.attempt import read_state

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

HELD = "+launch.sbatch.hold=true"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def line(cluster: Cluster, base: Path, chats: Path, cache: Path) -> Callable[..., list[str]]:
    def made(run_dir: Path, *more: str) -> list[str]:
        return arguments(base, chats, run_dir, "launch=slurm", "launch.gpus_per_node=0", "launch.processes=1", *more)

    return made


@pytest.fixture
def submit(cluster: Cluster, line: Callable[..., list[str]], cache: Path) -> Command:
    """Type the launcher's command on the cluster's login node: `submit(run_dir, override, ...)`."""

    def type_it(run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
        where = environment(cache) | cluster.environment
        return subprocess.run(line(run_dir, *more), cwd=ROOT, env=where, capture_output=True, text=True, timeout=90, check=False)

    return type_it


def job_id(run_dir: Path) -> str:
    return str(json.loads((run_dir / "slurm.json").read_text())["id"])


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_run_whose_job_waits(cluster: Cluster, submit: Command, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = submit(run_dir, HELD)
    assert first.returncode == 0, first.stderr
    job = job_id(run_dir)
    assert f"scontrol release {job}" in first.stderr, "a held job needs no other partition"
    again = submit(run_dir, HELD)
    assert (again.returncode, "nothing to submit" in again.stdout, f"scontrol release {job}" in again.stdout) == (0, True, True)
    other = submit(run_dir, HELD, "launch.time=30", "launch.nodes=2")
    refused(other, 'launch.time: null -> "30"', "launch.nodes: 1 -> 2", f"scancel {job}")
    assert submit(run_dir, HELD, "checkpoint.every=3").returncode == 0
    assert "every: 3" in (run_dir / "config.yaml").read_text()
    refused(submit(run_dir, HELD, "checkpoint.every=3", "optim.lr=0.5"), "optim.lr: 0.01 -> 0.5", f"job {job} is PENDING")
    refused(submit(run_dir, "launch=local"), f"job {job} of this run is PENDING", f"scancel {job}")
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    assert submit(copy, HELD, "checkpoint.every=3").returncode == 0
    assert job_id(copy) != job
    run_dir.rename(tmp_path / "moved")
    refused(submit(tmp_path / "moved", HELD, "checkpoint.every=3"), f"looks for it in {run_dir}", f"scancel {job}")
    cluster.run("scancel", job, job_id(copy))
    cluster.wait_for("an empty queue", lambda: not cluster.run("squeue", "--noheader"))
    moved = submit(tmp_path / "moved", HELD, "checkpoint.every=3")
    assert (moved.returncode, f"was in {run_dir} before" in moved.stderr) == (0, True), moved.stderr


def test_a_job_that_slurm_refuses_may_be_corrected(cluster: Cluster, submit: Command, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    refused(submit(run_dir, "launch.partition=nowhere"), "SLURM refuses the job", "launch.partition")
    assert read_state(run_dir) == "failed"
    assert "failed" in tool(cache, tmp_path, name="runs")
    assert submit(run_dir, HELD, "optim.lr=0.5").returncode == 0
    assert "lr: 0.5" in (run_dir / "config.yaml").read_text()


def test_a_job_that_ended_before_any_rank_began_shows_the_shells_last_words(submit: Command, cluster: Cluster, tmp_path: Path) -> None:
    """As where the checkout has moved while the job waited."""
    run_dir = tmp_path / "run"
    given = "launch.setup=[cd /nowhere/checkout || exit 7]"
    done = submit(run_dir, given, "launch.wait=true")
    assert done.returncode == 1
    assert "before any rank began" in done.stderr
    assert "/nowhere/checkout" in done.stderr.splitlines()[-1]
    again = submit(run_dir, given)
    cluster.wait_for("its end", lambda: job_id(run_dir) not in cluster.run("squeue", "--noheader", "--format=%i").split())
    assert again.returncode == 0
    done = submit(run_dir, HELD)
    assert "/nowhere/checkout" in done.stderr, "the same command says how the last job ended"


def test_points_in_the_queue_count_among_those_that_run_at_once(
    cluster: Cluster, line: Callable[..., list[str]], cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = [word for word in line(folder, "seed=1,2,3", f"hydra.sweep.dir={folder}") if not word.startswith("run_dir=")]

    def sweep(*more: str) -> str:
        command = [*words[:3], "-m", *words[3:], HELD, *more]
        where = environment(cache) | cluster.environment
        done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sweep("launch.array_parallelism=2")
    cluster.run("scancel", job_id(folder / "seed=1"))
    cluster.wait_for("its end", lambda: len(cluster.run("squeue", "--noheader", "--array").splitlines()) == 2)
    said = sweep("launch.array_parallelism=2")
    assert "after those in the queue" in said
    waits_for = cluster.job(job_id(folder / "seed=1"))["Dependency"]
    assert all(f"afterany:{job_id(folder / f'seed={seed}')}" in waits_for for seed in (2, 3)), waits_for
    cluster.run("scancel", job_id(folder / "seed=1"))
    cluster.wait_for("its end", lambda: len(cluster.run("squeue", "--noheader", "--array").splitlines()) == 2)
    assert "(1 points, 1 at once)" in sweep("launch.array_parallelism=3")


def test_ctrl_c_while_a_sweep_is_followed_says_that_its_jobs_continue(
    cluster: Cluster, line: Callable[..., list[str]], cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = [word for word in line(folder, "seed=1,2", HELD, f"hydra.sweep.dir={folder}") if not word.startswith("run_dir=")]
    command: list[Any] = [*words[:3], "-m", *words[3:], "launch.wait=true"]
    where = environment(cache) | cluster.environment
    following = subprocess.Popen(command, cwd=ROOT, env=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        cluster.wait_for("its jobs", lambda: (folder / "seed=2" / "slurm.json").exists())
        time.sleep(1.5)  # it looks once a second
        following.send_signal(signal.SIGINT)
        _, error = following.communicate(timeout=30)
    finally:
        following.kill()
        following.wait(10)
    assert following.returncode == 130, error
    ids = " ".join(job_id(folder / f"seed={seed}") for seed in (1, 2))
    assert f"2 jobs of the sweep still in the queue; scancel {ids} ends them" in error
    assert len(cluster.run("squeue", "--noheader", "--array").splitlines()) == 2
