"""What `wandb sync` makes of a run directory, at a server that answers as W&B's does and keeps what it is sent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, arguments, launch, read_rows, stop_at_step
from local_server import JsonRequests, LocalServer

from launcher.job import with_environment
from trainers.config.choices import WandbMode
from trainers.config.schema import LogConfig
from trainers.rundir.mirror import mode_of


class Requests(JsonRequests):
    """GraphQL by the name of the operation, lines of files by their offset; what else comes (uploads, telemetry) is taken and dropped."""

    server: Server

    def do_POST(self) -> None:
        body = self.body()
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif stream := re.fullmatch("/files/me/[^/]+/([^/]+)/file_stream", self.path):
            self.server.keep(stream[1], json.loads(body).get("files") or {})
        self.reply(answer)

    do_PUT = do_POST


class Server(LocalServer):
    """Of each run: its config, and the lines of its files at the places at which they came."""

    requests = Requests

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, list[str]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.asked: dict[str, dict[str, Any]] = {}

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[run].get("wandb-history.jsonl", [])]

    def keep(self, run: str, files: dict[str, dict[str, Any]]) -> None:
        for name, part in files.items():
            lines = self.files[run].setdefault(name, [])
            assert part["offset"] <= len(lines)
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        assert found is not None
        if found[1] == "RunResumeStatus":
            known = variables["name"] in self.configs
            project = {"id": "project", "name": variables["project"], "entity": {"id": "entity", "name": "me"}}
            return {"model": project | {"bucket": self.state(variables["name"]) if known else None}}
        if found[1] == "UpsertBucket":
            return {"upsertBucket": self.upsert(variables)}
        if found[1] == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def state(self, run: str) -> dict[str, Any]:
        """What a client asks before it continues a run. One without telemetry (t) counts as one that never began."""
        history, events = self.files[run].get("wandb-history.jsonl", []), self.files[run].get("wandb-events.jsonl", [])
        config = self.configs[run]
        return {
            "id": run,
            "name": run,
            "displayName": run,
            "summaryMetrics": self.files[run].get("wandb-summary.json", ["{}"])[-1],
            "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events),
            "eventsTail": json.dumps(events[-1:]),
            "logLineCount": 0,
            "config": json.dumps(config),
            "wandbConfig": json.dumps({"t": config.get("_wandb", {}).get("value", {}).get("t")}),
            "tags": [],
            "notes": None,
        }

    def upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        self.asked[run] = {name: value for name, value in variables.items() if value is not None} | self.asked.get(run, {})
        new = run not in self.configs
        self.files.setdefault(run, {})
        self.configs[run] = self.configs.get(run, {}) | json.loads(variables["config"] or "{}")
        project = {"id": "project", "name": variables["project"], "entity": {"id": "entity", "name": "me"}}
        bucket = self.state(run) | {"description": None, "sweepName": None, "project": project}
        return {"bucket": bucket, "inserted": new}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.serving():
        yield server


def sync(server: Server, home: Path, *paths: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "HOME": str(home)}
    line = [sys.executable, "-m", "wandb", "sync", *map(str, paths)]
    done = subprocess.run(
        line, env=environment, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def assert_mirrors(server: Server, run_dir: Path) -> None:
    """One run, of the id that the run directory names; each row of metrics.jsonl once, in order, at a place of its own."""
    assert list(server.files) == [json.loads((run_dir / "manifest.json").read_text())["wandb_id"]]
    rows, written = server.rows(*server.files), read_rows(run_dir)
    keys = ("step", "loss", "lr", "tokens", "eval_loss")
    assert [[row.get(key) for key in keys] for row in rows] == [[row.get(key) for key in keys] for row in written]
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_sync_of_a_run(server: Server, finished: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    sync(server, tmp_path, run_dir / "wandb")
    assert_mirrors(server, run_dir)
    config = server.configs.popitem()[1]
    assert config["optim"]["value"]["lr"] == 1e-2
    assert "No runs to sync" in sync(server, tmp_path, run_dir / "wandb")
    assert_mirrors(server, run_dir)


@pytest.fixture(scope="module")
def continued(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts, both without a network."""
    run_dir = tmp_path_factory.mktemp("continued") / "run"
    line = arguments(base, chats, run_dir, "train.steps=40", "train.eval_every=20", "log.wandb=offline", "launch.processes=1")
    stop_at_step(cache, line, run_dir, 3)
    launch(cache, line)
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("when", ["behind the last attempt", "behind each attempt"])
def test_sync_of_a_run_that_was_stopped_and_continued(server: Server, continued: Path, tmp_path: Path, when: str) -> None:
    run_dir = shutil.copytree(continued, tmp_path / "run", symlinks=True)
    if when == "behind each attempt":
        first, _ = sorted((run_dir / "wandb").glob("offline-run-*"))
        sync(server, tmp_path, first)
        assert 3 <= server.rows(*server.files)[-1]["step"] < 40
    sync(server, tmp_path, run_dir / "wandb")
    assert_mirrors(server, run_dir)


