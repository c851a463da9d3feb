"""Benchmarks of the lm-eval package, where it is installed (pip install lm-eval): on a task of our own, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import tool

TASK = """
task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": "the cat sat", "choices": [" on a mat", " two dogs ran"], "answer": number % 2} for number in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cats.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder


def test_a_task_of_our_own(finished: Path, cache: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install lm-eval; it would be asked for a task of two choices")
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    said = tool(cache, run, "--rows", "0", "--lm-eval", "cats", "--lm-eval-dir", tasks)
    assert "cats, acc" in said
    found = json.loads((run / "evaluation" / "run.json").read_text())["lm_eval"]["cats"]["acc"]
    assert found["value"] == 0.5  # the same question six times, whose answer is now the one and now the other
    assert found["documents"] == 6
    assert "has no task" in tool(cache, run, "--rows", "0", "--lm-eval", "dogs", "--lm-eval-dir", tasks, expect=2)


def test_without_the_package_one_message_says_so(finished: Path, cache: Path, tasks: Path, tmp_path: Path) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        said = tool(cache, run, "--rows", "0", "--lm-eval", "cats", "--lm-eval-dir", tasks, expect=2)
        assert "pip install lm-eval" in said
        assert "Traceback" not in said
