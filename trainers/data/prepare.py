"""Rows to packed tokens on disk, once per content hash and outside the process group: ranks memory-map the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainers import host
from trainers.batch import WEIGHT
from trainers.cache import build_once, cache_root, content_key, require_whole
from trainers.config.choices import Layout, ObjectiveName, PairsOf, Reasoning, TooLong
from trainers.config.derived import DESIRABLE, OF_STREAMS, SCORED, Source, compares, rows_as, sources_of
from trainers.config.errors import ConfigError
from trainers.config.mixtures import OF_LABELS
from trainers.config.schema import DataConfig, RunConfig
from trainers.data import formats, sources
from trainers.data.encode import COUNTS, Documents, Encoder, encoder_of, special_tokens
from trainers.data.ends import chat_remedy, may_grow, stop_ids
from trainers.data.formats import BadRow
from trainers.data.glance import WIDTH, Glance, Keys
from trainers.data.leakage import marks_file, shared
from trainers.data.masks import BUILT_IN
from trainers.data.pack import one_each, pack, pack_units
from trainers.data.parts import KINDS, LeftOut
from trainers.data.report import bar_of
from trainers.data.sources import Row
from trainers.data.table import TokenTable, open_table, save_table
from trainers.data.tokenizer import is_trained, load_tokenizer, template_hash, tokenizer_hash, with_template
from trainers.health.activity import watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainers.data.weights import Weights

VERSION = 3
"""Of what is on disk and how it was made: raise it when either changes."""
SMALL = 2000
"""Rows up to which starting processes costs more than it saves."""
CHUNK = 512
SHOWN = 5
QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
RENDERING = (
    "layout",
    "supervise",
    "seq_len",
    "too_long",
    "eval_fraction",
    "packing",
    "skip_bad_rows",
    "max_lost_fraction",
    "ignore",
    "document",
    "max_left_out_fraction",
)

LATER = {"pairs": "", "reasoning": " of the assistant", "styles": "", "style_rows": "", "style_instruction": ""}
"""Counted where they are not what they are by default, so that data that were prepared before keep their key.

With words of their own where what they do has changed since.
"""
CHECKS = ("skip_bad_rows", "max_lost_fraction", "max_left_out_fraction")
"""Of these, what decides whether rows are accepted and not what becomes of them."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Prepared data, memory-mapped."""

    path: Path
    train: TokenTable
    eval: TokenTable | None
    report: dict[str, Any]
    """What report.summary prints."""
    reused: bool
    """It was there already."""


def prepare(config: RunConfig, progress: bool = False, tokenizer: PreTrainedTokenizerFast | None = None) -> Prepared:
    """Return the run's data, of a stream the first shard, prepared by whichever process comes first; the others wait for it.

    Raises ConfigError for bad rows (unless `data.skip_bad_rows`), for more lost than `data.max_lost_fraction`, and where
    nothing is left to train. With `progress` this process draws a bar on stderr, and checks the hashes of data that were there already.
    """
    tokenizer = tokenizer or load_tokenizer(config)
    if config.data.mix:
        return _prepare_mix(config, progress, tokenizer)
    name = f"data-{data_key(config, tokenizer)}"
    root = cache_root(config.data.prepared_dir)
    part = first_shard(config) if config.data.streaming else config
    folder, reused = build_once(root, name, lambda partial: _build(part, tokenizer, partial, progress), "the prepared data")
    if reused and progress:
        require_whole(folder, "the prepared data")
    prepared = open_prepared(folder, reused)
    _rename(config, prepared.report)
    if config.data.streaming:
        prepared.report["stream"] = {name: getattr(config.data, name) for name in OF_STREAMS}
    return prepared


def first_shard(config: RunConfig) -> RunConfig:
    """Return a run whose data are the first shard of a stream, which represents all until training begins."""
    data = config.data
    most = data.shard_rows if data.max_rows is None else min(data.shard_rows, data.max_rows)
    return replace(config, data=replace(data, streaming=False, max_rows=most))


