"""Preparation: every file type and layout, bad rows named, once only, killed and started again, splits apart, lengths kept."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import tokenizer_of

from trainers.config.choices import Layout, ObjectiveName, Supervise, TooLong
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from trainers.data import formats, prepare, report
from trainers.data.ends import stop_ids
from trainers.data.formats import BadRow
from trainers.data.tokenizer import load_tokenizer, pad_id

ROOT = Path(__file__).parents[1]
QA = [{"question": f"What is {number} + 1?", "answer": f"It is {number + 1}."} for number in range(40)]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = {
    Layout.messages: {"messages": CHAT},
    Layout.sharegpt: {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    Layout.alpaca: {"instruction": "Say", "input": "it", "output": "Hello"},
    Layout.question_answer: {"question": "Hi", "answer": "Hello"},
    Layout.prompt_completion: {"prompt": "Hi", "completion": "Hello"},
    Layout.text: {"text": "Hi Hello"},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("chatml", "plain"):
        tokenizer = tokenizer_of("chatml")
        tokenizer.chat_template = tokenizer.chat_template if name == "chatml" else None
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(tokenizers, tmp_path):
    def make(path, tokenizer="plain", objective="sft", **options):
        options = {"prepared_dir": str(tmp_path / "prepared"), "seq_len": 128, "processes": 1} | options
        data = DataConfig(path=str(path) if path else None, **options)
        return RunConfig(
            model=ModelConfig(id=str(tokenizers / tokenizer)), data=data, objective=ObjectiveConfig(name=ObjectiveName(objective))
        )

    return make


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_as(file, rows):
    if file.suffix == ".jsonl":
        write(file, rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps({"version": 1, "data": rows}))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return file


def documents(table):
    return [
        (table.tokens[start:end], table.supervised[start:end]) for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True)
    ]


def texts(config, table):
    """Each document as text with its trained part in marks."""
    tokenizer = load_tokenizer(config)
    found = []
    for tokens, supervised in documents(table):
        first = int(np.argmax(supervised))
        found.append(f"{tokenizer.decode(tokens[:first])}⟦{tokenizer.decode(tokens[supervised == 1])}⟧")
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_each_file_type_gives_the_same_documents(config, tmp_path, suffix):
    settings = config(write_as(tmp_path / f"rows{suffix}", QA))
    prepared = prepare.prepare(settings)
    assert prepared.report["rows"] == 40
    assert prepared.report["layout"] == "question_answer"
    assert texts(settings, prepared.train)[3] == "What is 3 + 1?\n⟦It is 4.<|im_end|>⟧"


def test_a_directory_is_read_in_sorted_order_and_text_files_are_documents(config, tmp_path):
    folder = tmp_path / "books"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "inner" / "c.txt").write_text("third")
    (folder / "notes.xyz").write_text("not data")
    settings = config(folder, objective="cpt")
    assert texts(settings, prepare.prepare(settings).train) == ["f⟦irst<|im_end|>⟧", "s⟦econd<|im_end|>⟧", "t⟦hird<|im_end|>⟧"]


@pytest.mark.parametrize("layout", ROWS)
def test_each_layout_is_recognised_and_rendered(config, tmp_path, layout):
    settings = config(write(tmp_path / "rows.jsonl", [ROWS[layout]]), tokenizer="chatml")
    prepared = prepare.prepare(settings)
    assert prepared.report["layout"] == str(layout)
    assert texts(settings, prepared.train)[0].endswith("Hello<|im_end|>⟧")


@pytest.mark.parametrize("layout", [Layout.alpaca, Layout.question_answer, Layout.prompt_completion])
def test_pairs_without_a_template_are_plain_text(config, tmp_path, layout):
    settings = config(write(tmp_path / "rows.jsonl", [ROWS[layout]]))
    wanted = {Layout.alpaca: "Say\nit\n", Layout.question_answer: "Hi\n", Layout.prompt_completion: "Hi"}
    assert texts(settings, prepare.prepare(settings).train) == [f"{wanted[layout]}⟦Hello<|im_end|>⟧"]


@pytest.mark.parametrize("layout", [Layout.messages, Layout.sharegpt])
def test_conversations_without_a_template_ask_for_one(config, tmp_path, layout):
    with pytest.raises(ConfigError, match=r"data.template(.|\n)*chatml"):
        prepare.prepare(config(write(tmp_path / "rows.jsonl", [ROWS[layout]])))


@pytest.mark.parametrize("layout", ROWS)
def test_continued_pre_training_takes_every_layout_and_every_token(config, tmp_path, layout):
    prepared = prepare.prepare(config(write(tmp_path / "rows.jsonl", [ROWS[layout]]), objective="cpt"))
    assert prepared.train.supervised.tolist() == [0] + [1] * (len(prepared.train.tokens) - 1)


BAD = {
    "not json": ("{oops", "is not JSON"),
    "a list": ("[1]", "not an object"),
    "no role": ('{"messages": [{"content": "x"}]}', "turn 1 has no role"),
    "unknown role": ('{"messages": [{"role": "bot", "content": "x"}]}', "unknown role 'bot'"),
    "empty turn": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
        "turn 2 is an empty assistant turn",
    ),
    "wrong type": ('{"messages": [{"role": "user", "content": 5}]}', "content that is a number"),
    "no assistant": ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    "no messages": ('{"other": 1}', "has no `messages`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_file_line_and_reason(config, tmp_path, name):
    text, reason = BAD[name]
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": CHAT})
    file.write_text(f"{good}\n\n{text}\n{good}\n")
    with pytest.raises(ConfigError) as caught:
        prepare.prepare(config(file, tokenizer="chatml"))
    assert f"{file}:3: " in str(caught.value)
    assert reason in str(caught.value)
    assert "skip_bad_rows" in str(caught.value)
    prepared = prepare.prepare(config(file, tokenizer="chatml", skip_bad_rows=True))
    assert prepared.report["bad"] == 1
    assert prepared.report["splits"]["train"]["documents"] == 2


def test_bytes_that_are_no_utf8_are_a_bad_row(config, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(QA[0]).encode() + b'\n{"question": "\xff", "answer": "x"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: is not UTF-8"):
        prepare.prepare(config(file))


def test_only_the_first_five_bad_rows_are_shown(config, tmp_path):
    file = write(tmp_path / "rows.jsonl", [QA[0], *[{"question": "x"}] * 9])
    with pytest.raises(ConfigError) as caught:
        prepare.prepare(config(file))
    assert str(caught.value).count("rows.jsonl:") == 5


def test_unknown_layout_names_the_fields_and_known_layouts(config, tmp_path):
    with pytest.raises(ConfigError, match=r"bad, good(.|\n)*messages"):
        prepare.prepare(config(write(tmp_path / "rows.jsonl", [{"good": "a", "bad": "b"}])))


def test_tool_calls_in_json_text_become_objects_and_tools_are_read():
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = formats.to_messages({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call]}]}, Layout.messages)
    assert messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
    assert formats.to_tools({"tools": '[{"name": "f"}]'}) == [{"name": "f"}]
    with pytest.raises(BadRow, match="not JSON"):
        formats.to_tools({"tools": "nonsense"})


def test_sharegpt_roles_are_mapped():
    turns = [("system", "S"), ("human", "H"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "O"), ("gpt", "G")]
    row = {"conversations": [{"from": name, "value": value} for name, value in turns]}
    assert [message["role"] for message in formats.to_messages(row, Layout.sharegpt)] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_the_same_first_prompt_never_stands_on_both_sides(config, tmp_path):
    rows = [{"question": f"Question {number % 20}", "answer": f"Answer {number}"} for number in range(200)]
    settings = config(write(tmp_path / "rows.jsonl", rows), eval_fraction=0.2)
    prepared = prepare.prepare(settings)
    train, held_out = ({text.split("⟦")[0] for text in texts(settings, table)} for table in (prepared.train, prepared.eval))
    assert not train & held_out
    assert len(train) == 16
    assert len(held_out) == 4
    settings.seed = 1
    assert {text.split("⟦")[0] for text in texts(settings, prepare.prepare(settings).eval)} != held_out


def test_rows_of_the_eval_file_leave_the_training_rows(config, tmp_path):
    settings = config(write(tmp_path / "train.jsonl", QA), eval_path=str(write(tmp_path / "eval.jsonl", QA[:3])))
    prepared = prepare.prepare(settings)
    assert prepared.report["splits"]["train"]["documents"] == 37
    assert prepared.report["overlap"] == 3
    assert prepared.report["splits"]["eval"]["documents"] == 3


def test_one_prompt_cannot_be_split_but_one_long_text_can(config, tmp_path):
    file = write(tmp_path / "rows.jsonl", [QA[0]] * 5)
    with pytest.raises(ConfigError, match="eval_fraction"):
        prepare.prepare(config(write(tmp_path / "one.jsonl", [QA[0]]), eval_fraction=0.1))
    assert file.exists()
    book = tmp_path / "book.txt"
    book.write_text("word " * 2000)
    prepared = prepare.prepare(config(book, objective="cpt", too_long=TooLong.split, eval_fraction=0.1))
    assert len(prepared.eval) > 0


def test_hold_out_takes_at_least_one_group():
    groups = np.array([1, 1, 2, 2, 3], np.uint64)
    assert prepare.hold_out(groups, 0.01).sum() == 1
    assert prepare.hold_out(groups, 0.4).sum() == 2


def test_truncate_counts_and_keeps_the_front(config, tmp_path):
    rows = [*QA, {"question": "x", "answer": "y" * 200}]
    prepared = prepare.prepare(config(write(tmp_path / "rows.jsonl", rows), max_lost_fraction=0.5))
    assert prepared.report["truncated"] == 1
    assert prepared.report["supervised_lost"] == 200 + 1 + 2 - 128
    assert int(np.diff(prepared.train.offsets).max()) == 128


def test_a_row_that_loses_its_answer_is_dropped_and_counted(config, tmp_path):
    rows = [*QA, {"question": "x" * 200, "answer": "y"}]
    prepared = prepare.prepare(config(write(tmp_path / "rows.jsonl", rows)))
    assert prepared.report["dropped"] == 1
    assert prepared.report["supervised_lost"] == 2
    assert prepared.report["splits"]["train"]["documents"] == 40


def test_drop_and_split(config, tmp_path):
    rows = [*[{"text": f"text {number}"} for number in range(9)], {"text": "z" * 300}]
    file = write(tmp_path / "rows.jsonl", rows)
    dropped = prepare.prepare(config(file, objective="cpt", too_long=TooLong.drop, max_lost_fraction=1.0))
    assert dropped.report["dropped"] == 1
    assert dropped.report["splits"]["train"]["documents"] == 9
    split = prepare.prepare(config(file, objective="cpt", too_long=TooLong.split))
    assert split.report["split"] == 1
    assert split.report["splits"]["train"]["documents"] == 12
    assert split.report["splits"]["train"]["tokens"] == 9 * 7 + 301


def test_too_much_lost_is_an_error_with_counts_and_remedies(config, tmp_path):
    rows = [{"question": "x", "answer": "y" * 200}] * 3 + QA[:7]
    with pytest.raises(ConfigError, match=r"% of the supervised tokens(.|\n)*3 rows are truncated(.|\n)*seq_len"):
        prepare.prepare(config(write(tmp_path / "rows.jsonl", rows)))


def test_nothing_supervised_is_an_error(config, tmp_path):
    with pytest.raises(ConfigError, match="no rows"):
        prepare.prepare(config(write(tmp_path / "empty.jsonl", []), layout=Layout.text))


def test_packing_fills_rows_and_the_report_says_so(config, tmp_path):
    settings = config(write(tmp_path / "rows.jsonl", QA))
    packed = prepare.prepare(settings)
    settings.data.packing = False
    unpacked = prepare.prepare(settings)
    assert len(unpacked.train) == 40
    assert len(packed.train) < 15
    assert packed.train.row_lengths().max() <= 128
    assert packed.train.row_lengths().sum() == unpacked.train.row_lengths().sum()
    split = packed.report["splits"]["train"]
    assert split["efficiency"] == pytest.approx(split["tokens"] / (split["rows"] * 128))
    text = report.summary(packed.report)
    assert all(word in text for word in ("40 rows", "question_answer", "filled", "supervised", "p99"))


def test_the_hash_follows_content_tokenizer_template_and_options(config, tmp_path):
    file = write(tmp_path / "rows.jsonl", QA)
    first = prepare.prepare(config(file))
    assert prepare.prepare(config(file)).reused
    assert not first.reused
    moved = write(tmp_path / "moved.jsonl", QA)
    assert prepare.prepare(config(moved)).path == first.path
    others = [{"seq_len": 64}, {"packing": False}, {"supervise": Supervise.all}, {"template": "chatml"}, {"tokenizer": "chatml"}]
    paths = {prepare.prepare(config(file, **other)).path for other in others}
    write(file, [*QA[:-1], {"question": "What is 39 + 1?", "answer": "It is 41."}])
    paths.add(prepare.prepare(config(file)).path)
    assert len(paths) == 5
    assert first.path not in paths


def test_many_rows_by_two_processes_equal_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SMALL", 10)
    monkeypatch.setattr(prepare, "CHUNK", 7)
    file = write(tmp_path / "rows.jsonl", QA)
    one = prepare.prepare(config(file))
    two = prepare.prepare(config(file, processes=2, prepared_dir=str(tmp_path / "other")))
    assert one.path.name == two.path.name
    assert one.path != two.path
    assert (one.train.tokens == two.train.tokens).all()
    assert (one.train.order == two.train.order).all()


def test_errors_come_back_from_other_processes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SMALL", 2)
    with pytest.raises(ConfigError, match="chat template"):
        prepare.prepare(config(write(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 20), processes=2))


def test_an_unwritable_folder_is_an_error_on_its_field(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.prepared_dir(.|\n)*cannot be written(.|\n)*FULLTUNE_CACHE"):
        prepare.prepare(config(write(tmp_path / "rows.jsonl", QA), prepared_dir=str(tmp_path / "file" / "inside")))


SLOWED = """
import sys, time
from trainers.config.schema import (DataConfig, ModelConfig, RunConfig)
from trainers.data import prepare
slow = prepare.encode_all
def slowed(*args):
    print("building", flush=True)
    time.sleep(float(sys.argv[4]))
    return slow(*args)
