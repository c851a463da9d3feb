"""Preparation and packing, next to the best public packer."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from trainers import host
from trainers.config.choices import DataSource
from trainers.config.derived import sources_of
from trainers.config.errors import plural
from trainers.config.schema import DataConfig, ModelConfig, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainers.data.encode import Documents, Encoder
    from trainers.data.sources import Row


REFERENCE = {"efficiency": 0.9890, "pack_seconds": 0.14, "rows_per_second": 7641}
"""The best public packer on gsm8k_train with GPT-2's tokenizer at 2,048 tokens, tokenising on one core."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench data`."""
    parser.add_argument("--path", help="rows (default: the documentation of this Python, as conversations)")
    parser.add_argument("--tokenizer", help="tokenizer directory or hub id (default: one trained on the rows)")
    parser.add_argument("--template", help="chat template: a Jinja file or `chatml`")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a row (default 2048)")


def run(options: argparse.Namespace) -> None:
    """Print rows a second with one process and with all cores, next to the bare tokenizer, and how well rows are packed."""
    from trainers.data import prepare, sources
    from trainers.data.encode import encoder_of
    from trainers.data.pack import pack
    from trainers.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        config = _config(options, folder)
        tokenizer = load_tokenizer(config)
        source = sources_of(config.data)[0]
        rows = list(sources.rows(source, config.objective.name))
        encoder = encoder_of(config, tokenizer, prepare.find_layout(config, source))
        table = Table(
            "measured",
            "here",
            "best public packer on gsm8k_train, gpt2, 2,048",
            title=f"{len(rows):,} rows, {options.seq_len} tokens a row",
        )
        bare = _bare(tokenizer, encoder, rows)
        table.add_row("bare tokenizer, one core, offsets and no mask", f"{bare:,.0f} rows/s", "")
        for processes in sorted({1, host.cores()}):
            rate, documents = _encode(encoder, rows, processes)
            reference = f"{REFERENCE['rows_per_second']:,} rows/s" if processes == 1 else ""
            table.add_row(f"rows to masked tokens, {plural(processes, 'process')}", f"{rate:,.0f} rows/s", reference)
        lengths = np.concatenate([part.lengths for part in documents])
        started = time.perf_counter()
        packed = len(pack(lengths, options.seq_len)[1]) - 1
        seconds = time.perf_counter() - started
    table.add_row("packing", f"{seconds:.3f} s", f"{REFERENCE['pack_seconds']:.2f} s")
    efficiency = lengths.sum() / (packed * options.seq_len)
    table.add_row(f"filled, in {packed:,} rows", f"{efficiency:.2%}", f"{REFERENCE['efficiency']:.2%}")
    table.add_row("fewest rows possible", f"{-(-int(lengths.sum()) // options.seq_len):,}", "")
    Console().print(table)


def _config(options: argparse.Namespace, folder: str) -> RunConfig:
    files = options.path is not None
    model = ModelConfig(tokenizer=options.tokenizer) if options.tokenizer else ModelConfig(train_tokenizer=4096)
    source = DataSource.files if files else DataSource.python_docs
    return RunConfig(
        model=model,
        data=DataConfig(source=source, path=options.path, template=options.template, seq_len=options.seq_len, prepared_dir=folder),
    )


def _bare(tokenizer: PreTrainedTokenizerFast, encoder: Encoder, rows: list[Row]) -> float:
    """Return rows a second of the tokenizer's own call on the rendered texts, on one core."""
    from trainers.data.sources import parse

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = [item.text for row in islice(rows, 4000) for item in encoder.render(parse(row))[0]]
    tokenizer(texts[:100])
    started = time.perf_counter()
    for at in range(0, len(texts), 256):
        tokenizer(texts[at : at + 256], add_special_tokens=False, return_offsets_mapping=True)
    return len(texts) / (time.perf_counter() - started)


def _encode(encoder: Encoder, rows: list[Row], processes: int) -> tuple[float, list[Documents]]:
    from trainers.data.prepare import encode_rows

    started = time.perf_counter()
    documents = list(encode_rows(encoder, iter(rows), processes))
    return len(rows) / (time.perf_counter() - started), documents
