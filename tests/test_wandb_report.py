"""The comparison as a W&B report, at a server on this machine; without a network or a key it is one message, soon, and no prompt."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ROOT
from local_server import JsonRequests, LocalServer

WRITE = """
import json, sys
from tools.compare.__main__ import ENDING_S
from tools.compare.wandb_report import NoReport, write_report
from trainers.processes import exit_after
try:
    print(json.dumps(["written", write_report(**json.loads(sys.argv[1]))]))
except NoReport as error:
    print(json.dumps(["refused", str(error)]))
sys.stdout.flush()
exit_after(ENDING_S, 0)  # as tools.compare ends
"""
REPORT = {
    "entity": None,
    "project": "fulltune",
    "run_ids": ["abc12345", "def12345"],
    "markdown": "| method | loss |\n|---|---|\n| full | 1.0 |",
    "title": "Full against LoRA",
}


class Requests(JsonRequests):
    """GraphQL by the name of the operation; telemetry is dropped."""

    server: Server

    def do_POST(self) -> None:
        body = self.body()
        self.reply(self.server.answer(json.loads(body)) if self.path == "/graphql" else {})


class Server(LocalServer):
    requests = Requests

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.hangs_at = ""

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        found, variables = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"]), asked.get("variables") or {}
        assert found is not None
        self.asked.append(found[1])
        if found[1] == self.hangs_at:
            time.sleep(100)
        if found[1] in ("Viewer", "GetDefaultEntity"):
            return {"data": {"viewer": {"id": "user", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}}
        if found[1] == "ProjectInternalId":
            return {"data": {"project": {"id": "project", "internalId": "12"} if variables["projectName"] == "fulltune" else None}}
        if found[1] == "GetProjects":
            node = {"id": "project", "name": "fulltune", "entityName": "me", "createdAt": "2026-01-01", "isBenchmark": False, "user": None}
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"data": {"models": {"edges": [{"node": node}], "pageInfo": page}}}
        if found[1] == "upsertView":
            self.views.append(variables)
            project = {"id": "project", "name": variables["projectName"], "entityName": variables["entityName"]}
            view = {key: variables[key] for key in ("type", "name", "displayName", "description", "spec")}
            return {"data": {"upsertView": {"inserted": True, "view": view | {"id": "VmlldzoxMg==", "project": project}}}}
        raise AssertionError(found[1])


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.serving():
        yield server


def write(home: Path, more: dict[str, str], **changed: Any) -> tuple[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(home), "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **more}
    line = [sys.executable, "-c", WRITE, json.dumps(REPORT | changed)]
    terminal, other = pty.openpty()  # at a terminal wandb would ask for a key
    try:
        done = subprocess.run(
            line, env=environment, cwd=ROOT, stdin=other, stdout=subprocess.PIPE, stderr=other, text=True, timeout=60, check=True
        )
    finally:
        os.close(terminal)
        os.close(other)
    kind, said = json.loads(done.stdout.splitlines()[-1])
    return kind, said


def test_a_report_reaches_wandb(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "WANDB_MODE": "offline"}
    assert write(tmp_path, key) == ("written", f"{server.url}/me/fulltune/reports/Full-against-LoRA--VmlldzoxMg==")
    (view,) = server.views
    assert view["displayName"] == "Full against LoRA"
    blocks = {block["type"]: block for block in json.loads(view["spec"])["blocks"]}
    assert blocks["markdown-block"]["content"] == REPORT["markdown"]
    grid = blocks["panel-grid"]["metadata"]
    (runs,) = grid["runSets"]
    assert [(one["key"]["name"], one["op"], one["value"]) for one in runs["filters"]["filters"]] == [("name", "IN", REPORT["run_ids"])]
    shown = [(panel["config"].get("xAxis"), panel["config"]["metrics"]) for panel in grid["panelBankSectionConfig"]["panels"]]
    lines = [("tokens", ["eval_loss"]), ("tokens", ["loss"]), ("tokens", ["tokens_per_second"])]
    assert shown == [*lines, (None, ["device_bytes_peak"])]


@pytest.mark.slow
def test_why_there_is_no_report(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
    assert "wandb login" in write(tmp_path, {})[1]
    assert "40+ characters" in write(tmp_path, key | {"WANDB_API_KEY": "short"})[1]
    assert "`wandb sync RUN_DIR/wandb`" in write(tmp_path, key, project="other")[1]
    assert "needs runs" in write(tmp_path, key, run_ids=[])[1]
    assert not server.views


@pytest.mark.slow
@pytest.mark.parametrize(("trouble", "entity"), [("refuses", None), ("silent", "me"), ("hangs", None)])
def test_no_network_ends_soon(server: Server, tmp_path: Path, trouble: str, entity: str | None) -> None:
    pytest.importorskip("wandb_workspaces")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if trouble == "silent":
            listener.listen(50)
        if trouble == "hangs":
            url, server.hangs_at = server.url, "GetProjects"
        kind, said = write(tmp_path, {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url}, entity=entity)
    assert kind == "refused"
    assert "network" in said
