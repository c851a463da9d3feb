"""A stream's rows are those of prepared data, whatever holds them; its shards are made again from any place, and few are on disk."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from preparing import TOKENIZER, settings, write
from pyarrow import parquet
from stores import MOTO, Files, Objects, moto, serving

from trainers.batch import WEIGHT
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data import ahead, remote, stream
from trainers.data.loader import Loader
from trainers.data.prepare import data_key, prepare
from trainers.data.shards import WANTED
from trainers.data.stream import Streamed
from trainers.rundir.files import try_json
from trainers.world import World

ROWS = [{"prompt": f"What is {number} + 1?", "completion": f"{number + 1} " * (number % 40 + 1)} for number in range(300)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{number} no"} for number, row in enumerate(ROWS[:90])]


class Inline:
    """Prepares in this process what a rank waits for."""

    def __init__(self, config, folder):
        self.folder, self.producer, self.most = folder, ahead.Producer(config, folder), 0

    def check(self):
        wanted = try_json(self.folder / WANTED)["shards"]
        self.producer.remove_others(wanted)
        number = self.producer.missing(wanted)
        if number is not None:
            self.producer.make(number)
        self.most = max(self.most, sum(path.is_dir() for path in self.folder.glob("data-*")))


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(ahead, "load_tokenizer", lambda config: TOKENIZER)
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)


def run_of(path, objective="sft", **data):
    """Return a run of 100 steps of 8 rows; 37 steps are the whole of ROWS but 4."""
    return replace(settings(path, objective, **data), train=TrainConfig(steps=100, global_batch=8, microbatch=2))


def streamed(config, folder, rank=0, world_size=1):
    folder.mkdir(exist_ok=True)
    return Streamed(config, folder, alone(), rank=rank, world_size=world_size, pad_id=0, ahead=Inline(config, folder))


def alone():
    return World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def batches(rows, step):
    return rows.batches(step, rows.row_ids(step))


def same(one, other):
    """Tell whether two ranks' microbatches are the same, bit for bit."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for name in ("input_ids", "labels", "position_ids", "documents"):
            assert torch.equal(getattr(left, name), getattr(right, name))
        assert left.signals.keys() == right.signals.keys()
        assert all(torch.equal(left.signals[name], right.signals[name]) for name in left.signals)
    return True


def texts(rows, steps):
    """Return the documents of some steps, each once."""
    found = [batch for step in range(steps) for batch in batches(rows, step)]
    return {
        tuple(ids[document == document.max()].tolist())
        for batch in found
        for ids, document in zip(batch.input_ids, batch.documents, strict=True)
    }


def loader_of(config, rank=0, world_size=1):
    plain = replace(config, data=replace(config.data, streaming=False))
    return Loader(prepare(plain, tokenizer=TOKENIZER).train, config.train, seed=0, rank=rank, world_size=world_size, pad_id=0)


