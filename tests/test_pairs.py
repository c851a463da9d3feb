"""How well a model tells preferred answers from others: from scores alone, and through tools.evaluate, the gate and the comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import arguments, launch, tool
from conftest import WORDS
from synthetic import make_run

from launcher.plan import known_hardware
from tools.compare.methods import compare
from tools.compare.say import markdown, write_csv
from tools.evaluate import record
from tools.evaluate.intervals import share
from tools.evaluate.pairs import Pairs, accuracy, margin, rewards_of
from tools.evaluate.record import Judged, load
from tools.gate.__main__ import main as gate
from trainers.config.choices import ObjectiveName
from trainers.config.derived import PREFERENCES
from trainers.config.schema import ObjectiveConfig, plain
from trainers.objectives import CHOICES
from trainers.objectives.preference import Answers
from trainers.plan.plan import make_plan
from trainers.plan.request import Place, PlanConfig, Variant
from trainers.rundir.base import config_of
from trainers.rundir.rows import read_rows


def test_accuracy_by_length_shows_a_model_that_prefers_long_answers() -> None:
    tokens = np.array([[9.0, 4.0]] * 60 + [[4.0, 9.0]] * 30 + [[5.0, 5.0]] * 10)
    found = {bucket: accuracy(tokens, tokens, bucket) for bucket in ("all", "longer", "shorter")}
    assert found == {"all": share(60, 100), "longer": share(60, 60), "shorter": share(0, 30)}
    told = margin(tokens)
    assert told is not None
    assert told.value == pytest.approx(1.5)
    assert told.low is not None
    assert told.low < 1.5
    assert accuracy(tokens[:60], tokens[:60], "shorter") is None


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("normalised", [False, True])
def test_rewards_are_the_objectives_own(name: ObjectiveName, normalised: bool) -> None:
    config = ObjectiveConfig(name=name, beta=0.3, length_normalised=normalised)
    draw = np.random.default_rng(0)
    logps, reference, tokens = -draw.gamma(4, 2, (7, 2)), -draw.gamma(4, 2, (7, 2)), draw.integers(1, 9, (7, 2)).astype(float)
    found = rewards_of(config, logps, tokens, reference)
    both = [tuple(map(torch.from_numpy, values.T)) for values in (logps, tokens, reference)]
    objective: Any = CHOICES[name](config)
    known = both[2] if objective.signals else None
    assert found is not None
    assert found == pytest.approx(torch.stack(objective.rewards(Answers(both[0], both[1], known)), 1).numpy())  # type: ignore[arg-type]
    assert (rewards_of(config, logps, tokens, None) is None) == bool(objective.signals)
    assert rewards_of(ObjectiveConfig(name=ObjectiveName.sft), logps, tokens, reference) is None


def test_rows_without_log_probabilities_are_ordered_by_their_scores() -> None:
    pairs = Pairs.of_rows([{"tokens": 3, "reward": 1.0}, {"tokens": 2, "reward": -1.0}])
    assert pairs.logps is None
    assert pairs.scores is not None
    assert pairs.scores.tolist() == [[1.0, -1.0]]


def test_a_win_is_a_better_mean_of_both_orders() -> None:
    run, base = np.array([4.0, 3.0, 2.0, 5.0]), np.array([3.0, 3.0, 4.0, 1.0])
    rate = Judged(about={}, run={"overall": run}, base={"overall": base}).win_rate()
    assert rate is not None
    assert rate.value == 2.5 / 4
    assert Judged(about={}, run={}, base={}).win_rate() is None


def transcripts(folder: Path, count: int = 60) -> Path:
    """Pairs as Bai et al. (2022) write them: two transcripts with a shared beginning; the preferred answer begins with `cat`."""
    draw = np.random.default_rng(0)

    def say(longest: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, longest)))

    rows = []
    for _ in range(count):
        shared = f"\n\nHuman: {say(5)}\n\nAssistant: {say(5)}\n\nHuman: {say(5)}\n\nAssistant:"
        rows.append({"chosen": f"{shared} {WORDS[0]} {say(6)}", "rejected": f"{shared} {WORDS[1]} {say(6)}"})
    file = folder / "transcripts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def with_pairs(run: Path, right: int, count: int = 40) -> Path:
    """Add pairs to a made-up run's evaluation: `right` of them are ordered rightly; in the others the preferred answer is shorter."""
    for name in ("run", "base"):
        about = json.loads((run / "evaluation" / f"{name}.json").read_text())
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in (run / "evaluation" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row.pop("part"), []).append(row)
        known = {"tokens": 6, "nats": 12.0}
        rows["pairs"] = []
        for number in range(count):
            first, second = ({"document": 2 * number + at} | known for at in (0, 1))
            if name == "run":
                longer = number < right
                first |= {"tokens": 6 + longer, "reward": 1.0 if longer else -1.0}
                second |= {"tokens": 7 - longer, "reward": 0.0}
            rows["pairs"] += [first, second]
        about = {key: value for key, value in about.items() if key not in ("figures", "version")}
        record.write(run / "evaluation", name, about | {"sets": about["sets"] | {"pairs": "data-one"}}, rows)
    return run


