"""Which files of a directory are rows: the split's, as `datasets` tells them, and nothing else that is in it."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import prepared, settings, trained, write

from trainers.config.checks import validate
from trainers.config.derived import Source, sources_of
from trainers.config.errors import ConfigError
from trainers.data import hub
from trainers.data.listing import listing
from trainers.data.report import summary

ROW = '{"question": "q", "answer": "%s"}\n'


def make(folder, *names):
    """Files with one row each, whose answer is the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"question": ["q"], "answer": [name]}), folder / name)
        elif name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress((ROW % name).encode()))
        elif name.endswith((".md", ".txt")):
            (folder / name).write_text(f"text of {name}")
        else:
            (folder / name).write_text("question,answer\nq," + name if name.endswith(".csv") else ROW % name)
    return folder


def read(folder, split="train", **more):
    return [str(file.relative_to(folder)) for file in listing(Source(str(folder), split, **more)).files]


LAYOUTS = [
    ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/validation-00000-of-00001-0123456789abcdef.parquet"),
    ("train.jsonl", "test.jsonl", "dev.jsonl"),
    ("train/a.jsonl", "train/deep/b.jsonl", "validation/a.jsonl"),
    ("my_train_data.csv", "my_eval_data.csv"),
    ("training/x.parquet", "testing/x.parquet"),
    ("one.jsonl", "two.jsonl", "inner/three.jsonl"),
    ("train.jsonl.gz", "valid.jsonl.gz"),
    ("corpus-train-1.jsonl", "corpus-train-2.jsonl", "other.jsonl"),
    ("train.jsonl", ".hidden/train.jsonl", "__pycache__/train.jsonl", ".train.jsonl"),
    ("data/en-00000-of-00001.jsonl", "data/de-00000-of-00001.jsonl"),
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_splits_are_those_that_datasets_finds(tmp_path, names):
    from datasets import load_dataset_builder

    folder = make(tmp_path / "folder", *names)
    theirs = load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache")).config.data_files
    for split, found in theirs.items():
        assert read(folder, str(split)) == sorted(os.path.relpath(file, folder) for file in found)
    missing = next(split for split in ("train", "test", "zz") if split not in theirs)
    with pytest.raises(
        ConfigError, match=rf"data\.split` = '{missing}'(.|\n)*has (the splits|one split)(.|\n)*data\.split={next(iter(theirs))}"
    ):
        read(folder, missing)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = make(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(ConfigError, match=r"has the splits train, test(.|\n)*data\.split=train"):
        read(folder, "validation")


BESIDES = (
    *(
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "CHANGELOG.md",
        "dataset_infos.json",
        "dataset_info.json",
        "_SUCCESS",
        "rows.idx",
        "train.lock",
    ),
    *(
        ".git/config.json",
        ".cache/x.jsonl",
        "._train.jsonl",
        "__MACOSX/._train.jsonl",
        "notes.txt",
        "model.safetensors.index.json",
        "x.pkl",
    ),
)


def test_what_lies_next_to_rows_is_not_read_and_is_named(tmp_path):
    folder = make(tmp_path, "train.jsonl", *BESIDES)
    (folder / "train-1.jsonl").touch()
    found = listing(Source(str(folder), "train"))
    assert [file.name for file in found.files] == ["train.jsonl"]
    assert found.left_out["empty"] == ["train-1.jsonl"]
    named = {name for names in found.left_out.values() for name in names}
    assert named == {name for name in BESIDES if not name.startswith((".", "__"))} | {"train-1.jsonl"}
    assert trained(folder) == ["train.jsonl<|im_end|>"]
    said = summary(prepared(folder).report)
    assert f"read  {folder}/train.jsonl: 1 row" in said
    assert "text next to rows: notes.txt" in said


def test_a_card_next_to_compressed_rows_is_not_read(tmp_path):
    assert trained(make(tmp_path / "a", "train.jsonl.gz", "README.md")) == ["train.jsonl.gz<|im_end|>"]
    with pytest.raises(
        ConfigError, match=r"holds no data file \(not rows: README\.md; no known type: rows\.7z\)(.|\n)*data_files=\[README\.md\]"
    ):
        prepared(make(tmp_path / "b", "rows.7z", "README.md"))
    assert read(tmp_path / "b", patterns=("README.md",)) == ["README.md"]


def test_the_files_of_a_run_and_their_rows_are_in_the_report(tmp_path):
    folder = make(tmp_path / "folder", "train-1.jsonl", "train-2.jsonl", "test.jsonl")
    write(folder / "train-2.jsonl", [{"question": "q", "answer": "a"}] * 3)
    report = prepared(folder).report
    assert report["files"] == {f"{folder}/train-1.jsonl": 1, f"{folder}/train-2.jsonl": 3}
    assert report["left_out"] == {"split test": ["test.jsonl"]}
    moved = folder.rename(tmp_path / "moved")
    again = prepared(moved)
    assert again.reused
    assert again.report["files"] == {f"{moved}/train-1.jsonl": 1, f"{moved}/train-2.jsonl": 3}
    assert "from the cache" in summary(again.report, again.reused)
    assert "from the cache" not in summary(report)


def test_many_files_are_shown_shortly(tmp_path):
    said = summary(prepared(make(tmp_path, *(f"part-{number:02}.jsonl" for number in range(20)))).report)
    assert said.count("  read  ") == 9
    assert "12 more files: 12 rows; all are in manifest.json" in said


def test_the_split_of_held_out_rows_may_be_another_of_the_same_folder(tmp_path):
    folder = make(tmp_path / "folder", "train.jsonl", "test.jsonl")
    write(folder / "test.jsonl", [{"question": "other", "answer": "test"}])
    data = prepared(folder, eval_path=str(folder), eval_split="test").report
    assert list(data["files"]) == [f"{folder}/train.jsonl", f"{folder}/test.jsonl"]
    assert data["left_out"] == {}
    assert [data["splits"][name]["documents"] for name in ("train", "eval")] == [1, 1]
    with pytest.raises(ConfigError, match=r"data\.eval_split(.|\n)*data\.eval_path"):
        validate(settings(folder, eval_split="test"))


def test_what_datasets_saves_to_disk_is_opened_as_such(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {name: Dataset.from_list([{"question": "q", "answer": name}] * 2) for name in ("train", "test")}
    DatasetDict(rows).save_to_disk(tmp_path / "both")
    rows["test"].save_to_disk(tmp_path / "one", num_shards=2)
    shutil.copy(tmp_path / "one/data-00000-of-00002.arrow", tmp_path / "one/cache-0123456789abcdef.arrow")
    assert trained(tmp_path / "both") == ["train<|im_end|>"] * 2
    assert trained(tmp_path / "both", split="test") == ["test<|im_end|>"] * 2
    assert trained(tmp_path / "one") == ["test<|im_end|>"] * 2
    with pytest.raises(ConfigError, match="has the splits train, test"):
        prepared(tmp_path / "both", split="validation")


def test_what_datasets_keeps_in_its_cache_is_read_without_caches_of_its_own(tmp_path):
    from datasets import load_dataset

    rows = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}] * 3)
    loaded = load_dataset("json", data_files=str(rows), cache_dir=str(tmp_path / "cache"), split="train")
    loaded.map(lambda row: {"answer": "mapped"})
    (folder,) = {os.path.dirname(part["filename"]) for part in loaded.cache_files}
    assert any(name.startswith("cache-") for name in os.listdir(folder))
    assert trained(folder) == ["a<|im_end|>"] * 3


