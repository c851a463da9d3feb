"""The rows that models are measured on: held-out ones of a run, and text of the base's own domain."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from trainers.cache import build_once, cache_root, content_key
from trainers.config.choices import DataSource, Layout, ObjectiveName, Reasoning, TooLong
from trainers.config.derived import compares, sources_of
from trainers.config.errors import ConfigError
from trainers.config.measured import SAMPLED
from trainers.config.mix import first_of
from trainers.config.schema import DataConfig, ObjectiveConfig, RunConfig
from trainers.data.pack import one_each
from trainers.data.prepare import Prepared, data_key, find_layout, open_prepared, prepare
from trainers.data.table import TokenTable, open_table, save_table
from trainers.data.tokenizer import tokenizer_hash
from trainers.generate.subject import Subject
from trainers.model.blueprint import positions_limit
from trainers.rundir import paths
from trainers.rundir.base import config_of
from trainers.rundir.files import try_json

Ints = NDArray[np.int64]
SAMPLES_AT_ONCE, SAMPLE_TOKENS = 16, 256
GENERAL = "general"
"""The source of a mixture whose held-out rows forgetting is measured on where nothing else is named."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Documents of a table that are measured, and a key of their content."""

    table: TokenTable
    documents: Ints
    key: str
    labels: tuple[str, ...] = ()
    """The names of classes, in the order of their numbers in the table."""


def held_out(config: RunConfig, tokenizer: PreTrainedTokenizerFast, labels: tuple[str, ...] = ()) -> EvalSet:
    """Return the rows of `evaluation.path`, else those that the run held out; of pairs all documents, two a pair.

    `labels` are the classes that a classifier knows: rows of another one are refused, by file and line. Raises ConfigError where
    there are no rows.
    """
    path = config.evaluation.path
    if path is not None:
        given = first_of(config.data)
        data = dataclasses.replace(given, source=DataSource.files, path=path, eval_path=None, eval_fraction=0.0, packing=False)
        data = dataclasses.replace(data, streaming=False)
        data = dataclasses.replace(data, split=data.eval_split or data.split, eval_split=None)
        if path != given.path:
            data = dataclasses.replace(data, config=None, data_files=[], revision=None)
        objective = dataclasses.replace(config.objective, labels=list(labels), class_weights=[])
        prepared = prepare(_with_objective(dataclasses.replace(config, data=data, objective=objective)), tokenizer=tokenizer)
        table: TokenTable | None = prepared.train
    else:
        prepared = _prepared(config, tokenizer)
        table = prepared.eval
    if table is None:
        raise ConfigError("evaluation.path", None, "the run held no rows out", "--path FILE, rows of the task that it has not trained on")
    names = tuple(prepared.report.get("labels", ()))
    return EvalSet(table=table, documents=np.arange(len(table.offsets) - 1), key=prepared.path.name, labels=names)


def answered(config: RunConfig, tokenizer: PreTrainedTokenizerFast, held: EvalSet) -> EvalSet:
    """Return the rows of `held` as they are answered: with data.reasoning=mask the reasoning is not a part of the prompt.

    Raises ConfigError where the run's own rows, which are prepared anew for that, have changed since it was trained.
    """
    parts = [config.data.reasoning, *(source.reasoning for source in config.data.mix.values())]
    if Reasoning.mask not in parts:
        return held
    mix = {name: dataclasses.replace(source, reasoning=_whole(source.reasoning)) for name, source in config.data.mix.items()}
    if config.evaluation.path is None:
        now = f"data-{data_key(config, tokenizer)}"
        if now != held.key:
            raise _has_changed(config, held.key, now)
    data = dataclasses.replace(config.data, reasoning=_whole(config.data.reasoning) or Reasoning.keep, mix=mix)
    config = dataclasses.replace(config, data=data)
    if config.evaluation.path is not None:
        return held_out(config, tokenizer)
    prepared = prepare(config, tokenizer=tokenizer)
    assert prepared.eval is not None  # they are those of `held`
    return EvalSet(table=prepared.eval, documents=np.arange(len(prepared.eval.offsets) - 1), key=prepared.path.name)


def _whole(reasoning: Reasoning | None) -> Reasoning | None:
    return Reasoning.keep if reasoning is Reasoning.mask else reasoning


def _with_objective(config: RunConfig) -> RunConfig:
    """Return a config whose objective takes its rows: one of pairs for pairs, else the run's own or one of single answers."""
    if config.objective.name is ObjectiveName.classify:
        return config
    of_pairs = dataclasses.replace(config, objective=ObjectiveConfig(name=ObjectiveName.dpo))
    with contextlib.suppress(ConfigError):  # what is wrong with rows of neither kind is said by who prepares them
        if find_layout(of_pairs, sources_of(config.data)[0]) in (Layout.preference, Layout.ranked):
            return of_pairs
    if not compares(config.objective.name):
        return config
    return dataclasses.replace(config, objective=ObjectiveConfig(name=ObjectiveName.sft))


