"""The sources of a mixture as one table, without a copy of their tokens, and one report of their preparations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainers.batch import WEIGHT
from trainers.config.choices import Layout
from trainers.config.derived import sources_of
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data import sources
from trainers.data.encode import COUNTS, encoder_of
from trainers.data.formats import BadRow
from trainers.data.leakage import shared
from trainers.data.table import TokenTable, save_joined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
Splits = Mapping[str, TokenTable]
"""Tables of a source by their names, train and eval."""


def render_first(config: RunConfig, tokenizer: PreTrainedTokenizerFast, layout: Layout) -> None:
    """Raise what a source's first row would, such as that its template is missing, before an earlier source takes hours."""
    encoder = encoder_of(config, tokenizer, layout)
    for row in islice(sources.rows(sources_of(config.data)[0], config.objective.name), 100):
        with suppress(BadRow):
            encoder.render(sources.parse(row, config.data.ignore))
            return


def join(
    splits: Mapping[str, Splits],
    folders: Mapping[str, Path],
    reports: Mapping[str, dict[str, Any]],
    folder: Path,
    special: NDArray[np.bool_],
) -> None:
    """Write the joined tables and their report into a folder next to those of the sources.

    `special` says of each id whether it is an added token, (vocabulary,).
    """
    for split in ("train", "eval"):
        tables = {name: tables[split] for name, tables in splits.items() if split in tables}
        if tables:
            _require_alike(split, tables)
            places = {name: f"../../{folders[name].name}/{split}" for name in tables}
            save_joined(tables, places, folder / split)
    whole = joined_report(splits, reports) | {"fingerprint": folder.name.split("-")[2]} | shared([*folders.values()], special)
    (folder / "report.json").write_text(json.dumps(whole, indent=2))


def joined_report(splits: Mapping[str, Splits], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one report of all sources, with those of each under `sources`."""
    first, held = next(iter(reports.values())), list(reports.values())
    counts = {name: sum(report.get(name, 0) for report in held) for name in (*COUNTS, "overlap")}
    seconds = sum(report["seconds"] for report in held)
    return {
        "layout": ", ".join(dict.fromkeys(report["layout"] for report in held)),
        **{name: first[name] for name in ("tokenizer_hash", "template_hash", "stops")},
        **counts,
        "files": {name: count for report in held for name, count in report["files"].items()},
        "left_out": {reason: names for report in held for reason, names in report["left_out"].items()},
        "template_leaves_out": _template_leaves_out([report["template_leaves_out"] for report in held]),
        "unread": sorted({name for report in held for name in report["unread"]}),
        "prepared_at": max(report["prepared_at"] for report in held),
        "seconds": round(seconds, 3),
        "rows_per_second": round(counts["rows"] / max(seconds, 1e-3), 1),
        "splits": {
            split: _joined_split({name: tables[split] for name, tables in splits.items() if split in tables}, split, held)
            for split in ("train", "eval")
            if any(split in tables for tables in splits.values())
        },
        "sources": dict(reports),
    }


def _joined_split(tables: Mapping[str, TokenTable], split: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [report["splits"][split] for report in reports if split in report["splits"]]
    lengths = np.concatenate([np.diff(table.offsets) for table in tables.values()])
    sums: dict[str, Any] = {
        name: sum(part[name] for part in parts)
        for name in ("documents", "pairs", "rows", "tokens", "supervised_tokens")
        if name in parts[0]
    }
    room = sum(part["tokens"] / part["efficiency"] for part in parts)
    quantiles = {name: int(np.quantile(lengths, share, method="nearest")) for name, share in QUANTILES.items()}
    sums |= _weights(list(tables.values()))
    return {**sums, "lengths": quantiles, "efficiency": sums["tokens"] / room, "pack_seconds": sum(part["pack_seconds"] for part in parts)}


def _weights(tables: list[TokenTable]) -> dict[str, dict[str, float]]:
    """Return the smallest, mean and largest weight of all sources; nothing where no source has weights."""
    held = [table.signals[WEIGHT] for table in tables if WEIGHT in table.signals]
    if not held:
        return {}
    counts = [int(table.label_starts[-1]) if held[0].ndim == 2 else len(table.offsets) - 1 for table in tables]
    total = sum(count if table.weights is None else float(table.weights.sum()) for table, count in zip(tables, counts, strict=True))
    ones = [1.0] if len(held) < len(tables) else []
    smallest = min([*ones, *(float(weights.min()) for weights in held)])
    largest = max([*ones, *(float(weights.max()) for weights in held)])
    return {"weights": {"min": smallest, "mean": total / sum(counts), "max": largest}}


def _template_leaves_out(found: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    rows, missing = Counter[str](), Counter[str]()
    for kinds in found:
        rows.update({kind: counts["rows"] for kind, counts in kinds.items()})
        missing.update({kind: counts["missing"] for kind, counts in kinds.items()})
    return {kind: {"rows": rows[kind], "missing": missing[kind]} for kind in sorted(rows)}


def _require_alike(split: str, tables: Mapping[str, TokenTable]) -> None:
    """Raise ConfigError where sources have other kinds of rows than the first."""
    (first, known), *others = ((name, sorted(table.signals.keys() - {WEIGHT})) for name, table in tables.items())
    for name, signals in others:
        if signals != known:
            reason = (
                f"the {split} rows carry {', '.join(signals) or 'tokens alone'}, and those of {first} {', '.join(known) or 'tokens alone'}"
            )
            raise ConfigError(f"data.mix.{name}", name, reason, "sources whose rows carry the same")
