"""launch.generators on a real cluster: nodes that write answers give the answers of one machine, whatever becomes of them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from command import ROOT, arguments, environment, trace

from trainers.rundir.rows import last_step, read_rows, steps

pytestmark = pytest.mark.slurm

WORDS = ["cat", "two dogs", "hills home", "mat while the", "green", "far over", "ran ran ran ran ran ran", "sat on", "home", "again a"]
TOLD = ("reward", "reward/short", "entropy", "mismatch", "mismatch_largest", "prompts_drawn", "eval_reward", "eval_pass@1")
WORKER = "^[^ ]*python[^ ]* -m trainers.generate.worker"  # and not the srun that starts it
LONG = ("train.steps=8", "checkpoint.every=2")
ONE = ("launch=slurm", "launch.gpus_per_node=0", "launch.processes=2", "launch.generators=1")


def line(base: Path, folder: Path, run_dir: Path, *more: str) -> list[str]:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(json.dumps({"question": words, "answer": words[:3]}) + "\n" for words in WORDS * 3))
    asked = ("objective=grpo", "reward.short.kind=length", "reward.short.max=2", "reward.short.soft=6", "data.packing=false", "rl.batch=3")
    batch = ("train.global_batch=8", "train.microbatch=2", "rl.group_size=4", "rl.max_new_tokens=8", "train.sample_tokens=4")
    return arguments(base, prompts, run_dir, *asked, *batch, "optim.lr=3e-3", *more)


def told(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be the same to the bit: the trace, rewards and answers."""
    folders = sorted((run_dir / "rollouts").glob("step-*"))
    numbers = [tuple(row.get(key) for key in TOLD) for row in read_rows(run_dir)]
    return [*trace(run_dir), *numbers, *((folder.name, (folder / "answers.jsonl").read_bytes()) for folder in folders)]


def type_it(words: list[str], cache: Path, more: dict[str, str]) -> None:
    done = subprocess.run(
        words, cwd=ROOT, env=environment(cache) | {"OMP_NUM_THREADS": "1"} | more, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def status(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "status.json").read_text()))


def said(run_dir: Path) -> str:
    """What ranks have said, of all attempts."""
    return "\n".join(path.read_text() for path in (*sorted((run_dir / "slurm").glob("*.out")), *sorted(run_dir.glob("logs/*/*.log"))))


def wait_for(condition: Callable[[], Any], run_dir: Path, timeout_s: float = 150) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, said(run_dir)[-4000:]
        time.sleep(0.05)


def wait_for_end(cluster: Cluster, run_dir: Path) -> None:
    wait_for(lambda: status(run_dir)["state"] in ("done", "failed"), run_dir)
    assert status(run_dir)["state"] == "done", said(run_dir)[-4000:]
    job = str(json.loads((run_dir / "slurm.json").read_text())["id"])
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job).strip(), run_dir, timeout_s=30)


@contextmanager
def running(cluster: Cluster, base: Path, cache: Path, run_dir: Path, *more: str) -> Iterator[str]:
    """Submit a run, and let it end once it was disturbed; gives the id of its job after two steps."""
    type_it(line(base, run_dir.parent, run_dir, *more), cache, cluster.environment)
    wait_for(lambda: last_step(steps(read_rows(run_dir))) >= 2, run_dir)
    yield str(json.loads((run_dir / "slurm.json").read_text())["id"])
    wait_for_end(cluster, run_dir)


def workers(cluster: Cluster, node: int) -> list[str]:
    found = subprocess.run(
        [str(ROOT / "slurm" / "cluster.sh"), "exec", str(node), "pgrep", "-f", WORKER],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return found.stdout.split()


@pytest.fixture(scope="module")
def undisturbed(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    type_it(line(base, folder, folder / "run", *LONG), cache, {})
    return told(folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_generator_on_a_node_of_its_own_is_replaced_and_changes_nothing(
    cluster: Cluster, base: Path, cache: Path, tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    """Two ranks on one node; the process on the other one is killed after two steps."""
    run_dir = tmp_path / "run"
    with running(cluster, base, cache, run_dir, *ONE, *LONG) as job:
        cluster.on(2, "pkill", "-9", "-f", WORKER)
        assert cluster.job(job)["NodeList"] == "node[1-2]"
        assert not workers(cluster, 1)
    assert "the generator on node2 is replaced: the model's process has ended" in said(run_dir)
    assert not workers(cluster, 2)
    assert (status(run_dir)["attempt"], told(run_dir)) == (1, undisturbed)


def preempt(cluster: Cluster, job: str) -> None:
    cluster.run("srun", "--partition=high", "-N3", "--exclusive", "hostname", timeout_s=60)


LOSSES: dict[str, Callable[[Cluster, str], object]] = {
    "frozen": lambda cluster, job: cluster.freeze(2),
    "crashed": lambda cluster, job: cluster.crash(2),
    "preempted": preempt,
    "saved and queued again": lambda cluster, job: cluster.run("scancel", "--signal=USR2", job),
}


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", LOSSES)
def test_a_job_that_is_queued_again_continues(
    how: str, cluster: Cluster, base: Path, cache: Path, tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    """The node of the generator is lost, or the job: SLURM starts it again, perhaps on other nodes."""
    with running(cluster, base, cache, tmp_path / "run", *ONE, *LONG) as job:
        LOSSES[how](cluster, job)
    assert status(tmp_path / "run")["attempt"] == 2
    assert told(tmp_path / "run") == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_generator_that_hangs_is_named_and_replaced(
    cluster: Cluster, base: Path, cache: Path, tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    """Its node answers, and SLURM notices nothing. It takes no SIGTERM, and is gone long before its job is."""
    run_dir = tmp_path / "run"
    with running(cluster, base, cache, run_dir, *ONE, *LONG, "rl.timeout_s=8", "limits.load_s=90") as job:
        [hung] = workers(cluster, 2)
        cluster.on(2, "kill", "-STOP", hung)
        wait_for(lambda: hung not in workers(cluster, 2), run_dir)
        assert cluster.job(job)["JobState"] == "RUNNING"
    assert "the generator on node2 is replaced: the model has given no answer for" in said(run_dir)
    assert (status(run_dir)["attempt"], told(run_dir)) == (1, undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_two_generators_give_the_answers_of_one(
    cluster: Cluster, base: Path, cache: Path, tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    with running(cluster, base, cache, tmp_path / "run", *ONE, *LONG, "launch.generators=2"):
        assert [len(workers(cluster, node)) for node in (1, 2, 3)] == [0, 1, 1]
    assert told(tmp_path / "run") == undisturbed
