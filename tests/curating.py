"""Rows to curate, and a curation in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tools.curate.__main__ import main

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
WORDS = ["".join(np.random.default_rng(seed).choice(LETTERS, 3 + seed % 6)) for seed in range(800)]


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def write(file: Path, rows: list[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def run(config: Path | str, *inputs: Path, out: Path, processes: int = 1) -> int:
    if isinstance(config, str):
        out.parent.mkdir(parents=True, exist_ok=True)
        text, config = config, out.parent / f"{out.name}.yaml"
        config.write_text(text)
    return main([str(config), *map(str, inputs), "--out", str(out), "--processes", str(processes), "--quiet"])


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
