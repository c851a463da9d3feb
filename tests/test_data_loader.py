"""Ranks together see one stream of rows that no world size changes; labels stay within their documents."""

import dataclasses
import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import LENGTHS, ragged_table

from trainers.batch import IGNORE, Sizes
from trainers.config.schema import TrainConfig
from trainers.data.loader import Loader, eval_batches, make_batch, row_order
from trainers.data.pack import one_each, pack, pack_units
from trainers.data.table import TokenTable, open_table, save_table


def table_of(lengths, capacity=None, mask=None):
    """Documents whose tokens say who they are: 1000 x (document + 1) + position; all but the first supervised."""
    tokens = np.concatenate([1000 * (number + 1) + np.arange(length) for number, length in enumerate(lengths)]).astype(np.int32)
    supervised = np.concatenate([np.arange(length) > 0 for length in lengths]).astype(np.uint8)
    order, rows = one_each(len(lengths)) if capacity is None else pack(np.array(lengths), capacity)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenTable(
        tokens=tokens, supervised=supervised if mask is None else np.array(mask, np.uint8), offsets=offsets, order=order, rows=rows
    )


def loader_of(table, rank=0, world_size=1, **train):
    return Loader(table, TrainConfig(**train), seed=3, rank=rank, world_size=world_size, pad_id=0)