def test_a_clone_with_configurations_asks_for_one(tmp_path):
    folder = make(tmp_path, "main/train-0.jsonl", "main/test-0.jsonl", "socratic/train-0.jsonl", "socratic/test-0.jsonl")
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in ("train", "test")]}
        for name in ("main", "socratic")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# Card\n")
    with pytest.raises(
        ConfigError, match=r"data\.config(.|\n)*configurations main, socratic, and one is to be named(.|\n)*data\.config=main"
    ):
        read(folder)
    with pytest.raises(ConfigError, match="has the configurations main, socratic"):
        read(folder, config="mian")
    assert read(folder, config="socratic") == ["socratic/train-0.jsonl"]
    assert read(folder, "test", config="main") == ["main/test-0.jsonl"]
    configs[1]["default"] = True
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert read(folder) == ["socratic/train-0.jsonl"]
    (folder / "README.md").write_text("---\nconfigs: [{data_files: x}]\n---\n")
    with pytest.raises(ConfigError, match=r"README\.md(.|\n)*header(.|\n)*data\.data_files"):
        read(folder)
    with pytest.raises(ConfigError, match="has no configurations"):
        read(make(tmp_path / "plain", "a.jsonl"), config="main")


def test_files_can_be_named_by_patterns(tmp_path):
    folder = make(tmp_path, "en/a.jsonl", "en/b.jsonl", "de/a.jsonl", "de/a.csv")
    assert read(folder, patterns=("en/*",)) == ["en/a.jsonl", "en/b.jsonl"]
    assert read(folder, patterns=("**/a.jsonl",)) == ["de/a.jsonl", "en/a.jsonl"]
    assert trained(folder, data_files=["de/a.csv"]) == ["de/a.csv<|im_end|>"]
    with pytest.raises(ConfigError, match=r"data\.data_files(.|\n)*matches nothing in .*, which has de/a\.csv, de/a\.jsonl, en/a"):
        read(folder, patterns=("fr/*",))


