"""What `tools.bench generate` measures: the same answers, written by each way."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tools.bench import generate
from tools.bench.__main__ import main

ORDER = {"prompts": 9, "shortest": 3, "longest": 24, "parameters": 200_000, "batch": 4}


def test_answers_are_known_and_of_all_lengths() -> None:
    prompts = generate.prompts_of(ORDER)
    assert sorted(len(generate.known(prompt)) for prompt in prompts) == [3, 6, 8, 11, 14, 16, 19, 21, 24]
    assert generate.known([70, 71, 5]) == [4, 3, 2, 1]
    assert all(generate.PROMPT[0] <= len(prompt) <= generate.PROMPT[1] and max(prompt[:-1]) < 24 + 2 + 64 for prompt in prompts)


def test_speeds_are_ratios_and_other_answers_are_refused() -> None:
    options = argparse.Namespace(line="python -m tools.bench generate", runs=1, **ORDER)
    one = {"greedy": 100.0, "drawn": 80.0, "greedy known": 9.0, "drawn known": 9.0, "memory": 2.0**30}
    found = {"plain": [one], "ours": [one | {"greedy": 90.0}], "vllm": [one | {"drawn": 320.0, "memory": 2.0**31, "greedy known": 8.0}]}
    text = generate.section(options, {"parameters": 2e5}, found)
    assert "| transformers, `generate` in batches | 100 | 0.90 | 80 | 1.00 | 1.0 GiB | 1.00 | 9 of 9 |" in text
    assert "| vLLM | 100 | 0.90 | 320 | 0.25 | 2.0 GiB | 0.50 | 8 of 9 |" in text
    with pytest.raises(RuntimeError, match="plain generate has 8 of 9 answers right"):
        generate.section(options, {"parameters": 2e5}, found | {"plain": [one | {"greedy known": 8.0}]})


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_each_way_writes_the_same_answers(tmp_path: Path) -> None:
    out = tmp_path / "found.md"
    small = [word for key in ("prompts", "shortest", "longest", "parameters", "batch") for word in (f"--{key}", str(ORDER[key]))]
    assert main(["generate", *small, "--runs", "1", "--out", str(out)]) == 0
    rows = [line for line in out.read_text().splitlines() if line.endswith("9 of 9 |")]
    assert len(rows) == 4
