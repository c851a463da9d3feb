"""What a container of rows adds or breaks: padding, JSON as text, compression, encodings, damage; read rightly, or named by line."""

from __future__ import annotations

import bz2
import codecs
import csv
import datetime
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import marked, prepared, trained, write

from trainers.config.errors import ConfigError
from trainers.data import containers

QA = [{"question": f"What is {number} + 1?", "answer": f"It is {number + 1}."} for number in range(6)]
ANSWERS = [f"It is {number + 1}.<|im_end|>" for number in range(6)]


def calls(tool, other):
    """Two rows that call tools of different parameters."""

    def row(name, arguments, properties):
        function = {"name": name, "arguments": arguments}
        return {
            "tools": [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}],
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
            ],
        }

    return [row("one", *tool), row("two", *other)]


CALLS = calls(
    ({"city": "Seoul", "at": {"hour": 1}, "list": [1, None, 2]}, {"city": {"type": "string"}}),
    ({"x": 1, "at": {"minute": 2}, "points": [{"x": 1}, {"y": 2}]}, {"x": {"type": "integer", "enum": [1, 2]}}),
)


def tables(rows, tmp_path):
    """The rows in each container that has one type for all of them."""
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [tmp_path / name for name in ("rows.parquet", "file.arrow", "stream.arrow")]


def test_nulls_that_fill_up_a_struct_are_dropped_and_those_of_a_list_stay(tmp_path):
    wanted = marked(prepared(write(tmp_path / "rows.jsonl", CALLS)).train)
    assert wanted[0].count("null") == 1
    for file in tables(CALLS, tmp_path):
        assert sorted(json.dumps(row, sort_keys=True) for row, _ in containers.read(file)) == sorted(
            json.dumps(row, sort_keys=True) for row in CALLS
        )
        assert [text.count("null") for text in marked(prepared(file).train)] == [1, 0]
        assert [len(text) for text in marked(prepared(file).train)] == [len(text) for text in wanted]


def test_a_map_is_an_object_and_its_nulls_are_its_own(tmp_path):
    kind = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.int64()))])
    pq.write_table(pa.table({"call": pa.array([{"name": "f", "arguments": [("a", 1), ("b", None)]}], kind)}), tmp_path / "rows.parquet")
    assert list(containers.read(tmp_path / "rows.parquet")) == [({"call": {"name": "f", "arguments": {"a": 1, "b": None}}}, 1)]


@pytest.mark.parametrize("nested", [False, True])
def test_json_kept_as_text_is_read_as_json(tmp_path, nested):
    """As `datasets` writes columns of mixed types."""
    messages = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "right"}]
    kind = pa.list_(pa.json_()) if nested else pa.json_()
    texts = [json.dumps(turn) for turn in messages] if nested else json.dumps(messages)
    column = pa.array([texts], pa.list_(pa.string()) if nested else pa.string()).cast(kind)
    pq.write_table(pa.table({"messages": column}), tmp_path / "rows.parquet")
    assert list(containers.read(tmp_path / "rows.parquet")) == [({"messages": messages}, 1)]
    assert trained(tmp_path / "rows.parquet") == ["right<|im_end|>"]


def test_turns_kept_as_json_text_in_a_table_are_read(tmp_path):
    call = json.dumps([{"function": {"name": "f", "arguments": "{}"}}])
    for turns in (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "right", "weight": 1}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "right"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": call}],
    ):
        with (tmp_path / "rows.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["conversations"], [json.dumps(turns)]])
        assert trained(tmp_path / "rows.csv")[0].removesuffix("<|im_end|>") in (
            "right",
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        )
    (tmp_path / "rows.csv").write_text("messages\nplain words\n")
    with pytest.raises(ConfigError, match="has `messages` that are not JSON"):
        prepared(tmp_path / "rows.csv")


def test_what_datasets_writes_for_mixed_types_is_read(tmp_path):
    from datasets import Dataset

    Dataset.from_list(CALLS, on_mixed_types="use_json").to_parquet(tmp_path / "rows.parquet")
    assert [text.count("null") for text in marked(prepared(tmp_path / "rows.parquet").train)] == [1, 0]


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files_are_read(tmp_path, suffix, kind):
    plain = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in QA),
        ".json": json.dumps(QA),
        ".csv": "question,answer\n" + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in QA),
    }[kind]
    file = tmp_path / f"rows{kind}{suffix}"
    whole = COMPRESS[suffix](plain.encode())
    file.write_bytes(whole)
    assert trained(file) == ANSWERS
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"rows{kind}{suffix}(.|\n)*cannot be read"):
        prepared(file)


def test_several_pieces_in_one_compressed_file_are_all_read(tmp_path):
    for suffix, compress in COMPRESS.items():
        file = tmp_path / f"rows.jsonl{suffix}"
        file.write_bytes(b"".join(compress((json.dumps(row) + "\n").encode()) for row in QA))
        assert trained(file) == ANSWERS


def test_compression_is_told_by_the_content_where_the_name_is_wrong(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in QA)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl.gz").write_text(text)
    assert trained(tmp_path / "a.jsonl") == trained(tmp_path / "b.jsonl.gz") == ANSWERS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_encodings_with_and_without_a_mark_are_read(tmp_path, encoding, kind):
    rows = [{"question": "Über?", "answer": "한국"}] * 2
    text = {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        ".json": json.dumps(rows, ensure_ascii=False),
        ".csv": "question,answer\r\nÜber?,한국\r\nÜber?,한국\r\n",
        ".txt": "Ein Text: 한국",
    }[kind]
    (tmp_path / f"rows{kind}").write_bytes(text.encode(encoding))
    if kind == ".txt":
        assert trained(tmp_path / "rows.txt", "cpt") == ["in Text: 한국<|im_end|>"]
    else:
        assert trained(tmp_path / f"rows{kind}") == ["한국<|im_end|>"] * 2


