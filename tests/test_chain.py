"""A pipeline on SLURM: its runs and the commands between them are jobs, each begun once the one before has succeeded."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from command import ROOT, environment, launch, read_rows, tool, trace
from piping import call, pipeline_of, three_stages, written

from launcher import chain, chain_task, stage_checks
from launcher.config import Backend, LaunchConfig
from launcher.job import Job
from launcher.progress import Progress
from launcher.stages import Pipeline, Stage
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig

ON_SLURM = ("launch=slurm", "launch.gpus_per_node=0", "launch.processes=1")
LAUNCH = LaunchConfig(backend=Backend.slurm, nodes=2, gpus_per_node=4, cpus_per_gpu=3, sbatch={"dependency": "afterany:7", "nice": 5})
STAGES = [
    {"name": "drawn", "before": ["sample m rows --out {dir}/a"]},
    {"name": "sft", "run": ["seed=1"], "after": ["evaluate {stage}"]},
    {"name": "chosen", "before": ["select {dir}/a --out {dir}/b"], "run": ["seed=2"]},
    {"name": "last", "run": ["seed=3"], "after": ["compare {dir}", "gate {stage}"]},
]
NAMES = ["before drawn, after drawn", "sft", "after sft, before chosen", "chosen", "after chosen", "last", "after last"]


def chain_of(tmp_path: Path) -> tuple[Pipeline, list[tuple[Stage, Job]]]:
    made = pipeline_of(tmp_path, f"run_dir={tmp_path / 'run'}", stages=STAGES)
    return made, [(stage, Job(RunConfig(name=stage.name), LAUNCH, made.folder / stage.name)) for stage in made.stages if stage.run]


def test_runs_have_the_commands_between_them_as_jobs_of_one_node(tmp_path: Path) -> None:
    made, jobs = chain_of(tmp_path)
    found = chain.links(made, jobs)
    assert [link.name for link in found] == NAMES
    sizes = [(link.job.launch.nodes, link.job.launch.processes, link.job.launch.cpus_per_gpu) for link in found[1:3]]
    assert sizes == [(2, None, 3), (1, 1, 12)]
    assert {link.job.launch.gpus_per_node for link in found} == {4}
    assert [link.job.launch.sbatch.get("dependency") for link in found] == ["afterany:7", *[None] * 6]
    assert {link.job.launch.sbatch["nice"] for link in found} == {5}


def test_the_text_of_every_job_waits_for_the_one_before(tmp_path: Path) -> None:
    made, jobs = chain_of(tmp_path)
    said = chain.dry_run(made, jobs)
    assert "#SBATCH --dependency=afterany:7\n" in said
    waits = re.findall("--dependency=afterok:(.*)", said)
    assert waits == [f"JOB_{number}" for number in range(1, 7)]
    assert said.count("#SBATCH --kill-on-invalid-dep=yes") == 6
    assert said.count("#SBATCH --requeue") == 7
    assert said.index("# sft: evaluate {stage}") < said.index("# chosen: select") < said.index("# last: gate {stage}")


class Queue:
    """Stands for SLURM: takes jobs, and says which of them it has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers, self.words, self.ended = itertools.count(1), {}, []
        self.sent: list[tuple[str, list[str]]] = []
        self.refuses = ""
        monkeypatch.setattr(chain.slurm, "send", self.send)
        monkeypatch.setattr(chain.slurm, "warn_where_stuck", lambda number: None)
        monkeypatch.setattr(chain.slurm, "hand_over", self.hand_over)
        monkeypatch.setattr(chain.queue, "in_queue", lambda *ids: {key: word for key, word in self.words.items() if key in ids})
        monkeypatch.setattr(chain.queue, "ask", self.ask)

    def send(self, tasks: Any, job: Job, folder: Path, after: list[str], how: str) -> list[dict[str, Any]]:
        name = " ".join(f"{stage.name}.{key}" for stage, key in tasks[0].parts) if tasks else job.run_dir.name
        if name == self.refuses:
            raise ConfigError("launch.partition", "none", "SLURM refuses the job: there is no such partition")
        number = str(next(self.numbers))
        self.words[number] = "PENDING"
        job.run_dir.mkdir(parents=True, exist_ok=True)
        self.sent.append((name, list(after)))
        return [{"id": number, "log": f"{number}.out", "time": 1.0}]

    def hand_over(self, jobs: list[Job], folder: Path, after: list[str], how: str) -> list[dict[str, Any]]:
        [record] = self.send([], jobs[0], folder, after, how)
        (jobs[0].run_dir / "slurm.json").write_text(json.dumps(record))
        return [record]

    def ask(self, *words: str) -> str:
        for number in words[1:]:
            self.words.pop(number, None)
            self.ended.append(number)
        return ""