def test_the_gate_sees_a_length_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = with_pairs(make_run(tmp_path / "run"), right=30)
    rules = tmp_path / "rules.yaml"
    for rule, code in (("preference_accuracy_at_least: 0.5", 0), ("preference_shorter_at_least: 0.5", 1), ("win_rate_at_least: 0.5", 1)):
        rules.write_text(rule)
        assert gate([str(run), "--rules", str(rules)]) == code
        said = capsys.readouterr().out
        assert rule.partition(":")[0] in said
        assert ("was not measured: it needs evaluation.rows, the base, and --judge" in said) == rule.startswith("win")
    assert "preference accuracy, the preferred answer longer" in (run / "export" / "README.md").read_text()


def test_a_comparison_shows_accuracies_and_what_differs(tmp_path: Path) -> None:
    with_pairs(make_run(tmp_path / "peft=none"), right=36)
    with_pairs(make_run(tmp_path / "peft=lora", "lora", lr=2e-4), right=10)
    comparison = compare([tmp_path], None)
    full, lora = comparison.methods
    assert full.figures.accuracy == share(36, 40)
    assert (full.figures.longer, full.figures.shorter) == (share(36, 36), share(0, 4))
    assert lora.figures.verdict("accuracy_to_full") == "worse"
    said = markdown(comparison)
    assert "| preference accuracy | longer preferred | shorter preferred | preference accuracy - full |" in said
    assert "preference accuracy: worse, -0.650" in said
    write_csv(comparison, tmp_path / "found.csv")
    assert "accuracy_to_full_low" in (tmp_path / "found.csv").read_text()


@pytest.mark.slow
def test_a_run_on_transcripts_is_trained_evaluated_and_passed(base: Path, cache: Path, tmp_path: Path) -> None:
    """The commands of a user on pairs in their original layout: what evaluation says is what training said, and the gate reads it."""
    file, run = transcripts(tmp_path), tmp_path / "run"
    launch(cache, arguments(base, file, run, "objective=dpo", "data.seq_len=128", "data.eval_fraction=0.3", "train.eval_every=8"))
    said = tool(cache, run, "--rows", "4", "--max-new-tokens", "4")
    assert "reward accuracy, shorter" in said
    last = [row for row in read_rows(run) if "eval_accuracy" in row][-1]
    figures = json.loads((run / "evaluation" / "run.json").read_text())["figures"]
    assert figures["preference_accuracy"]["value"] == pytest.approx(last["eval_accuracy"])
    assert figures["preference_margin"]["value"] == pytest.approx(last["eval_reward_margin"], rel=1e-4)
    assert figures["held_out_loss"]["documents"] == figures["preference_accuracy"]["documents"] >= 10
    ours, theirs = load(run / "evaluation", "run"), load(run / "evaluation", "base")
    pairs, known = (one.pairs if one is not None else None for one in (ours, theirs))
    assert pairs is not None
    assert known is not None
    assert known.rewards is None
    assert pairs.rewards == pytest.approx(0.1 * (pairs.logps - known.logps), rel=1e-6, abs=1e-6)
    config = config_of(run)
    config.data.prepared_dir = str(cache / "prepared")  # as FULLTUNE_CACHE of the commands
    asked = Variant(run=plain(config), place=Place(nodes=1, ranks_per_node=2, gpus=True, save_s=300))
    planned = make_plan(asked, [next(item for item in known_hardware() if item.name == "h100")], PlanConfig(), {})
    assert planned.reference is not None
    assert planned.reference.disk_bytes == sum(np.load(kept).nbytes for kept in (run / "reference").glob("*.npy"))
    assert planned.reference.second_model_bytes == planned.parameters * 4 // 2
    assert planned.reference.seconds is not None
    assert planned.step_seconds is not None
    assert planned.run_seconds() == pytest.approx(
        [8 * step + once for step, once in zip(planned.step_seconds, planned.reference.seconds, strict=True)]
    )
    other = shutil.copy(file, tmp_path / "other.jsonl")
    tool(cache, run, "--rows", "0", "--path", other)
    assert json.loads((run / "evaluation" / "run.json").read_text())["figures"]["preference_accuracy"]["documents"] == 60
    tool(cache, run / "export", "--rows", "0", "--path", other, "--out", tmp_path / "out")
    alone = json.loads((tmp_path / "out" / "model.json").read_text())["figures"]
    assert alone["preference_scores"] == "likelihood"
    assert alone["preference_accuracy"]["documents"] == 60
