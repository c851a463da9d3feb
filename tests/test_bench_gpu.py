"""`python -m tools.bench gpu`: rows in their order, written one by one, within a time; and a rehearsal of the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import ROOT

from tools.bench.gpu.command import Session, merged
from tools.bench.gpu.processes import NotDone
from tools.bench.gpu.results import Results
from tools.bench.gpu.rows import SECTIONS, Row, Size, all_rows

H100, H200 = Size(memory=79 << 30), Size(memory=140 << 30)
EIGHT = Size(memory=79 << 30, gpus=8)


class Pretended(Session):
    """A session whose rows give what they are told to."""

    def __init__(self, page: Path, rows: list[Row], figures: dict[str, Any], minutes: float = 10, fresh: bool = False) -> None:
        results = Results(page=page, device="a card", about="", line="")
        results.read()
        super().__init__(H100, rows, results, page.parent, time.monotonic() + 60 * minutes)
        self.figures, self.measured = figures, []

    def _figures(self, row: Row, overrides: tuple[str, ...], limit_s: float, is_last: bool) -> dict[str, Any]:
        self.measured.append((row.name, overrides))
        if row.name not in self.figures:
            raise NotDone("exit code 1: no such | kernel")
        return {"tokens_per_second": self.figures[row.name]}


def of(*names: str, seconds: int = 1) -> list[Row]:
    rows = [Row(section="lora", name=name, path="lora", tries=(name,) if "=" in name else (), seconds=seconds) for name in names]
    assert len({row.id for row in rows}) == len(rows)
    return rows


def test_each_row_has_a_table_and_a_name_of_its_own() -> None:
    rows = all_rows(EIGHT)
    assert len({row.id for row in rows}) == len(rows)
    assert {row.section for row in rows} == set(SECTIONS)
    assert [row.section for row in rows[:4]] == ["runs"] * 4


def test_meshes_are_measured_where_there_are_several_gpus() -> None:
    """Next to sharding alone, with the same work: as many rows a step, over all GPUs."""
    assert not [row for row in all_rows(H100) if row.section in ("meshes", "dealt")]
    rows = [row for row in all_rows(EIGHT) if row.section in ("meshes", "dealt")]
    meshes = ["engine.context=2", "engine.tensor=2", "engine.context=8", "engine.tensor=8", "engine.replicate=2"]
    assert [row.name for row in rows if row.section == "meshes"] == ["engine.shard alone", *meshes]
    assert [row.name for row in rows if row.section == "dealt"] == ["engine.shard alone", "engine.expert=2", "engine.expert=8"]
    assert all({"launch.processes=8", "train.global_batch=16"} <= set(row.overrides) for row in rows)


def test_the_largest_model_that_is_trained_whole_fits() -> None:
    assert (H100.largest_llama(), H200.largest_llama()) == (12, 32)


def test_a_setting_stays_where_it_is_faster_and_goes_where_it_fails(tmp_path: Path) -> None:
    rows = of("first", "a=1", "b=1", "c=1", "a=2")
    session = Pretended(tmp_path / "gpu.md", rows, {"first": 100.0, "a=1": 120.0, "b=1": 110.0, "a=2": 130.0})
    session.run(rows)
    tried = [[word for word in words if word[0] in "abc" and word[1] == "="] for _, words in session.measured]
    assert tried == [[], ["a=1"], ["a=1", "b=1"], ["a=1", "c=1"], ["a=2"]]
    page = (tmp_path / "gpu.md").read_text()
    assert "| c=1 |" in page
    assert "no such \\| kernel" in page
    assert "| a=2 (kept) | 130 | 1.30 |" in page


def test_a_second_call_continues_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    rows = [*of("first"), *of("a=1", seconds=1000), *of("b=1")]
    first = Pretended(tmp_path / "gpu.md", rows[1:2], {}, minutes=1)
    first.run(rows[1:2])
    assert (first.measured, first.results.left_out) == ([], ["lora: a=1"])
    assert "did not suffice for: lora: a=1" in (tmp_path / "gpu.md").read_text()
    Pretended(tmp_path / "gpu.md", rows, {"first": 1.0}).run(rows[:1])
    again = Pretended(tmp_path / "gpu.md", rows, {"b=1": 2.0})
    again.run([rows[0], rows[2]])
    assert [name for name, _ in again.measured] == ["b=1"]
    kept = [json.loads(line)["name"] for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert kept == ["first", "b=1"]


def test_the_last_override_of_a_key_wins() -> None:
    assert merged(("a.b=1", "++c=2"), ("d=3",), ("c=4", "a.b=5")) == ("a.b=5", "c=4", "d=3")


@pytest.mark.soak
def test_a_rehearsal_measures_each_kind_of_row(tmp_path: Path) -> None:
    """Of each kind of process one: a run that is killed, our loop with a plan, a refused setting, a bare loop, isolation, an export."""
    chosen = [
        "runs: LoRA, fsdp",
        "lora: the first",
        "lora: train.compile",
        "bare transformers and peft",
        "isolation: sdpa",
        "files: export",
        "long: data.seq_len=128",
        "meshes:",
        "dealt:",
    ]
    line = [sys.executable, "-m", "tools.bench", "gpu", "--rehearse", "--out", str(tmp_path / "gpu.md"), "--only", *chosen]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    by_id = {row["id"]: row for row in map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())}
    records = {row["name"]: row for row in by_id.values()}
    assert not {name: row["failed"] for name, row in records.items() if "failed" in row and "compile" not in name}
    assert "exported" in records["LoRA, fsdp"]["words"]
    assert records["the first"]["plan_bytes"] > 0
    assert records["the first"]["losses"] == pytest.approx(records["bare transformers and peft, LoRA"]["losses"], rel=0.2)
    on_meshes = [record for record in by_id.values() if record["section"] in ("meshes", "dealt")]
    assert len(on_meshes) == 5
    for record in on_meshes:
        assert record["plan_bytes"] > 0
        first = by_id[f"{record['section']}: engine.shard alone"]
        assert record["losses"] == pytest.approx(first["losses"], rel=1e-5)
    assert records["sdpa"]["words"] == "Llama apart (sdpa)"
    assert "nats a token from the trainer" in records["export, reopen, load, 1B"]["words"]
    assert (tmp_path / "gpu.md").read_text() in done.stdout
