"""Runs are compared where they can be, flagged by name where they cannot, and nothing is called better inside the noise."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, launch, tool
from synthetic import change, make_run

from tools.compare.__main__ import main
from tools.compare.methods import compare
from tools.compare.page import POLICY, page
from tools.compare.say import conclusions, markdown


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Full fine-tuning, LoRA that is as good, and IA3 that is worse beyond the noise."""
    folder = tmp_path / "sweep"
    make_run(folder / "peft=none", better=0.5, seed=1)
    make_run(folder / "peft=lora", "lora", lr=2e-4, better=0.5, seed=2)
    make_run(folder / "peft=ia3", "ia3", lr=3e-3, better=0.2, seed=3)
    return folder


def test_what_is_the_same_is_not_different_and_what_is_worse_is(sweep: Path) -> None:
    found = {method.label: method.figures for method in compare([sweep], None).methods}
    assert list(found) == ["full fine-tuning", "LoRA", "IA3"]
    assert found["LoRA"].verdict("held_out_to_full") == "no difference"
    assert found["IA3"].verdict("held_out_to_full") == "worse"
    assert found["IA3"].held_out_to_full is not None
    assert found["IA3"].held_out_to_full.value == pytest.approx(0.3, abs=0.03)
    assert found["full fine-tuning"].verdict("score_to_base") == "better"
    assert found["IA3"].verdict("score_to_full") == "worse"
    assert found["full fine-tuning"].verdict("forgetting") == "better"  # 0.1 + 0.25 - 0.5
    assert found["IA3"].verdict("forgetting_to_full") == "worse"


def test_runs_that_learn_from_their_own_answers_are_compared_by_reward_and_pass_rate(tmp_path: Path) -> None:
    """They have trained on other numbers of tokens, and the held-out loss is minus the reward."""
    for number, name in enumerate(("a", "b")):
        run = make_run(tmp_path / name, "none" if name == "a" else "lora", evaluated=False, final_loss=-0.5 - 0.2 * number)
        change(run / "config.yaml", objective__name="grpo", reward={"right": {"kind": "exact"}})
        change(run / "summary.json", tokens=2000 + number, input_tokens=3000 - number, export_step=20)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row["eval_tokens" if "eval_loss" in row else "reward"] = 0.05 * row["step"] + number
            if "eval_loss" in row:
                at = 0.025 * row["step"] + 0.2 * number
                row |= {"eval_loss": -at, "eval_reward": at, "eval_pass@1": at, "eval_pass@1_low": at - 0.1, "eval_pass@1_high": at + 0.1}
                row |= {f"eval_pass@16{end}": at + 0.25 for end in ("", "_low", "_high")} if name == "b" else {}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare([tmp_path], None)
    assert comparison.flagged == []
    found = {method.label: method.figures for method in comparison.methods}
    assert [round(figures.passed.value, 3) for figures in found.values() if figures.passed] == [0.5, 0.7]
    assert found["LoRA"].passed is not None
    assert (found["LoRA"].passed.low, found["LoRA"].passed.high) == (pytest.approx(0.6), pytest.approx(0.8))
    assert comparison.methods[0].best.trained.loss[-1] == -1.0, "the curve is of the reward too"
    text = markdown(comparison)
    assert "| held-out reward | pass@1 | pass@16 |" in text
    assert "| 0.950 [0.950, 0.950] |" in text
    assert "0.500 [0.400, 0.600]" in text
    assert "of training |" not in text, "minus the reward is not shown once more"


