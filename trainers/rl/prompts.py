"""Rows of any layout as prompts: the turns before the answer, as ids and as what rewards read. Made once per content, like all data."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from trainers.cache import build_once, cache_root, content_key, require_whole
from trainers.config.derived import sources_of
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data import sources
from trainers.data.ends import stop_ids
from trainers.data.prepare import QUANTILES, Prepared, open_prepared
from trainers.data.table import TokenTable, save_table
from trainers.data.tokenizer import template_hash, tokenizer_hash
from trainers.generate.prompts import Prompt, read_each, rendered
from trainers.health.activity import watch

VERSION = 1
"""Of what is on disk and how it was made: raise it when either changes."""
ROWS = "rows.jsonl"
"""Next to a split's table: of each prompt its messages, the reference that its row has, and the row."""
BEAT_EVERY = 512


def prepare_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerFast, progress: bool = False) -> Prepared:
    """Return the run's prompts, each a document without labels; whichever process comes first makes them.

    Raises ConfigError for a row without a prompt, and where too many prompts leave no room for an answer.
    """
    root = cache_root(config.data.prepared_dir)
    name = f"data-{_key(config, tokenizer)}"
    folder, reused = build_once(root, name, lambda partial: _build(config, tokenizer, partial), "the prepared prompts")
    if reused and progress:
        require_whole(folder, "the prepared prompts")
    return open_prepared(folder, reused)


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return what rewards read of each prompt of a split: `prompt`, `reference` and `row`."""
    with (folder / split / ROWS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _key(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    data = config.data
    options = [
        data.eval_fraction,
        config.seed if data.eval_fraction else 0,
        data.max_rows,
        data.ignore,
        _room(config),
        data.max_lost_fraction,
    ]
    marks = [sources.fingerprint(source, config.objective.name) for source in sources_of(data)]
    return content_key("prompts", VERSION, marks, tokenizer_hash(tokenizer), template_hash(tokenizer), options)


def _room(config: RunConfig) -> int:
    """Return how many tokens a prompt may have."""
    return config.data.seq_len - config.rl.max_new_tokens


def _build(config: RunConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    started, room, data = time.monotonic(), _room(config), config.data
    found: dict[str, list[tuple[Prompt, list[int]]]] = {}
    long = total = 0
    for split, source in zip(("train", "eval"), sources_of(data), strict=False):
        found[split] = []
        for number, prompt in enumerate(
            islice(read_each(source, f"data.{'eval_' if split == 'eval' else ''}path", data.ignore), data.max_rows)
        ):
            ids = rendered(prompt, tokenizer)
            total, long = total + 1, long + (len(ids) > room)
            if ids and len(ids) <= room:
                found[split].append((prompt, ids))
            if number % BEAT_EVERY == 0:
                watch.beat()
    if not total:
        raise ConfigError("data.path", data.path, "there are no rows")
    if long > data.max_lost_fraction * total:
        reason = f"{long:,} of {total:,} prompts have more than {room} tokens, which is data.seq_len less rl.max_new_tokens"
        raise ConfigError("data.seq_len", data.seq_len, reason, "a longer data.seq_len, or a larger data.max_lost_fraction")
    if data.eval_fraction:
        found |= _split(found["train"], data.eval_fraction, config.seed)
    for split, prompts in found.items():
        if not prompts:
            raise ConfigError("data.path", data.path, f"no {'held-out ' if split == 'eval' else ''}prompt is left")
        _save(prompts, folder / split)
    report = {
        "fingerprint": folder.name.split("-")[2],
        "layout": "prompts",
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(tokenizer),
        "rows": total,
        "files": {name: total for source in sources_of(data)[:1] for name in sources.names(source)},
        "left_out": {},
        "supervised_before": 1,
        **dict.fromkeys(("supervised_lost", "truncated", "split", "bad", "overlap"), 0),
        "dropped": long,
        "stops": {str(tokenizer.convert_ids_to_tokens(number)): number for number in stop_ids(tokenizer)},
        "prepared_at": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(time.monotonic() - started, 3),
        "rows_per_second": round(total / max(time.monotonic() - started, 1e-9), 1),
        "splits": {split: _lengths([ids for _, ids in prompts]) for split, prompts in found.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2))


def _split(prompts: list[tuple[Prompt, list[int]]], fraction: float, seed: int) -> dict[str, list[tuple[Prompt, list[int]]]]:
    """Return which prompts are trained and which are held out, equal ones on one side."""
    marks = [hashlib.sha256(json.dumps([seed, ids]).encode()).hexdigest() for _, ids in prompts]
    distinct = sorted(set(marks))
    held = set(distinct[: max(1, round(fraction * len(distinct)))])
    sides: dict[str, list[tuple[Prompt, list[int]]]] = {"train": [], "eval": []}
    for prompt, mark in zip(prompts, marks, strict=True):
        sides["eval" if mark in held else "train"].append(prompt)
    return sides


def _save(prompts: list[tuple[Prompt, list[int]]], folder: Path) -> None:
    save_table(table_of([ids for _, ids in prompts], [[False] * len(ids) for _, ids in prompts]), folder)
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        for prompt, _ in prompts:
            about = asdict(prompt)
            row = {"prompt": about["messages"], "tools": about["tools"], "reference": prompt.reference, "row": prompt.row}
            file.write(json.dumps(row | {"at": f"{prompt.file}:{prompt.line}"}, ensure_ascii=False, default=str) + "\n")


def table_of(documents: list[list[int]], labels: list[list[bool]], signals: dict[str, Any] | None = None) -> TokenTable:
    """Return documents as a table, a row each, and which of their tokens are trained; the first of each has nothing before it."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    supervised = [np.array(kept, bool) & (np.arange(len(kept)) > 0) for kept in labels]
    return TokenTable(
        tokens=np.concatenate([np.zeros(0, np.int32), *(np.array(ids, np.int32) for ids in documents)]),
        supervised=np.concatenate([np.zeros(0, bool), *supervised]).astype(np.uint8),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        order=np.arange(len(documents), dtype=np.int64),
        rows=np.arange(len(documents) + 1, dtype=np.int64),
        signals=signals or {},
    )


def _lengths(documents: list[list[int]]) -> dict[str, Any]:
    lengths = [len(ids) for ids in documents]
    counts = {"documents": len(documents), "rows": len(documents), "tokens": sum(lengths), "supervised_tokens": 0, "efficiency": 1.0}
    return counts | {"lengths": {name: int(np.quantile(lengths, at)) for name, at in QUANTILES.items()}}