def equals_prepared(config, folder, steps, here=None):
    """Compare all steps of two ranks with those of prepared data, of the file `here`."""
    prepared_of = config if here is None else replace(config, data=replace(config.data, path=str(here)))
    for rank in range(2):
        plain, stream = loader_of(prepared_of, rank, 2), streamed(config, folder / "stream", rank, 2)
        for step in steps:
            assert same(batches(stream, step), batches(plain, step))
            assert np.array_equal(stream.row_ids(step), plain.row_ids(step))
            assert stream.sizes(step, stream.row_ids(step)) == plain.sizes(step, plain.row_ids(step))
    return True


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows in each format, below the bucket `rows`."""
    root = tmp_path_factory.mktemp("stores")
    folder = root / "rows"
    (folder / "parts").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    made = {"": text, ".gz": gzip.compress(text), ".bz2": bz2.compress(text), ".xz": lzma.compress(text)}
    made[".zst"] = pa.compress(text, codec="zstd", asbytes=True)
    for suffix, content in made.items():
        (folder / f"all.jsonl{suffix}").write_bytes(content)
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, folder / "all.parquet", row_group_size=64, compression="zstd")
    (folder / "all.csv").write_text("prompt,completion\n" + "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in ROWS))
    (folder / "all.json").write_text(json.dumps(ROWS))
    for number in range(3):
        part = "".join(json.dumps(row) + "\n" for row in ROWS[number * 100 : (number + 1) * 100])
        (folder / "parts" / f"train-0000{number}-of-00003.jsonl.gz").write_bytes(gzip.compress(part.encode()))
    return root


FORMATS = ("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "parquet", "csv", "json")


@contextmanager
def at(store, files, monkeypatch):
    """Yield where the files of the bucket are."""
    for name, value in {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    if store == "disk":
        yield str(files / "rows")
    elif store == "http":
        with serving(Files, files) as url:
            yield f"{url}/rows"
    else:
        with moto(files, MOTO) if store == "moto" else serving(Objects, files) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            yield "s3://rows"


NO_MOTO = pytest.mark.skipif(MOTO is None, reason="moto_server is not in PATH")
STORES = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("disk", "http")),
    pytest.param("s3", marks=pytest.mark.soak),
    pytest.param("moto", marks=[pytest.mark.slow, NO_MOTO]),
]


@pytest.mark.parametrize("store", STORES)
def test_each_format_of_each_store_streams_as_prepared(store, files, tmp_path, monkeypatch):
    """In one window: the same rows in the same order as the plain file prepared, bit for bit."""
    with at(store, files, monkeypatch) as place:
        for name in [f"all.{kind}" for kind in FORMATS] + ["parts"] * (store != "http"):
            config = run_of(f"{place}/{name}", streaming=True, shard_rows=70, window_shards=5, prepared_dir=str(tmp_path / "kept"))
            (tmp_path / name).mkdir()
            assert equals_prepared(config, tmp_path / name, (0, 36), files / "rows" / "all.jsonl")


def test_a_stream_equals_prepared_data_over_two_passes(files, tmp_path):
    config = run_of(files / "rows" / "all.jsonl", streaming=True, shard_rows=70, window_shards=5, prepared_dir=str(tmp_path / "kept"))
    assert equals_prepared(config, tmp_path, (0, 36, 37, 80))


@pytest.mark.parametrize("kind", ["pairs", "packed pairs", "weights", "packed"])
def test_pairs_weights_and_packed_rows_stream_as_prepared(kind, tmp_path):
    rows = {"weights": [row | {"weight": number % 3 / 2} for number, row in enumerate(ROWS)], "packed": ROWS}.get(kind, PAIRS)
    objective = "orpo" if "pairs" in kind else "sft"
    shards = {"shard_rows": 500, "window_shards": 1} if "packed" in kind else {"shard_rows": 32, "window_shards": 10}
    config = run_of(write(tmp_path / "rows.jsonl", rows), objective, streaming=True, packing="packed" in kind, **shards)
    assert equals_prepared(config, tmp_path, (0, 3, 11))


def test_a_shard_without_weights_has_ones(tmp_path):
    """The first rows have none, so that a window has shards of both kinds."""
    rows = [row | ({"weight": 0.5} if number >= 200 else {}) for number, row in enumerate(ROWS)]
    config = run_of(write(tmp_path / "rows.jsonl", rows), streaming=True, shard_rows=64, window_shards=5)
    stream, plain = streamed(config, tmp_path / "stream"), loader_of(config)
    for step in range(3):
        assert all(
            torch.equal(a.signals[WEIGHT], b.signals[WEIGHT]) for a, b in zip(batches(stream, step), batches(plain, step), strict=True)
        )


def test_any_step_has_the_same_rows_after_a_restart_on_few_shards(files, tmp_path):
    """Three passes over files in small windows: each step again from nothing but the index, at another number of ranks."""
    config = run_of(files / "rows" / "parts", streaming=True, shard_rows=16, window_shards=2, max_rows=290)
    whole = streamed(config, tmp_path / "whole")
    rows = [whole.row_ids(step) for step in range(100)]
    passes = [np.sort(np.concatenate(rows)[number * 290 : (number + 1) * 290]) for number in range(2)]
    assert all(np.array_equal(taken, np.arange(290)) for taken in passes)
    assert whole.ahead.most <= 4 * 2
    assert whole.epoch(36) == 0.0
    assert whole.epoch(58) == pytest.approx(58 * 8 / 290)
    for step in (3, 50, 77):
        for rank in range(2):
            other = streamed(config, tmp_path / "whole", rank, 2)
            assert np.array_equal(other.row_ids(step), rows[step])
            expected = batches(Streamed(config, tmp_path / "whole", alone(), rank=rank, world_size=2, pad_id=0, ahead=other.ahead), step)
            assert same(batches(other, step), expected)
            assert same(expected[:1], [whole.batches(step, rows[step])[rank]])


def test_a_process_that_dies_between_a_shard_and_its_note_makes_it_again(tmp_path):
    config = run_of(write(tmp_path / "rows.jsonl", ROWS), streaming=True, shard_rows=64, window_shards=2)
    before = streamed(config, tmp_path / "stream")
    rows = [before.row_ids(step) for step in range(16)]
    index = tmp_path / "stream" / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    after = streamed(config, tmp_path / "stream")
    assert all(np.array_equal(after.row_ids(step), taken) for step, taken in enumerate(rows))


def test_shards_without_anything_to_train_are_passed_over(tmp_path):
    """The second and the last have no supervised token; the third has only prompts that are held out."""
    rows = [row | ({"weight": 0} if number // 30 in (1, 9) else {}) for number, row in enumerate(ROWS)]
    held = write(tmp_path / "held.jsonl", ROWS[60:90])
    config = run_of(write(tmp_path / "rows.jsonl", rows), streaming=True, shard_rows=30, window_shards=1, eval_path=str(held))
    stream = streamed(config, tmp_path / "stream")
    taken = np.concatenate([stream.row_ids(step) for step in range(60)])
    assert [shard.rows for shard in stream.index.shards] == [30, 0, 0, *[30] * 6, 0]
    assert stream.index.shards[-1].is_last
    assert sorted(taken[:210]) == sorted(taken[210:420]) == list(range(210))
    assert texts(stream, 27) == texts(loader_of(config), 27)


def test_what_is_lost_counts_until_here(tmp_path):
    """A shard that loses much is accepted where all rows until it do not, and refused where they do."""
    rows = [row | ({"completion": "word " * 400} if number in (150, 151) else {}) for number, row in enumerate(ROWS)]
    path = write(tmp_path / "rows.jsonl", rows)
    of = {"streaming": True, "shard_rows": 30, "window_shards": 2, "seq_len": 256}
    accepted = streamed(run_of(path, **of, max_lost_fraction=0.3), tmp_path / "accepted")
    accepted.row_ids(30)
    with pytest.raises(ConfigError, match="of the supervised tokens would be lost") as found:
        streamed(run_of(path, **of, max_lost_fraction=0.1), tmp_path / "refused").row_ids(30)
    assert found.value.path == "data.max_lost_fraction"
    assert len((tmp_path / "refused" / "index.jsonl").read_text().splitlines()) == 5


def test_a_shard_that_is_made_again_is_not_counted_again(tmp_path):
    """All that is lost is in one shard: it takes the whole up to what is allowed, and would go beyond that a second time."""
    rows = [row | ({"completion": "word " * 400} if number in (285, 286) else {}) for number, row in enumerate(ROWS)]
    of = {"streaming": True, "shard_rows": 30, "window_shards": 2, "seq_len": 256}
    path = write(tmp_path / "rows.jsonl", rows)
    free = streamed(run_of(path, **of, max_lost_fraction=0.9), tmp_path / "free")
    free.row_ids(36)
    counts = free.ahead.producer.index.totals.counts
    allowed = counts["supervised_lost"] / counts["supervised_before"] * 1.01
    first = streamed(run_of(path, **of, max_lost_fraction=allowed), tmp_path / "stream")
    first.row_ids(36)
    first.row_ids(50)  # of the next pass: the last shards are gone
    again = streamed(run_of(path, **of, max_lost_fraction=allowed), tmp_path / "stream")
    assert np.array_equal(again.row_ids(36), first.row_ids(36))


def windows_of(tmp_path):
    """Return a stream of windows of 8 steps."""
    return streamed(run_of(write(tmp_path / "rows.jsonl", ROWS), streaming=True, shard_rows=32, window_shards=2), tmp_path / "stream")


def test_rows_are_asked_for_ahead_within_a_window_that_is_there(tmp_path):
    """Where none was waited for; and after rows were left out, as many steps fewer."""
    rows = windows_of(tmp_path)
    assert rows.make(0)
    assert (rows.made_until, rows.made.seconds > 0) == (1, True)
    assert rows.make(1)
    assert (rows.made_until, rows.made.seconds) == (8, 0.0)
    assert rows.make(4, 3)
    assert rows.made_until == 5
    assert rows.make(5, 3)
    assert rows.make(6, 3)
    assert rows.made_until == 16 - 3


@pytest.mark.parametrize("own", [True, False])
def test_a_signal_to_any_rank_ends_the_wait_for_rows(own, tmp_path, monkeypatch):
    """While the process ahead makes nothing; the second time that it is looked for."""
    rows, asked = windows_of(tmp_path), []
    rows.ahead.check = lambda: asked.append(rows)

    def any_of(stop, missing):
        if own and asked:
            rows.world.signalled = 15
        return [stop or (not own and bool(asked)), missing]

    monkeypatch.setattr(rows.world, "any", any_of)
    assert not rows.make(0)
    assert len(asked) == 1 + own


def test_a_shard_is_gone_at_once_or_not_at_all(tmp_path, monkeypatch):
    """What cannot be removed yet, as files that are open on NFS, is no shard any more and is tried again."""
    rows = windows_of(tmp_path)
    rows.row_ids(0)
    with monkeypatch.context() as patch:
        patch.setattr(ahead.shutil, "rmtree", lambda path, ignore_errors: (path / "sha256.json").unlink(missing_ok=True))
        rows.ahead.producer.remove_others([1, 2])
    assert rows.ahead.producer.missing([0, 1]) == 0
    assert len(list(rows.folder.glob("tmp-*"))) == 1
    rows.ahead.producer.remove_others([1, 2])
    assert not list(rows.folder.glob("tmp-*"))


def test_what_cannot_be_removed_at_the_end_ends_no_run(tmp_path, monkeypatch, caplog):
    rows = windows_of(tmp_path)
    rows.batches(0, rows.row_ids(0))
    process = object.__new__(stream.Ahead)
    process.folder = rows.folder
    with monkeypatch.context() as patch:
        patch.setattr(stream.shutil, "rmtree", lambda path, ignore_errors: None)
        process.remove(done=True)
    assert "still has data-000000" in caplog.text
    process.remove(done=True)
    assert not list(rows.folder.glob("data-*"))


def test_copies_of_files_and_moved_ones_are_the_same_stream(tmp_path):
    """By name in the data set, size and second; another second or name is another one."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        os.utime(write(tmp_path / name / "a.jsonl", ROWS[:9]), ns=(0, 10**18 + len(name)))
    whole, single = run_of(tmp_path / "one", streaming=True), run_of(tmp_path / "one" / "a.jsonl", streaming=True)
    key = data_key(whole, TOKENIZER)
    assert key == data_key(run_of(tmp_path / "other", streaming=True), TOKENIZER)
    assert data_key(single, TOKENIZER) == data_key(run_of(tmp_path / "other" / "a.jsonl", streaming=True), TOKENIZER)
    os.utime(tmp_path / "other" / "a.jsonl", ns=(0, 10**18 + 10**9))
    assert key != data_key(run_of(tmp_path / "other", streaming=True), TOKENIZER)
    (tmp_path / "one" / "a.jsonl").rename(tmp_path / "one" / "b.jsonl")
    assert key != data_key(whole, TOKENIZER)


def test_a_bad_row_is_named_where_a_stream_comes_to_it(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:100], {"prompt": 1, "completion": 2}, *ROWS[100:]])
    of = {"streaming": True, "shard_rows": 30, "window_shards": 1}
    stream = streamed(run_of(path, **of), tmp_path / "stream")
    rows = [stream.row_ids(step) for step in range(11)]
    with pytest.raises(ConfigError, match=r"rows.jsonl:101: has `prompt`"):
        stream.row_ids(12)
    after = streamed(run_of(path, **of, skip_bad_rows=True), tmp_path / "stream")
    assert all(np.array_equal(after.row_ids(step), taken) for step, taken in enumerate(rows))
    assert len(np.unique(np.concatenate([after.row_ids(step) for step in range(37)]))) == 296