def done(made: Pipeline, name: str) -> None:
    (made.folder / name / "status.json").write_text('{"state": "done"}')


def test_only_what_is_missing_is_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """And what follows it: jobs that wait for one that failed are ended."""
    queue = Queue(monkeypatch)
    made, jobs = chain_of(tmp_path)

    def again() -> list[str]:
        queue.sent.clear()
        progress = Progress(made)
        progress.read()
        assert chain.submit(progress, jobs) == 0
        return [name for name, _ in queue.sent]

    assert again() == ["drawn.before drawn.after", "sft", "sft.after chosen.before", "chosen", "chosen.after", "last", "last.after"]
    assert [after for _, after in queue.sent] == [[], ["1"], ["2"], ["3"], ["4"], ["5"], ["6"]]
    said = capfd.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:9]] == [str(number) for number in range(1, 8)]
    assert "scancel 1 2 3 4 5 6 7" in said
    assert again() == [], "all are in the queue"
    progress = Progress(made, {"drawn": {"began": 1.0, "seconds": 1.0, "before": made.stages[0].before, "after": [], "ended": 2.0}})
    progress.write()
    done(made, "sft")
    for number in ("1", "2", "4"):  # two are done, and somebody has ended the fourth; SLURM has not ended those after it yet
        del queue.words[number]
    queue.words["5"] = "PENDING (DependencyNeverSatisfied)"
    assert again() == ["chosen", "chosen.after", "last", "last.after"]
    assert queue.sent[0] == ("chosen", ["3"])
    assert queue.ended == ["5", "6", "7"]
    said = capfd.readouterr().out
    assert said.count("  done") == 2
    del queue.words["3"]
    queue.words["8"] = "RUNNING"
    with pytest.raises(ConfigError, match="`after sft, before chosen` is to be done, and `chosen`, which follows it, runs as job 8"):
        again()


def test_a_chain_that_slurm_refuses_in_the_middle_leaves_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    queue.refuses = "chosen"
    with pytest.raises(ConfigError, match="there is no such partition"):
        chain.submit(Progress(chain_of(tmp_path)[0]), chain_of(tmp_path)[1])
    assert queue.ended == ["1", "2", "3"]
    assert queue.words == {}


def test_a_pipeline_with_jobs_does_not_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Queue(monkeypatch)
    made, jobs = chain_of(tmp_path)
    chain.submit(Progress(made), jobs)
    with pytest.raises(ConfigError, match="jobs of this pipeline are in the queue: 1, 3, 5, 7"):
        chain.require_nothing_queued(made)


def test_a_secret_in_a_command_of_a_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Queue(monkeypatch)
    stages = [{"name": "one", "run": ["seed=1"], "after": ["evaluate {stage} --judge http://u:pa55word@h/v1"]}]
    made = pipeline_of(tmp_path, f"run_dir={tmp_path / 'run'}", stages=stages)
    with pytest.raises(ConfigError, match="give it by a variable") as refused:
        chain.submit(Progress(made), [(made.stages[0], Job(RunConfig(), LAUNCH, made.folder / "one"))])
    assert "pa55word" not in str(refused.value)
    assert not made.folder.exists()


ALONE = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}