def _prepared(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    """Return a run's data as it was prepared; raises ConfigError where it has changed since."""
    run_dir = Path(config.run_dir)
    begun = try_json(run_dir / paths.MANIFEST).get("prepared")
    kept = cache_root(config.data.prepared_dir) / str(begun)
    if begun is not None and kept.is_dir():  # the files that it is made of may have moved
        return open_prepared(kept)
    prepared = prepare(config, tokenizer=tokenizer)
    if begun is not None and begun != prepared.path.name:
        raise _has_changed(config, begun, prepared.path.name)
    return prepared


def _has_changed(config: RunConfig, begun: str, now: str) -> ConfigError:
    reason = f"the data has changed since {config.run_dir} was trained (prepared as {begun}, now {now})"
    return ConfigError("data.path", config.data.path, reason, "put the data back, or --path FILE")


def general(subject: Subject, device: torch.device) -> EvalSet | None:
    """Return the text that forgetting is measured on, of which every token counts, or held-out rows; None where none is named.

    Raises ConfigError where a run that is named has another tokenizer, or a source of the run's mixture has no held-out rows.
    """
    config, tokenizer = subject.config, subject.tokenizer
    name, rows = config.evaluation.general, config.evaluation.general_rows
    if name is None and GENERAL not in config.data.mix:
        return None
    if name is None or name in config.data.mix:
        return _of_source(config, tokenizer, name)
    if name == SAMPLED:
        return _sampled(subject, device, rows)
    if (Path(name) / paths.CONFIG).is_file():
        prepared = _prepared(config_of(Path(name)), tokenizer)
        if prepared.eval is None:
            raise ConfigError("evaluation.general", name, "the run held no rows out", "a file of text, or `sampled`")
        if prepared.report["tokenizer_hash"] != tokenizer_hash(tokenizer):
            raise ConfigError("evaluation.general", name, "the run has another tokenizer", "a file of text")
        return EvalSet(table=prepared.eval, documents=evenly(len(prepared.eval.offsets) - 1, rows), key=f"{prepared.path.name}-{rows}")
    data = DataConfig(
        path=name,
        seq_len=config.data.seq_len,
        too_long=TooLong.split,
        packing=False,
        max_lost_fraction=1.0,
        prepared_dir=config.data.prepared_dir,
    )
    text = dataclasses.replace(config, data=data, objective=ObjectiveConfig(name=ObjectiveName.cpt))
    prepared = prepare(text, tokenizer=tokenizer)
    return EvalSet(table=prepared.train, documents=evenly(len(prepared.train.offsets) - 1, rows), key=f"{prepared.path.name}-{rows}")


def _of_source(config: RunConfig, tokenizer: PreTrainedTokenizerFast, name: str | None) -> EvalSet | None:
    """Return held-out rows of a source of the run's mixture; of GENERAL, if it has some, where none is named."""
    prepared, rows = _prepared(config, tokenizer), config.evaluation.general_rows
    numbers = None if prepared.eval is None else prepared.eval.rows_of_sources().get(name or GENERAL)
    if prepared.eval is None or numbers is None:
        if name is None:
            return None
        reason = "this source of the mixture held no rows out"
        raise ConfigError("evaluation.general", name, reason, f"a file of text, or data.mix.{name}.eval_fraction=0.05 in the run")
    documents = prepared.eval.documents_of(numbers)
    return EvalSet(
        table=prepared.eval, documents=documents[evenly(len(documents), rows)], key=f"{prepared.path.name}-{name or GENERAL}-{rows}"
    )


def evenly(count: int, wanted: int) -> Ints:
    """Return so many of the numbers below `count`, from the first to the last and as far apart as they go; all where there are fewer."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def _sampled(subject: Subject, device: torch.device, rows: int) -> EvalSet:
    """Return text that the base writes itself, made once for its weights.

    On such text the loss of another model less that of the base is, in the mean, the divergence KL(base || model) a token: how far the
    model has gone from what the base was.
    """
    if subject.config.model.id is None:
        raise ConfigError("evaluation.general", SAMPLED, "the run began with random weights: no base could write a text", "a file of text")
    base, tokenizer = dataclasses.replace(subject, folder=None), subject.tokenizer
    first = next((number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if number is not None), None)
    if first is None:
        raise ConfigError("evaluation.general", SAMPLED, "the tokenizer has no token that a text begins with", "a file of text")
    key = content_key("sampled", 1, base.fingerprint, tokenizer_hash(tokenizer), rows)

    def build(folder: Path) -> None:
        model = base.open(torch.float32, device)
        limit = positions_limit(model.config)[0] or SAMPLE_TOKENS
        texts = _write_texts(model, int(first), rows, min(SAMPLE_TOKENS, limit))
        lengths = np.array([len(text) for text in texts])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        supervised = np.ones(int(offsets[-1]), np.uint8)
        supervised[offsets[:-1]] = 0
        order, rows_of_texts = one_each(len(texts))
        tokens = np.concatenate(texts).astype(np.int32)
        save_table(TokenTable(tokens=tokens, supervised=supervised, offsets=offsets, order=order, rows=rows_of_texts), folder)

    folder, _ = build_once(cache_root(subject.config.data.prepared_dir), f"sampled-{key}", build, "the base's own text")
    table = open_table(folder)
    return EvalSet(table=table, documents=np.arange(len(table.offsets) - 1), key=folder.name)


@torch.no_grad()
def _write_texts(model: PreTrainedModel, first: int, rows: int, longest: int) -> list[Ints]:
    """Return `rows` texts as ids, each token drawn as likely as the model holds it to be, from `first` through the end of the text."""
    torch.manual_seed(0)
    known: Any = model.generation_config.eos_token_id
    ends = sorted({first, *([known] if isinstance(known, int) else known or [])})  # several bases put BOS between texts, and no EOS
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest - 1, eos_token_id=ends, pad_token_id=first
    )
    texts: list[Ints] = []
    while len(texts) < rows:
        begun = torch.full((SAMPLES_AT_ONCE, 1), first, device=model.device)
        for row in model.generate(begun, attention_mask=torch.ones_like(begun)).cpu().numpy():  # type: ignore[operator]
            ended = np.flatnonzero(np.isin(row[1:], ends))
            texts.append(row[: ended[0] + 2] if len(ended) else row)
    return texts[:rows]
