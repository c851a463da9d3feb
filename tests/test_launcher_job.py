"""A run directory is made once and joined by the same command; signals, ends and leftovers are told apart."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import ending, local, process
from launcher import job as job_module
from launcher.compose import compose
from launcher.freeze import freeze
from launcher.job import Job, make_job, mark_submitted, next_attempt, only_launcher
from launcher.presets import CONF
from launcher.report import rows
from trainers.config.checks import load
from trainers.config.errors import ConfigError
from trainers.rundir.attempt import read_status

ROOT = CONF.parent


def job_in(folder: Path, *overrides: str) -> Job:
    return make_job(compose(["+exp=quickstart_base", f"run_dir={folder}/out", *overrides]))


def files_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if path.name != "code.diff")  # there while this checkout has changes


def test_freeze_makes_the_three_files(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    freeze(job)
    assert files_in(job.run_dir) == ["config.yaml", "manifest.json", "status.json"]
    assert load(job.config_path) == job.run
    manifest = json.loads((job.run_dir / "manifest.json").read_text())
    assert set(manifest) >= {"command", "code", "python", "packages", "host", "user", "time", "scheduler", "wandb_id"}
    assert len(manifest["wandb_id"]) == 8
    assert manifest["packages"]["hydra-core"]
    assert read_status(job.run_dir)["state"] == "submitted"


def test_the_code_that_ran_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the commit and the saved changes, whatever bytes they have; files that git does not know are named."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, timeout=20, check=True).stdout

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    git("init", "-q")
    (checkout / "code.py").write_text("before\n")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    changed = b"after \xff\x00\n"
    (checkout / "code.py").write_bytes(changed)
    (checkout / "new.py").touch()
    for setting in ("color.diff=always", "diff.noprefix=true", "diff.external=false"):
        git("config", *setting.split("="))
    monkeypatch.setattr(job_module, "ROOT", checkout)
    job = job_in(tmp_path)
    freeze(job)
    code = json.loads((job.run_dir / "manifest.json").read_text())["code"]
    assert code["untracked"] == ["new.py"]
    assert code["git_sha"] == git("rev-parse", "HEAD").decode().strip()
    git("checkout", "-q", "--force", code["git_sha"])
    assert (checkout / "code.py").read_text() == "before\n"
    git("apply", str(job.run_dir / "code.diff"))
    assert (checkout / "code.py").read_bytes() == changed


def _freeze_and_report(folder: str, lr: str, results: Any) -> None:
    job = job_in(Path(folder), f"optim.lr={lr}")
    try:
        freeze(job)
        results.put(json.loads((job.run_dir / "manifest.json").read_text())["wandb_id"])
    except ConfigError as error:
        results.put(str(error))


def race(folder: Path, rates: list[str]) -> list[str]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_freeze_and_report, args=(str(folder), lr, results)) for lr in rates]
    for racer in racers:
        racer.start()
    said = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join()
    return said


def test_eight_at_once_make_one_run(tmp_path: Path) -> None:
    said = race(tmp_path, ["1e-3"] * 8)
    assert len(set(said)) == 1
    assert len(said[0]) == 8
    assert files_in(tmp_path / "out") == ["config.yaml", "manifest.json", "status.json"]


@pytest.mark.slow
def test_eight_at_once_with_two_settings_make_one_run_and_refuse_the_other(tmp_path: Path) -> None:
    said = race(tmp_path, ["1e-3", "2e-3"] * 4)
    assert sum("optim.lr:" in text for text in said) == 4
    assert len({text for text in said if len(text) == 8}) == 1


def test_the_same_settings_continue_on_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path)
    freeze(job)
    before = {path.name: path.read_bytes() for path in job.run_dir.iterdir()}
    monkeypatch.chdir(tmp_path)
    freeze(make_job(compose(["+exp=quickstart_base", "run_dir=out", "launch.processes=1"])))
    assert {path.name: path.read_bytes() for path in job.run_dir.iterdir()} == before


def with_a_row(job: Job) -> Job:
    """The job of a run that has begun."""
    freeze(job)
    (job.run_dir / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 0, "eval_loss": 1.0}\n')
    return job


def test_other_settings_are_refused_field_by_field(tmp_path: Path) -> None:
    with_a_row(job_in(tmp_path))
    with pytest.raises(ConfigError) as refused:
        freeze(job_in(tmp_path, "optim.lr=0.5", "model.tokenizer=null", "log.tags=[a]"))
    assert refused.value.path == "run_dir"
    assert "optim.lr: 0.005 -> 0.5" in str(refused.value)
    assert "log.tags" not in str(refused.value)
    assert "optim.clip" not in str(refused.value)


def test_an_older_run_without_a_newer_field_continues(tmp_path: Path) -> None:
    job = with_a_row(job_in(tmp_path))
    lines = [line for line in job.config_path.read_text().splitlines() if "sample_tokens" not in line]
    job.config_path.write_text("\n".join(lines))
    freeze(job)
    job.config_path.write_text("\n".join([*lines, "removed_field: 3"]))
    with pytest.raises(ConfigError, match="does not fit this version"):
        freeze(job)


def test_a_directory_that_is_no_run_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not a run directory: it holds thesis.tex"):
        freeze(job_in(tmp_path))
    (tmp_path / "out" / "thesis.tex").unlink()
    freeze(job_in(tmp_path))


@pytest.mark.parametrize("below", ["file/out", "file/deeper/out", "file"])
def test_a_place_that_cannot_be_written_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match=r"run_dir.*cannot be written"):
        freeze(make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path}/{below}"])))


def test_a_second_launcher_of_a_running_run_is_refused(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    freeze(job)
    with only_launcher(job), pytest.raises(ConfigError, match=f"process {os.getpid()}"), only_launcher(job, wait_s=0.1):
        pass
    with only_launcher(job):
        pass


@pytest.mark.parametrize(
    ("status", "code", "signalled", "exit_code", "words"),
    [
        ({"state": "done"}, 0, None, 0, ""),
        ({"state": "preempted", "step": 40}, 1, signal.SIGTERM, 75, "step 40"),
        ({"state": "preempted", "step": 40}, 1, None, 75, "the same command continues"),
        ({"state": "preempted", "step": 40}, 1, signal.SIGINT, 130, "step 40"),
        ({"state": "running"}, -9, signal.SIGINT, 130, "without a new checkpoint"),
        ({"state": "running"}, 1, signal.SIGTERM, 1, "without a new checkpoint"),
        (
            {"state": "failed", "error": {"rank": 1, "message": "no", "traceback": "ValueError: no"}},
            1,
            None,
            1,
            "first on rank 1): ValueError: no",
        ),
        ({"state": "submitted"}, 1, None, 1, "left no reason"),
        ({"state": "running"}, 0, None, 0, ""),
    ],
)
def test_ends_are_told_apart(
    status: dict[str, Any], code: int, signalled: int | None, exit_code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_in(tmp_path)
    freeze(job)
    (job.run_dir / "status.json").write_text(json.dumps(status))
    assert ending.settle(job, next_attempt(job), code, signalled) == exit_code
    assert words in capsys.readouterr().err


def test_ranks_inherit_nothing_of_a_run_that_the_launcher_is_part_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would end without a word, for their parent is not that run's."""
    monkeypatch.setenv("FULLTUNE_AGENT", "1")
    monkeypatch.setenv("FULLTUNE_SLURM_ATTEMPT", "7.0")
    assert not {"FULLTUNE_AGENT", "FULLTUNE_SLURM_ATTEMPT"} & local.environment(job_in(tmp_path)).keys()