def test_the_same_rows_in_two_formats_are_read_once(tmp_path):
    folder = make(tmp_path, "train.jsonl", "train.parquet", "train.csv", "train.jsonl.gz")
    found = listing(Source(str(folder), "train"))
    assert [file.name for file in found.files] == ["train.parquet"]
    assert found.left_out == {"the same rows as train.parquet by its name": ["train.jsonl", "train.jsonl.gz", "train.csv"]}


def test_files_of_several_formats_are_refused_with_a_remedy_that_works(tmp_path):
    folder = make(tmp_path, "a.jsonl", "b.jsonl", "stats.csv")
    with pytest.raises(ConfigError, match=r"2 formats(.|\n)*a\.jsonl and 1 more, stats\.csv(.|\n)*\"data\.data_files=\[\*\*/\*\.jsonl\]\""):
        read(folder)
    assert read(folder, patterns=("**/*.jsonl",)) == ["a.jsonl", "b.jsonl"]
    assert read(folder, patterns=("**",)) == ["a.jsonl", "b.jsonl", "stats.csv"]


def test_links_are_followed_once_and_one_to_nothing_is_named(tmp_path):
    outside = make(tmp_path / "outside", "x.jsonl")
    folder = make(tmp_path / "folder", "2024.jsonl")
    (folder / "latest.jsonl").symlink_to("2024.jsonl")
    (folder / "blob.jsonl").symlink_to(outside / "x.jsonl")
    (folder / "loop").symlink_to(folder)
    (folder / "more").symlink_to(make(tmp_path / "more", "y.jsonl"))
    assert read(folder) == ["2024.jsonl", "blob.jsonl", "more/y.jsonl"]
    assert listing(Source(str(folder), "train")).left_out == {"the same file as 2024.jsonl": ["latest.jsonl"]}
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"gone\.jsonl(.|\n)*link to nowhere\.jsonl, which is not there"):
        read(folder)


@pytest.mark.parametrize("name", ["rows.zip", "rows.tar.gz", "rows", "rows.gz", "rows.parquet.gz"])
def test_a_file_that_does_not_say_what_it_holds_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    with pytest.raises(ConfigError, match=r"data\.path"):
        prepared(tmp_path / name)


def test_what_only_a_hub_data_set_has_is_refused_of_files(tmp_path):
    file = make(tmp_path, "rows.jsonl") / "rows.jsonl"
    for name, value in (("config", "main"), ("revision", "v1"), ("data_files", ["x"])):
        with pytest.raises(ConfigError, match=rf"data\.{name}(.|\n)*leave it out"):
            validate(settings(file, **{name: value}))
    with pytest.raises(ConfigError, match=r"data\.revision"):
        validate(settings(tmp_path, revision="v1"))
    assert sources_of(settings(file, eval_path="x/y").data)[1] == Source("x/y", "train")


def errors_of_datasets(folder):
    """What `datasets` itself says, asked of a folder: the errors are the same for a hub id."""
    from datasets import load_dataset

    for options in ({}, {"name": "mian"}, {"name": "main", "split": "trian"}):
        try:
            load_dataset(str(folder), cache_dir=str(folder.parent / "cache"), **options)
        except ValueError as error:
            yield error


def test_a_hub_data_sets_errors_name_the_setting_and_what_there_is(tmp_path):
    folder = make(tmp_path / "folder", "main/train.jsonl", "socratic/train.jsonl")
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in ("main", "socratic")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    one, other, split = errors_of_datasets(folder)
    said = [hub._explained(Source("acme/set", "trian", config), error) for config, error in ((None, one), ("mian", other), ("main", split))]
    assert [error.path for error in said] == ["data.config", "data.config", "data.split"]
    assert "acme/set has the configurations main, socratic, and one is to be named" in said[0].reason
    assert said[0].remedy == "data.config=main"
    assert "has the splits train" in said[2].reason
    gone = hub._explained(Source("acme/set", "train", None, (), "v9"), ValueError("x"), "the hub has no revision v9 of it")
    unreachable = hub._explained(Source("acme/set", "train"), ConnectionError("no network"))
    assert "--repo-type dataset acme/set --local-dir DIR" in unreachable.remedy
    assert (gone.path, gone.reason) == ("data.revision", "acme/set: the hub has no revision v9 of it")


def test_rows_of_the_hub_are_as_those_of_its_files(tmp_path, monkeypatch):
    from datasets import Dataset

    rows = [{"question": "q", "answer": "a", "call": {"a": 1}}, {"question": "q", "answer": "b", "call": {"b": 2}}]
    monkeypatch.setattr(hub, "open_hub", lambda source: Dataset.from_list(rows))
    assert list(hub.rows(Source("acme/set", "train"))) == [(rows[0], 1), (rows[1], 2)]
    assert hub.name_of(Source("acme/set", "train", "main")) == "acme/set/main[train]"