def test_a_job_of_commands_does_what_is_not_done_and_counts_the_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails ends it with its code; the next job begins there."""
    made, jobs = chain_of(tmp_path)
    parts = chain.links(made, jobs)[2].parts
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    called: list[str] = []

    def run(words: list[str], environment: dict[str, str], shutdown_s: int) -> tuple[int, int | None]:
        called.append(words[2])
        return (3 if called == ["tools.evaluate", "tools.select"] else 0), None

    monkeypatch.setattr(chain_task.process, "run", run)
    (made.folder / "sft").mkdir(parents=True)
    (made.folder / "sft" / "summary.json").write_text('{"wall_seconds": 100.0}')
    job = Job(RunConfig(), LaunchConfig(backend=Backend.slurm, gpus_per_node=0, processes=1), made.folder)
    task = chain_task.Commands(made, ["python", "-m", "launcher"], parts, job, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        task()
    assert ended.value.code == 3
    task()
    assert called == ["tools.evaluate", "tools.select", "tools.select"]
    kept = json.loads((made.folder / "pipeline.json").read_text())
    assert kept["command"] == ["python", "-m", "launcher"]
    assert "ended" in kept["state"]["sft"]
    assert 100 <= kept["state"]["sft"]["seconds"] < 150
    assert kept["state"]["chosen"]["before"] == made.stages[2].before
    assert "ended" not in kept["state"]["chosen"]


def test_a_dry_run_shows_scripts_and_configs_as_they_will_be(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    base, chats = tmp_path / "base", tmp_path / "chats.jsonl"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    chats.write_text('{"question": "1", "answer": "1"}\n')
    monkeypatch.setattr(stage_checks, "require_commands", lambda asked: None)
    presets, folder = written(tmp_path, **three_stages(base, chats)), tmp_path / "run"
    code, said = call(monkeypatch, capfd, "--config-dir", presets, "+pipeline=tiny", f"run_dir={folder}", "mode=dry_run", *ON_SLURM)
    assert code == 0, said
    assert "# 6 jobs, in this order" in said
    assert f"id: {folder}/rejection/export" in said
    assert f"path: {folder}/chosen.jsonl" in said
    assert "pipeline-" not in said, "a folder that is not there any more"
    assert not folder.exists()


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(cluster: Cluster, base: Path, chats: Path, cache: Path, tmp_path: Path) -> Command:
    """Type the launcher's command on the cluster's login node: `submit(folder, override, ...)`."""
    presets = written(tmp_path, **three_stages(base, chats))

    def type_it(folder: Path, *more: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "launcher", "--config-dir", presets, "+pipeline=tiny", f"run_dir={folder}", *more]
        where = environment(cache) | cluster.environment
        return subprocess.run(line, cwd=ROOT, env=where, capture_output=True, text=True, timeout=timeout_s, check=False)

    return type_it


def numbers(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"(?m)^  (\d+) ", done.stdout)


@pytest.mark.slurm
@pytest.mark.slow
def test_jobs_wait_for_each_other_and_those_of_one_that_is_ended_are_ended(cluster: Cluster, submit: Command, tmp_path: Path) -> None:
    """Training nothing: the first job is held."""
    folder, held = tmp_path / "run", [*ON_SLURM, "+launch.sbatch.hold=true"]
    first = numbers(submit(folder, *held))
    assert len(first) == 6
    for before, number in itertools.pairwise(first):
        assert f"afterok:{before}" in cluster.job(number)["Dependency"]
    cluster.run("scancel", first[3])
    cluster.wait_for("the end of those after it", lambda: {cluster.job(number)["JobState"] for number in first[3:]} == {"CANCELLED"})
    again = submit(folder, *held)
    assert numbers(again)[:3] == first[:3]
    assert len(set(numbers(again)) - set(first)) == 3
    other = submit(folder, *held, "launch.time=30")
    assert other.returncode == 2
    assert "with other launch settings, and keeps them" in other.stderr
    here = submit(folder, "launch=local", "launch.processes=1")
    assert here.returncode == 2
    assert "jobs of this pipeline are in the queue" in here.stderr


@pytest.mark.slurm
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_chain_that_is_preempted_and_killed_in_stage_3_continues_exactly(
    cluster: Cluster, submit: Command, base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    """The first run is queued again under its number, so that those after it wait on; the third is ended, and the command continues it."""
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    presets, longer = str(tmp_path / "presets"), "sft.train.steps=100"
    launch(cache, [sys.executable, "-m", "launcher", "--config-dir", presets, "+pipeline=tiny", f"run_dir={whole}", longer], timeout_s=400)
    first = numbers(submit(killed, *ON_SLURM, longer))

    def steps_of(name: str) -> int:
        return max((row.get("step", 0) for row in read_rows(killed / name)), default=0)

    def wait_for(condition: Callable[[], Any], timeout_s: float = 240) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            logs = "\n".join(path.read_text()[-3000:] for path in sorted(killed.rglob("slurm/*_log.out")))
            assert time.monotonic() < until, logs
            time.sleep(0.1)

    wait_for(lambda: steps_of("sft") >= 1)
    cluster.run("scancel", "--signal=USR2", first[0])
    wait_for(lambda: steps_of("last") >= 4)
    assert json.loads((killed / "sft" / "status.json").read_text())["attempt"] == 2
    cluster.run("scancel", first[4])
    cluster.wait_for("the end of both", lambda: {cluster.job(number)["JobState"] for number in first[4:]} == {"CANCELLED"})
    again = submit(killed, *ON_SLURM, longer, "launch.wait=true", timeout_s=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(numbers(again)) == 2
    assert "done  last" in again.stdout
    for name in ("sft", "rejection", "last"):
        assert trace(killed / name) == trace(whole / name)
        assert _settings(killed / name, killed) == _settings(whole / name, whole)
    assert (killed / "stages.csv").read_text().count("\n") == 4
    shown = tool(cache, killed, name="runs")
    assert "3/3" in shown
    nothing = submit(killed, *ON_SLURM, longer)
    assert numbers(nothing) == []
    shutil.rmtree(killed / "last")
    assert len(numbers(submit(killed, *ON_SLURM, longer, "launch.wait=true", timeout_s=400))) == 2
    assert trace(killed / "last") == trace(whole / "last")


def _settings(run_dir: Path, folder: Path) -> str:
    return (run_dir / "config.yaml").read_text().replace(str(folder), "PIPELINE")
