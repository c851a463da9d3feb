"""Rows as they lie in files, on the hub or in the running Python, each with the file and line it came from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trainers.config.choices import ObjectiveName
from trainers.config.derived import DIGITS, TASKS, Source, compares, rows_as
from trainers.config.errors import ConfigError
from trainers.config.local import COMPRESSED, FILE_TYPES, file_type, is_remote
from trainers.data.formats import BadRow, strict_json
from trainers.data.remote import RemotePath
from trainers.rundir.files import sha256

LARGE_FILE = 64 << 20


class Row(NamedTuple):
    """A row where it was found; `data` is still JSON text (bytes) for rows of a jsonl file, and a BadRow where it is damaged."""

    data: Any
    file: str
    line: int
    """Line of a text file, counted from 1, or number of the row in other files."""


def parse(row: Row, ignore: Sequence[str] = ()) -> Any:
    """Return a row's data without the fields `ignore`, from JSON where it is bytes; raises BadRow where that fails."""
    if isinstance(row.data, BadRow):
        raise row.data
    data = _from_json(row.data) if isinstance(row.data, bytes) else row.data
    return _without(data, ignore) if ignore else data


def _without(row: Any, names: Sequence[str]) -> Any:
    """Return a row without the fields `names`, of its own and of its turns."""
    if not isinstance(row, dict):
        return row
    return {key: _turns_without(value, names) for key, value in row.items() if key not in names}


def _turns_without(value: Any, names: Sequence[str]) -> Any:
    if not isinstance(value, list):
        return value
    return [{key: held for key, held in turn.items() if key not in names} if isinstance(turn, dict) else turn for turn in value]


def _from_json(text: bytes) -> Any:
    try:
        return strict_json(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise BadRow(f"is not JSON: {error}") from None


def rows(source: Source | None, objective: ObjectiveName, done: frozenset[str] = frozenset()) -> Iterator[Row]:
    """Yield the rows of a source, or of Python's documentation where it is None, without those of the files `done`.

    Raises ConfigError where there are no rows of a known type.
    """
    if source is None or source.path.startswith((DIGITS, TASKS)):
        yield from _own(source, objective)
    elif _has_files(source):
        for file in files(source):
            if str(file) not in done:
                yield from _read(file)
    else:
        from trainers.data import hub

        name = hub.name_of(source)
        for row, number in hub.rows(source):
            yield Row(row, name, number)


def fingerprint(source: Source | None, objective: ObjectiveName, quick: bool = False) -> list[str]:
    """Return what identifies the rows of a source in a content hash: digests of file contents, a hub data set's own.

    With `quick`, files of this machine are told by their name in the data set, size and second of change: reading terabytes takes
    hours, and a copy of them on another node or a directory that was moved is the same.
    """
    if source is None or source.path.startswith((DIGITS, TASKS)):
        if source is not None and source.path.startswith(TASKS):
            from trainers.data.tasks import marks

            return marks(source.path)
        return [DIGITS] if source else ["python_docs", sys.version, str(rows_as(objective))]
    if _has_files(source):
        found = files(source)
        return [f"{file_type(file.name)}:{_stat(file, source) if quick and isinstance(file, Path) else digest(file)}" for file in found]
    from trainers.data import hub

    return [repr(source), hub.fingerprint(source)]


def names(source: Source | None) -> list[str]:
    """Return what the rows of a source are called by, in their order: `Row.file`."""
    if source is None or source.path.startswith((DIGITS, TASKS)):
        return [source.path.partition(":")[0] if source else "python_docs"]
    if _has_files(source):
        return [str(file) for file in files(source)]
    from trainers.data import hub

    return [hub.name_of(source)]


def left_out(source: Source | None) -> dict[str, list[str]]:
    """Return the files of a directory that are not read, by the reason."""
    if source is None or not _place(source.path).is_dir():
        return {}
    from trainers.data.listing import listing

    return listing(source).left_out


def _place(path: str) -> Path | RemotePath:
    return RemotePath(path) if is_remote(path) else Path(path)


def _has_files(source: Source) -> bool:
    """Tell files, here or at a URL, from a hub data set."""
    return is_remote(source.path) or Path(source.path).exists()


def files(source: Source) -> list[Path | RemotePath]:
    """Return the data files of a path or URL in sorted order; raises ConfigError where there are none."""
    root = _place(source.path)
    if root.is_dir():
        from trainers.data.listing import listing

        return listing(source).files
    if file_type(root.name) not in FILE_TYPES:
        known = f"known types are {' '.join(FILE_TYPES)}, the text ones also with {' '.join(COMPRESSED)} after it"
        raise ConfigError("data.path", source.path, "is not a data file by its name", f"{known}; an archive is unpacked before")
    return [root]


def digest(file: Path | RemotePath) -> str:
    """Return the sha256 of a file's content; that of a large file is kept with its size and time, as every rank asks for it.

    Of a remote file it is what its store says of it.
    """
    if isinstance(file, RemotePath):
        return f"{file.url}:{file.version()}"
    return _large_digest(file) if file.stat().st_size >= LARGE_FILE else sha256(file)


def _stat(file: Path, source: Source) -> str:
    root, info = Path(source.path), file.stat()
    return f"{file.relative_to(root) if root.is_dir() else file.name}:{info.st_size}:{int(info.st_mtime)}"


def _large_digest(file: Path) -> str:
    from trainers.cache import remembered

    info = file.stat()
    key = f"{file.resolve()}:{info.st_size}:{info.st_mtime_ns}:{info.st_ino}"
    return remembered(key, partial(sha256, file))


def _read(file: Path | RemotePath) -> Iterator[Row]:
    if isinstance(file, Path) and file.suffix == ".jsonl" and _is_plain(file):
        with file.open("rb") as stream:
            yield from (Row(line, str(file), number) for number, line in enumerate(stream, 1) if line.strip())
        return
    from trainers.data import containers

    for data, line in containers.read(file):
        yield Row(data, str(file), line)


def _is_plain(file: Path) -> bool:
    """Tell whether a file begins as JSON lines in UTF-8 do, neither compressed nor with a byte order mark."""
    with file.open("rb") as stream:
        head = stream.read(4)
    return head[:1] == b"{" and b"\x00" not in head


def digits() -> Iterator[dict[str, str]]:
    """Yield {"question", "answer"} of the larger of each two digits: what a small model can learn from rewards, and anybody can check."""
    for first in range(10):
        for second in range(10):
            yield {"question": f"{first},{second}?", "answer": str(max(first, second))}


def _own(source: Source | None, objective: ObjectiveName) -> Iterator[Row]:
    """Yield rows that are made and not read."""
    from trainers.data import python_docs

    if source is not None:
        if source.path.startswith(TASKS):
            from trainers.data.tasks import rows_of
        made = digits() if source.path == DIGITS else rows_of(source.path)
        for number, row in enumerate(made, 1):
            yield Row(row, source.path.partition(":")[0], number)
        return

    if compares(objective):
        found: Iterator[dict[str, Any]] = python_docs.pairs()
    else:
        found = python_docs.documents() if objective is ObjectiveName.cpt else python_docs.conversations()
    for number, row in enumerate(found, 1):
        yield Row(row, "python_docs", number)
