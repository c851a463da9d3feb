"""launch=slurm on a real cluster: what is submitted trains, is saved, queued again, and ends as an uninterrupted run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from command import ROOT, arguments, environment, read_rows, trace

from trainers.rundir.rows import last_step, steps

pytestmark = pytest.mark.slurm


@pytest.fixture
def submit(cluster: Cluster, base: Path, chats: Path, cache: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Type the launcher's command on the cluster's login node: `submit(run_dir, override, ...)`."""

    def type_it(run_dir: Path | None, *more: str, multirun: bool = False) -> subprocess.CompletedProcess[str]:
        line = arguments(base, chats, run_dir or Path("unused"), "launch=slurm", "launch.gpus_per_node=0", "launch.processes=1", *more)
        line = [word for word in line if run_dir or not word.startswith("run_dir=")]
        line = [*line[:3], "-m", *line[3:]] if multirun else line
        where = environment(cache) | cluster.environment
        return subprocess.run(line, cwd=ROOT, env=where, capture_output=True, text=True, timeout=60, check=False)

    return type_it


def local(run_dir: Path, base: Path, chats: Path, cache: Path, *more: str) -> None:
    line = arguments(base, chats, run_dir, *more)
    done = subprocess.run(line, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr


def job_id(run_dir: Path) -> str:
    return str(json.loads((run_dir / "slurm.json").read_text())["id"])


def status(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "status.json").read_text()))


