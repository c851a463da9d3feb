"""What is measured of classifiers, and of answers that are wanted or not: by hand, as training has it, and with true intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import change, make_run

from tools.compare.methods import compare
from tools.compare.say import markdown, write_csv
from tools.evaluate import record
from tools.evaluate.classes import Classes
from tools.evaluate.intervals import share
from tools.evaluate.pairs import longer_wins, thirds
from tools.evaluate.say import table_of
from tools.evaluate.unpaired import Unpaired
from tools.gate.__main__ import main as gate
from trainers.batch import Batch, Output
from trainers.config.choices import ObjectiveName
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.scored import Classify

NAMES = ("no", "perhaps", "yes")
TRIALS = 300
WITHIN = 3.3 * math.sqrt(0.95 * 0.05 / TRIALS)


def said(labels: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> Classes:
    taken = probabilities.argmax(1)
    return Classes(labels=[NAMES[at] for at in labels], taken=[NAMES[at] for at in taken], confidence=probabilities.max(1))


def test_the_metrics_of_a_classifier_are_those_of_training() -> None:
    draw = np.random.default_rng(0)
    labels, logits = draw.choice(3, 200, p=[0.6, 0.3, 0.1]), draw.normal(size=(200, 3)) * 2
    logits[np.arange(200), labels] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    objective = Classify(ObjectiveConfig(name=ObjectiveName.classify))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    signals = {"label": torch.from_numpy(labels.astype(np.float32))}
    fields = {"num_rows": 1, "num_tokens": 1, "num_documents": 200}
    batch = Batch(input_ids=ids, labels=ids, position_ids=ids, documents=ids, signals=signals, **fields)  # type: ignore[arg-type]
    tally = objective.tally(Output(logps=torch.zeros(1, 1), scores=torch.from_numpy(logits)), batch)
    found, ours = objective.summary(tally.tolist()), said(labels, probabilities)
    assert ours.macro_f1().value == pytest.approx(found["macro_f1"], rel=1e-6)
    assert ours.calibration_error().value == pytest.approx(found["calibration_error"], rel=1e-6)
    assert ours.overconfidence().value == pytest.approx(float(probabilities.max(1).mean() - ours.right.mean()))
    hits = sum(label == taken == "yes" for label, taken in zip(ours.labels, ours.taken, strict=True))
    assert ours.f1("yes").value == pytest.approx(2 * hits / (ours.labels.count("yes") + ours.taken.count("yes")))


@pytest.mark.parametrize(
    ("shares", "count", "right"), [((0.6, 0.3, 0.1), 100, 0.8), ((0.7, 0.2, 0.1), 200, 0.97), ((0.5, 0.5, 0), 60, 0.9)]
)
def test_macro_f1_is_covered(shares: tuple[float, ...], count: int, right: float) -> None:
    draw, kinds = np.random.default_rng(1), sum(share > 0 for share in shares)
    spread = (1 - right) / (kinds - 1)
    for_it = [share * right + spread * (1 - share) for share in shares[:kinds]]
    truth = float(np.mean([2 * share * right / (share + taken) for share, taken in zip(shares, for_it, strict=False)]))
    hits = 0
    for _ in range(TRIALS):
        labels = draw.choice(3, count, p=shares)
        taken = np.where(draw.random(count) < right, labels, (labels + draw.integers(1, kinds, count)) % kinds)
        hits += not said(labels, np.eye(3)[taken]).macro_f1().excludes(truth)
    assert hits / TRIALS > 0.95 - WITHIN


@pytest.mark.parametrize(
    ("power", "count"), [(1.0, 60), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1.0, 400), (0.6, 200), (2.0, 300)))]
)
def test_the_calibration_error_is_covered_also_where_it_is_0(power: float, count: int) -> None:
    """Confidences are even from 0.5 to 1, and a document is right with their `power`: with 1 the model is calibrated."""
    edges = np.linspace(0.5, 1, 6)
    integrals = [
        (high**2 - low**2) - 2 * (high ** (power + 1) - low ** (power + 1)) / (power + 1)
        for low, high in np.stack([edges[:-1], edges[1:]], 1)
    ]
    truth, draw, hits = float(np.abs(integrals).sum()), np.random.default_rng(2), 0
    for _ in range(TRIALS):
        confidence = draw.uniform(0.5, 1, count)
        taken = ["yes" if right else "no" for right in draw.random(count) < confidence**power]
        hits += not Classes(labels=["yes"] * count, taken=taken, confidence=confidence).calibration_error().excludes(truth)
    assert hits / TRIALS > 0.95 - WITHIN


def test_answers_are_told_by_the_baseline_of_mismatched_ones() -> None:
    wanted, rewards = [1, 1, 0, 0, 1], [0.5, 0.1, 0.3, -1.0, 0.2]
    rows = [{"wanted": want, "reward": reward} for want, reward in zip(wanted, rewards, strict=True)]
    told = Unpaired.of_rows(rows, [{"reward": 0.5}, {"reward": -0.2}])
    assert told.baseline == pytest.approx(0.15)
    assert told.right is not None
    assert told.right.tolist() == [1, 0, 0, 1, 1]
    assert (told.accuracy("wanted"), told.accuracy("unwanted")) == (share(2, 3), share(1, 2))
    assert told.reward("wanted").value == pytest.approx(0.8 / 3)  # type: ignore[union-attr]
    assert Unpaired.of_rows(rows, [{"reward": -1.0}]).baseline == 0
    assert Unpaired.of_rows([{"wanted": 1}], []).right is None


def test_thirds_by_length_and_the_longer_answer_show_a_bias() -> None:
    tokens = np.array([[2.0, 4.0]] * 10 + [[10.0, 6.0]] * 10 + [[20.0, 30.0]] * 10)
    assert [(low, high, int(which.sum())) for low, high, which in thirds(tokens)] == [(3, 3, 10), (8, 8, 10), (25, 25, 10)]
    assert longer_wins(tokens, tokens) == share(30, 30)
    assert longer_wins(-tokens, tokens) == share(0, 30)
    assert [int(which.sum()) for *_, which in thirds(np.full((5, 2), 3.0))] == [5]


def with_part(run: Path, part: str, rows: list[dict[str, Any]], *more: tuple[str, list[dict[str, Any]]]) -> Path:
    """Replace what a made-up run was evaluated on."""
    about = json.loads((run / "evaluation" / "run.json").read_text())
    about = {key: value for key, value in about.items() if key not in ("figures", "version")} | {"sets": {part: "data-one"}}
    (run / "evaluation" / "base.json").unlink()
    record.write(run / "evaluation", "run", about, {part: rows, **dict(more)})
    return run


def classified(run: Path, wrong: int) -> Path:
    rows = [
        {"document": at, "label": NAMES[at % 3], "taken": NAMES[(at + (at < wrong)) % 3], "confidence": 0.9 if at % 2 else 0.6}
        for at in range(90)
    ]
    return with_part(run, "classes", rows)


def test_the_gate_the_card_and_the_comparison_know_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = classified(make_run(tmp_path / "all" / "peft=none"), wrong=9)
    classified(make_run(tmp_path / "all" / "peft=lora", "lora", lr=2e-4), wrong=60)
    rules = tmp_path / "rules.yaml"
    for rule, code in (("accuracy_at_least: 0.8", 0), ("macro_f1_at_least: 0.89", 1), ("calibration_error_at_most: 0.5", 0)):
        rules.write_text(rule)
        assert gate([str(run), "--rules", str(rules)]) == code
        assert rule.partition(":")[0] in capsys.readouterr().out
    assert "| macro F1 |" in (run / "export" / "README.md").read_text()
    assert "90 held-out documents" in (run / "export" / "README.md").read_text()
    comparison = compare([tmp_path / "all"], None)
    full, lora = comparison.methods
    assert full.figures.told == share(81, 90)
    assert lora.figures.verdict("told_to_full") == "worse"
    assert "| accuracy | accuracy - full | macro F1 | calibration error |" in markdown(comparison)
    change(run / "evaluation" / "run.json", sets__classes="data-two")
    assert "another set of rows it is evaluated on" in str([flagged.faults for flagged in compare([tmp_path / "all"], None).flagged])
    write_csv(comparison, tmp_path / "found.csv")
    assert "macro_f1_low" in (tmp_path / "found.csv").read_text()
    ours = record.load(run / "evaluation", "run")
    assert ours is not None
    titles = list(table_of(run / "evaluation", ours, None).columns[0].cells)
    assert titles == ["accuracy", "macro F1", "calibration error", "confidence - accuracy", *(f"F1 of {name}" for name in NAMES)]


def test_the_gate_knows_answers_that_are_wanted_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"document": at, "tokens": 4, "nats": 5.0, "wanted": at % 2, "reward": 1.0 if at % 2 else -1.0} for at in range(60)]
    run = with_part(make_run(tmp_path / "run"), "unpaired", rows, ("mismatched", [row | {"reward": 0.1} for row in rows]))
    rules = tmp_path / "rules.yaml"
    rules.write_text("accuracy_at_least: 0.9")
    assert gate([str(run), "--rules", str(rules)]) == 0
    assert "accuracy_at_least" in capsys.readouterr().out
    figures = json.loads((run / "evaluation" / "run.json").read_text())["figures"]
    assert (figures["accuracy_wanted"]["value"], figures["reward_baseline"]) == (1.0, pytest.approx(0.1))
