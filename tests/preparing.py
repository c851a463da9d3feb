"""Rows in a file, prepared, and what of each document is trained."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from chat_tokenizers import tokenizer_of

from trainers.config.choices import ObjectiveName
from trainers.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from trainers.data.prepare import Prepared, prepare
from trainers.data.table import TokenTable

TOKENIZER = tokenizer_of("chatml")


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(path: Path | str, objective: str = "sft", **data: Any) -> RunConfig:
    """Return a run that prepares `path` into a folder next to it."""
    kept = str(Path(path).parent / "kept")
    data = {"prepared_dir": kept, "seq_len": 512, "processes": 1, "packing": False} | data
    return RunConfig(
        model=ModelConfig(id="a/model"), data=DataConfig(path=str(path), **data), objective=ObjectiveConfig(name=ObjectiveName(objective))
    )


def prepared(path: Path | str, objective: str = "sft", template: bool = True, **data: Any) -> Prepared:
    tokenizer = TOKENIZER
    if not template:
        tokenizer = tokenizer_of("chatml")
        tokenizer.chat_template = None
    return prepare(settings(path, objective, **data), tokenizer=tokenizer)


def marked(table: TokenTable) -> list[str]:
    """Return each document as text, what is trained between ⟦ and ⟧."""
    found = []
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        tokens, supervised = table.tokens[start:end], table.supervised[start:end]
        edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(tokens)]
        parts = [(TOKENIZER.decode(tokens[one:other]), supervised[one]) for one, other in pairwise(edges)]
        found.append("".join(f"⟦{text}⟧" if trained else text for text, trained in parts))
    return found


def trained(path: Path | str, objective: str = "sft", template: bool = True, **data: Any) -> list[str]:
    """Return what is trained of each document, in order, one string a stretch joined by `|`."""
    documents = marked(prepared(path, objective, template, **data).train)
    return ["|".join(part.split("⟧")[0] for part in text.split("⟦")[1:]) for text in documents]
