"""What `tools.bench preferences` compares trains the same, and its table says what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import pair_table
from transformers import AutoModelForCausalLM

from tools.bench.__main__ import main
from tools.bench.peers.measure import Measured
from tools.bench.preferences import answer_logps, our_command, section
from trainers.batch import by_document
from trainers.data.loader import make_batch
from trainers.model.forward import forward

MADE = {"pairs": 11.0, "rows": 4.0, "tokens": 1996.0, "parameters": 8.6e6}
OPTIONS = argparse.Namespace(line="python -m tools.bench preferences", seq_len=512, steps=3, runs=1, microbatch=4)


def test_the_plain_loop_measures_what_ours_does(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    table = pair_table([5, 29, 11, 13, 40, 17], 64)
    batch = make_batch(table, np.arange(len(table)), len(table), 0)
    with torch.no_grad():
        plain = answer_logps(model, batch)
        assert plain.tolist() == pytest.approx(by_document(forward(model, batch).logps, batch).tolist(), rel=1e-5)


def test_the_section_gives_ratios_and_refuses_other_losses() -> None:
    one = {"speed": 100.0, "peak": 100.0 * 2**20, "loss": 0.5}
    found = {
        "dpo": one | {"reference": 300.0, "evaluation": 200.0, "kept": 88.0},
        "sft": one,
        "plain": one,
        "second": one | {"speed": 50.0},
    }
    measured = Measured(losses=[0.69, 0.5, 0.4], step_seconds=2.0, first_step_s=9.0, peak_bytes=2**30, cpu_seconds=3.0)
    planned = {"peak": 80.0 * 2**20, "second": 32.0 * 2**20, "kept": 88.0}
    found["second"] = found["second"] | {"peak": 130.0 * 2**20}
    text = section(OPTIONS, MADE, found, planned, {"ours": [measured]})
    assert "| plain loop, a second model | 50 | 2.00 |" in text
    assert "1.50 times" in text
    assert "| ours | 998 | 1.00 |" in text
    assert "| DPO with a second model | 112 MiB | 130 MiB |" in text
    with pytest.raises(RuntimeError, match="does not train the same"):
        section(OPTIONS, MADE, found | {"second": one | {"loss": 0.4}}, planned, {})


def test_our_command_is_one_rank_and_a_pass_a_step(tmp_path: Path) -> None:
    assert {"objective=dpo", "train.global_batch=4", "launch.processes=1"} <= set(our_command(tmp_path, tmp_path / "run", 4, OPTIONS))


@pytest.mark.soak
def test_the_command_measures_all_on_the_same_pairs(tmp_path: Path) -> None:
    out = tmp_path / "found.md"
    assert main(["preferences", "--runs", "1", "--steps", "2", "--step-rows", "2", "--microbatch", "1", "--out", str(out)]) == 0
    text = out.read_text()
    assert "DPO, the reference kept" in text
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| on disk") for cell in line.strip("|").split("|")]
    assert cells[1] == cells[2], "the plan knows the bytes that are kept"
