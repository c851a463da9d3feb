"""Rows of web servers and object stores are those of the same files here, in each format and compression; what is wrong is said."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from contextlib import contextmanager

import pyarrow as pa
import pytest
from pyarrow import parquet
from stores import MOTO, Files, Objects, moto, serving

from trainers.config.choices import ObjectiveName
from trainers.config.derived import Source
from trainers.config.errors import ConfigError
from trainers.data import remote, sources

ROWS = [{"prompt": f"What is {number} + 1?", "completion": f"{number + 1} " * (number % 40 + 1)} for number in range(900)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows in each format, below the bucket `rows`."""
    root = tmp_path_factory.mktemp("stores")
    folder = root / "rows"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    made = {"": text, ".gz": gzip.compress(text), ".bz2": bz2.compress(text), ".xz": lzma.compress(text)}
    made[".zst"] = pa.compress(text, codec="zstd", asbytes=True)
    for suffix, content in made.items():
        (folder / f"all.jsonl{suffix}").write_bytes(content)
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "all.parquet", row_group_size=200)
    (folder / "parts" / "data").mkdir(parents=True)
    for number in range(3):
        part = "".join(json.dumps(row) + "\n" for row in ROWS[number * 300 : (number + 1) * 300])
        (folder / "parts" / "data" / f"train-0000{number}-of-00003.jsonl.gz").write_bytes(gzip.compress(part.encode()))
    (folder / "parts" / "data" / "test-00000-of-00001.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (folder / "parts" / "README.md").write_text("# rows\n")
    (folder / "cut.jsonl.gz").write_bytes(made[".gz"][: len(made[".gz"]) // 2])
    return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)
    monkeypatch.setattr(remote, "WAITS_S", (0.01,))


@contextmanager
def at(store, files, monkeypatch):
    """Yield where the files of the bucket are."""
    if store == "http":
        with serving(Files, files) as url:
            yield f"{url}/rows"
        return
    for name, value in {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    with moto(files, MOTO) if store == "moto" else serving(Objects, files) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield "s3://rows"


def read(path, **of):
    source = Source(path, "train", **of)
    found = [(sources.parse(row), row.line) for row in sources.rows(source, ObjectiveName.sft)]
    return found, sources.fingerprint(source, ObjectiveName.sft), sources.names(source)


NO_MOTO = pytest.mark.skipif(MOTO is None, reason="moto_server is not in PATH")
STORES = ["http", "s3", pytest.param("moto", marks=[pytest.mark.slow, NO_MOTO])]


@pytest.mark.parametrize("store", STORES)
def test_rows_are_those_of_the_same_file_here(store, files, monkeypatch):
    with at(store, files, monkeypatch) as place:
        for name in ("all.jsonl", "all.jsonl.gz", "all.jsonl.bz2", "all.jsonl.xz", "all.jsonl.zst", "all.parquet"):
            here, _, _ = read(str(files / "rows" / name))
            there, marks, names = read(f"{place}/{name}")
            assert there == here
            assert [row for row, _ in there] == ROWS
            assert names == [f"{place}/{name}"]
            assert marks == read(f"{place}/{name}")[1]
            assert name in marks[0]


def test_a_folder_of_a_bucket_is_read_as_a_directory(files, monkeypatch):
    with at("s3", files, monkeypatch) as place:
        rows, marks, names = read(f"{place}/parts")
        assert [row for row, _ in rows] == ROWS
        assert len(marks) == len(names) == 3
        left = sources.left_out(Source(f"{place}/parts", "train"))
        assert left == {"not rows": ["README.md"], "split test": ["data/test-00000-of-00001.jsonl"]}
        chosen, _, _ = read(f"{place}/parts", patterns=("data/*00001-of*",))
        assert [row for row, _ in chosen] == ROWS[300:600]


def test_a_changed_file_has_another_fingerprint(files, tmp_path):
    shutil.copy(files / "rows" / "all.jsonl", tmp_path / "rows.jsonl")
    with serving(Files, tmp_path) as url:
        before = read(f"{url}/rows.jsonl")[1]
        (tmp_path / "rows.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes().replace(b"What", b"when"))
        assert read(f"{url}/rows.jsonl")[1] != before


def wrong(path):
    with pytest.raises(ConfigError) as found:
        read(path)
    return str(found.value)


def test_what_cannot_be_read_is_said_with_place_and_remedy(files, monkeypatch):
    with at("http", files, monkeypatch) as place:
        assert "is not there" in wrong(f"{place}/none.jsonl")
        cut = wrong(f"{place}/cut.jsonl.gz")
        assert "cut.jsonl.gz" in cut
        assert "cannot be read after line" in cut
        assert "a web server has no folders" in wrong(f"{place}/parts")
    refused = wrong("http://127.0.0.1:9/all.jsonl")
    assert "could not be reached" in refused
    assert "check the address and the network" in refused
    with serving(Files, files, broken={"all.jsonl.bz2"}) as url:
        dropped = wrong(f"{url}/rows/all.jsonl.bz2")
        assert "could not be read: 503" in dropped
    with at("s3", files, monkeypatch) as place:
        assert "neither a data file by its name nor a folder" in wrong("s3://nothing/here")
        assert "check bucket and key" in wrong("s3://nothing/rows.jsonl")
