"""The hub: asked once, waited for once, its cache read where it does not answer; pickled weights are converted without running them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT
from huggingface_hub import constants
from local_server import JsonRequests, LocalServer
from safetensors.torch import load_file

from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig, RunConfig
from trainers.data.tokenizer import load_tokenizer
from trainers.model import hub
from trainers.model.blueprint import make_blueprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "acme/tiny"


class Requests(JsonRequests):
    """A hub with one repository, as its client asks for it."""

    server: Hub

    def do_GET(self) -> None:
        if "harnesses" not in self.path:
            self.server.asked.append(self.path)
        files = sorted(path.name for path in self.server.folder.iterdir())
        if self.path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [{"type": "file", "path": name, "size": 1, "oid": f"{number:040x}"} for number, name in enumerate(files)]
            self.answer(json.dumps(entries).encode(), "application/json")
        elif self.path.startswith(f"/api/models/{NAME}"):
            self.reply({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif self.path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.answer((self.server.folder / self.path.rpartition("/")[2]).read_bytes(), "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "ETag": f'"{hash(self.path)}"',
            "X-Repo-Commit": COMMIT,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


class Hub(LocalServer):
    requests: type[BaseHTTPRequestHandler] = Requests

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.asked: list[str] = []


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the hub's client, and a client that has asked nothing yet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "fulltune"))
    monkeypatch.setattr(hub, "unanswered", [])
    hub._ask.cache_clear()
    yield tmp_path / "hub"
    hub._ask.cache_clear()


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def in_cache(folder: Path, cache: Path) -> Path:
    """Put a directory into the cache, as the client keeps a snapshot of it."""
    place = cache / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


def as_bins(base: Path, folder: Path, shards: int = 1) -> Path:
    """Copy a model directory, its weights pickled, as older ones on the hub are."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[number::shards]} for number in range(shards)]
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{number:05d}-of-{shards:05d}.bin" for number in range(1, shards + 1)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file)
    if shards > 1:
        placed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def opened(name: str, **settings: Any) -> tuple[Any, Any]:
    """Open tokenizer and model as a rank does."""
    config = RunConfig(model=ModelConfig(id=name, **settings))
    tokenizer = load_tokenizer(config)
    return tokenizer, make_blueprint(config.model, 0, tokenizer)