prepare.encode_all = slowed
config = RunConfig(model=ModelConfig(id=sys.argv[1]), data=DataConfig(path=sys.argv[2], prepared_dir=sys.argv[3], seq_len=128))
print("reused" if prepare.prepare(config).reused else "built", flush=True)
"""


def start(tokenizers, file, folder, seconds):
    command = [sys.executable, "-c", SLOWED, str(tokenizers / "plain"), str(file), str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_once_and_the_other_says_whom_it_waits_for(tokenizers, tmp_path):
    file = write(tmp_path / "rows.jsonl", QA)
    both = [start(tokenizers, file, tmp_path / "prepared", 3) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    said = "".join(out for out, _ in results)
    assert said.count("building") == 1
    assert said.count("built") == 2, "neither found it made"
    waiting = "".join(error for _, error in results)
    assert "waiting for the prepared data" in waiting
    assert "process" in waiting


def test_killed_in_the_middle_the_next_start_builds_anew(tokenizers, tmp_path):
    file, folder = write(tmp_path / "rows.jsonl", QA), tmp_path / "prepared"
    first = start(tokenizers, file, folder, 60)
    assert first.stdout.readline() == "building\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(list(folder.glob("tmp-*"))) == 1
    assert not list(folder.glob("data-*/report.json"))
    out, error = start(tokenizers, file, folder, 0).communicate(timeout=60)
    assert out == "building\nbuilt\n", error
    assert not list(folder.glob("tmp-*"))
    assert len(list(folder.glob("data-*/report.json"))) == 1


def test_a_tokenizer_is_trained_once_and_ends_turns(tmp_path):
    file = write(tmp_path / "rows.jsonl", QA)
    data = DataConfig(path=str(file), prepared_dir=str(tmp_path / "prepared"), seq_len=128)
    settings = RunConfig(model=ModelConfig(architecture={"model_type": "llama"}, train_tokenizer=320), data=data)
    tokenizer = load_tokenizer(settings)
    assert len(tokenizer) <= 320
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.chat_template
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(pad_id(tokenizer)) == "<|pad|>"
    before = next(iter((tmp_path / "prepared").glob("tokenizer-*/tokenizer.json"))).stat().st_mtime_ns
    load_tokenizer(settings)
    assert next(iter((tmp_path / "prepared").glob("tokenizer-*/tokenizer.json"))).stat().st_mtime_ns == before
    assert texts(settings, prepare.prepare(settings).train)[0].endswith("It is 1.<|im_end|>⟧")


def test_a_tokenizer_that_cannot_be_loaded_is_an_error_on_its_field(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        load_tokenizer(RunConfig(model=ModelConfig(tokenizer=str(tmp_path / "empty")), data=DataConfig(path="x")))


def test_a_file_that_cannot_be_read_is_an_error(config, tmp_path):
    for name in ("rows.parquet", "rows.json", "rows.arrow"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(ConfigError, match="cannot be read"):
            prepare.prepare(config(tmp_path / name))


def test_prepared_data_that_changed_on_their_disk_are_refused_and_the_remedy_mends_it(config, tmp_path, capfd):
    settings = config(write(tmp_path / "rows.jsonl", QA))
    folder = prepare.prepare(settings, progress=True).path
    assert prepare.prepare(settings, progress=True).reused
    tokens = next(folder.rglob("tokens.npy"))
    data = bytearray(tokens.read_bytes())
    data[-3] ^= 4
    tokens.write_bytes(data)
    with pytest.raises(ConfigError, match=r"has changed on its disk: train/tokens\.npy") as refused:
        prepare.prepare(settings, progress=True)
    subprocess.run(refused.value.remedy.partition(",")[0], shell=True, check=True, timeout=20)
    assert not prepare.prepare(settings, progress=True).reused
    next(folder.rglob("offsets.npy")).unlink()
    with pytest.raises(ConfigError, match=r"has changed on its disk"):
        prepare.prepare(settings, progress=True)
