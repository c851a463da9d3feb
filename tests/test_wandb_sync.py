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
from command import arguments, launch, read_rows, stop_at_step
from local_server import JsonRequests, LocalServer


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