def test_an_old_end_is_not_mistaken_for_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path)
    freeze(job)
    (job.run_dir / "status.json").write_text('{"state": "preempted", "step": 7, "attempt": 2, "error": "x"}')
    mark_submitted(job)
    status = read_status(job.run_dir)
    assert time.time() - status.pop("time") < 60
    assert status == {"state": "submitted", "step": 7, "attempt": 2}
    monkeypatch.setattr(local, "command", lambda job: [sys.executable, "-c", "raise SystemExit(3)"])
    assert local.submit(job) == 1


CHILD = """
import os, signal, sys, time
def stop(number, frame): os.write(1, f"{signal.Signals(number).name}\\n".encode()); raise SystemExit(75)  # print may be in a print
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2): signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, sys; from launcher import process
print(process.run([sys.executable, "-c", {CHILD!r}], dict(os.environ), 5), flush=True)
"""


def start_parent() -> subprocess.Popen[str]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    return parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_is_passed_on_once_and_the_clean_end_awaited(number: signal.Signals) -> None:
    parent = start_parent()
    parent.send_signal(number)
    parent.send_signal(number)
    assert parent.communicate(timeout=20)[0] == f"{number.name}\n(75, {int(number)})\n"


def test_killing_the_launcher_ends_its_child() -> None:
    parent = start_parent()
    parent.kill()
    assert parent.stdout is not None
    assert parent.stdout.readline() == "SIGTERM\n"
    parent.communicate(timeout=20)


def test_a_child_that_never_stops_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "KILL_AFTER_S", 0)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, signalled = process.run([sys.executable, "-c", stubborn], dict(os.environ), shutdown_s=1)
    assert (code, signalled) == (-signal.SIGKILL, signal.SIGTERM)


def test_a_run_that_is_done_is_not_started_again(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    freeze(job)
    (job.run_dir / "status.json").write_text('{"state": "done", "step": 200}')
    summary = {
        "eval_loss_before": 8.3,
        "eval_loss_after": 3.1,
        "train_loss": 3.0,
        "steps": 200,
        "tokens": 1638400,
        "tokens_per_second": 5123.4,
        "mfu": None,
        "device_bytes_peak": 0,
        "host_bytes_peak": 3 * 2**29,
        "trainable_parameters": 10,
        "parameters": 20,
        "wall_seconds": 90.0,
        "gpu_hours": 0.0,
        "export": "out/export",
        "sample": {"prompt": "What does [x] do?", "answer": "It folds."},
        "skipped_steps": 0,
    }
    (job.run_dir / "summary.json").write_text(json.dumps(summary))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "+exp=quickstart_base", f"run_dir={job.run_dir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in ("done already", "8.3000 -> 3.1000", "1,638,400", "5,123", "1.50 GiB", "10 of 20 (50.0%)", "What does [x] do?"):
        assert words in done.stdout
    assert rows({}) == []
    assert rows({"sample": {"prompt": "p", "answer": "\n \n." * 60}})[1] == ("sample answer", ".\n.\n.\n.\n.\n. ...")


def test_a_setting_that_ranks_refuse_is_explained_like_any_other(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    freeze(job)
    setting = {"path": "data.path", "value": "x", "reason": "has bad rows", "remedy": ""}
    (job.run_dir / "status.json").write_text(json.dumps({"state": "failed", "error": {"rank": 0, "message": "x", "setting": setting}}))
    with pytest.raises(ConfigError, match="has bad rows"):
        ending.settle(job, next_attempt(job), 2, None)
