"""What is known of a run's model and data on a machine that has neither weights nor, perhaps, the data."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from trainers.batch import Batch
from trainers.config.choices import DataSource, ObjectiveName
from trainers.config.derived import SAMPLED, SCORED, compares
from trainers.config.errors import ConfigError
from trainers.config.local import looks_local
from trainers.config.schema import ModelConfig, RunConfig
from trainers.data.loader import LENGTH_MULTIPLE
from trainers.data.prepare import find_prepared
from trainers.data.table import TokenTable
from trainers.data.tokenizer import load_tokenizer
from trainers.model import hub
from trainers.model.blueprint import Blueprint, blueprint_of, from_architecture, num_ids
from trainers.plan.request import PlanConfig
from trainers.plan.shapes import SHAPES
from trainers.processes import raise_exhausted

log = logging.getLogger("fulltune")


@dataclass
class _Tokens:
    """A tokenizer that is not here."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass(kw_only=True)
class Data:
    """How much there is to train on."""

    source: str
    """Where the numbers come from, in words."""
    seq_len: int
    """Tokens of the longest row that a microbatch can have."""
    rows: float | None
    """Rows of one pass; None where nobody knows."""
    tokens: float | None
    """Tokens of one pass, without padding."""
    measured: tuple[float, float] | None = None
    """Rows and documents that a reference is measured of, held-out ones included; None where the data are not prepared."""
    num_rows: int | None = None
    """Rows that the run takes, where the data say that."""
    in_row: int = 1
    """Sequences of `seq_len` tokens that a row has below each other: the two answers of a pair without packing."""

    @property
    def row_tokens(self) -> int:
        """Return the tokens of a row that is full."""
        return self.in_row * self.seq_len

    def steps(self, config: RunConfig) -> int | None:
        """Return the run's optimizer steps."""
        if self.num_rows is not None:
            return math.ceil(self.num_rows / config.train.global_batch)
        if config.train.steps is not None:
            return config.train.steps
        if self.rows is None:
            return None
        return math.ceil(max(1, round((config.train.epochs or 1.0) * self.rows)) / config.train.global_batch)


def read_model(config: RunConfig) -> tuple[Blueprint, list[str]]:
    """Return the model without values, and what a reader should know of it; raises ConfigError naming the field."""
    model, notes = config.model, []
    if model.id is None:
        config_of = _from_architecture(config)
    elif model.id in SHAPES and not Path(model.id).exists():
        fields = dict(SHAPES[model.id])
        config_of = AutoConfig.for_model(fields.pop("model_type"), **fields)
        notes.append(f"the architecture of {model.id} is the one that ships with fulltune")
    else:
        config_of = _fetch(model)
    with _offline():
        tokens = _vocabulary(config)
    blueprint = blueprint_of(model, config.seed, config_of, tokens)
    return (_headed(config, blueprint, notes) if config.objective.name in SCORED else blueprint), notes


def _headed(config: RunConfig, blueprint: Blueprint, notes: list[str]) -> Blueprint:
    """Return a blueprint with a head of scores: of the named classes, or of those of the prepared rows, else of two."""
    from trainers.model.scores import ScoreHead, with_head

    labels = tuple(config.objective.labels)
    if config.objective.name is ObjectiveName.classify and not labels:
        with contextlib.suppress(ConfigError), _offline():
            labels = tuple(prepared.report["labels"]) if (prepared := find_prepared(config)) is not None else ()
        if not labels:
            labels = ("0", "1")
            notes.append("the head is one of two classes: the rows are not prepared on this machine, and objective.labels is empty")
    return replace(blueprint, config=with_head(blueprint.config, ScoreHead(labels=labels, pad_id=0)), scores=True)


@contextmanager
def _offline() -> Iterator[None]:
    """Look only at what is on this machine: a plan downloads no tokenizer and no data."""
    import huggingface_hub.constants as hub

    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    variable, os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE"), "1"
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        os.environ.pop("HF_HUB_OFFLINE")
        os.environ.update({} if variable is None else {"HF_HUB_OFFLINE": variable})


def _from_architecture(config: RunConfig) -> PreTrainedConfig:
    size = config.model.architecture.get("vocab_size") or _vocabulary(config)
    return from_architecture(config.model.architecture, _Tokens(), size)


def _vocabulary(config: RunConfig) -> int:
    """Return the tokenizer's tokens; what it is asked to train, or 0 where it is not on this machine: no model grows for that."""
    if config.model.train_tokenizer:
        return config.model.train_tokenizer + len(config.model.add_tokens)
    try:
        return num_ids(load_tokenizer(config))
    except ConfigError:
        if config.model.id is None:
            raise
        return 0