def said(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*.out")))


def wait_for(condition: Callable[[], Any], run_dir: Path, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, said(run_dir)[-4000:]
        time.sleep(0.1)


def steps_done(run_dir: Path) -> int:
    return last_step(steps(read_rows(run_dir)))


@pytest.mark.parametrize(
    ("nodes", "ranks"),
    [
        pytest.param(1, 2, marks=pytest.mark.soak),
        pytest.param(2, 1, marks=pytest.mark.soak),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_nodes_and_ranks_make_the_losses_of_a_local_run(
    nodes: int, ranks: int, submit: Any, base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    rows = [f"train.global_batch={nodes * ranks * 2}", "train.steps=4", "train.eval_every=null"]
    run_dir = tmp_path / "run"
    done = submit(run_dir, f"launch.nodes={nodes}", f"launch.processes={ranks}", *rows)
    assert done.returncode == 0, done.stderr
    assert status(run_dir)["state"] != "done", "it returns at once"
    wait_for(lambda: status(run_dir)["state"] in ("done", "failed"), run_dir)
    local(tmp_path / "local", base, chats, cache, f"launch.processes={nodes * ranks}", *rows)
    assert trace(run_dir) == trace(tmp_path / "local")
    hosts = {json.loads(path.read_text()).get("host") for path in (run_dir / "ranks").glob("*.json")}
    assert len(hosts) in (0, nodes)  # removed by ranks that are done


LONG = ("train.steps=50", "checkpoint.every=5", "train.eval_every=25", "log.wandb=offline")


@pytest.fixture(scope="module")
def undisturbed(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The trace of the run that the tests below disturb."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    local(run_dir, base, chats, cache, "launch.processes=2", *LONG)
    return trace(run_dir)


@pytest.mark.slow
def test_a_signal_saves_and_queues_again_once(cluster: Cluster, submit: Any, undisturbed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """To all processes of the job, as before a time limit; twice."""
    run_dir = tmp_path / "run"
    given = ["launch.nodes=2", *LONG, "checkpoint.every=100"]
    assert submit(run_dir, *given).returncode == 0
    job = job_id(run_dir)
    for attempt in (1, 2):
        wait_for(lambda: status(run_dir).get("attempt") == attempt and steps_done(run_dir) >= 5 * attempt, run_dir)  # noqa: B023
        cluster.run("scancel", "--signal=USR2", job)
        wait_for(lambda: status(run_dir).get("attempt") == attempt + 1, run_dir)  # noqa: B023
    again = submit(run_dir, *given)
    assert (again.returncode, "nothing to submit" in again.stdout) == (0, True)
    wait_for(lambda: status(run_dir)["state"] == "done", run_dir)
    assert status(run_dir)["attempt"] == 3
    assert said(run_dir).count("goes back into the queue") == 2
    assert trace(run_dir) == undisturbed
    assert wandb_ids(run_dir) == [json.loads((run_dir / "manifest.json").read_text())["wandb_id"]] * 3


def wandb_ids(run_dir: Path) -> list[str]:
    """The W&B run of each attempt."""
    return [path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")]


def preempt(cluster: Cluster, job: str) -> None:
    cluster.run("srun", "--partition=high", "-N3", "--exclusive", "hostname", timeout_s=60)


def set_down(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.harmed.add(2)


def end_slurmd(cluster: Cluster, job: str) -> None:
    """And the node's ranks go on."""
    cluster.harmed.add(2)
    cluster.on(2, "pkill", "-9", "-x", "slurmd")


HARM: dict[str, Callable[[Cluster, str], object]] = {
    "crash": lambda cluster, job: cluster.crash(2),
    "preempt": preempt,
    "requeue": lambda cluster, job: cluster.run("scontrol", "requeue", job),
    "cut": lambda cluster, job: cluster.cut(2),
    "freeze": lambda cluster, job: cluster.freeze(2),
    "set down": set_down,
    "slurmd ends": end_slurmd,
}


@pytest.mark.parametrize("how", [pytest.param(name, marks=pytest.mark.slow if name == "crash" else pytest.mark.soak) for name in HARM])
def test_what_befalls_a_job_changes_no_figure(
    how: str, cluster: Cluster, submit: Any, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """SLURM itself queues it again, once; W&B has one run."""
    run_dir = tmp_path / "run"
    assert submit(run_dir, "launch.nodes=2", *LONG).returncode == 0
    wait_for(lambda: steps_done(run_dir) >= 8, run_dir)
    assert "node2" in cluster.run("scontrol", "show", "hostnames", cluster.job(job_id(run_dir))["NodeList"])
    HARM[how](cluster, job_id(run_dir))
    wait_for(lambda: status(run_dir)["state"] == "done", run_dir, timeout_s=150)
    assert status(run_dir)["attempt"] == 2
    assert trace(run_dir) == undisturbed
    assert wandb_ids(run_dir) == [json.loads((run_dir / "manifest.json").read_text())["wandb_id"]] * 2
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job_id(run_dir)).strip(), run_dir, timeout_s=30)
    assert cluster.job(job_id(run_dir))["Restarts"] == "1"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_time_limit_is_come_before(cluster: Cluster, submit: Any, base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Of two minutes 50 seconds are for saving: SLURM's own signal, which it may send half a minute early."""
    long = ["train.steps=1500", "train.eval_every=null", "checkpoint.every=10000"]
    run_dir = tmp_path / "run"
    assert submit(run_dir, "launch.nodes=2", "launch.time=2", "launch.grace_s=50", *long).returncode == 0
    wait_for(lambda: status(run_dir)["state"] in ("done", "failed"), run_dir, timeout_s=700)
    requeues = said(run_dir).count("goes back into the queue")
    assert requeues >= 1
    assert (status(run_dir)["state"], status(run_dir)["attempt"]) == ("done", requeues + 1)
    local(tmp_path / "local", base, chats, cache, "launch.processes=2", *long)
    assert trace(run_dir) == trace(tmp_path / "local")


@pytest.mark.slow
def test_a_failed_job_goes_on_without_the_node_that_failed(
    cluster: Cluster, submit: Any, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert submit(run_dir, "launch.nodes=2", "launch.requeue_on_failure=true", *LONG).returncode == 0
    wait_for(lambda: steps_done(run_dir) >= 8, run_dir)
    cluster.on(2, "pkill", "-9", "-f", f"m trainers {run_dir}/")
    wait_for(lambda: status(run_dir)["state"] == "done", run_dir, timeout_s=150)
    job = cluster.job(job_id(run_dir))
    assert (job["ExcNodeList"], job["NodeList"], job["Restarts"]) == ("node2", "node[1,3]", "1")
    assert trace(run_dir) == undisturbed


@pytest.mark.slow
def test_a_job_that_always_fails_is_not_queued_again_for_ever(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    """Three failures without a new checkpoint are enough; wrong settings are not tried twice."""
    run_dir = tmp_path / "run"
    assert submit(run_dir, "launch.requeue_on_failure=true", "train.steps=4", "checkpoint.every=2").returncode == 0
    (run_dir / "checkpoints").touch()
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job_id(run_dir)).strip(), run_dir, timeout_s=150)
    assert status(run_dir)["state"] == "failed"
    assert cluster.job(job_id(run_dir))["Restarts"] == "2"
    assert "failed 3 times in a row without a new checkpoint" in said(run_dir)
    assert cluster.job(job_id(run_dir))["ExcNodeList"] == "node1,node2"


def test_a_job_that_slurm_takes_and_does_not_start_is_told_of(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    """SLURM 22.05 accepts more nodes than there are."""
    done = submit(tmp_path / "run", "launch.nodes=9", "train.global_batch=9")
    assert done.returncode == 0, done.stderr
    assert "as it is: Partition" in done.stderr

    def listed() -> str:
        return cluster.run(sys.executable, "-m", "tools.runs", str(tmp_path), COLUMNS="250")

    assert "pending" in listed()
    assert "does not start as it is: Partition" in listed()
    cluster.run("scancel", job_id(tmp_path / "run"))
    assert "the job ended as CANCELLED: the same command continues the run" in listed()


@pytest.mark.slow
def test_no_more_requeues_than_allowed(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert submit(run_dir, "launch.max_requeues=0", "train.steps=500", "checkpoint.every=500", "train.eval_every=null").returncode == 0
    wait_for(lambda: steps_done(run_dir) >= 2, run_dir)
    cluster.run("scancel", "--signal=USR2", job_id(run_dir))
    wait_for(lambda: status(run_dir)["state"] == "preempted" and not cluster.run("squeue", "-h", "-j", job_id(run_dir)).strip(), run_dir)
    assert "launch.max_requeues" in said(run_dir)


@pytest.mark.slow
def test_a_rank_killed_from_outside_is_named(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    """And the job ends as failed, soon, with no rank left."""
    run_dir = tmp_path / "run"
    assert submit(run_dir, "launch.nodes=2", "train.steps=500", "checkpoint.every=500", "train.eval_every=null").returncode == 0
    wait_for(lambda: steps_done(run_dir) >= 2, run_dir)
    subprocess.run(["pkill", "-9", "-o", "-f", f"m trainers {run_dir}/"], check=True, timeout=20)
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job_id(run_dir)).strip(), run_dir, timeout_s=90)
    assert status(run_dir)["state"] == "failed"
    assert "was killed by SIGKILL" in status(run_dir)["error"]["message"]
    found = subprocess.run(["pgrep", "-f", f"m trainers {run_dir}/"], capture_output=True, text=True, check=False, timeout=20)
    assert not found.stdout


def test_what_slurm_refuses_is_said_in_its_words(submit: Any, tmp_path: Path) -> None:
    for number, (override, words) in enumerate(
        [
            ("launch.partition=absent", ["launch.partition", "invalid partition specified"]),
            ("launch.memory=999G", ["launch.memory", "SLURM refuses the job: Memory specification"]),
        ]
    ):
        done = submit(tmp_path / str(number), override)
        assert done.returncode == 2, done.stdout + done.stderr
        assert all(word in done.stderr for word in words), done.stderr
        assert "Traceback" not in done.stderr


def test_a_contradiction_ends_the_job_in_seconds(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    """MASTER_ADDR is left in the environment of whoever submits."""
    run_dir = tmp_path / "run"
    done = submit(run_dir, "launch.setup=[export MASTER_ADDR=localhost]".replace("[", '["').replace("]", '"]'))
    assert done.returncode == 0, done.stderr
    wait_for(lambda: status(run_dir)["state"] == "failed", run_dir, timeout_s=30)
    assert "MASTER_ADDR is localhost" in status(run_dir)["error"]["message"]
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job_id(run_dir)).strip(), run_dir, timeout_s=30)


@pytest.mark.slow
def test_an_array_of_points(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    """One cannot save and one is killed -9; the others are done, and the same command again submits exactly these two."""
    folder = tmp_path / "sweep"
    points = ["peft=none,lora", "optim.lr=3e-3,1e-3", f"hydra.sweep.dir={folder}", "launch.array_parallelism=2"]
    given = [*points, "train.steps=150", "checkpoint.every=50", "train.eval_every=null", "data.eval_fraction=0"]
    done = submit(None, *given, multirun=True)
    assert done.returncode == 0, done.stderr
    assert "4 to submit" in done.stdout
    runs = [path.parent for path in folder.glob("*/config.yaml")]
    assert len(runs) == 4
    raising, killed = folder / "optim.lr=0.001,peft=lora", folder / "optim.lr=0.003,peft=none"
    (raising / "checkpoints").touch()
    wait_for(lambda: steps_done(killed) >= 2, killed)
    cluster.run("pkill", "-9", "-f", f"m trainers {killed}/")
    wait_for(lambda: all(status(run)["state"] in ("done", "failed") for run in runs), killed, timeout_s=200)
    assert {run for run in runs if status(run)["state"] == "failed"} == {raising, killed}
    assert "was killed by SIGKILL" in status(killed)["error"]["message"]
    ids = {run: job_id(run) for run in runs}
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", ids[killed].partition("_")[0]).strip(), killed, timeout_s=30)
    assert {run for run in runs if cluster.job(ids[run])["JobState"] == "FAILED"} == {raising, killed}
    listed = cluster.run(sys.executable, "-m", "tools.runs", str(folder), COLUMNS="250")
    assert listed.count("failed") == 2
    (raising / "checkpoints").unlink()
    again = submit(None, *given, multirun=True)
    assert "4 points: 2 done, 0 in the queue, 2 to submit" in again.stdout, again.stderr
    wait_for(lambda: all(status(run)["state"] == "done" for run in runs), killed, timeout_s=100)
    assert [run for run in runs if job_id(run) != ids[run]] == [run for run in runs if run in (raising, killed)]
    assert "4 points: 4 done" in submit(None, *given, multirun=True).stdout


@pytest.mark.slow
def test_a_snapshot_is_what_runs_and_its_log_can_be_followed(submit: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mark = f"""launch.setup=["echo 'print(\\"from the copy\\")' >> {run_dir}/code/trainers/__init__.py"]"""
    done = submit(run_dir, mark, "launch.snapshot=true", "launch.wait=true", "train.steps=2", "train.eval_every=null")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert "peak host memory" in done.stdout, "the table of figures"
    assert f"cd {run_dir / 'code'}" in next((run_dir / "slurm").glob("*_submission.sh")).read_text()
    assert "from the copy" in done.stdout
    assert (run_dir / "code" / "trainers" / "loop.py").read_bytes() == (ROOT / "trainers" / "loop.py").read_bytes()


@pytest.mark.slow
def test_two_jobs_on_one_node_keep_out_of_each_other_s_way(cluster: Cluster, submit: Any, tmp_path: Path) -> None:
    """At the same time: each has a port of its own, and the other's figures."""
    runs = [tmp_path / name for name in ("one", "two")]
    given = ["launch.processes=2", "+launch.sbatch.nodelist=node1", "train.steps=100", "train.eval_every=null", "checkpoint.every=100"]
    for run_dir in runs:
        assert submit(run_dir, *given).returncode == 0
    wait_for(lambda: all(steps_done(run_dir) for run_dir in runs), runs[0])
    assert [status(run_dir)["state"] for run_dir in runs] == ["running"] * 2
    wait_for(lambda: all(status(run_dir)["state"] == "done" for run_dir in runs), runs[1])
    assert trace(runs[0]) == trace(runs[1])


@pytest.mark.slow
def test_many_launches_at_once_make_as_many_runs(cluster: Cluster, base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Twenty, none waiting for another."""
    where = environment(cache) | cluster.environment
    more = ["launch=slurm", "launch.gpus_per_node=0", "launch.processes=1", "+launch.sbatch.hold=true"]
    lines = [arguments(base, chats, tmp_path / str(number), *more) for number in range(20)]
    started = [subprocess.Popen(line, cwd=ROOT, env=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for line in lines]
    for process in started:
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 0, said
        assert "JobHeldUser" in said
    assert len({job_id(tmp_path / str(number)) for number in range(20)}) == 20
