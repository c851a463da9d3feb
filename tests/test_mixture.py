"""A mixture: shares exact to a row, one stream for every split, sources prepared once, losses of each source those of a plain loop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import tokenizer_of
from conftest import Ranks
from preparing import TOKENIZER, marked, write
from tables import LR, blueprint_for, config_for, pair_table, plain_adamw, ragged_table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tools.evaluate.sets import general
from trainers.batch import IGNORE, SOURCE
from trainers.config.choices import EngineName, Exhausted, MixBy, MixChange, ObjectiveName
from trainers.config.errors import ConfigError
from trainers.config.mix import schedule
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, RunConfig, SourceConfig, TrainConfig
from trainers.data.loader import Loader, make_batch, row_order
from trainers.data.mixture import Content, Mixture, contents
from trainers.data.prepare import Prepared, prepare
from trainers.data.table import TokenTable, open_table, save_joined, save_table
from trainers.engines.build import build_engine
from trainers.loop import train
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import evaluations, of_sources, read_rows, steps
from trainers.world import World


def mixture(weights: dict[str, float | None], rows: list[int], tokens: list[int] | None = None, seed: int = 3, **fields: Any) -> Mixture:
    """Return the stream of sources with so many rows, 10 tokens each unless `tokens` says how many."""
    given = {name: fields.pop(name) for name in ("steps", "epochs", "global_batch") if name in fields}
    then, repeats = fields.pop("then", {}), fields.pop("repeats", {})
    mix = {name: SourceConfig(weight=weight, then=then.get(name, []), repeat=repeats.get(name)) for name, weight in weights.items()}
    each = tokens or [10 * count for count in rows]
    sources = [Content(name, count, total) for name, count, total in zip(weights, rows, each, strict=True)]
    return Mixture(DataConfig(mix=mix, **{"mix_by": MixBy.rows} | fields), TrainConfig(**{"steps": 1000} | given), sources, seed)


def stream(found: Mixture, count: int) -> tuple[list[int], list[int]]:
    """Return the source of each of the first rows, and its number within the source."""
    rows = found.row_ids(np.arange(count))
    of = np.searchsorted(found.first, rows, side="right") - 1
    return of.tolist(), (rows - np.array(found.first)[of]).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_shares_are_right_to_a_row_after_every_thousand(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(2 + 2 * seed)) + 0.002
    found = mixture({f"s{number}": float(weight) for number, weight in enumerate(weights)}, [37] * len(weights))
    for thousands in range(1, 60):
        exact = weights / weights.sum() * 1000 * thousands
        assert np.abs(np.array(found.counts_before(1000 * thousands)) - exact).max() < 1
        assert sum(found.counts_before(1000 * thousands)) == 1000 * thousands


def test_the_stream_has_the_counts_and_each_source_its_own_order() -> None:
    found = mixture({"general": 80, "code": 20}, [300, 50])
    of, rows = stream(found, 4000)
    assert [Counter(of[start : start + 1000]) for start in range(0, 4000, 1000)] == [Counter({0: 800, 1: 200})] * 4
    assert found.counts_before(2500) == [Counter(of[:2500])[number] for number in (0, 1)]
    assert found.passes(2000) == {"general": 1600 / 300, "code": 8.0}
    assert of[:1000] != of[1000:2000], "each block has an order of its own"
    for source, count in enumerate((300, 50)):
        own = [row for which, row in zip(of, rows, strict=True) if which == source]
        alone = np.concatenate([row_order(3, epoch, count) for epoch in range(-(-len(own) // count))])
        assert own == alone[: len(own)].tolist()
    behind = np.cumsum(of) - 0.2 * np.arange(1, 4001)
    assert np.abs(behind).max() < 2, "spread evenly within the block"
    assert len(set(np.diff(np.flatnonzero(of)).tolist())) > 5, "and not at regular distances"


def test_a_position_is_the_same_whoever_asks_first() -> None:
    weights, rows = {"a": 5.0, "b": 3.0, "c": 0.5}, [90, 40, 7]
    whole = stream(mixture(weights, rows), 6000)
    late = mixture(weights, rows)
    assert late.row_ids(np.arange(5990, 6000)).tolist() == mixture(weights, rows).row_ids(np.arange(6000))[5990:].tolist()
    assert stream(late, 6000) == whole
    assert stream(mixture(weights, rows, seed=4), 6000) != whole


def test_a_stream_that_ends_before_a_source_begins_is_refused() -> None:
    phases = {"mix_exhausted": Exhausted.drop, "mix_change": MixChange.phase, "mix_steps": [1000], "steps": 2000, "global_batch": 8}
    with pytest.raises(ConfigError, match="runs out before it, and b waits") as refused:
        mixture({"a": 1, "b": 0}, [4000, 100_000], then={"a": [0], "b": [1]}, **phases)
    assert refused.value.path == "data.mix_exhausted"
    assert mixture({"a": 1, "b": 0}, [9000, 100_000], then={"a": [0], "b": [1]}, **phases).num_rows == 16_000


def test_extreme_temperatures_are_the_largest_source_alone_and_equal_shares() -> None:
    assert mixture({"a": None, "b": None}, [9000, 1000], mix_temperature=0.001).shares(0) == [1.0, 0.0]
    assert mixture({"a": 0.9, "b": 0.1}, [10, 10], mix_temperature=1e9).shares(0) == pytest.approx([0.5, 0.5])


def test_one_source_is_that_source_alone() -> None:
    table = ragged_table([4 + number % 7 for number in range(50)])
    train_config = TrainConfig(global_batch=8, epochs=2.5)
    alone = Loader(table, train_config, seed=3, rank=0, world_size=1, pad_id=0)
    only = Loader(
        table,
        train_config,
        seed=3,
        rank=0,
        world_size=1,
        pad_id=0,
        stream=mixture({"a": None}, [50], steps=None, epochs=2.5, global_batch=8),
    )
    assert only.num_steps == alone.num_steps == 16
    assert [only.row_ids(step).tolist() for step in range(16)] == [alone.row_ids(step).tolist() for step in range(16)]


def test_weights_are_shares_of_tokens() -> None:
    """Rows of 100 and of 25 tokens, half of the tokens each: one row in five is of the longer ones."""
    found = mixture({"long": 1, "short": 1}, [100, 400], tokens=[10_000, 10_000], mix_by=MixBy.tokens)
    assert found.counts_before(1000) == [200, 800]
    report = found.report()
    assert [of["token_share"] for of in report.values()] == pytest.approx([0.5, 0.5])
    assert [of["row_share"] for of in report.values()] == pytest.approx([0.2, 0.8])


def test_without_weights_each_has_as_much_as_it_has_and_a_temperature_flattens() -> None:
    assert mixture({"a": None, "b": None}, [300, 100]).counts_before(1000) == [750, 250]
    flat = mixture({"a": None, "b": None}, [900, 100], mix_temperature=2.0)
    assert flat.counts_before(1000) == [750, 250], "3 : 1, the roots of 9 : 1"
    assert mixture({"a": 9, "b": 1, "c": 0}, [9, 9, 9], mix_temperature=float("inf")).counts_before(1000) == [500, 500, 0]


def test_a_source_that_runs_out_stops_the_run_or_is_dropped() -> None:
    """Of 500 and 100 rows in equal shares the second one runs out at about position 200, or 400 after two passes."""
    short: dict[str, Any] = {"steps": None, "epochs": None, "global_batch": 1}
    for passes, most in ((None, 100), (2.0, 200)):
        stop = mixture({"a": 1, "b": 1}, [500, 100], mix_exhausted=Exhausted.stop, repeats={"b": passes}, **short)
        of, _ = stream(stop, stop.num_rows + 1)
        assert Counter(of[:-1])[1] == most
        assert of[-1] == 1, "the next row would be one too many"
    drop = mixture({"a": 1, "b": 1}, [500, 100], mix_exhausted=Exhausted.drop, **short)
    assert drop.num_rows == 600
    assert sorted(drop.row_ids(np.arange(600)).tolist()) == list(range(600)), "each row once"
    large = mixture({"a": 1, "b": 1, "c": 2}, [9000, 700, 2000], mix_exhausted=Exhausted.drop, **short)
    assert [large.counts_before(1000 * n) for n in (1, 2, 3, 4)] == [[250, 250, 500], [500, 500, 1000], [767, 700, 1533], [1300, 700, 2000]]
    assert mixture({"a": 1, "b": 1}, [500, 100], mix_exhausted=Exhausted.drop, steps=30, epochs=None, global_batch=4).num_rows == 120
    assert mixture({"a": 1, "b": 1}, [500, 100], steps=None, epochs=2.0, global_batch=1).num_rows == 1200


def test_weights_that_change_are_the_integral_of_what_they_are() -> None:
    """From 90:10 to 20:80 over 500 steps of 16 rows: 8,000 rows, then constant."""
    found = mixture({"a": 90, "b": 10}, [70, 70], then={"a": [20.0], "b": [80.0]}, mix_steps=[500], global_batch=16)
    for position in range(1000, 12_001, 1000):
        inside = min(position, 8000)
        exact = 0.9 * inside - 0.7 * inside**2 / 16_000 + 0.2 * (position - inside)
        assert abs(found.counts_before(position)[0] - exact) < 1


def test_weights_at_several_steps_are_exact_to_a_row_and_equal_a_sum_over_positions() -> None:
    """90:10 to 50:50 in 333 steps of 7 rows, to 20:80 until step 1200, then constant; what remains is at most a row."""
    found = mixture({"a": 90, "b": 10}, [70, 70], then={"a": [50.0, 20.0], "b": [50.0, 80.0]}, mix_steps=[333, 1200], global_batch=7)
    share = np.interp(np.arange(12_000) + 0.5, [0, 2331, 8400], [0.9, 0.5, 0.2])
    for position in (1000, 2000, 2331, 3331, 8331, 8400, 9400, 11_400):
        assert abs(found.counts_before(position)[0] - share[:position].sum()) < 1
    late = mixture({"a": 90, "b": 10}, [70, 70], then={"a": [50.0, 20.0], "b": [50.0, 80.0]}, mix_steps=[333, 1200], global_batch=7)
    assert late.row_ids(np.arange(8390, 8420)).tolist() == found.row_ids(np.arange(9000))[8390:8420].tolist()


def test_phases_begin_at_their_step() -> None:
    """Rows of a source that has weight 0 until step 100, of 7 rows each, begin there; each phase has its shares to a row."""
    then = {"a": [50.0, 0.0], "b": [50.0, 30.0], "c": [0.0, 70.0]}
    found = mixture({"a": 100, "b": 0, "c": 0}, [70, 70, 70], then=then, mix_steps=[100, 400], mix_change=MixChange.phase, global_batch=7)
    of, _ = stream(found, 5000)
    counts = [Counter(of[start:end]) for start, end in ((0, 700), (700, 2800), (2800, 4800))]
    assert counts == [Counter({0: 700}), Counter({0: 1050, 1: 1050}), Counter({1: 600, 2: 1400})]
    assert found.pass_rows == 210


def test_a_ratio_is_a_weight_for_each_source_and_a_text_is_a_path() -> None:
    data = DataConfig(mix={"general": "owner/general", "domain": {"path": "chats.jsonl"}}, mix_ratio=[80, 20])
    assert data.mix["general"] == SourceConfig(path="owner/general")
    assert schedule(data) == [(0, [80.0, 20.0])]
    assert schedule(DataConfig(mix={"a": "x", "b": "y"})) is None


def three_sources() -> dict[str, TokenTable]:
    lengths = {"general": [5, 29, 11, 13, 40, 17, 8, 23], "code": [6, 7, 19], "maths": [31, 9, 12, 30, 22]}
    return {name: ragged_table(each, 48) for name, each in lengths.items()}


def joined(tables: dict[str, TokenTable], folder: Path, split: str = "train") -> TokenTable:
    """Save the tables as preparation does, each in a folder of its own, and open them as one."""
    for name, table in tables.items():
        save_table(table, folder / f"data-{name}" / split)
    opened = {name: open_table(folder / f"data-{name}" / split) for name in tables}
    save_joined(opened, {name: f"../../data-{name}/{split}" for name in tables}, folder / "data-all" / split)
    return open_table(folder / "data-all" / split)


@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_a_joined_table_is_the_tables_one_after_another(tmp_path: Path, kind: str) -> None:
    tables = three_sources() if kind == "rows" else {"a": pair_table([5, 9, 3, 8]), "b": pair_table([7, 4, 12, 6, 2, 9])}
    whole = joined(tables, tmp_path)
    assert not list((tmp_path / "data-all").rglob("tokens.npy")), "no copy of tokens"
    assert list(whole.sources.values()) == [len(table) for table in tables.values()]
    assert whole.apart == (kind == "pairs")
    at = 0
    for number, table in enumerate(tables.values()):
        for row in range(len(table)):
            mine, theirs = make_batch(whole, np.array([at]), 1, 0), make_batch(table, np.array([row]), 1, 0)
            assert torch.equal(mine.input_ids, theirs.input_ids)
            assert torch.equal(mine.labels, theirs.labels)
            assert set(mine.signals[SOURCE].tolist()) == {number}
            assert whole.sizes(np.array([at])) == table.sizes(np.array([row]))
            at += 1
    everything = np.random.default_rng(0).permutation(len(whole))
    assert int((make_batch(whole, everything, len(whole), 0).labels != IGNORE).sum()) == whole.sizes(everything).labels
    assert [source.tokens for source in contents(whole)] == [int(table.offsets[-1]) for table in tables.values()]
    assert np.asarray(whole.tokens).tolist() == [int(token) for table in tables.values() for token in table.tokens]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def mix_settings(folder: Path, **data: Any) -> RunConfig:
    general = write(folder / "general.jsonl", [chat(f"general {number}?", f"answer {number}") for number in range(12)])
    code = write(folder / "code.jsonl", [{"prompt": f"code {number}?", "completion": f"print({number})"} for number in range(8)])
    mix = {"general": {"path": str(general), "weight": 80}, "code": {"path": str(code), "weight": 20, "max_rows": 6, "supervise": "all"}}
    fields = {"prepared_dir": str(folder / "kept"), "seq_len": 512, "processes": 1, "packing": False, "eval_fraction": 0.2}
    return RunConfig(model=ModelConfig(id="a/model"), data=DataConfig(mix=mix, **fields | data))


def test_sources_are_prepared_under_keys_of_their_own(tmp_path: Path) -> None:
    config = mix_settings(tmp_path)
    first = prepare(config, tokenizer=TOKENIZER)
    folders = {path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()}
    assert len(folders) == 3
    assert not first.reused
    assert first.report["rows"] == 18
    assert set(first.report["sources"]) == {"general", "code"}
    assert first.eval is not None
    assert list(first.eval.sources) == ["general", "code"]
    assert sum(first.train.sources.values()) + sum(first.eval.sources.values()) == 18
    texts = marked(first.train)
    assert sum(text.startswith("⟦") for text in texts) == 0
    assert "general" in texts[0]
    assert "code" in texts[-1]
    assert "⟦" in texts[-1].split("code")[0], "all tokens of the second source are trained"
    other = replace(config, data=replace(config.data, mix={**config.data.mix, "code": replace(config.data.mix["code"], weight=70.0)}))
    again = prepare(other, tokenizer=TOKENIZER)
    assert again.reused
    assert again.path == first.path
    assert json.dumps(again.report) == json.dumps(first.report)
    alone = prepare(replace(config, data=DataConfig(path=config.data.mix["general"].path, **fields_of(config.data))), tokenizer=TOKENIZER)
    assert alone.reused, "a source of a mixture is prepared as for a run of its own"
    assert alone.path.name in folders


def test_forgetting_is_measured_on_the_general_source(tmp_path: Path) -> None:
    config = mix_settings(tmp_path)
    for named, wanted in ((None, "general"), ("general", "general"), ("code", "code")):
        asked = replace(config, evaluation=replace(config.evaluation, general=named, general_rows=2))
        found = general(SimpleNamespace(config=asked, tokenizer=TOKENIZER), torch.device("cpu"))  # type: ignore[arg-type]
        assert found is not None
        texts = marked(found.table)
        assert 0 < len(found.documents) <= 2
        assert all(wanted in texts[document] for document in found.documents)
    none = replace(config, data=replace(config.data, eval_fraction=0.0))
    assert general(SimpleNamespace(config=none, tokenizer=TOKENIZER), torch.device("cpu")) is None  # type: ignore[arg-type]
    asked = replace(none, evaluation=replace(config.evaluation, general="code"))
    with pytest.raises(ConfigError, match="held no rows out"):
        general(SimpleNamespace(config=asked, tokenizer=TOKENIZER), torch.device("cpu"))  # type: ignore[arg-type]


def fields_of(data: DataConfig) -> dict[str, Any]:
    return {name: getattr(data, name) for name in ("prepared_dir", "seq_len", "processes", "packing", "eval_fraction")}


def test_a_bad_source_is_named(tmp_path: Path) -> None:
    config = mix_settings(tmp_path)
    write(tmp_path / "code.jsonl", [{"prompt": "x", "completion": 3}])
    with pytest.raises(ConfigError) as refused:
        prepare(config, tokenizer=TOKENIZER)
    assert refused.value.path == "data.mix.code.path"
    with pytest.raises(ConfigError, match=r"(?s)data\.mix\.code\.paht.*data\.mix\.code\.path"):
        DataConfig(mix={"code": {"paht": "x"}})
    with pytest.raises(ConfigError, match=r"data\.mix\.code\.weight"):
        DataConfig(mix={"code": {"weight": "much"}})


def test_a_source_without_its_template_is_refused_before_another_is_prepared(tmp_path: Path) -> None:
    config, tokenizer = mix_settings(tmp_path), tokenizer_of("chatml")
    tokenizer.chat_template = None
    write(tmp_path / "general.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}] * 8)
    write(tmp_path / "code.jsonl", [{"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]}] * 8)
    with pytest.raises(ConfigError, match=r"data\.mix\.code\.template.*chat template"):
        prepare(config, tokenizer=tokenizer)
    assert not (tmp_path / "kept").exists()


def run_mixture(
    world: World, run_dir: Path, model: Path, folder: Path, fields: dict[str, Any], engine: str = "fsdp", objective: str = "sft"
) -> list[dict[str, Any]]:
    """Train on a mixture through the real loop; return the rows of metrics.jsonl."""
    run_dir.mkdir(exist_ok=True)
    config = config_for(run_dir, model, **fields)
    mix = {"general": {"weight": 60}, "code": {"weight": 25}, "maths": {"weight": 15}}
    data_config = DataConfig(mix={name: mix[name] for name in ("general", "code", "maths")}, mix_by=MixBy.rows, prepared_dir=str(run_dir))
    config = replace(
        config, data=data_config, objective=ObjectiveConfig(name=ObjectiveName(objective)), engine=EngineConfig(name=EngineName(engine))
    )
    tables = {split: open_table(folder / "data-all" / split) for split in ("train", "eval")}
    data = Prepared(path=run_dir, train=tables["train"], eval=tables["eval"], report={}, reused=True)
    stream = Mixture(config.data, config.train, contents(data.train), 0)
    loader = Loader(data.train, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0, stream=stream)
    train(config, world, Attempt(run_dir), build_engine(config, world, blueprint_for(model)), data, loader, 1.0)
    return read_rows(run_dir) if world.rank == 0 else []


def plain(model: Any, table: TokenTable, row: int) -> tuple[torch.Tensor, int]:
    """Return the summed loss of a row's documents, one unpadded document at a time, and their labels."""
    total, labels = torch.zeros(()), 0
    for document in table.documents(row):
        part = slice(int(table.offsets[document]), int(table.offsets[document + 1]))
        ids, marks = (torch.from_numpy(np.asarray(array[part]).astype(np.int64)) for array in (table.tokens, table.supervised))
        wanted = torch.where(marks[1:] > 0, ids[1:], IGNORE)
        total = total + cross_entropy(model(input_ids=ids[None]).logits[0, :-1], wanted, ignore_index=IGNORE, reduction="sum")
        labels += int((wanted != IGNORE).sum())
    return total, labels


