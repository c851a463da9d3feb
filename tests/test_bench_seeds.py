"""The table of what 7B and 70B take: its numbers are the plans', and each difference is told by a plan's parts."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench import seeds

LLAMA2_7B = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
"""Embedding and head; of each block attention, feed-forward and two norms; the last norm."""


def plan(count: float, **parts: float) -> dict[str, Any]:
    return {"parameters": count, "peak": parts, "needed": {seeds.DEVICE: sum(parts.values()) + 2e9}}


def test_a_row_has_the_parts_of_one_gpu_and_the_sum_of_all() -> None:
    plans = [plan(7e9, parameters=28e9 / case.gpus, gradients=28e9 / case.gpus, optimizer=56e9 / case.gpus) for case in seeds.CASES]
    lines = seeds.table(plans)
    assert lines[4] == "| 7B | full | 1 | 28.0 | 28.0 | 56.0 | 0.0 | 0.0 | 0.0 | 114.0 | 114 | 112 |"
    assert lines[5].endswith("| 30.0 | 120 | 112 |")
    assert {line.count("|") for line in lines if line.startswith("|")} == {13}
    assert sum(line.startswith("- ") for line in lines) == len(seeds.CASES)


def test_a_difference_is_told_by_its_parts_and_by_what_it_fits_on() -> None:
    case = seeds.CASES[-1]
    said = seeds.difference(case, plan(70e9, parameters=37e9, gradients=3e9, optimizer=2e9, activations=4e9, logits=1e9))
    assert said.startswith("70B, qlora, 1 GPU: 1 GB more than quoted (half a byte a parameter, and a little).")
    assert "42 GB are weights, gradients and optimizer state, 0.6 bytes a parameter; 5 GB activations" in said
    assert said.endswith("2 GB the allocator's slack, CUDA and NCCL. It does not fit on 48 GB and fits on 80 GB.")


@pytest.mark.slow
def test_a_case_is_planned_by_the_command_of_a_user() -> None:
    """QLoRA of 7B on one GPU: its parameters are counted here, and no more than 0.6 bytes of each are kept with the adapters' state."""
    case = next(case for case in seeds.CASES if (case.size, case.method) == ("7B", "qlora"))
    found = seeds.plan_of(case)
    assert found["parameters"] - found["trainable"] == LLAMA2_7B
    assert found["peak"]["parameters"] > 0.5 * LLAMA2_7B
    assert found["needed"][seeds.DEVICE] == pytest.approx(sum(found["peak"].values()) + found["slack"] + 2 * 2**30)
    assert found["verdicts"][seeds.DEVICE] == "fits"