class Silent:
    """A server that takes connections, reads what is asked for, and says nothing."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.asked: list[bytes] = []
        self.taken: list[socket.socket] = []
        threading.Thread(target=self.take, daemon=True).start()

    def take(self) -> None:
        while True:
            self.taken.append(self.listening.accept()[0])
            asked = self.taken[-1].recv(1000).split()[1]
            if b"/agent-harnesses" not in asked:  # a list for the client's own telemetry
                self.asked.append(asked)


@pytest.mark.parametrize("kind", ["silent", "refusing", "no such host"])
def test_a_hub_that_does_not_answer_is_waited_for_once(
    base: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    snapshot, server = in_cache(base, own_cache), Silent()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}"
    at(monkeypatch, {"silent": server.url, "refusing": refusing, "no such host": "http://nowhere.invalid"}[kind])
    monkeypatch.setattr(logging.getLogger("fulltune"), "propagate", True)
    tokenizer, blueprint = opened(NAME)
    assert len(tokenizer) > 0
    assert (blueprint.folder, blueprint.revision) == (snapshot, COMMIT)
    assert server.asked == ([f"/api/models/{NAME}".encode()] if kind == "silent" else [])
    said = [record.message for record in caplog.records if "does not answer" in record.message]
    assert len(said) == 1
    assert "only files of this machine are read" in said[0]


def test_what_is_not_in_the_cache_either_is_refused_in_one_message(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "http://nowhere.invalid")
    with pytest.raises(ConfigError) as refused:
        opened(NAME)
    said = str(refused.value)
    assert "model.id" in said
    assert "http://nowhere.invalid does not answer" in said
    assert f"the cache {own_cache} does not have it" in said
    assert f"hf download {NAME}" in said


def test_a_hub_that_answers_is_asked_for_the_commit_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Hub(base)
    at(monkeypatch, server.url)
    with server.serving():
        _, blueprint = opened(NAME)
        questions = [path for path in server.asked if path.startswith("/api/models/") and "/tree/" not in path]
        assert len(questions) == 1, server.asked
        assert blueprint.revision == COMMIT
        assert blueprint.folder is not None
        assert (blueprint.folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        server.asked.clear()
        hub._ask.cache_clear()
        opened(NAME)
        assert len(server.asked) == 1, server.asked  # another run of what is in the cache


def test_no_such_model_and_no_such_revision_are_told_apart(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Requests):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound")
            self.end_headers()

    class Refuses(Hub):
        requests = Refusing

    server = Refuses(base)
    at(monkeypatch, server.url)
    with server.serving():
        with pytest.raises(ConfigError, match="no such model, or it asks for a token"):
            opened(NAME)
        with pytest.raises(ConfigError, match=r"model\.revision.* no revision v9"):
            opened(NAME, revision="v9")


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_refused_and_converted_where_asked_for(base: Path, tmp_path: Path, shards: int) -> None:
    folder = as_bins(base, tmp_path / "model", shards)
    with pytest.raises(ConfigError, match=r"model\.convert=true"):
        opened(str(folder))[1].build("cpu")
    _, blueprint = opened(str(folder), convert=True)
    expected = load_file(base / "model.safetensors")
    state = blueprint.build("cpu").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    made = blueprint.folder
    assert made is not None
    assert tmp_path / "fulltune" in made.parents
    times = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert opened(str(folder), convert=True)[1].folder == made
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == times  # once
    assert not list(folder.glob("*.safetensors"))


def test_a_model_of_the_hub_with_pickled_weights_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Hub(as_bins(base, tmp_path / "theirs"))
    at(monkeypatch, server.url)
    with server.serving():
        with pytest.raises(ConfigError, match=r"has only pytorch_model\.bin.*\n?.*model\.convert=true"):
            opened(NAME)
        assert not [path for path in server.asked if path.endswith(".bin")]  # nothing was fetched for nothing
        _, blueprint = opened(NAME, convert=True)
    state = blueprint.build("cpu").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(base / "model.safetensors").items())
    assert blueprint.revision == COMMIT


def test_a_cache_without_weights_says_what_to_fetch(base: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = in_cache(as_bins(base, tmp_path / "theirs"), own_cache)
    with pytest.raises(ConfigError, match=r"model\.convert=true"):
        opened(NAME)
    assert opened(NAME, convert=True)[1].build("cpu") is not None
    (snapshot / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=f"hf download {NAME}.*model.convert=true"):
        opened(NAME)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "a bare pickle", "not a table"])
def test_code_in_pickled_weights_is_not_run(base: Path, tmp_path: Path, how: str) -> None:
    folder, marker = as_bins(base, tmp_path / "model"), tmp_path / "ran"
    hostile = {"weight": torch.zeros(2), "more": Touch(marker)}
    file = folder / "pytorch_model.bin"
    if how == "torch.save":
        torch.save(hostile, file)
    elif how == "a bare pickle":
        file.write_bytes(pickle.dumps(hostile))
    else:
        torch.save([1, 2], file)
    with pytest.raises(ConfigError, match=r"model\.convert"):
        opened(str(folder), convert=True)
    assert not marker.exists()
    assert not list((tmp_path / "fulltune" / "converted").glob("weights-????????????????????"))


def test_shards_outside_the_directory_are_not_read(base: Path, tmp_path: Path) -> None:
    folder = as_bins(base, tmp_path / "model", 2)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "secret.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"weight": "../secret.bin"}}))
    with pytest.raises(ConfigError, match=r"has no file \.\./secret\.bin"):
        opened(str(folder), convert=True)


def test_whose_code_runs_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "stranger/code--modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(logging.getLogger("fulltune"), "propagate", True)
    hub.say_whose_code(str(folder), folder, COMMIT)
    assert f"Python code of {folder} (commit {COMMIT}) and of stranger/code runs here" in caplog.text


ASK = """
import sys
from pathlib import Path
from trainers.config.errors import ConfigError
from trainers.model import hub
try:
    print(hub.fetch("model.id", "acme/tiny", None, ("config.json",))[0])
except ConfigError as error:
    print(error)
"""


def ask_as_a_rank(**variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    line = [sys.executable, "-c", ASK]
    done = subprocess.run(line, env=environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.slow
def test_variables_of_the_hub_are_followed(base: Path, tmp_path: Path) -> None:
    tokens: list[str | None] = []

    class Asked(Requests):
        def do_GET(self) -> None:
            if "harnesses" not in self.path:
                tokens.append(self.headers.get("Authorization"))
            super().do_GET()

        do_HEAD = do_GET

    class Asks(Hub):
        requests = Asked

    server, home = Asks(base), tmp_path / "home"
    (tmp_path / "token").write_text("hf_from_a_file")
    with server.serving():
        endpoint = {"HF_ENDPOINT": server.url}
        found = ask_as_a_rank(**endpoint, HF_HOME=str(home), HF_TOKEN="hf_secret")
        assert found.startswith(str(home / "hub"))
        assert set(tokens) == {"Bearer hf_secret"}
        assert ask_as_a_rank(**endpoint, HF_HOME=str(home), HF_HUB_CACHE=str(tmp_path / "cache")).startswith(str(tmp_path / "cache"))
        tokens.clear()
        ask_as_a_rank(**endpoint, HF_HOME=str(tmp_path / "other"), HF_TOKEN_PATH=str(tmp_path / "token"))
        assert set(tokens) == {"Bearer hf_from_a_file"}
        tokens.clear()
        for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            assert ask_as_a_rank(**endpoint, HF_HOME=str(home), **{offline: "1"}) == found
            assert "HF_HUB_OFFLINE is set" in ask_as_a_rank(**endpoint, HF_HOME=str(tmp_path / "nothing"), **{offline: "1"})
        assert not tokens
    silent = Silent()
    said = ask_as_a_rank(HF_ENDPOINT=silent.url, HF_HOME=str(tmp_path / "nothing"), HF_HUB_ETAG_TIMEOUT="1")
    assert f"the hub at {silent.url} does not answer (timed out)" in said