DAMAGED = {
    "half an emoji": (b'{"question": "a", "answer": "x \\ud83d y"}', "ud83d"),
    "half in an argument": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": '
        b'[{"function": {"name": "f", "arguments": "{\\"a\\": \\"\\\\ud83d\\"}"}}]}]}',
        "ud83d",
    ),
    "NUL": (b'{"question": "a", "answer": "x\\u0000y"}', "NUL"),
    "zeros at the end": (b"\0" * 40, "not JSON"),
    "cut off": (b'{"question": "a", "ans', "not JSON"),
    "key twice": (b'{"question": "a", "answer": "b", "answer": "c"}', "key `answer` twice"),
    "key of a turn twice": (b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "key `role` twice"),
    "too deep": (b'{"question": "a", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "latin-1": (b'{"question": "a", "answer": "\xe9"}', "not UTF-8"),
    "two on a line": (b'{"question": "a", "answer": "b"}{"question": "a", "answer": "b"}', "not JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_lines_are_bad_rows_with_their_line(tmp_path, name):
    line, reason = DAMAGED[name]
    first = (
        QA[0] if b"messages" not in line else {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is 1."}]}
    )
    for number, file in enumerate((tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz")):
        content = json.dumps(first).encode() + b"\n" + line
        file.write_bytes(gzip.compress(content) if number else content)
        with pytest.raises(ConfigError) as caught:
            prepared(file)
        assert f"{file}:2: " in str(caught.value)
        assert reason in str(caught.value)
        assert trained(file, skip_bad_rows=True) == ["It is 1.<|im_end|>"]


def test_csv_rows_are_named_by_the_line_they_begin_in(tmp_path):
    file = tmp_path / "rows.csv"
    good = '"two\nlines","an ""answer"""'
    file.write_bytes(
        f'question,answer\n{good}\n\na,b,c\na\n{good}\nx,"not"closed\ny,caf'.encode() + b'\xe9\nz,1\nlast,"never closed\n1,2\n'
    )
    with pytest.raises(ConfigError) as caught:
        prepared(file)
    said = str(caught.value)
    for line, reason in (
        (5, "has 3 fields, and the header has 2"),
        (6, "has 1 field,"),
        (9, "not valid CSV"),
        (10, "udce9"),
        (12, "not valid CSV"),
    ):
        assert f"rows.csv:{line}: " in said
        assert reason in said.split(f"rows.csv:{line}: ")[1].split("\n")[0]
    assert trained(file, skip_bad_rows=True) == ['an "answer"<|im_end|>'] * 2 + ["1<|im_end|>"]


def test_csv_text_is_never_a_number_and_fields_may_be_large(tmp_path):
    (tmp_path / "rows.csv").write_text(f"question,answer\na,NA\nb,007\nc,nan\nd,{'x' * 300_000}\n")
    rows = [row["answer"] for row, _ in containers.read(tmp_path / "rows.csv")]
    assert rows[:3] == ["NA", "007", "nan"]
    assert len(rows[3]) == 300_000
    (tmp_path / "rows.tsv").write_text("question\tanswer\na, b\tc, d\n")
    assert trained(tmp_path / "rows.tsv") == ["c, d<|im_end|>"]
    (tmp_path / "excel.csv").write_text("question;answer\na, b;c, d\n")
    assert trained(tmp_path / "excel.csv") == ["c, d<|im_end|>"]


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, kind):
    file = tmp_path / f"rows{kind}"
    if kind == ".csv":
        file.write_text("question,answer,answer\na,b,c\n")
    else:
        pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"]), file)
    with pytest.raises(ConfigError, match="column `answer` twice"):
        prepared(file)


def test_a_parquet_row_that_is_not_utf8_is_a_bad_row(tmp_path):
    text = pa.array([b"fine", b"caf\xe9", b"fine"]).view(pa.binary())
    column = pa.StringArray.from_buffers(3, text.buffers()[1], text.buffers()[2])
    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": column}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"rows\.parquet:2: is not UTF-8"):
        prepared(tmp_path / "rows.parquet")
    assert trained(tmp_path / "rows.parquet", skip_bad_rows=True) == ["fine<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "Out of range|not JSON compliant"), (datetime.date(2026, 1, 1), "date"), (b"x", "bytes")]
)
def test_arguments_that_json_has_no_word_for_are_refused(tmp_path, value, word):
    rows = calls(({"a": value}, {"a": {"type": "number"}}), ({"a": value}, {"a": {"type": "number"}}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=rf"rows\.parquet:1: has tool call arguments that are not JSON: .*({word})"):
        prepared(tmp_path / "rows.parquet")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(ConfigError, match=r"Git LFS pointer(.|\n)*lfs pull"):
        prepared(tmp_path / "rows.jsonl")


def test_line_numbers_are_those_of_the_file_with_a_mark_and_blank_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n".join([json.dumps(QA[0]).encode(), b"", b"  ", b"{oops"]))
    with pytest.raises(ConfigError, match=r"rows\.jsonl:4: is not JSON"):
        prepared(tmp_path / "rows.jsonl")
