"""What `tools.bench generate`, `staleness`, `learning` and `rlhf` measure: the same answers, parts of a step, and what was learnt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tools.bench import generate, learning, rlhf, staleness
from tools.bench.__main__ import main
from tools.bench.learning import Learnt
from tools.bench.rlhf import Scored

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


def test_parts_of_a_step_add_up() -> None:
    """What is done while the step before is trained is not part of a step."""
    turns = {"step_seconds": 4.0, "sync_seconds": 0.5, "sampling_seconds": 2.0, "scoring_seconds": 0.25}
    ahead = turns | {"step_seconds": 2.5, "waiting_seconds": 0.25, "opening_seconds": 0.1}
    slow: list[dict[str, Any]] = [{"step_seconds": 99.0}] * staleness.FIRST
    found = {0: staleness.means_of([*slow, turns]), 1: staleness.means_of([*slow, ahead, ahead])}
    assert (found[0]["training_seconds"], found[1]["training_seconds"]) == (1.25, 1.75)
    options = argparse.Namespace(line="python -m tools.bench staleness", answers=8, tokens=16, steps=5, runs=1)
    text = staleness.section(options, found)
    assert "| 0 | 900 | 1.00 | 4.00 s |" in text
    assert "| 1 | 1,440 | 1.60 | 2.50 s |" in text


def test_the_threads_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(staleness.host, "cores", lambda *_: 8)
    said = staleness._threads()
    assert said.startswith("with 4 threads for the rank and 4 threads for the generator on 8 cores; ")
    assert said.endswith("taking turns the rank has 8 threads and the generator 8.")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "with 3 threads for the rank and 4 threads" in staleness._threads()


def test_who_learns_is_told_and_a_lot_says_nothing_of_an_answer() -> None:
    row = {"prompt": [{"role": "user", "content": "3,8?"}], "answer": "8"}
    drawn = [learning.by_lot(row) for _ in range(2000)]
    assert 0.2 < sum(drawn) / len(drawn) < 0.3
    learnt, lot = (Learnt(reward=(0.1, end), held_out=(0.1, end), seconds=60.0) for end in (0.9, 0.1))
    assert learning.failures_of({(0, False): learnt, (0, True): lot}) == []
    (first, second) = learning.failures_of({(0, False): lot, (1, True): learnt})
    assert first.startswith("seed 0: of its answers right from 0.10 to 0.10")
    assert second.startswith("seed 1: a control")
    text = learning.section(argparse.Namespace(line="python -m tools.bench learning"), {(0, False): learnt, (0, True): lot})
    assert "| 0 | `exact` | 0.10 | 0.90 | 0.10 (0.04 to 0.23) | 0.90 (0.77 to 0.96) |" in text
    assert "| 0 | drawn by lot | 0.10 | 0.10 |" in text


def test_scores_rise_by_more_than_those_of_a_control() -> None:
    asked = {"prompt": [{"role": "user", "content": "3,8?"}], "reference": "8"}
    pairs = list(rlhf.pairs_of([asked | {"answer": text} for text in ("8", "3", " ", "3\0", "88")]))
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [("8", "3"), ("8", "88")]
    risen, still = (Scored(score=(-5.0, end), right=(0.1, 0.5), seconds=60.0) for end in (3.0, -4.5))
    assert rlhf.failures_of({(0, False): risen, (0, True): still}) == []
    for run, control, words in ((still, still, "from -5.00 to -4.50"), (risen, risen, "the control's from -5.00 to 3.00")):
        (said,) = rlhf.failures_of({(0, False): run, (0, True): control})
        assert words in said
    options = argparse.Namespace(line="python -m tools.bench rlhf", steps=200)
    text = rlhf.section(options, 0.975, {(0, False): risen, (0, True): still})
    assert "it is right in 97.5%" in text
    assert "| 0 | reward model | -5.00 | 3.00 | 0.10 (0.04 to 0.23) | 0.50 (0.35 to 0.65) |" in text


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_each_way_writes_the_same_answers(tmp_path: Path) -> None:
    out = tmp_path / "found.md"
    small = [word for key in ("prompts", "shortest", "longest", "parameters", "batch") for word in (f"--{key}", str(ORDER[key]))]
    assert main(["generate", *small, "--runs", "1", "--out", str(out)]) == 0
    rows = [line for line in out.read_text().splitlines() if line.endswith("9 of 9 |")]
    assert len(rows) == 4


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_ahead_is_measured_by_its_command(tmp_path: Path) -> None:
    out = tmp_path / "found.md"
    small = ["--steps", "5", "--runs", "1", "--answers", "8", "--tokens", "8", "--prompt-words", "4", "--hidden-size", "16"]
    assert main(["staleness", *small, "--out", str(out)]) == 0
    assert [line.split(" | ")[0] for line in out.read_text().splitlines() if " s |" in line] == ["| 0", "| 1"]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_learning_is_asked_of_the_experiment_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty steps are too few to learn, and the command says so."""
    out = tmp_path / "found.md"
    assert main(["learning", "--seeds", "0", "--steps", "20", "--out", str(out)]) == 1
    assert "asked is from below 0.2 to above 0.8" in capsys.readouterr().err
    assert "| 0 | drawn by lot |" in out.read_text()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_scores_are_measured_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few steps, which need not suffice: the exit code is what is said."""
    out = tmp_path / "found.md"
    code = main(["rlhf", "--seeds", "0", "--steps", "20", "--out", str(out)])
    assert code == int("asked are a rise of 1" in capsys.readouterr().err)
    assert [line.split(" | ")[1] for line in out.read_text().splitlines() if line.startswith("| 0 ")] == ["reward model", "drawn by lot"]