MIRROR = """
import json, os, sys
from pathlib import Path
from launcher.config import JobConfig
from launcher.job import make_job, manifest
from trainers.rundir.attempt import Attempt
from trainers.rundir.metrics import Metrics, log_to_terminal
from trainers.rundir.rows import Kind
folder = Path(sys.argv[1])
run = make_job(JobConfig(run_dir=str(folder), name="ours")).run
(folder / "manifest.json").write_text(json.dumps(manifest({})))
log_to_terminal(0)
metrics = Metrics(run, Attempt(folder), 0, 1)
metrics.start(0)
metrics.write(Kind.step, {"step": 1, "loss": 1.0, "tokens_per_second": 3.0, "step_seconds": 0.1})
metrics.close()
os._exit(0)
"""


def mirrored(server: Server, folder: Path, **variables: str) -> str:
    """Mirror one row of a run whose settings say nothing of W&B; returns what was said."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "HOME": str(folder), "PYTHONPATH": str(ROOT)} | variables
    line = [sys.executable, "-c", MIRROR, str(folder)]
    done = subprocess.run(line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_variables_of_wandb_are_followed_or_named(server: Server, tmp_path: Path) -> None:
    wanted = {
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "us",
        "WANDB_RUN_GROUP": "several",
        "WANDB_NAME": "mine",
        "WANDB_NOTES": "a note",
        "WANDB_JOB_TYPE": "trial",
        "WANDB_TAGS": "one, two",
        "WANDB_RUN_ID": "chosen",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
        "WANDB_INIT_TIMEOUT": "30",
        "WANDB_RESUME": "never",
    }
    (tmp_path / "elsewhere").mkdir()
    said = mirrored(server, tmp_path / "run", **wanted)
    asked = server.asked["chosen"]
    expected = {"project": "theirs", "entity": "us", "groupName": "several", "displayName": "mine", "notes": "a note", "jobType": "trial"}
    assert {name: asked.get(name) for name in expected} == expected
    assert {"one", "two", "full"} <= set(asked["tags"])
    assert len(server.rows("chosen")) == 1
    assert list((tmp_path / "elsewhere" / "wandb").glob("run-*"))
    assert not (tmp_path / "run" / "wandb").exists()
    assert "WANDB_RESUME=never is not used: all attempts" in said


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["WANDB_MODE=offline", "WANDB_MODE=dryrun", "WANDB_MODE=disabled", "WANDB_DISABLED=true"])
def test_a_mode_of_wandb_is_never_exceeded(server: Server, tmp_path: Path, variable: str) -> None:
    name, _, value = variable.partition("=")
    mirrored(server, tmp_path / "run", **{name: value})
    assert not server.asked
    recorded = list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert bool(recorded) is (value in ("offline", "dryrun"))


def test_modes() -> None:
    auto, online, offline, disabled = WandbMode.auto, WandbMode.online, WandbMode.offline, WandbMode.disabled
    assert [mode_of(mode, {}) for mode in (auto, online, offline, disabled)] == [auto, online, offline, disabled]
    assert [mode_of(mode, {"WANDB_MODE": "online"}) for mode in (auto, online, offline, disabled)] == [online, online, offline, disabled]
    assert [mode_of(mode, {"WANDB_MODE": "offline"}) for mode in (auto, online, offline, disabled)] == [offline] * 3 + [disabled]
    assert [mode_of(mode, {"WANDB_MODE": "Disabled"}) for mode in (auto, online, offline, disabled)] == [disabled] * 4


def test_settings_go_before_variables() -> None:
    variables = {"WANDB_PROJECT": "a", "WANDB_ENTITY": "b", "WANDB_RUN_GROUP": "", "WANDB_TAGS": "x,y"}
    assert with_environment(LogConfig(), variables) == LogConfig(project="a", entity="b", tags=["x", "y"])
    own = LogConfig(project="p", entity="e", group="g", tags=["t"])
    assert with_environment(own, variables) == own
    assert with_environment(LogConfig(), {}).project == "fulltune"
