"""Files of object stores and web servers, read in blocks through fsspec: as much of a path as reading rows needs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from trainers.config.errors import ConfigError
from trainers.processes import raise_exhausted

BLOCK = 8 << 20
"""Bytes that are asked for at once."""
WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Before each further try: what a network drops now and then is asked for again."""
VERSIONS = ("ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "blob_id", "LastModified", "last_modified", "mtime", "Last-Modified")
"""Of what file systems say of a file, in this order: by one of these and the size a changed file is told."""
FINAL = (FileNotFoundError, PermissionError, NotImplementedError, ImportError)
REFUSED = (401, 403, 404, 410)
"""Answers of a web server that stay the same."""
REMEDIES = {
    "s3": "check bucket and key, and the credentials: AWS_PROFILE, or AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL",
    "gs": "check bucket and name, and the credentials: GOOGLE_APPLICATION_CREDENTIALS",
    "az": "check container and name, AZURE_STORAGE_ACCOUNT_NAME and the credentials",
    "hf": "check the name; a gated or private one needs HF_TOKEN",
}
T = TypeVar("T")


class RemotePath:
    """A file or folder by its URL, with what pathlib.Path has of the same names."""

    def __init__(self, url: str, info: dict[str, Any] | None = None) -> None:
        """Ask nobody yet; `info` is what a listing has said of it."""
        self.url, self.scheme = url, urlsplit(url).scheme
        self.name = PurePosixPath(urlsplit(url).path if self.scheme in ("http", "https") else url.rstrip("/")).name
        self.suffix = PurePosixPath(self.name).suffix
        self.is_arrow = False
        if info is not None:
            self.info = info

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}", self.files.get(name, {}))

    @property
    def parent(self) -> str:
        """Return the folder that it is in."""
        return self.url.rpartition("/")[0]

    @cached_property
    def place(self) -> tuple[Any, str]:
        """Return its file system and its name there; raises ConfigError where nothing here reads such URLs."""
        import fsspec

        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(self.url)
            return found
        except ImportError as error:
            if self.scheme in ("http", "https", "hf"):
                raise self._wrong(f"nothing here reads it: {error}", "pip install 'fulltune[remote]'") from None
            self.is_arrow = True
            return self._asked(lambda: _of_arrow(self.url, self.scheme))

    @cached_property
    def info(self) -> dict[str, Any]:
        """Return what its file system says of it; raises ConfigError where it is not there or cannot be reached."""
        fs, path = self.place
        found: dict[str, Any] = self._asked(lambda: fs.info(path))
        return found

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return what is said of each file below it, by its name from here, sorted."""
        if self.scheme in ("http", "https"):
            raise self._wrong("is not a data file by its name, and a web server has no folders", "name each file by itself")
        fs, path = self.place
        found = self._asked(lambda: fs.find(path, detail=True))
        if not found:
            raise self._wrong("is neither a data file by its name nor a folder that holds files", self._remedy())
        start = path.rstrip("/") + "/"
        return {name.removeprefix(start): info for name, info in sorted(found.items())}

    def exists(self) -> bool:
        """Tell whether a listing has named it."""
        return bool(self.info)

    is_file = exists

    def is_dir(self) -> bool:
        """Tell whether it is a folder, which is seen in its name alone."""
        from trainers.config.local import FILE_TYPES, file_type

        return self.url.endswith("/") or file_type(self.name) not in FILE_TYPES

    def resolve(self) -> str:
        """Return what tells it from others: there are no links."""
        return self.url

    def stat(self) -> SimpleNamespace:
        """Return its size in bytes, as `st_size`."""
        if self.info.get("size") is None:
            raise self._wrong("the server does not say how long it is", "download it, and data.path=FILE")
        return SimpleNamespace(st_size=int(self.info["size"]))

    def version(self) -> str:
        """Return what changes when its content does, as its store says; raises ConfigError where that says nothing."""
        found = next((self.info[name] for name in VERSIONS if self.info.get(name) is not None), None)
        if found is None:
            raise self._wrong("its store does not say when it changes: neither ETag nor Last-Modified", "download it, and data.path=FILE")
        return f"{found}:{self.stat().st_size}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it for reading bytes, from any place of it."""
        fs, path = self.place
        read = partial(_read_arrow, fs.fs, path) if self.is_arrow else partial(fs.cat_file, path)
        return cast(BinaryIO, io.BufferedReader(Blocks(read, self.stat().st_size), 1 << 20))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return its content as text."""
        return self.open().read().decode(encoding, errors)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return retried(ask)
        except Exception as error:  # each file system raises errors of its own
            raise_exhausted(error)
            what = "is not there" if _is_missing(error) else f"could not be reached: {_said(_cause(error))}"
            raise self._wrong(what, self._remedy()) from None

    def _remedy(self) -> str:
        return REMEDIES.get(self.scheme, "check the address and the network; without one, download it elsewhere, and data.path=FILE")

    def _wrong(self, reason: str, remedy: str) -> ConfigError:
        return ConfigError("data.path", self.url, reason, remedy)


class Blocks(io.RawIOBase):
    """A file of which `read(start, end)` returns the bytes; one block of it is kept. Raises OSError where reading fails for good."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """Read nothing yet."""
        self.read_range, self.size = read, size
        self.at, self.start, self.block = 0, 0, b""

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that any place of it can be read."""
        return True

    def tell(self) -> int:
        """Return the place that is read next."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, and return it."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer up to the end of a block; returns the number of bytes."""
        if self.at >= self.size:
            return 0
        if not self.start <= self.at < self.start + len(self.block):
            self.start, self.block = self.at, self._fetch(self.at, min(self.size, self.at + BLOCK))
        found = self.block[self.at - self.start :][: len(buffer)]
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)

    def _fetch(self, start: int, end: int) -> bytes:
        def read() -> bytes:
            block = self.read_range(start, end)
            if len(block) > end - start:
                raise NotImplementedError("the server does not answer requests for a part of a file: download it, and data.path=FILE")
            if len(block) < end - start:
                raise OSError(f"{len(block):,} of {end - start:,} bytes came")
            return block

        try:
            return retried(read)
        except Exception as error:  # each file system raises errors of its own
            raise_exhausted(error)
            raise OSError(f"bytes {start:,} to {end:,} could not be read: {_said(error)}") from None


def retried(ask: Callable[[], T]) -> T:
    """Return what is asked for, after several tries where it fails of what may pass."""
    for wait_s in WAITS_S:
        try:
            return ask()
        except Exception as error:  # each file system raises errors of its own
            if isinstance(cause := _cause(error), FINAL) or getattr(cause, "status", None) in REFUSED:
                raise
            time.sleep(wait_s)
    return ask()


def _cause(error: BaseException) -> BaseException:
    """Return the first cause of an error: fsspec calls each of the web's, a refused connection too, a file that is not found."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_missing(error: BaseException) -> bool:
    cause = _cause(error)
    return isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410)


def _said(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _read_arrow(fs: Any, path: str, start: int, end: int) -> bytes:
    with fs.open_input_file(path) as file:
        found: bytes = file.read_at(end - start, start)
        return found


def _of_arrow(url: str, scheme: str) -> tuple[Any, str]:
    """Return arrow's own file system of an object store as one of fsspec's, and the name there."""
    import os

    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    if scheme == "s3":
        found: Any = fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    elif scheme == "gs":
        found = fs.GcsFileSystem()
    else:
        found = fs.AzureFileSystem(os.environ["AZURE_STORAGE_ACCOUNT_NAME"])
    return ArrowFSWrapper(found), url.partition("://")[2].rstrip("/")
