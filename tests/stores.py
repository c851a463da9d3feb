"""A web server and an S3 server on this machine that give out the files of a folder, in parts where they are asked for those."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from local_server import JsonRequests, LocalServer

from trainers.processes import prepare_child


class Files(JsonRequests):
    """GET and HEAD of files, with Range, ETag and Content-Length."""

    protocol_version = "HTTP/1.1"
    folder: Path
    broken: set[str]
    """Names of which only the first half comes."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        file = self.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            self.answer(404, b"not there", {})
            return
        content = file.read_bytes()
        facts = {
            "ETag": f'"{hashlib.md5(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Last-Modified": "Thu, 26 Nov 2026 10:00:00 GMT",
        }
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found is None:
            self.answer(200, content, facts)
            return
        start, end = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
        if file.name in self.broken and start >= 0 and end > len(content) // 2:
            self.answer(503, b"gone", {})
            return
        self.answer(206, content[start : end + 1], facts | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def answer(self, code, content, headers):
        self.send_response(code)
        for name, value in ({"Content-Type": "application/octet-stream"} | headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Objects(Files):
    """As much of S3 as reading needs: buckets are folders, and their objects can be listed (ListObjectsV2)."""

    def do_GET(self):
        parts = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        bucket = unquote(parts.path).strip("/")
        if "list-type" not in asked:
            super().do_GET()
            return
        if not (self.folder / bucket).is_dir():
            self.answer(404, b"<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>", {})
            return
        files = [path for path in sorted((self.folder / bucket).rglob("*")) if path.is_file()]
        keys = {str(path.relative_to(self.folder / bucket)): path for path in files}
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
            "<LastModified>2026-11-26T10:00:00.000Z</LastModified></Contents>"
            for key, path in keys.items()
            if key.startswith(asked.get("prefix", ""))
        )
        said = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self.answer(200, said.encode(), {"Content-Type": "application/xml"})


@contextmanager
def serving(kind: type[Files], folder: Path, broken: set[str] = frozenset()) -> Iterator[str]:  # type: ignore[assignment]
    """Serve a folder; yield the server's URL."""

    class Handler(kind):
        pass

    Handler.folder, Handler.broken = folder, set(broken)

    class Server(LocalServer):
        requests = Handler

        def __init__(self):
            super(LocalServer, self).__init__(("127.0.0.1", 0), Handler)
            self.url = f"http://127.0.0.1:{self.server_port}"

    server = Server()
    with server.serving():
        yield server.url


@contextmanager
def moto(folder: Path, program: str) -> Iterator[str]:
    """Serve a folder's buckets by moto's S3; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], preexec_fn=prepare_child(), **quiet)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < until, "moto_server does not start"
                time.sleep(0.1)
        for path in sorted(folder.rglob("*")):
            data = b"" if path.is_dir() else path.read_bytes()
            if path.is_file() or path.parent == folder:
                request = urllib.request.Request(
                    f"{url}/{path.relative_to(folder)}", data=data, method="PUT", headers={"Content-Type": "application/octet-stream"}
                )
                urllib.request.urlopen(request, timeout=30).close()
        yield url
    finally:
        child.terminate()
        child.wait(timeout=30)


MOTO = shutil.which("moto_server")
