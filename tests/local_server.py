"""A server on this machine that answers in JSON, for clients that would ask one elsewhere."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonRequests(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def body(self) -> bytes:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body

    def reply(self, answer: dict[str, Any]) -> None:
        said = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


class LocalServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    requests: type[BaseHTTPRequestHandler]

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), self.requests)
        self.url = f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()


class VllmRequests(JsonRequests):
    """What a vLLM server answers, as far as our client asks. The nth token of an answer is (sum of the prompt + seed + n + version) % 7."""

    def refuses(self) -> bool:
        server = self.server
        assert isinstance(server, VllmServer)
        path = self.path.partition("?")[0]
        server.paths.append(path)
        if path.startswith("/v1") and server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            self.send_error(401)
            return True
        if path in server.hangs:
            server.released.wait(30)
        if server.faults.get(path, 0) > 0:
            server.faults[path] -= 1
            self.send_error(server.status)
            return True
        return False

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, VllmServer)
        if not self.refuses():
            self.reply({"data": [{"id": "policy", "max_model_len": server.positions}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        asked, server = json.loads(self.body()), self.server
        assert isinstance(server, VllmServer)
        if self.refuses():
            return
        if self.path == "/v1/completions":
            server.asked.append(asked)
            ids = [(sum(asked["prompt"]) + asked["seed"] + at + server.version) % 7 for at in range(asked["max_tokens"])]
            end = next((at + 1 for at, number in enumerate(ids) if number in asked["stop_token_ids"]), None)
            finish, ids = ("length", ids) if end is None else ("stop", ids[:end])
            self.reply({"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}, "finish_reason": finish}]})
            return
        if self.path == "/collective_rpc":
            server.weights.append(asked["kwargs"]["weights_path"])
            server.version += 1
        self.reply({})


class VllmServer(LocalServer):
    """Faulty on request: `faults` are requests of a path that fail with `status`, `hangs` are paths that say nothing."""

    requests = VllmRequests

    def __init__(self, port: int = 0, positions: int = 16) -> None:
        super().__init__(port)
        self.positions, self.key = positions, ""
        self.faults, self.hangs, self.status, self.version = dict[str, int](), set[str](), 500, 0
        self.paths, self.weights, self.asked = list[str](), list[str](), list[dict[str, Any]]()
        self.released = threading.Event()


if __name__ == "__main__":  # in the place of `python -m vllm.entrypoints.openai.api_server`
    server = VllmServer(int(sys.argv[sys.argv.index("--port") + 1]), 64)
    server.key = os.environ.get("VLLM_API_KEY", "")
    server.serve_forever()
