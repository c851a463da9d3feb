"""Rows as they lie in files, on the hub or in the running Python, each with the file and line it came from."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainers.config.checks import FILE_TYPES
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, DataSource, ObjectiveName
from trainers.data.formats import BadRow

TEXT_TYPES = (".txt", ".md")
NOT_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json")
LARGE_FILE = 64 << 20


class Row(NamedTuple):
    """A row where it was found; `data` is still JSON text (bytes) for rows of a jsonl file."""

    data: Any
    file: str
    line: int
    """Line of a text file, counted from 1, or number of the row in other files."""


def parse(row: Row, ignore: Sequence[str] = ()) -> Any:
    """Return a row's data without the fields `ignore`, from JSON where it is bytes; raises BadRow where that fails."""
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
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise BadRow(f"is not JSON: {error}") from None


def rows(data: DataConfig, path: str | None, objective: ObjectiveName) -> Iterator[Row]:
    """Yield the rows of `path` (a file, a directory or a hub id), or of Python's documentation where `path` is None.

    Raises ConfigError where the path holds no rows of a known type.
    """
    if path is None:
        yield from _python_docs(objective)
    elif Path(path).exists():
        for file in files(path):
            yield from _read(file)
    else:
        for number, row in enumerate(_hub(data, path), 1):
            yield Row(row, f"{path}[{data.split}]", number)


def data_path(data: DataConfig) -> str | None:
    """Return where the training rows are: a path or hub id, or None for Python's documentation."""
    return None if data.source is DataSource.python_docs else data.path


def fingerprint(data: DataConfig, path: str | None, objective: ObjectiveName) -> list[str]:
    """Return what identifies the content of `path` in a content hash: digests of file contents, a hub data set's own."""
    if path is None:
        return ["python_docs", sys.version, str(objective)]
    if Path(path).exists():
        return [f"{file.suffix}:{digest(file)}" for file in files(path)]
    return [path, data.split, _hub(data, path)._fingerprint]


def files(path: str) -> list[Path]:
    """Return the data files of a path in sorted order; raises ConfigError where there are none."""
    root = Path(path)
    if root.is_file():
        found = [root]
    else:
        inside = [file for file in sorted(root.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(root).parts)]
        known = [file for file in inside if file.is_file() and file.suffix in FILE_TYPES and file.name not in NOT_ROWS]
        structured = [file for file in known if file.suffix not in TEXT_TYPES]
        found = structured or known  # a README next to data is not data
    if not found or found[0].suffix not in READERS:
        raise ConfigError("data.path", path, "holds no data file", f"known types are {' '.join(FILE_TYPES)}")
    return found


def digest(file: Path) -> str:
    """Return the sha256 of a file's content; that of a large file is kept with its size and time, as every rank asks for it."""
    size = file.stat().st_size
    if size < LARGE_FILE:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return _large_digest(file)


def _large_digest(file: Path) -> str:
    from trainers.cache import remembered

    info = file.stat()
    key = f"{file.resolve()}:{info.st_size}:{info.st_mtime_ns}:{info.st_ino}"

    def digest() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return remembered(key, digest)


def _read(file: Path) -> Iterator[Row]:
    try:
        for data, line in READERS[file.suffix](file):
            yield Row(data, str(file), line)
    except (OSError, ValueError, csv.Error) as error:  # ValueError: also pyarrow's ArrowInvalid, JSON and UTF-8 errors
        raise ConfigError("data.path", str(file), f"cannot be read: {error}") from None


def _read_jsonl(file: Path) -> Iterator[tuple[Any, int]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield text, number


def _read_json(file: Path) -> Iterator[tuple[Any, int]]:
    text = file.read_text("utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _read_jsonl(file)  # JSON lines under another name
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"the object holds {len(lists)} lists, and rows are looked for in the only one")
        content = lists[0]
    if not isinstance(content, list):
        raise ValueError("it holds neither a list nor an object with one")
    yield from zip(content, range(1, len(content) + 1), strict=True)


def _read_csv(file: Path) -> Iterator[tuple[Any, int]]:
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        line = 1
        for row in reader:
            yield {key: value for key, value in row.items() if key is not None}, line + 1
            line = reader.line_num


def _read_parquet(file: Path) -> Iterator[tuple[Any, int]]:
    from pyarrow import parquet

    yield from _number_rows(parquet.ParquetFile(file).iter_batches(batch_size=1024))


def _read_arrow(file: Path) -> Iterator[tuple[Any, int]]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches: Iterator[Any] = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the stream form, which `datasets` writes
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _number_rows(batches)


def _number_rows(batches: Iterator[Any]) -> Iterator[tuple[Any, int]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield row, number


def _read_text(file: Path) -> Iterator[tuple[Any, int]]:
    yield {"text": file.read_text("utf-8-sig")}, 1


def _python_docs(objective: ObjectiveName) -> Iterator[Row]:
    from trainers.data import python_docs

    found = python_docs.documents() if objective is ObjectiveName.cpt else python_docs.conversations()
    for number, row in enumerate(found, 1):
        yield Row(row, "python_docs", number)


def _hub(data: DataConfig, path: str) -> Any:
    import datasets

    from trainers.model import hub

    why = hub.ask(path, kind="dataset").why
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or bool(hub.unanswered)  # read when it was imported
    try:
        return datasets.load_dataset(path, split=data.split)
    except Exception as error:  # whatever the hub client raises: no network, no such data set, a gated one
        reason = why or hub.first_line(error)
        raise ConfigError("data.path", path, f"is not a file here and could not be loaded from the hub: {reason}") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[Any, int]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
    ".md": _read_text,
}
