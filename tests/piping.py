"""Pipelines of a test: their files, the launcher in this process, and three small stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.__main__ import main
from launcher.stages import Pipeline, read

FEW = [
    *("data.seq_len=64", "data.eval_fraction=0.1", "train.steps=6", "train.global_batch=4", "train.precision=fp32", "optim.lr=1e-2"),
    *("train.eval_every=null", "log.wandb=disabled", "launch.processes=1", "data.template=chatml", "checkpoint.every=2"),
]


def written(folder: Path, name: str = "tiny", **content: Any) -> str:
    """Write a pipeline file and return the option that finds it."""
    (folder / "presets" / "pipeline").mkdir(parents=True, exist_ok=True)
    (folder / "presets" / "pipeline" / f"{name}.yaml").write_text("# A tiny one.\n" + yaml.safe_dump(content, sort_keys=False))
    return str(folder / "presets")


def three_stages(base: Path, chats: Path, **more: Any) -> dict[str, Any]:
    """Return SFT, SFT on chosen answers of its own, and SFT again."""
    chosen = ["sample {model} {rows} --rows 8 --n 2 --max-new-tokens 6 --out {dir}/answers.jsonl"]
    chosen += ["select {dir}/answers.jsonl --reward length:max=5,soft=50 --keep-cut --out {dir}/chosen.jsonl"]
    return {
        "values": {"rows": str(chats)},
        "every": FEW,
        "stages": [
            {"name": "sft", "run": ["model=hf", f"model.id={base}", "data=files", "data.path={rows}"]},
            {"name": "rejection", "before": chosen, "run": ["data=files", "data.path={dir}/chosen.jsonl", "data.eval_fraction=0"]},
            {
                "name": "last",
                "run": ["data=files", "data.path={rows}", "train.steps=12"],
                "after": ["compare {dir} --csv {dir}/stages.csv"],
            },
        ],
    } | more


def pipeline_of(tmp_path: Path, *overrides: str, **content: Any) -> Pipeline:
    return read(["+pipeline=tiny", *overrides], written(tmp_path, **content))


def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run the launcher in this process; returns its exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["launcher", *words])
    try:
        code = main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capfd.readouterr()
    return code, said.out + said.err