def test_two_identical_runs_are_reported_as_not_different(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, "none" if name == "a" else "lora", better=0.3, seed=5)
    comparison = compare([tmp_path], None)
    assert comparison.methods[1].figures.held_out_to_full is not None
    assert comparison.methods[1].figures.held_out_to_full.value == 0.0
    assert {comparison.methods[1].figures.verdict(name) for name in ("held_out_to_full", "score_to_full")} == {"no difference"}
    said = conclusions(comparison)[1]
    assert "no difference beyond the noise" in said
    assert not re.search("better|worse", said)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: change(run / "manifest.json", prepared="data-two"), "another data: data-two, the others' data-one"),
        (lambda run: change(run / "manifest.json", data__template_hash="u"), "another chat template: u, the others' t"),
        (lambda run: change(run / "manifest.json", base_revision="abc"), None),
        (lambda run: change(run / "evaluation" / "base.json", weights="others"), "another base: its weights"),
        (lambda run: change(run / "summary.json", tokens=1999), "another number of trained tokens: 1,999, the others' 2,000"),
        (lambda run: change(run / "config.yaml", train__global_batch=8), "train.global_batch = 8, the others' 16"),
        (lambda run: change(run / "config.yaml", seed=3), "seed = 3, the others' 0"),
        (lambda run: change(run / "config.yaml", peft__adapter="/earlier/export"), "peft.adapter = /earlier/export, the others' None"),
        (lambda run: change(run / "evaluation" / "run.json", sets__held_out="data-x"), "another set of rows it is evaluated on"),
        (lambda run: change(run / "evaluation" / "run.json", sets__general="data-y"), "another general text it is evaluated on"),
        (lambda run: change(run / "evaluation" / "run.json", settings__max_new_tokens=9), "another evaluation of answers"),
        (lambda run: change(run / "evaluation" / "run.json", dtype="bfloat16"), "another type it is evaluated in: bfloat16"),
        (lambda run: change(run / "status.json", state="running", step=4), "is running at step 4, not done"),
        (
            lambda run: change(run / "status.json", state="failed", step=7, error={"message": "the disk is full\nmore"}),
            "is failed at step 7, not done: the disk is full",
        ),
        (lambda run: change(run / "summary.json", eval_loss_after=None), "its held-out loss is not a finite number"),
        (lambda run: change(run / "summary.json", train_loss=None), "its training loss is not a finite number"),
        (lambda run: (run / "summary.json").write_text('{"eval'), "has no summary.json that can be read"),
    ],
)
def test_runs_that_do_not_compare_are_named_with_both_values(
    sweep: Path, spoil: object, words: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(sweep / "peft=lora")  # type: ignore[operator]
    comparison = compare([sweep], None)
    if words is None:  # the others have none, and say nothing of theirs
        assert [run.name for run in comparison.flagged] == []
        return
    assert [run.name for run in comparison.flagged] == ["peft=lora"]
    assert words in "; ".join(comparison.flagged[0].faults)
    assert [method.label for method in comparison.methods] == ["full fine-tuning", "IA3"]
    monkeypatch.setenv("COLUMNS", "500")
    assert main([str(sweep)]) == 0
    said = capsys.readouterr().out
    assert f"not compared: peft=lora: {words}" in said
    assert words in markdown(comparison)
    from html import escape

    assert escape(words) in page(comparison, [])


def test_a_base_that_is_measured_on_other_text_tells_nothing(sweep: Path) -> None:
    change(sweep / "peft=lora" / "evaluation" / "base.json", sets__general="data-other")
    comparison = compare([sweep], None)
    lora = comparison.methods[1]
    assert lora.figures.forgetting is None
    assert lora.figures.score_to_base is not None
    assert "its base is evaluated on other rows or in another type" in "; ".join(lora.best.notes)


def test_runs_that_are_named_twice_count_once(sweep: Path) -> None:
    comparison = compare([sweep, sweep / "peft=lora", sweep / "peft=none" / ".." / "peft=lora"], None)
    assert [(method.label, len(method.tried)) for method in comparison.methods] == [("full fine-tuning", 1), ("LoRA", 1), ("IA3", 1)]


def test_a_run_that_is_left_out_decides_nothing(sweep: Path) -> None:
    run = sweep / "peft=none"
    change(run / "config.yaml", seed=4)
    change(run / "evaluation" / "run.json", settings__metrics=["json"])
    comparison = compare([sweep], None)
    assert comparison.metric == "exact_match"
    assert [run.name for run in comparison.flagged] == ["peft=none"]


def test_training_s_own_loss_does_not_stand_among_those_of_other_rows(sweep: Path) -> None:
    for name in ("none", "ia3"):
        change(sweep / f"peft={name}" / "evaluation" / "run.json", settings__path="/test/rows.jsonl")
    shutil.rmtree(sweep / "peft=lora" / "evaluation")
    assert {method.label: method.figures.held_out is None for method in compare([sweep], None).methods} == {
        "full fine-tuning": False,
        "LoRA": True,
        "IA3": False,
    }


def test_without_held_out_losses_no_rate_is_the_best(tmp_path: Path) -> None:
    for lr in (1e-3, 1e-1):
        run = make_run(tmp_path / str(lr), lr=lr, final_loss=None, evaluated=False)
        rows = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if "eval_loss" not in line]
        (run / "metrics.jsonl").write_text("".join(rows))
    comparison = compare([tmp_path], None)
    assert {method.label for method in comparison.methods} == {"full fine-tuning, lr 0.001", "full fine-tuning, lr 0.1"}
    assert not comparison.is_picked