def _fetch(model: ModelConfig) -> PreTrainedConfig:
    """Return a model's config, and have its code where it brings some, of the revision that is named; no weights."""
    assert model.id is not None
    if not looks_local(model.id):
        hub.require_readable(model.id, model.revision, model.convert)
    folder, _ = hub.fetch("model.id", model.id, model.revision, ("config.json", "*.py"))
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # whatever transformers or the hub client raises
        raise_exhausted(error)
        reason = (
            f"its config.json could not be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        )
        remedy = "hf auth login where it is gated; without a network model.id=DIR, a directory with its config.json"
        raise ConfigError("model.id", model.id, reason, remedy) from error
    return found


def read_data(config: RunConfig, plan: PlanConfig) -> Data:
    """Return how much there is to train on: from the prepared data, else `plan.tokens`, else nothing but `train.steps`."""
    if config.objective.name in SAMPLED:
        return _of_answers(config, plan)
    return _read_data(config, plan, 2 if compares(config.objective.name) and not config.data.packing else 1)


def _of_answers(config: RunConfig, plan: PlanConfig) -> Data:
    """Return how much there is where the model writes the answers itself; raises ConfigError for tokens of rows that are not there yet."""
    objective = f"objective={config.objective.name}"
    if plan.tokens is not None:
        reason = f"{objective} trains on answers that the model writes: nobody knows their tokens before"
        raise ConfigError("plan.tokens", plan.tokens, reason, "train.steps=100, or leave it out")
    words = "answers of the model itself, each row as long as data.seq_len lets it be"
    words += "" if config.train.steps is not None else "; the number of prompts, and so of steps, is not known here: train.steps=N gives it"
    return Data(source=words, seq_len=config.data.seq_len, rows=None, tokens=None)


def _read_data(config: RunConfig, plan: PlanConfig, in_row: int) -> Data:
    seq_len, batch = config.data.seq_len, config.train.global_batch
    try:
        with _offline():
            prepared = find_prepared(config)
    except ConfigError as error:
        log.debug("no prepared data: %s", error)
        prepared = None
    if prepared is not None and config.data.streaming:
        return Data(source=f"a stream (first shard {prepared.path.name})", seq_len=seq_len, rows=None, tokens=None, in_row=in_row)
    if prepared is not None:
        lengths = prepared.train.row_lengths()
        longest = seq_len if config.data.packing else min(seq_len, -(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        words = f"the prepared data ({prepared.path.name})"
        tables = [table for table in (prepared.train, prepared.eval) if table is not None]
        times = 1 if prepared.train.partners is None else 2  # prompts with answers to others in addition
        measured = float(times * sum(map(len, tables))), float(times * sum(len(table.offsets) - 1 for table in tables))
        found = Data(source=words, seq_len=longest, rows=float(len(lengths)), tokens=float(lengths.sum()), measured=measured, in_row=in_row)
        return _of_mixture(config, prepared.train, found) if prepared.train.sources else found
    if plan.tokens is not None:
        words = f"plan.tokens={plan.tokens:g}, in full rows: the data are not prepared on this machine"
        return Data(source=words, seq_len=seq_len, rows=math.ceil(plan.tokens / (in_row * seq_len)), tokens=plan.tokens, in_row=in_row)
    if config.train.steps is not None:
        words = f"train.steps={config.train.steps} of {batch} full rows: the data are not prepared on this machine"
        return Data(source=words, seq_len=seq_len, rows=None, tokens=None, in_row=in_row)
    how = "python -m tools.show_batch prepares them" if config.data.source is not DataSource.files or _is_here(config) else ""
    words = f"unknown: the data are not prepared on this machine{'; ' if how else ''}{how}; plan.tokens=N says how many tokens one pass has"
    return Data(source=words, seq_len=seq_len, rows=None, tokens=None, in_row=in_row)


def _of_mixture(config: RunConfig, table: TokenTable, whole: Data) -> Data:
    """Return how much there is of a mixture: a pass has as many rows as all sources, in the shares of the run."""
    from trainers.data.mixture import mixture_of

    mixture = mixture_of(config, table)
    found = mixture.report()
    rows = mixture.pass_rows
    tokens = sum(of["row_share"] * of["tokens"] / of["rows"] for of in found.values()) * rows
    shares = ", ".join(f"{name} {of['row_share']:.1%} of the rows in {of['passes']:.2f} passes" for name, of in found.items())
    return replace(whole, source=f"{whole.source}, a mixture: {shares}", rows=float(rows), tokens=tokens, num_rows=mixture.num_rows)


def most_of_sources(config: RunConfig, batch: Batch) -> Batch:
    """Return the most that rows of an encoder-decoder take: the longest source and the longest target of the prepared data in each.

    Both as long as `batch`, which has a row of each, where nobody knows them: they may be of different rows.
    """
    rows, longest = batch.labels.shape
    sources = targets = longest
    with contextlib.suppress(ConfigError), _offline():
        if (prepared := find_prepared(config)) is not None:
            lengths, labels = np.diff(prepared.train.offsets), np.diff(prepared.train.label_starts)
            sources, targets = (LENGTH_MULTIPLE * -(-int(most) // LENGTH_MULTIPLE) for most in ((lengths - labels).max(), labels.max()))
    ids = torch.zeros(rows, targets, dtype=torch.int64)
    source = torch.zeros(rows, sources, dtype=torch.int64)
    made = Batch.of(ids, ids.clone(), torch.arange(targets).repeat(rows, 1), source)
    signals = {name: values[:, :1].expand(-1, targets, *values.shape[2:]).clone() for name, values in batch.signals.items()}
    return replace(made, signals=signals)


def _is_here(config: RunConfig) -> bool:
    files = [source.path for source in config.data.mix.values() if source.source is DataSource.files] or [config.data.path]
    return all(path is not None and Path(path).exists() for path in files)
