"""metrics.jsonl is whole lines and the truth; W&B is a mirror that cannot hold up a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.config.choices import WandbMode
from trainers.config.schema import LogConfig, RunConfig
from trainers.rundir.attempt import Attempt
from trainers.rundir.ending import State
from trainers.rundir.metrics import Metrics
from trainers.rundir.rows import Kind

ROOT = Path(__file__).parents[1]
ROW = {"loss": 1.0, "tokens_per_second": 3.0, "step_seconds": 0.1}


def metrics_in(folder: Path, rank: int = 0) -> Metrics:
    return Metrics(RunConfig(run_dir=str(folder), log=LogConfig(wandb=WandbMode.disabled)), Attempt(folder), rank, 9)


def test_a_record_is_cut_back_to_the_step_a_run_continues_from(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step} | ROW) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')  # killed while writing
    with metrics_in(tmp_path) as metrics:
        assert [row["step"] for row in metrics.start(2)] == [1, 2]
        metrics.write(Kind.step, {"step": 3, "loss": float("nan")} | {key: ROW[key] for key in ("tokens_per_second", "step_seconds")})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] is None
    assert rows[2]["kind"] == "step"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with metrics_in(tmp_path, rank=1) as metrics:
        metrics.start(0)
        metrics.write(Kind.step, {"step": 1} | ROW)
    assert not list(tmp_path.iterdir())


def test_status_keeps_what_it_knew_and_forgets_an_old_error(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.set_status(State.running, attempt=1, step=3)
    attempt.record_failure({"message": "x"}, at=1.0)
    attempt.set_status(State.preempted)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    attempt.set_status(State.submitted)
    attempt.set_status(State.running)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["attempt"], status["step"]) == ("running", 1, 3)
    assert "error" not in status


MIRROR = """
import json, os, sys, time
from pathlib import Path
from trainers.config.choices import WandbMode
from trainers.config.schema import (LogConfig, RunConfig)
from trainers.rundir.metrics import Metrics, log_to_terminal
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import Kind
folder = Path(sys.argv[1])
(folder / "manifest.json").write_text(json.dumps({"wandb_id": "abc12345"}))
log_to_terminal(0)
metrics = Metrics(RunConfig(run_dir=str(folder), log=LogConfig(wandb=WandbMode(sys.argv[2]))), Attempt(folder), 0, 5)
metrics.start(0)
slowest = 0.0
for step in range(1, 6):
    started = time.perf_counter()
    metrics.write(Kind.step, {"step": step, "loss": 1.0, "tokens_per_second": 3.0, "step_seconds": 0.1})
    slowest = max(slowest, time.perf_counter() - started)
    time.sleep(0.2)
started = time.perf_counter()
metrics.close()
print(json.dumps({"slowest": slowest, "close": time.perf_counter() - started}), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("server", ["none", "refuses", pytest.param("silent", marks=pytest.mark.slow), "broken package"])
def test_wandb_never_stops_prompts_or_slows(tmp_path: Path, server: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment["PYTHONPATH"] = str(ROOT)
    if server == "broken package":
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('a broken installation')")
        environment["PYTHONPATH"] = f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "silent":
            listener.listen(50)  # takes connections and never answers
        if server in ("refuses", "silent"):
            environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        line = [sys.executable, "-c", MIRROR, str(tmp_path), "online"]
        done = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["slowest"] < 1.0
    assert figures["close"] < 25
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert "W&B" in done.stderr  # says what became of it
    assert bool(list(tmp_path.glob("wandb/offline-run-*"))) is (server != "broken package")


def test_a_key_that_wandb_login_has_stored_is_found(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "https_proxy": "", "no_proxy": "*"}
    login = [sys.executable, "-m", "wandb", "login", "--no-verify", "0" * 40]
    subprocess.run(login, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
    line = [sys.executable, "-c", MIRROR, str(tmp_path), "online"]
    done = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "there is no W&B key" not in done.stderr
