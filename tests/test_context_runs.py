"""Runs whose ranks share rows, as a user starts them: stopped, continued on other meshes, swept, of pairs, and named when they hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from command import (
    ROOT,
    arguments,
    environment,
    finish,
    launch,
    pids_of,
    read_rows,
    started,
    status_of,
    stop_at_step,
    tool,
    trace,
    wait_for_step,
)
from command import wait_for as wait_until
from small_models import save_mixture

from trainers.rundir.rows import last_step, steps

SHARED = ("engine.context=2", "train.global_batch=2")


def curve(run_dir: Path, *names: str) -> list[float]:
    return [row[name] for row in read_rows(run_dir) for name in names if name in row]


def exported(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_continues_on_its_own_mesh_bit_for_bit_and_on_others_as_one_curve(
    base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    """Two ranks that share rows, stopped; then the same two, four of which two share rows, three beyond the heads, and one alone."""
    whole = arguments(base, chats, tmp_path / "whole", *SHARED)
    said = launch(cache, whole)
    assert "1 microbatch of 1 on 2 ranks together" in said or "2 microbatches of 1 on 2 ranks together" in said
    assert "2 ranks share each row" in said
    parts = arguments(base, chats, tmp_path / "parts", *SHARED, "checkpoint.every=2")
    stop_at_step(cache, parts, tmp_path / "parts", 3)
    others = {"four": ["launch.processes=4", "engine.replicate=2"], "three": ["launch.processes=3", "engine.context=3"]}
    others |= {"one": ["launch.processes=1", "engine.context=1"]}
    for name in others:
        shutil.copytree(tmp_path / "parts", tmp_path / name)
    assert "continuing from" in launch(cache, parts)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    assert exported(tmp_path / "parts" / "export") == exported(tmp_path / "whole" / "export")
    for name, more in others.items():
        launch(cache, arguments(base, chats, tmp_path / name, *SHARED, "checkpoint.every=2", *more))
        assert curve(tmp_path / name, "loss", "grad_norm", "eval_loss") == pytest.approx(
            curve(tmp_path / "whole", "loss", "grad_norm", "eval_loss"), rel=2e-5
        ), name
    tool(cache, tmp_path / "four", tmp_path / "again", name="export")
    assert exported(tmp_path / "again") == exported(tmp_path / "four" / "export")


@pytest.mark.slow
def test_a_sweep_of_pairs_has_one_curve_on_each_mesh(base: Path, cache: Path, tmp_path: Path) -> None:
    """A LoRA by DPO with its reference measured on each mesh, and held-out pairs."""
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the cat {number}", "chosen": "sat on a mat", "rejected": f"far home {number}"} for number in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = ("objective=dpo", "peft=lora", "peft.dropout=0", "train.steps=3", "train.eval_every=3")
    line = [word for word in arguments(base, file, tmp_path, *method, *SHARED[1:]) if not word.startswith("run_dir=")]
    line = [*line[:3], "-m", *line[3:], f"hydra.sweep.dir={tmp_path / 'sweep'}", "engine.context=1,2"]
    launch(cache, line)
    apart, shared = (tmp_path / "sweep" / f"engine.context={context}" for context in (1, 2))
    names = ("loss", "grad_norm", "eval_loss", "accuracy", "reward_margin")
    assert curve(shared, *names) == pytest.approx(curve(apart, *names), rel=2e-5)
    own = tmp_path / "cache"
    launch(own, arguments(base, file, tmp_path / "run", *method, *SHARED))
    assert curve(tmp_path / "run", *names) == curve(shared, *names)


@pytest.mark.soak
def test_a_stopped_rank_that_shares_rows_is_named(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """The one that shares its rows waits for it in an exchange of heads, the other two in the sums of gradients."""
    run_dir = tmp_path / "run"
    given = ("launch.processes=4", "engine.context=2", "train.steps=60", "checkpoint.every=5", "train.step_timeout_s=6")
    with started(arguments(base, chats, run_dir, *given), environment(cache)) as process:
        wait_for_step(run_dir, 6, process)
        for pid in pids_of(run_dir, rank=3):
            os.kill(pid, signal.SIGSTOP)
        said = finish(process, run_dir)
    error = status_of(run_dir)["error"]
    assert (status_of(run_dir)["state"], error["rank"], error["ranks"]) == ("failed", 3, [3])
    assert "rank 3 has not been heard of for" in said.splitlines()[-1]


@pytest.mark.slurm
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("engine.context=2", marks=pytest.mark.soak),
        pytest.param("engine.tensor=2", marks=pytest.mark.soak),
        pytest.param("engine.expert=2", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_over_two_nodes_survives_one(mesh: str, cluster: Cluster, base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Four ranks on two nodes, in groups of two; the second node crashes. The trace is that of a run on this machine."""
    import subprocess

    run_dir = tmp_path / "run"
    base = save_mixture(base, tmp_path / "mixture") if mesh == "engine.expert=2" else base
    given = (mesh, "train.steps=40", "checkpoint.every=5", "train.eval_every=20")
    launch(cache, arguments(base, chats, tmp_path / "local", "launch.processes=4", *given), timeout_s=400)
    line = arguments(base, chats, run_dir, "launch=slurm", "launch.gpus_per_node=0", "launch.nodes=2", "launch.processes=2", *given)
    where: dict[str, Any] = environment(cache) | cluster.environment
    done = subprocess.run(line, cwd=ROOT, env=where, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: last_step(steps(read_rows(run_dir))) >= 8, timeout_s=120)
    cluster.crash(2)
    wait_until(lambda: status_of(run_dir)["state"] == "done", timeout_s=200)
    assert status_of(run_dir)["attempt"] == 2
    assert trace(run_dir) == trace(tmp_path / "local")
    assert exported(run_dir / "export") == exported(tmp_path / "local" / "export")