def test_broken_records_are_no_traceback(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = sweep / "peft=lora" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('{"step": 5,', '{"step": 5, "step_seconds": 1 broken', 1))
    rows = sweep / "peft=ia3" / "evaluation" / "run.jsonl"
    rows.write_text(rows.read_text().replace('"part"', '"pa', 3))
    comparison = compare([sweep], None)
    assert not comparison.flagged
    assert comparison.methods[2].best.ours is None or len(comparison.methods[2].best.ours.answers) <= 80
    (sweep / "peft=lora" / "config.yaml").write_text("a: [")
    assert main([str(sweep)]) == 2
    assert "config.yaml': cannot be read" in capsys.readouterr().err


def test_another_set_up_keeps_its_quality_and_loses_its_costs(sweep: Path) -> None:
    change(sweep / "peft=lora" / "config.yaml", engine__name="zero3")
    change(sweep / "peft=ia3" / "config.yaml", optim__weight_decay=0.1)
    manifest = sweep / "peft=none" / "manifest.json"
    known = json.loads(manifest.read_text())
    known["data"]["leakage"] = {"documents": 90, "text": 1, "near": 2, "prompt": 0, "any": 3, "similarity": 0.8}
    manifest.write_text(json.dumps(known))
    comparison = compare([sweep], None)
    assert not comparison.flagged
    notes = {run.name: "; ".join(run.notes) for run in comparison.runs}
    assert "engine.name = zero3, the others' fsdp: another set-up" in notes["peft=lora"]
    assert notes["peft=ia3"] == "optim.weight_decay = 0.1, the others' 0.0"
    assert "of 90 held-out documents 1 have the text of a trained one, 2 nearly" in notes["peft=none"]
    said = {line.partition(":")[0]: line for line in conclusions(comparison)}
    assert "time" not in said["LoRA"]
    assert "time 1.00 x" in said["IA3"]


def test_a_grid_of_rates_is_one_method_at_its_best_with_the_cost_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "full", better=0.5)
    for number, (lr, loss) in enumerate([(1e-4, 2.4), (2e-4, 2.1), (4e-4, 2.2)]):
        make_run(tmp_path / f"lora-{number}", "lora", lr=lr, final_loss=loss, evaluated=number == 1, seed=number)
    make_run(tmp_path / "ia3-0", "ia3", lr=1e-3, final_loss=2.4)
    make_run(tmp_path / "ia3-1", "ia3", lr=2e-3, final_loss=2.3)
    full, lora, ia3 = compare([tmp_path], None).methods
    assert (lora.best.name, [run.lr for run in lora.tried], lora.is_at_edge) == ("lora-1", [1e-4, 2e-4, 4e-4], False)
    assert lora.search_hours == pytest.approx(3 * full.best.hours)
    assert ia3.is_at_edge
    main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "0.0002: 2.1000 *" in said
    assert "Rates were chosen by the held-out loss that is reported" in " ".join(said.split())


def test_methods_of_one_name_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    for rank in (8, 64):
        run = make_run(tmp_path / str(rank), "lora")
        change(run / "config.yaml", peft__rank=rank)
    assert {method.label for method in compare([tmp_path], None).methods} == {"LoRA, rank 8", "LoRA, rank 64"}