def losses_by_source(model: Any, table: TokenTable, rows: list[int]) -> dict[str, float]:
    found = {}
    for name, own in table.rows_of_sources().items():
        parts = [plain(model, table, row) for row in rows if row in own]
        if labels := sum(count for _, count in parts):
            found[name] = sum(float(total.detach()) for total, _ in parts) / labels
    return found


SPLITS = [(1, 8, "fsdp"), (2, 2, "zero3"), (3, 1, "fsdp")]


@pytest.mark.parametrize(("size", "microbatch", "engine"), SPLITS)
def test_every_split_equals_a_plain_loop(
    ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path, size: int, microbatch: int, engine: str
) -> None:
    """Losses, those of each source, and the held-out loss of each, by plain transformers and torch."""
    table = joined(three_sources(), tmp_path)
    held = joined({name: ragged_table([9 + number, 21, 6], 48) for number, name in enumerate(table.sources)}, tmp_path, "eval")
    fields = {"steps": 3, "global_batch": 8, "microbatch": microbatch}
    rows = ranks(size).call(run_mixture, tmp_path / "run", tiny_llama, tmp_path, fields, engine)[0]
    config = config_for(tmp_path, tiny_llama, **fields)
    weights = {"general": {"weight": 60}, "code": {"weight": 25}, "maths": {"weight": 15}}
    order = Mixture(DataConfig(mix=weights, mix_by=MixBy.rows), config.train, contents(table), 0).row_ids(np.arange(24)).tolist()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    update = plain_adamw(model, LR, 3)
    before, after = evaluations(rows)
    everything = list(range(len(held)))
    for name, loss in losses_by_source(model, held, everything).items():
        assert before[f"eval_loss/{name}"] == pytest.approx(loss, rel=1e-5)
    for step, row in enumerate(steps(rows)):
        taken = order[8 * step : 8 * step + 8]
        for name, loss in losses_by_source(model, table, taken).items():
            assert row[f"loss/{name}"] == pytest.approx(loss, rel=1e-5)
        parts = [plain(model, table, each) for each in taken]
        loss = sum(total for total, _ in parts) / sum(labels for _, labels in parts)
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        assert row["grad_norm"] == pytest.approx(update(), rel=1e-4)
    parts = [plain(model, held, row) for row in everything]
    whole = sum(float(total.detach()) for total, _ in parts) / sum(labels for _, labels in parts)
    assert after["eval_loss"] == pytest.approx(whole, rel=1e-4)
    for name, loss in losses_by_source(model, held, everything).items():
        assert after[f"eval_loss/{name}"] == pytest.approx(loss, rel=1e-4)
    kept = of_sources(rows, 3)
    assert kept["eval_loss_after/code"] == after["eval_loss/code"]
    assert kept["eval_loss_before/code"] == before["eval_loss/code"]
    assert sum(kept[f"epoch/{name}"] * count for name, count in table.sources.items()) == pytest.approx(24)


def test_pairs_have_the_accuracy_of_each_source(ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path) -> None:
    tables = {name: pair_table([5 + number, 9, 12, 8, 7, 4], 64) for number, name in enumerate(("general", "code", "maths"))}
    joined(tables, tmp_path)
    joined(tables, tmp_path, "eval")
    fields = {"steps": 2, "global_batch": 4, "microbatch": 1}
    rows = ranks(2).call(run_mixture, tmp_path / "run", tiny_llama, tmp_path, fields, "fsdp", "simpo")[0]
    for row in evaluations(rows):
        losses = [row[f"eval_loss/{name}"] for name in tables]
        assert row["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5), "three pairs each"
        own = [row[f"eval_accuracy/{name}"] for name in tables]
        assert row["eval_accuracy"] == pytest.approx(sum(own) / 3, rel=1e-5)
    assert any("loss/general" in row and row["loss/general"] > 0 for row in steps(rows))
