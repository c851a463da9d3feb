"""Rows of every kind of file but plain JSON lines: json, csv, parquet, arrow, text, and what is compressed or not in UTF-8.

What a container adds is taken away again: the nulls that fill up a struct, JSON kept as text, byte order marks. What is
not valid becomes a BadRow with its line, where the reader can continue after it.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from trainers.config.errors import ConfigError, plural
from trainers.config.local import file_type
from trainers.data.formats import BadRow, strict_json
from trainers.data.remote import RemotePath
from trainers.processes import raise_exhausted

LFS_POINTER = b"version https://git-lfs"
HEAD = len(LFS_POINTER)
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma", b"]\x00\x00": "lzma", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a compressed file, which its name may not tell."""
LARGEST_FIELD = 1 << 30
Numbered = Iterator[tuple[Any, int]]
File = Path | RemotePath


def read(file: File) -> Numbered:
    """Yield a file's rows with their lines, counted from 1, or their numbers; a row may be a BadRow.

    Raises ConfigError where the file, or what follows a row, cannot be read.
    """
    line = 0
    try:
        if _head(file) == LFS_POINTER:
            raise ConfigError("data.path", str(file), "is a Git LFS pointer and not the data", f"git -C {file.parent} lfs pull")
        for data, line in READERS[file_type(file.name)](file):
            yield data, line
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:  # ValueError: also pyarrow's and JSON's
        raise_exhausted(error)
        after = f" after line {line}" if line else ""
        raise ConfigError("data.path", str(file), f"cannot be read{after}: {error}") from None


def _head(file: File) -> bytes:
    with file.open("rb") as stream:
        return stream.read(HEAD)


def opened(file: File) -> BinaryIO:
    """Open a file for its content, decompressed by its first bytes: gzip, bz2, xz and zstd (by pyarrow, which has it)."""
    head = _head(file)
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if kind is None:
        return file.open("rb")
    if kind == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(file.open("rb"), compression="zstd"))
    import bz2
    import gzip

    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "lzma": lzma.open}
    return io.BufferedReader(openers[kind](file.open("rb"), "rb"))


def _encoding(stream: BinaryIO) -> str:
    """Return the encoding of a text by its byte order mark, or by where its first bytes are zero, as JSON's standard says."""
    head = stream.peek(4)[:4]  # type: ignore[attr-defined]
    return json.detect_encoding(head) if head.strip(b"\x00") else "utf-8"  # also utf-8-sig, utf-16 and utf-32, which drop the mark


def _text(file: File, newline: str | None = None) -> TextIO:
    """Open a file as text; a byte that is not UTF-8 becomes half a surrogate pair, which makes its row a bad one."""
    stream = opened(file)
    return io.TextIOWrapper(stream, encoding=_encoding(stream), errors="surrogateescape", newline=newline)


def _jsonl(file: File) -> Numbered:
    stream = opened(file)
    encoding = _encoding(stream)
    lines: Iterable[bytes] = stream
    if encoding not in ("utf-8", "utf-8-sig"):
        lines = (line.encode() for line in io.TextIOWrapper(stream, encoding=encoding, newline="\n"))
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            yield text, number


def _json(file: File) -> Numbered:
    try:
        content = strict_json(_text(file).read())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _jsonl(file)  # JSON lines under another name
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"the object holds {len(lists)} lists, and rows are looked for in the only one")
        content = lists[0]
    if not isinstance(content, list):
        raise ValueError("it holds neither a list nor an object with one")
    yield from zip(content, range(1, len(content) + 1), strict=True)


def _csv(file: File) -> Numbered:
    """Yield rows with the line that they begin in: a quoted field may hold line ends. What the header has most of separates."""
    csv.field_size_limit(LARGEST_FIELD)
    with _text(file, newline="") as stream, _text(file) as header:
        delimiter = max(",;\t", key=next((line for line in header if line.strip()), "").count)
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        names = next((fields for fields in reader if fields), [])
        _require_distinct(names)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"is not valid CSV: {error}"), line
                continue
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True)), line
            elif fields:
                yield BadRow(f"has {plural(len(fields), 'field')}, and the header has {len(names)}"), line


def _require_distinct(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"it has the column `{twice[0]}` twice")


def _whole_text(file: File) -> Numbered:
    yield {"text": _text(file).read()}, 1


def _parquet(file: File) -> Numbered:
    from pyarrow import parquet

    yield from arrow_rows(parquet.ParquetFile(file.open("rb") if isinstance(file, RemotePath) else file).iter_batches(batch_size=1024))


def _arrow(file: File) -> Numbered:
    import pyarrow as pa

    with pa.PythonFile(file.open("rb")) if isinstance(file, RemotePath) else pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches: Iterator[Any] = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the stream form, which `datasets` writes
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from arrow_rows(batches)


def arrow_rows(batches: Iterable[Any]) -> Numbered:
    """Yield the rows of record batches, as their JSON would be, with their numbers."""
    number = 0
    for batch in batches:
        _require_distinct(batch.schema.names)
        convert = {field.name: found for field in batch.schema if (found := _converter(field.type)) is not None}
        for row in _to_rows(batch):
            number += 1
            yield _converted(row, convert), number


def _to_rows(batch: Any) -> Iterator[Any]:
    """Yield the rows of a batch as they are; a BadRow for one with bytes that are not UTF-8."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from _to_rows(batch.slice(number, 1))
        else:
            yield BadRow(f"is not UTF-8: {error.reason} at byte {error.start}")


def _converted(row: Any, convert: dict[str, Callable[[Any], Any]]) -> Any:
    if isinstance(row, BadRow) or not convert:
        return row
    try:
        return {name: convert[name](value) if name in convert and value is not None else value for name, value in row.items()}
    except BadRow as error:
        return error


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """Return what makes JSON's value of a column's type; None where it is that already.

    All rows of a column share one struct, so that a key which a row does not have is there as null: it is dropped. Nulls
    in a list, in a map and in JSON's own text are a row's own, and stay.
    """
    import pyarrow as pa

    if getattr(kind, "extension_name", "") == "arrow.json":
        return _from_text
    if pa.types.is_struct(kind):
        inner = {field.name: _converter(field.type) for field in kind}
        return lambda value: {key: _apply(inner[key], held) for key, held in value.items() if held is not None}
    if pa.types.is_map(kind):
        of_item = _converter(kind.item_type)
        return None if of_item is None else lambda value: {key: _apply(of_item, held) for key, held in value.items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        of_value = _converter(kind.value_type)
        return None if of_value is None else lambda value: [_apply(of_value, held) for held in value]
    return None


def _apply(convert: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)


def _from_text(text: str) -> Any:
    try:
        return strict_json(text)
    except ValueError as error:
        raise BadRow(f"holds JSON text that is not valid: {error}") from None


READERS: dict[str, Callable[[File], Numbered]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _whole_text,
    ".md": _whole_text,
}
