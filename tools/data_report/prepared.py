"""What a run's prepared data add to a report: lengths in tokens, what preparation counted, and held-out documents that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from tools.curate.config import Personal
from tools.curate.notes import SHOWN
from tools.curate.personal import hidden
from trainers.config.derived import sources_of
from trainers.config.mix import sources_of_mix
from trainers.config.schema import RunConfig
from trainers.data import sources
from trainers.data.formats import BadRow
from trainers.data.prepare import prepare
from trainers.data.report import summary
from trainers.data.sources import Row
from trainers.data.table import TokenTable
from trainers.data.tokenizer import load_tokenizer

PAIRS = 8
"""Held-out documents that are shown next to the trained ones that they are like."""


def rows_of(config: RunConfig) -> Iterator[Row]:
    """Yield the training rows of a run, those of a mixture's sources one after the other."""
    return chain.from_iterable(map(_rows, sources_of_mix(config).values() or [config]))


def _rows(config: RunConfig) -> Iterator[Row]:
    for row in islice(sources.rows(sources_of(config.data)[0], config.objective.name), config.data.max_rows):
        try:
            yield row._replace(data=sources.parse(row, config.data.ignore)) if config.data.ignore else row
        except BadRow:  # which the report names
            yield row


def about(config: RunConfig) -> dict[str, Any]:
    """Prepare a run's data if need be, and return what of them the report shows."""
    tokenizer = load_tokenizer(config)
    data = prepare(config, progress=True, tokenizer=tokenizer)
    lengths = np.diff(data.train.offsets)
    bits, counts = np.unique(np.frexp(lengths.astype(np.float64))[1], return_counts=True)
    held_out = data.eval
    pairs = data.report.get("leakage", {}).get("pairs", [])[:PAIRS] if held_out is not None else []
    texts = [
        {
            "similarity": similarity,
            "texts": [
                hidden(str(tokenizer.decode(_tokens(table, number))), Personal())[:SHOWN]
                for table, number in ((data.train, trained), (held_out, other))
            ],
        }
        for other, trained, similarity in pairs
        if held_out is not None
    ]
    return {
        "summary": summary(data.report, data.reused),
        "seq_len": config.data.seq_len,
        "splits": data.report["splits"],
        "glance": {name: one.get("glance") for name, one in data.report.get("sources", {"": data.report}).items()},
        "leakage": data.report.get("leakage"),
        "token_bits": dict(zip(map(str, bits.tolist()), counts.tolist(), strict=True)),
        "leaked": texts,
    }


def _tokens(table: TokenTable, document: int) -> list[int]:
    found: list[int] = table.tokens[int(table.offsets[document]) : int(table.offsets[document + 1])].tolist()
    return found