def documents_in(batches):
    return sorted(int(token) // 1000 for batch in batches for token in batch.input_ids.flatten().tolist() if token and token % 1000 == 0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_the_stream_is_the_same_for_every_world_size(world_size, microbatch):
    table = table_of([3 + number % 5 for number in range(50)])
    loaders = [loader_of(table, rank, world_size, global_batch=12, microbatch=microbatch, steps=9) for rank in range(world_size)]
    for step in range(9):
        rows = row_order(3, 0, 50)[step * 12 : step * 12 + 12] if step < 4 else loaders[0].row_ids(step)
        batches = [loader.step(step) for loader in loaders]
        assert all(len(mine) == len(batches[0]) for mine in batches)
        assert documents_in(functools.reduce(operator.iadd, batches, [])) == sorted(row + 1 for row in rows.tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_row_once_an_epoch(world_size):
    table = table_of([4] * 29)
    loaders = [loader_of(table, rank, world_size, global_batch=6, epochs=1) for rank in range(world_size)]
    assert loaders[0].num_steps == 5
    seen = [documents_in([batch for step in range(5) for batch in loader.step(step)]) for loader in loaders]
    assert sorted(functools.reduce(operator.iadd, seen, [])) == list(range(1, 30))
    assert len({len(loader.step(4)) for loader in loaders}) == 1


def test_epochs_have_different_orders_and_continue_across_steps():
    loader = loader_of(table_of([4] * 10), global_batch=4, epochs=2.5)
    assert loader.num_steps == 7
    assert loader.num_rows == 25
    stream = np.concatenate([loader.row_ids(step) for step in range(7)])
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    assert len(loader.row_ids(6)) == 1
    assert loader.epoch(7) == 2.5


def test_neither_steps_nor_epochs_is_one_epoch():
    assert loader_of(table_of([4] * 10), global_batch=4).num_steps == 3


def test_seven_samples_on_three_ranks_count_each_once():
    table = table_of([5, 9, 3, 8, 2, 6, 4])
    loaders = [loader_of(table, rank, 3, global_batch=9, microbatch=3, epochs=1) for rank in range(3)]
    batches = [loader.step(0) for loader in loaders]
    assert [len(mine) for mine in batches] == [1, 1, 1]
    assert sum(batch.num_rows for mine in batches for batch in mine) == 7
    assert sum(batch.num_tokens for mine in batches for batch in mine) == 37
    assert documents_in(functools.reduce(operator.iadd, batches, [])) == list(range(1, 8))
    assert sum(int((batch.labels != IGNORE).sum()) for mine in batches for batch in mine) == 37 - 7


@pytest.mark.parametrize(("world_size", "microbatch"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 8)])
@pytest.mark.parametrize("capacity", [None, 16])
def test_evaluation_takes_each_row_once_on_any_split(world_size, microbatch, capacity):
    table = table_of([5, 9, 3, 8, 2, 6, 4], capacity)
    ranks = [list(eval_batches(table, microbatch, rank=rank, world_size=world_size, pad_id=0)) for rank in range(world_size)]
    assert len({len(mine) for mine in ranks}) == 1
    batches = functools.reduce(operator.iadd, ranks, [])
    assert documents_in(batches) == list(range(1, 8))
    assert sum(batch.num_rows for batch in batches) == len(table)


@pytest.mark.parametrize("capacity", [None, 16, 40])
def test_labels_are_the_next_token_of_the_same_document(capacity):
    table = table_of([5, 9, 3, 8, 2, 6, 4], capacity)
    batch = make_batch(table, np.arange(len(table)), len(table), 0)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    for tokens, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        for at, (token, label) in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
            if token:
                assert positions[at] == token % 1000
            follows = at + 1 < len(tokens) and tokens[at + 1] == token + 1
            assert label == (token + 1 if token and follows else IGNORE)
    assert int((batch.labels != IGNORE).sum()) == 37 - 7


def test_only_supervised_tokens_are_labels():
    batch = make_batch(table_of([4, 3], mask=[0, 0, 1, 1, 0, 0, 1]), np.array([0, 1]), 2, 0)
    assert batch.labels.tolist() == [[IGNORE, 1002, 1003] + [IGNORE] * 5, [IGNORE, 2002] + [IGNORE] * 6]


def test_padding_is_a_document_of_its_own():
    batch = make_batch(table_of([5, 9]), np.array([0, 1]), 3, 77)
    assert batch.input_ids.shape == (3, 16)
    assert batch.num_rows == 2
    assert batch.position_ids[0].tolist() == [*range(5), *range(11)]
    assert batch.position_ids[2].tolist() == list(range(16))
    assert (batch.input_ids[2] == 77).all()
    assert (batch.labels[2] == IGNORE).all()


def test_a_rank_without_rows_gets_a_batch_of_padding():
    batch = make_batch(table_of([5]), np.zeros(0, np.int64), 2, 0)
    assert batch.input_ids.shape == (2, 8)
    assert batch.num_rows == 0
    assert batch.num_tokens == 0


def test_a_step_is_cheap_to_make():
    import time

    table = table_of([20 + number % 80 for number in range(4000)], 2048)
    loader = loader_of(table, global_batch=16, microbatch=8)
    loader.step(0)
    started = time.perf_counter()
    loader.step(1)
    assert time.perf_counter() - started < 0.25


def test_sizes_of_rows_are_those_of_their_batches(tmp_path: Path) -> None:
    """What divides a step's loss is known from the table, counted as it was written or when it is asked for."""
    table = ragged_table(LENGTHS, packed=44, masked=(2,))
    save_table(table, tmp_path / "table")
    for found in (table, open_table(tmp_path / "table")):
        for rows in (np.arange(len(table)), np.array([1, 1, 0])):
            sizes = [make_batch(found, np.array([row]), 1, 0).sizes() for row in rows]
            assert found.sizes(rows) == sum(sizes, Sizes())


def test_signals_and_units_come_back_from_disk_and_in_batches(tmp_path: Path) -> None:
    table = ragged_table(LENGTHS)
    of_token = np.arange(len(table.tokens), dtype=np.float32)
    units = np.arange(len(LENGTHS)) // 2
    order, rows = pack_units(np.array(LENGTHS), units, 80)
    signals = {"of_document": np.arange(8, dtype=np.float32), "of_token": of_token}
    save_table(dataclasses.replace(table, order=order, rows=rows, signals=signals, units=units), tmp_path / "table")
    opened = open_table(tmp_path / "table")
    assert sorted(order.tolist()) == list(range(8))
    for row in range(len(opened)):
        documents = opened.documents(row)
        assert all(np.isin(np.flatnonzero(units == unit), documents).all() for unit in units[documents])
        assert len(documents) == 2 * opened.sizes(np.array([row])).units
        batch = make_batch(opened, np.array([row]), 1, 0)
        assert batch.signals["of_document"].tolist() == documents.tolist()
        expected = np.concatenate([of_token[opened.offsets[number] : opened.offsets[number + 1]] for number in documents])
        assert batch.signals["of_token"][batch.documents >= 0].tolist() == expected.tolist()
        assert not batch.signals["of_token"][batch.documents < 0].any()
        in_rows = [int(number) for number in batch.documents[batch.documents >= 0]]
        assert in_rows == [place for place, number in enumerate(documents) for _ in range(LENGTHS[number])]
