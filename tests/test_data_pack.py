"""Packing covers every document once, never overfills a row, wastes little, and is the same every time."""

import itertools

import numpy as np
import pytest

from trainers.data.pack import best_fit, exact_fill, one_each, pack

RNG = np.random.default_rng(0)
LENGTHS = {
    "log-normal": np.minimum(RNG.lognormal(5, 0.6, 5000).astype(np.int64) + 1, 2048),
    "short": RNG.integers(1, 60, 5000),
    "long": RNG.integers(1100, 2049, 500),
    "equal": np.full(1000, 512),
    "one": np.array([7]),
    "none": np.zeros(0, np.int64),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_every_document_once_and_no_row_over_capacity(name):
    lengths = LENGTHS[name]
    order, rows = pack(lengths, 2048)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert rows[0] == 0
    assert rows[-1] == len(lengths)
    assert (np.diff(rows) > 0).all()
    assert all(lengths[order[start:end]].sum() <= 2048 for start, end in itertools.pairwise(rows))


@pytest.mark.parametrize("name", ["log-normal", "short", "equal"])
def test_rows_are_as_few_as_possible(name):
    lengths = LENGTHS[name]
    assert len(pack(lengths, 2048)[1]) - 1 <= -(-lengths.sum() // 2048) + 1


def test_documents_over_half_a_row_stand_alone():
    assert len(pack(LENGTHS["long"], 2048)[1]) - 1 == 500


def test_both_packers_agree_with_hand_work():
    assert best_fit([6, 5, 5, 4], 10) == [0, 1, 1, 0]
    assert exact_fill([6, 5, 5, 4], 10) == [0, 1, 1, 0]
    assert exact_fill([6, 4, 3, 3, 2, 2], 10) == [0, 0, 1, 1, 1, 1]


def test_packing_is_the_same_every_time():
    first, second = pack(LENGTHS["log-normal"], 2048), pack(LENGTHS["log-normal"].copy(), 2048)
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()


def test_a_document_that_does_not_fit_is_refused():
    with pytest.raises(ValueError):
        pack(np.array([5, 11]), 10)


def test_one_document_a_row():
    order, rows = one_each(3)
    assert order.tolist() == [0, 1, 2]
    assert rows.tolist() == [0, 1, 2, 3]