def test_runs_that_are_not_evaluated_compare_by_what_training_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", evaluated=False)
    make_run(tmp_path / "b", "lora", evaluated=False, better=0.1)
    assert main([str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is not evaluated: python -m tools.evaluate" in said
    assert "1.9000" in said
    assert conclusions(compare([tmp_path], None)) == ["LoRA: time 1.00 x; peak host memory 0.50 x."]


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward", "classify", "distil"])
def test_the_loss_of_another_objective_is_none_of_tokens(tmp_path: Path, objective: str) -> None:
    for name, evaluated in (("none", True), ("lora", False)):
        run = make_run(tmp_path / name, name, evaluated=evaluated, final_loss=0.5)
        change(run / "config.yaml", objective__name=objective)
    comparison = compare([tmp_path], None)
    full, lora = comparison.methods
    assert (lora.figures.held_out, full.figures.held_out) == (None, full.best.ours.loss("held_out"))  # type: ignore[union-attr]
    assert [method.figures.own_loss.value for method in (full, lora)] == [0.5, 0.5]  # type: ignore[union-attr]
    assert f"| held-out {objective} loss, of training |" in markdown(comparison)
    assert f"Held-out {objective} loss during training" in page(comparison, [])


def test_objectives_on_the_same_rows_are_compared_by_what_is_evaluated(tmp_path: Path) -> None:
    """Their own losses are of different kinds: they choose a rate of each objective, and are never drawn together."""
    for name, beta, loss in (("dpo", 0.1, 0.4), ("dpo", 0.5, 0.2), ("simpo", 2.5, 1.4)):
        run = make_run(tmp_path / f"{name}-{beta}", better=0.5 if name == "simpo" else 0.1, final_loss=loss)
        change(run / "config.yaml", objective__name=name, objective__beta=beta)
    comparison = compare([tmp_path], None)
    assert not comparison.flagged
    labels = [method.label for method in comparison.methods]
    assert labels == [f"full fine-tuning, name {name}, beta {beta}" for name, beta in (("dpo", 0.1), ("dpo", 0.5), ("simpo", 2.5))]
    assert [method.figures.verdict("held_out_to_full") for method in comparison.methods] == ["", "no difference", "better"]
    said = markdown(comparison)
    assert f"| held-out loss | held-out loss of its own, of training | held-out loss - {labels[0]} |" in said
    assert "Objectives differ" in said
    assert "Loss against tokens" not in page(comparison, [])
    change(tmp_path / "simpo-2.5" / "manifest.json", prepared="data-two")
    assert [run.name for run in compare([tmp_path], None).flagged] == ["simpo-2.5"]


def test_csv_has_a_line_a_run_in_plain_numbers(sweep: Path, tmp_path: Path) -> None:
    change(sweep / "peft=lora" / "status.json", state="failed")
    assert main([str(sweep), "--csv", str(tmp_path / "runs.csv"), "--markdown", str(tmp_path / "runs.md")]) == 0
    with (tmp_path / "runs.csv").open() as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert len(lines) == 3
    full = lines["peft=none"]
    assert float(full["held_out_low"]) < float(full["held_out"]) < float(full["held_out_high"])
    assert (lines["peft=lora"]["compared"], lines["peft=ia3"]["score_to_full_verdict"]) == ("False", "worse")
    assert "| full fine-tuning |" in (tmp_path / "runs.md").read_text()


OPENED = """
import collections, sys
opened = collections.Counter()
sys.addaudithook(lambda event, given: opened.update([str(given[0])]) if event == "open" else None)
from tools.compare.__main__ import main
code = main(sys.argv[1:])
print(code, {count for file, count in opened.items() if file.endswith(("metrics.jsonl", "evaluation/run.jsonl"))})
"""


def test_fifty_runs_are_each_read_once(tmp_path: Path) -> None:
    for number in range(50):
        make_run(tmp_path / f"run-{number:02d}", "none" if number == 0 else "lora", lr=1e-5 * (1 + number), steps=3000, seed=number)
    line = [sys.executable, "-c", OPENED, str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"COLUMNS": "200"})
    assert "2 methods, 50 runs" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 {1}"


def test_prices_are_of_gpu_hours(sweep: Path) -> None:
    for run in sweep.iterdir():
        change(run / "summary.json", gpu_hours=20 * 0.5 * 2 / 3600, device_bytes_peak=1 << 30)
    text = markdown(compare([sweep], 36.0))
    assert "GPU-hours" in text
    assert "| cost of all rates |" in text
    assert "| 0.20 |" in text  # 20 steps of half a second on 2 GPUs, at 36 an hour


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no such directory"),
        (["EMPTY"], "is neither a run nor a folder of runs"),
        (["SWEEP", "--html", "no/such/place.html"], "there is no such directory"),
    ],
)
def test_bad_input(sweep: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "SWEEP": str(sweep)}
    assert main([places.get(word, word) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_one_run_alone_is_no_comparison(tmp_path: Path) -> None:
    assert main([str(make_run(tmp_path / "a"))]) == 1


needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
PROBE = """<script>
const inside = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, svg"));
const wide = inside.filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const empty = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height < 100);
document.title = JSON.stringify({wide: wide.length, empty: empty.length, pictures: document.querySelectorAll("figure svg").length,
  lines: document.querySelectorAll("tbody tr").length, ids: new Set([...document.querySelectorAll("[id]")].map(e => e.id)).size,
  all: document.querySelectorAll("[id]").length});
</script>"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 760])
def test_the_page_opens_in_a_browser_without_a_network(sweep: Path, tmp_path: Path, width: int) -> None:
    file = tmp_path / "page.html"
    assert main([str(sweep), "--html", str(file)]) == 0
    text = file.read_text()
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|@import', text)  # nothing is fetched
    assert POLICY in text
    file.write_text(text.replace(POLICY, "").replace("</body>", PROBE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900"]
    line = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{file}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=90, check=True)
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert found["pictures"] == 5
    assert (found["wide"], found["empty"]) == (0, 0)
    assert found["lines"] == 3 + 3 + 3  # two tables and the list of runs
    assert found["ids"] == found["all"]  # pictures do not take each other's parts


@needs_browser
def test_the_page_prints(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    main([str(sweep), "--html", str(file)])
    paper = tmp_path / "page.pdf"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(["chromium", *flags, f"--print-to-pdf={paper}", f"file://{file}"], capture_output=True, timeout=90, check=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 1 <= pages <= 6


@pytest.mark.slow
def test_a_sweep_from_one_line_to_its_page(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """What `make compare-demo` does, on a smaller model: comparable by construction, measured, compared, and passed on."""
    folder = tmp_path / "sweep"
    line = [sys.executable, "-m", "launcher", "-m", "+exp=compare_quickstart", f"model.id={base}", "data=files", f"data.path={chats}"]
    line += ["data.seq_len=64", "data.eval_fraction=0.3", "train.steps=8", "train.eval_every=4", "evaluation.general=sampled"]
    line += [
        "evaluation.rows=20",
        "evaluation.max_new_tokens=12",
        "evaluation.general_rows=20",
        "optim.warmup_steps=1",
        "train.global_batch=4",
    ]
    launch(
        cache,
        [
            *line,
            "optim.warmup_steps=1",
            "train.global_batch=4",
            "train.microbatch=2",
            "peft=none,ia3",
            "optim.lr_factor=30,300",
            f"hydra.sweep.dir={folder}",
        ],
    )
    tool(cache, folder)
    said = tool(cache, folder, "--html", folder / "compare.html", name="compare")
    assert "2 methods, 4 runs" in said
    assert "not compared" not in said
    text = (folder / "compare.html").read_text()
    assert text.count("<figure>") == 5
    comparison = compare([folder], None)
    for method in comparison.methods:
        losses = {run.lr: run.loss for run in method.tried}
        assert len(losses) == 2
        assert method.best.loss == min(losses.values())  # type: ignore[type-var]
        summary = json.loads((method.best.run_dir / "summary.json").read_text())
        assert method.figures.held_out is not None
        assert method.figures.held_out.value == pytest.approx(summary["eval_loss_after"], abs=1e-6)
    assert comparison.full is not None
    rules = tmp_path / "rules.yaml"
    rules.write_text("forgetting_at_most: 100.0\nsure: false\n")
    assert "the model passes" in tool(cache, comparison.full.best.run_dir, "--rules", rules, name="gate")
