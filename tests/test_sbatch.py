"""slurm/train.sbatch on a real SLURM: a run on two nodes is stopped by a signal or loses a node, and comes to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from command import arguments, environment, read_rows

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 60


def submit(cluster: Cluster, base: Path, chats: Path, cache: Path, folder: Path) -> str:
    python, _, _, *settings = arguments(base, chats, folder / "run", f"train.steps={STEPS}", "train.eval_every=30", "checkpoint.every=10")
    variables = environment(cache) | {"PYTHON": python}
    script = ["slurm/train.sbatch", *settings, "launch=torchrun", "launch.processes=1"]
    return cluster.sbatch("--nodes=2", f"--output={folder}/out", *script, **{name: variables[name] for name in NEEDED})


NEEDED = ("PYTHON", "PYTHONPATH", "FULLTUNE_CACHE", "WANDB_MODE", "HF_HUB_OFFLINE")


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    def reached() -> bool:
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), (folder / "out").read_text()
        return any(row["step"] >= step for row in read_rows(folder / "run"))

    cluster.wait_for(f"step {step}", reached, timeout_s=100)


def check_finished(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.wait_for_state(job, "COMPLETED", restarts=1, timeout_s=120)
    said = (folder / "out").read_text()
    assert said.count("continuing from") == 1, said[-3000:]
    assert [row["step"] for row in read_rows(folder / "run") if "loss" in row] == list(range(1, STEPS + 1)), said[-3000:]
    assert (folder / "run" / "summary.json").is_file(), said[-3000:]


def test_a_signal_saves_and_the_job_goes_on_after_it(cluster: Cluster, base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    job = submit(cluster, base, chats, cache, tmp_path)
    wait_for_step(cluster, job, tmp_path, 20)
    cluster.run("scancel", "--signal=USR2", job)
    check_finished(cluster, job, tmp_path)
    assert "back into the queue" in (tmp_path / "out").read_text()


@pytest.mark.soak
def test_a_crashed_node_costs_the_steps_since_the_checkpoint(
    cluster: Cluster, base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    job = submit(cluster, base, chats, cache, tmp_path)
    wait_for_step(cluster, job, tmp_path, 20)
    assert cluster.job(job)["NodeList"] == "node[1-2]"
    cluster.crash(2)
    check_finished(cluster, job, tmp_path)
    assert cluster.job(job)["NodeList"] == "node[1,3]"