def _prepare_mix(config: RunConfig, progress: bool, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    """Prepare each source under its own key, and join their tables; raises ConfigError, which names the source."""
    from trainers.config.mix import named, sources_of_mix
    from trainers.data.joint import join, joined_report, render_first

    parts: dict[str, Prepared] = {}
    runs = {name: (one, with_template(one, tokenizer)) for name, one in sources_of_mix(config).items()}
    for name, (one, own) in runs.items():
        with named(name):
            render_first(one, own, find_layout(one, sources_of(one.data)[0]))
    for name, (one, own) in runs.items():
        with named(name):
            parts[name] = prepare(one, progress, own)
    splits = {name: {"train": part.train} | ({} if part.eval is None else {"eval": part.eval}) for name, part in parts.items()}
    folders, reports = {name: part.path for name, part in parts.items()}, {name: part.report for name, part in parts.items()}
    key = f"data-{data_key(config, tokenizer)}"
    root = cache_root(config.data.prepared_dir)
    special = special_tokens(tokenizer)
    folder, reused = build_once(root, key, lambda partial: join(splits, folders, reports, partial, special), "the joined data")
    if reused and progress:
        require_whole(folder, "the joined data")
    found = open_prepared(folder, reused and all(part.reused for part in parts.values()))
    return replace(found, report=found.report | joined_report(splits, reports))


def _rename(config: RunConfig, report: dict[str, Any]) -> None:
    """Call the files of data that were prepared before by the names that they have now."""
    names = [name for source in sources_of(config.data) for name in sources.names(source)]
    if len(names) == len(report["files"]):
        report["files"] = dict(zip(names, report["files"].values(), strict=True))
    report["left_out"] = _left_out(config)


def find_prepared(config: RunConfig) -> Prepared | None:
    """Return the run's data where they are prepared already, None where they are not, or that cannot be known without making something.

    Raises ConfigError as `prepare` does where tokenizer or data could not be loaded.
    """
    if config.model.train_tokenizer and not is_trained(config):
        return None
    folder = cache_root(config.data.prepared_dir) / f"data-{data_key(config, load_tokenizer(config))}"
    return open_prepared(folder) if folder.is_dir() else None


def open_prepared(folder: Path, reused: bool = True) -> Prepared:
    """Return what `prepare` has left in a folder."""
    has_eval = (folder / "eval").is_dir()
    return Prepared(
        path=folder,
        train=open_table(folder / "train"),
        eval=open_table(folder / "eval") if has_eval else None,
        report=json.loads((folder / "report.json").read_text()),
        reused=reused,
    )


def data_key(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the content hash: data, tokenizer, template and every option that changes the result.

    Files of a stream, but not its held-out rows, are told by size and time, and its settings that only check rows may change while
    it is read.
    """
    data = config.data
    if data.mix:
        from trainers.config.mix import sources_of_mix

        return content_key(VERSION, [[name, data_key(one, with_template(one, tokenizer))] for name, one in sources_of_mix(config).items()])
    options = {name: str(getattr(data, name)) for name in RENDERING if not (data.streaming and name in CHECKS)}
    options |= {"shard_rows": str(data.shard_rows)} if data.streaming else {}
    options |= {} if data.max_rows is None else {"max_rows": str(data.max_rows)}
    options |= {"objective": str(rows_as(config.objective.name)), "seed": str(config.seed if data.eval_fraction else 0)}
    options |= {"labels": str(config.objective.labels)} if config.objective.labels else {"of": ""} if config.model.encoder_decoder else {}
    options |= {name: f"{getattr(data, name)}{now}" for name, now in LATER.items() if getattr(data, name) != getattr(DataConfig(), name)}
    # rows with weights were bad rows once, which skipping left out
    options |= {"weights": "read"} if data.skip_bad_rows and not data.streaming else {}
    trained, *held_out = sources_of(data)
    marks = [sources.fingerprint(trained, config.objective.name, data.streaming)]
    marks += [sources.fingerprint(source, config.objective.name) for source in held_out]
    return content_key(VERSION, marks, tokenizer_hash(tokenizer), template_hash(tokenizer), options)


def _build(config: RunConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, progress: bool) -> None:
    started = time.monotonic()
    places = sources_of(config.data)
    layouts = [find_layout(config, source) for source in places]
    labels: tuple[str, ...] = ()
    if config.objective.name is ObjectiveName.classify:
        from trainers.data.scored import find_labels

        labels = find_labels(config, places[0])
    stores = {name: Store(folder, name) for name in ("train", "eval")[: len(layouts)]}
    with bar_of(progress) as advance:
        for store, source, layout in zip(stores.values(), places, layouts, strict=True):
            rows = sources.rows(source, config.objective.name)
            rows = islice(rows, config.data.max_rows) if store.name == "train" else rows
            encode_all(config, encoder_of(config, tokenizer, layout, labels), rows, store, advance)
    counts = {name: sum(store.counts[name] for store in stores.values()) for name in COUNTS}
    check_losses(config, counts)
    left_out = LeftOut()
    for store in stores.values():
        left_out.update(store.left_out)
    check_left_out(config, left_out, tokenizer)
    splits = _split(config, stores)
    report = {name: save_split(config, store, keep, folder / name) for name, (store, keep) in splits.items()}
    seen = {"glance": stores["train"].glance.report(stores["train"].marks())} | shared([folder], special_tokens(tokenizer))
    for store in stores.values():
        store.remove()
    seconds = time.monotonic() - started
    overlap = stores["train"].num_documents - int(splits["train"][1].sum()) if "eval" in stores else 0
    whole = {
        "fingerprint": folder.name.split("-")[2],
        "layout": ", ".join(dict.fromkeys(layouts)),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(tokenizer),
        **counts,
        "files": {
            name: store.files_read.get(name, 0)
            for store, source in zip(stores.values(), places, strict=True)
            for name in sources.names(source)
        },
        "left_out": _left_out(config),
        "overlap": overlap,
        "stops": {token: int(number) for number, token in _stops(config, tokenizer)},
        "template_leaves_out": {
            kind: {"rows": left_out.rows[kind], "missing": number} for kind, number in sorted(left_out.missing.items())
        },
        "unread": sorted(set().union(*(store.unread for store in stores.values()))),
        "prepared_at": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(seconds, 3),
        "rows_per_second": round(counts["rows"] / seconds, 1),
        "splits": report,
        **seen,
        **(_scored(folder, tokenizer, list(splits), labels) if config.objective.name in SCORED else {}),
    }
    (folder / "report.json").write_text(json.dumps(whole, indent=2))


def _scored(folder: Path, tokenizer: PreTrainedTokenizerFast, splits: list[str], labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what a model of scores must know of the rows: its classes with their documents, and what pads rows in its export."""
    from trainers.data.scored import choose_pad, ends_of, label_counts

    tables = {name: open_table(folder / name) for name in splits}
    counts = {"labels": label_counts(tables, labels)} if labels else {}
    return counts | {"pad_id": choose_pad(tokenizer, ends_of(list(tables.values())))}


def _left_out(config: RunConfig) -> dict[str, list[str]]:
    """Return the files of directories that are not read, by the reason."""
    places = sources_of(config.data)
    read = {name for source in places for name in sources.names(source)}
    found: dict[str, list[str]] = {}
    for source in places:
        for reason, names in sources.left_out(source).items():
            held = found.get(reason, [])
            new = [name for name in names if name not in held and str(Path(str(source and source.path)) / name) not in read]
            if new:
                found[reason] = [*held, *new]
    return found


def find_layout(config: RunConfig, source: Source | None) -> Layout:
    """Return the layout of a source, recognised in its first row that has one."""
    if config.data.layout is not Layout.auto:
        _require_fitting(config, config.data.layout)
        return config.data.layout
    reason = "there are no rows"
    for row in islice(sources.rows(source, config.objective.name), 100):
        try:
            data = sources.parse(row, config.data.ignore)
            found = formats.recognise(data)
            if config.objective.name is ObjectiveName.kto and found in JUDGED and "label" in data:
                found = Layout.unpaired
            _require_fitting(config, found)
            return found
        except BadRow as error:
            reason = f"{row.file}:{row.line} {error}" if reason == "there are no rows" else reason
    known = ", ".join(layout for layout in Layout if layout is not Layout.auto)
    path = source.path if source else None
    raise ConfigError("data.path", path, f"no row has a known layout: {reason}", f"rows of one of: {known}; or set data.layout")


def _require_fitting(config: RunConfig, layout: Layout) -> None:
    """Raise ConfigError where rows compare answers and the objective does not, or the other way round."""
    name, in_pairs = config.objective.name, layout in (Layout.preference, Layout.ranked)
    if name is ObjectiveName.kto:
        if layout not in (Layout.preference, Layout.unpaired):
            reason = f"is told by a `label` whether an answer is wanted, and rows of layout {layout} have none"
            raise ConfigError("objective.name", "kto", reason, "rows of prompt, completion and label, or pairs")
    elif layout is Layout.unpaired:
        reason = f"rows are answers that are wanted or not, and objective={name} is not told which"
        raise ConfigError("data.layout", str(layout), reason, "objective=kto")
    elif in_pairs and name is ObjectiveName.classify:
        raise ConfigError("data.path", config.data.path, "rows are pairs of answers, and a document has one class", "objective=reward")
    elif in_pairs and not compares(name):
        reason = f"rows are {'pairs' if layout is Layout.preference else 'lists'} of answers, and objective={name} trains on one"
        raise ConfigError(
            "data.path", config.data.path, reason, "objective=dpo, or data.ignore=[rejected] where another field has the answer"
        )
    elif not in_pairs and compares(name) and name is not ObjectiveName.reward:
        reason = f"compares two answers, and rows of layout {layout} have one"
        raise ConfigError("objective.name", str(name), reason, "objective=sft, or rows with `chosen` and `rejected`")
    if config.data.pairs is not PairsOf.best_worst and layout is not Layout.ranked:
        reason = f"says which answers of a ranked list are compared, and rows of layout {layout} have none"
        raise ConfigError("data.pairs", str(config.data.pairs), reason, "data.pairs=best_worst")
    if config.data.reasoning is not Reasoning.keep and layout is Layout.text:
        raise ConfigError("data.reasoning", str(config.data.reasoning), REASONING_OF_TEXTS, "data.reasoning=keep")


REASONING_OF_TEXTS = "is about turns and answers, and rows of layout text have none"
JUDGED = (Layout.prompt_completion, Layout.messages, Layout.sharegpt)
"""Layouts whose rows have one answer, which a `label` may judge."""


def _partners(config: RunConfig, groups: NDArray[np.uint64], split: str) -> NDArray[np.int64]:
    """Return whose answer follows each document's prompt in KTO's baseline; raises ConfigError where most have one prompt."""
    from trainers.data.mismatched import partners_of

    found = partners_of(groups)
    if found is None:
        reason = f"more than half of the {split} rows have one prompt, and the baseline of kto is measured on answers to other prompts"
        raise ConfigError("data.path", config.data.path, reason, "rows of more prompts, or objective=dpo on pairs")
    return found


class Store:
    """Documents of one source on disk, in the order of the rows, until they are split and packed."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open the files in `folder`."""
        self.name = name
        self.files = [folder / f"{name}.{what}.raw" for what in ("tokens", "supervised", "marks")]
        self.glance = Glance()
        self.streams: list[BinaryIO] = [file.open("wb") for file in self.files]
        self.lengths: list[NDArray[np.int64]] = []
        self.groups: list[NDArray[np.uint64]] = []
        self.has_pairs = False
        self.signals: dict[str, list[NDArray[np.float32]]] = {}
        self.weights: Weights | None = None
        self.counts = dict.fromkeys(COUNTS, 0)
        self.left_out = LeftOut()
        self.unread: set[str] = set()
        self.files_read: dict[str, int] = {}
        self.num_documents = 0

    def add(self, documents: Documents) -> None:
        """Append documents."""
        documents.tokens.tofile(self.streams[0])
        documents.supervised.tofile(self.streams[1])
        documents.marks.tofile(self.streams[2])
        self.glance.update(documents.glance)
        self.lengths.append(documents.lengths)
        self.groups.append(documents.groups)
        self.has_pairs |= documents.units is not None
        for name, values in documents.signals.items():
            self.signals.setdefault(name, []).append(values)
        if documents.weights is not None or self.weights is not None:
            self._add_weights(documents)
        self.num_documents += len(documents.lengths)
        self.counts = {name: self.counts[name] + documents.counts.get(name, 0) for name in COUNTS}
        self.left_out.update(documents.left_out)
        self.unread |= documents.unread

    def _add_weights(self, documents: Documents) -> None:
        """Append the weights of documents whose lengths are known, from the first chunk on that has some."""
        from trainers.data.weights import Weights

        if self.weights is None:
            before = sum(int(lengths.sum()) for lengths in self.lengths[:-1])
            self.weights = Weights(self.files[0].with_name(f"{self.name}.weights.raw"), before)
        self.weights.add(documents.weights, len(documents.tokens))

    def counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield rows, and count those of each file."""
        for row in rows:
            self.files_read[row.file] = self.files_read.get(row.file, 0) + 1
            yield row

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint64]]:
        """Return (tokens, supervised, lengths, groups), the first two memory-mapped."""
        for stream in self.streams:
            stream.flush()
        tokens, supervised = (
            np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
            for file, dtype in zip(self.files[:2], (np.int32, np.uint8), strict=True)
        )
        lengths = np.concatenate([np.zeros(0, np.int64), *self.lengths])
        return tokens, supervised, lengths, np.concatenate([np.zeros(0, np.uint64), *self.groups])

    def marks(self) -> Keys:
        """Return what documents are recognised by, (documents, WIDTH), memory-mapped."""
        self.streams[2].flush()
        return np.memmap(self.files[2], np.uint64, "r").reshape(-1, WIDTH) if self.num_documents else np.zeros((0, WIDTH), np.uint64)

    def remove(self) -> None:
        """Close and delete the files."""
        for stream, file in zip(self.streams, self.files, strict=True):
            stream.close()
            file.unlink()
        if self.weights is not None:
            self.weights.remove()


def encode_all(config: RunConfig, encoder: Encoder, rows: Iterator[Row], store: Store, advance: Callable[[int], None]) -> None:
    """Add the documents of rows to a store; raises ConfigError for bad rows (unless `data.skip_bad_rows`)."""
    bad: list[str] = []
    for documents in encode_rows(encoder, store.counted(rows), config.data.processes or host.cores()):
        if documents.error is not None:
            raise ConfigError(*documents.error)
        bad.extend(documents.bad)
        if len(bad) >= SHOWN and not config.data.skip_bad_rows:
            break
        store.add(documents)
        advance(documents.counts["rows"])
        watch.beat()
    if bad and not config.data.skip_bad_rows:
        lines = "".join(f"\n  {line}" for line in bad[:SHOWN])
        path = config.data.path if store.name == "train" else config.data.eval_path
        raise ConfigError("data.path", path, f"has bad rows; the first ones:{lines}", "mend them, or data.skip_bad_rows=true")


def encode_rows(encoder: Encoder, rows: Iterator[Row], processes: int) -> Iterator[Documents]:
    """Yield the documents of chunks of rows, in order, by as many processes; few rows are done in this one."""
    first = list(islice(rows, SMALL))
    if processes == 1 or len(first) < SMALL:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if processes == 1 else "true")
        yield from (encoder.encode(chunk) for chunk in _chunks(chain(first, rows)))
        return
    from trainers.data.parallel import encode_parallel

    yield from encode_parallel(encoder, _chunks(chain(first, rows)), processes)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def check_losses(config: RunConfig, counts: dict[str, int]) -> None:
    """Raise ConfigError where nothing is trained, or too much is lost."""
    if not counts["supervised_before"]:
        reason = "there are no rows" if counts["rows"] == counts["bad"] else f"none of the {counts['rows']:,} rows has a supervised token"
        raise ConfigError("data.supervise", str(config.data.supervise), reason, "look at them: python -m tools.show_batch")
    lost = counts["supervised_lost"] / counts["supervised_before"]
    if lost > config.data.max_lost_fraction or lost == 1.0:
        raise ConfigError(
            "data.max_lost_fraction",
            config.data.max_lost_fraction,
            f"{lost:.1%} of the supervised tokens would be lost: {counts['supervised_lost']:,} of {counts['supervised_before']:,}; "
            f"{counts['truncated']:,} rows are truncated and {counts['dropped']:,} dropped at data.seq_len = {config.data.seq_len}",
            "a longer data.seq_len, "
            + ("data.too_long=split, " if config.objective.name is ObjectiveName.cpt else "")
            + "or a higher data.max_lost_fraction",
        )


def _stops(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, str]]:
    """Return ids and texts of the tokens that end an answer; none where only texts are trained."""
    ids = stop_ids(tokenizer) if config.objective.name is not ObjectiveName.cpt else []
    return [(number, str(tokenizer.convert_ids_to_tokens(number))) for number in ids]


def check_left_out(config: RunConfig, left_out: LeftOut, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ConfigError where the chat template leaves a kind of part out of too many of the rows that have it."""
    for kind, name in KINDS.items():
        rows, missing = left_out.rows[kind], left_out.missing[kind]
        if missing > config.data.max_left_out_fraction * rows:
            raise ConfigError(
                "data.max_left_out_fraction",
                config.data.max_left_out_fraction,
                f"the chat template leaves the {name} out of {missing:,} of the {rows:,} rows that have some; the first is "
                f"{left_out.first[kind]}",
                " or ".join([*_ways_to_keep(config, kind, tokenizer), "data.max_left_out_fraction=1, which trains without"]),
            )


def _ways_to_keep(config: RunConfig, kind: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return overrides under which a kind of part is not left out."""
    ways = ["data.document=turn, which shows each turn what it sees when it answers"] if kind == "earlier" else []
    if kind in ("reasoning", "earlier"):
        ways.append("data.reasoning=strip, which leaves all reasoning out")
    if kind == "names":
        ways.append("data.ignore=[name]")
    elif kind != "documents" and config.data.template not in BUILT_IN:
        ways.append(chat_remedy(tokenizer, may_grow(config)))
    return ways


Kept = NDArray[np.bool_]


def _split(config: RunConfig, stores: dict[str, Store]) -> dict[str, tuple[Store, Kept]]:
    """Return for each split where its documents are and which of them it takes: no first prompt is on both sides."""
    store = stores["train"]
    groups = store.arrays()[3]
    if "eval" in stores:
        other = stores["eval"].arrays()[3]
        keep = ~np.isin(groups, other)
        if not keep.any() or not len(other):
            reason = "every first prompt of data.path is in it too" if len(other) else "no row has a supervised token"
            raise ConfigError("data.eval_path", config.data.eval_path, reason, "other held-out rows, or data.eval_fraction=0.05")
        return {"train": (store, keep), "eval": (stores["eval"], np.ones(len(other), dtype=bool))}
    if not config.data.eval_fraction:
        return {"train": (store, np.ones(len(groups), dtype=bool))}
    if config.data.too_long is TooLong.split and config.data.eval_fraction * len(np.unique(groups)) < 1:  # pieces of a few long texts
        groups = np.arange(len(groups), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    held_out = hold_out(groups, config.data.eval_fraction)
    if not held_out.any() or held_out.all():
        remedy = "data.eval_path=FILE, or data.eval_fraction=0"
        raise ConfigError(
            "data.eval_fraction", config.data.eval_fraction, "the rows have one first prompt in all, which cannot be split", remedy
        )
    return {"train": (store, ~held_out), "eval": (store, held_out)}


def hold_out(groups: NDArray[np.uint64], fraction: float) -> Kept:
    """Return which documents are held out: whole groups, in order of their hash, up to `fraction` of the documents; at least one group."""
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < 2:
        return np.zeros(len(groups), dtype=bool)
    target = fraction * len(groups)
    taken, total = [], 0
    for name, size in zip(names, sizes, strict=True):
        if total + size <= target:
            taken.append(name)
            total += size
        if total >= target:
            break
    return np.isin(groups, taken or [names[np.argmin(sizes)]])


def _rows_of(lengths: NDArray[np.int64], units: NDArray[np.int64] | None, data: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, rows) of documents: packed, or a document a row, or a pair a row."""
    if units is None:
        return pack(lengths, data.seq_len) if data.packing else one_each(len(lengths))
    if data.packing:
        return pack_units(lengths, units, data.seq_len)
    return np.arange(len(lengths), dtype=np.int64), np.arange(0, len(lengths) + 1, 2, dtype=np.int64)


def save_split(config: RunConfig, store: Store, keep: Kept, folder: Path) -> dict[str, Any]:
    """Pack and write a split; return its part of the report."""
    tokens, supervised, lengths, groups = store.arrays()
    which = slice(None) if keep.all() else np.repeat(keep, lengths)
    lengths = lengths[keep]
    started = time.monotonic()
    units = np.arange(len(lengths), dtype=np.int64) // 2 if store.has_pairs else None
    order, rows = _rows_of(lengths, units, config.data)
    pack_seconds = time.monotonic() - started
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    apart = units is not None and not config.data.packing
    signals: dict[str, NDArray[Any]] = {name: np.concatenate(values)[keep] for name, values in store.signals.items()}
    weights = None
    if store.weights is not None:
        weights = store.weights.signal(which, supervised[which], offsets, config.objective.name not in OF_LABELS)
    table = TokenTable(
        tokens=tokens[which],
        supervised=supervised[which],
        offsets=offsets,
        order=order,
        rows=rows,
        units=units,
        apart=apart,
        parted=config.model.encoder_decoder,
        signals=signals | ({} if weights is None else {WEIGHT: weights}),
        partners=_partners(config, groups[keep], folder.name) if config.objective.name is ObjectiveName.kto else None,
    )
    save_table(table, folder)
    np.save(marks_file(folder.parent, folder.name), store.marks()[keep])
    num_tokens = int(offsets[-1])
    longest = config.data.seq_len if config.data.packing else int(lengths.max())
    return {
        "documents": len(lengths),
        **({} if units is None else {"pairs": len(lengths) // 2}),
        **({"wanted": int(table.signals[DESIRABLE].sum())} if DESIRABLE in table.signals else {}),
        "rows": len(table),
        "tokens": num_tokens,
        "supervised_tokens": int(table.supervised.sum(dtype=np.int64)),
        **(
            {}
            if weights is None
            else {"weights": {"min": float(weights.min()), "mean": float(weights.mean()), "max": float(weights.max())}}
        ),
        "lengths": {name: int(np.quantile(lengths, share, method="nearest")) for name, share in QUANTILES.items()},
        "efficiency": num_tokens / ((len(lengths) if apart else len(table)) * longest),
        "pack_seconds": round(pack_seconds, 4),
    }
