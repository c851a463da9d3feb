"""slurm/cluster.sh: nodes are machines of their own, which fail as machines do, and nothing stays behind."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from cluster import SCRIPT, Cluster, traces

pytestmark = pytest.mark.slurm

BEATING = """#!/bin/sh
#SBATCH --requeue --open-mode=append --output=%j.out
while [ ! -e stop ]; do date > "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$(hostname)"; sleep 0.1; done
"""


def submit_beating(cluster: Cluster, folder: Path, *words: str) -> str:
    """Submit a job that touches JOB.LIFE.NODE ten times a second until there is a file `stop`."""
    (folder / "beating.sh").write_text(BEATING)
    return cluster.sbatch(f"--chdir={folder}", *words, str(folder / "beating.sh"))


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def test_nodes_have_names_and_networks_of_their_own(cluster: Cluster) -> None:
    assert sorted(cluster.run("srun", "-N3", "hostname").split()) == ["node1", "node2", "node3"]
    seen = cluster.run(
        "srun", "-N3", "sh", "-c", "echo $(hostname) $(ip -4 -o address show eth0 | awk '{print $4}') $(ls -d /proc/[0-9]* | wc -l)"
    )
    names, addresses, processes = zip(*sorted(line.split() for line in seen.splitlines()), strict=True)
    assert names == ("node1", "node2", "node3")
    assert len(set(addresses)) == 3
    assert all(int(count) < 20 for count in processes)  # not those of this machine
    cluster.on(1, "getent", "hosts", "node3")


def test_high_preempts_main(cluster: Cluster) -> None:
    low = cluster.sbatch("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 100")
    cluster.wait_for_state(low, "RUNNING")
    assert "node2" in cluster.run("srun", "--partition=high", "-N3", "hostname")
    cluster.wait_for_state(low, "PENDING", restarts=1)


@pytest.mark.slow
def test_jobs_of_a_crashed_and_of_a_cut_node_run_again(cluster: Cluster, tmp_path: Path) -> None:
    taken = cluster.sbatch("--exclusive", "--nodelist=node1", "--output=/dev/null", "--wrap", "sleep 100")
    cluster.wait_for_state(taken, "RUNNING")
    jobs = [submit_beating(cluster, tmp_path, "--exclusive") for _ in range(2)]
    cluster.wait_for("a beat of both", lambda: len(list(tmp_path.glob("*.0.*"))) == 2)
    crashed, cut = sorted(jobs, key=lambda job: cluster.job(job)["NodeList"])
    cluster.run("scancel", taken)

    cluster.crash(2)
    cluster.cut(3)
    for job in (crashed, cut):
        cluster.wait_for_state(job, "PENDING", restarts=1, timeout_s=40)
    assert age(tmp_path / f"{crashed}.0.node2") > 5
    assert age(tmp_path / f"{cut}.0.node3") < 2
    cluster.wait_for("a second life on node1", lambda: any(tmp_path.glob("*.1.node1")))
    assert age(tmp_path / f"{cut}.0.node3") < 2  # its first life does not know, as on a real cluster

    cluster.heal(2)
    cluster.heal(3)
    cluster.wait_for("the end of the first life", lambda: age(tmp_path / f"{cut}.0.node3") > 1)
    cluster.wait_for("two second lives", lambda: len(list(tmp_path.glob("*.1.*"))) == 2)
    (tmp_path / "stop").touch()
    for job in (crashed, cut):
        cluster.wait_for_state(job, "COMPLETED")


def test_a_frozen_node_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = submit_beating(cluster, tmp_path, "--nodelist=node2")
    beat = tmp_path / f"{job}.0.node2"
    cluster.wait_for("a beat", beat.exists)
    cluster.freeze(2)
    cluster.wait_for("an old beat", lambda: age(beat) > 1)
    cluster.thaw(2)
    cluster.wait_for("a new beat", lambda: age(beat) < 0.5)
    (tmp_path / "stop").touch()
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_down_leaves_nothing_and_the_next_cluster_uses_other_job_ids(cluster: Cluster) -> None:
    job = cluster.sbatch("--nodes=3", "--output=/dev/null", "--wrap", "srun sleep 100")
    cluster.wait_for_state(job, "RUNNING")
    cluster.stop()
    assert traces() == cluster.before
    cluster.stop()
    said = subprocess.run([SCRIPT, "crash", "2"], capture_output=True, text=True, timeout=10, check=False)
    assert (said.returncode, said.stderr) == (2, f"error: no cluster is up: {SCRIPT} up\n")
    cluster.start()
    assert cluster.sbatch("--output=/dev/null", "--wrap", "true") != job


@pytest.mark.slow
def test_a_cluster_whose_start_was_killed_is_ended(cluster: Cluster) -> None:
    cluster.stop()
    for seconds in (0.1, 0.4):
        start = subprocess.Popen([SCRIPT, "up", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        start.kill()
        start.wait(10)
    cluster.stop()
    until = time.monotonic() + 5
    while traces() != cluster.before and time.monotonic() < until:  # a shell that `up` had started ends within a second
        time.sleep(0.1)
    assert traces() == cluster.before


def test_a_second_cluster_is_refused(cluster: Cluster) -> None:
    done = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "a cluster is up already" in done.stderr
    assert cluster.run(SCRIPT, "status").count("idle") == 3
