"""Numbers are written in one way everywhere."""

from __future__ import annotations

import pytest

from trainers.units import GIB, KIB, MIB, in_bytes, in_digits, in_time


@pytest.mark.parametrize(
    ("num_bytes", "digits", "text"),
    [
        (0, 1, "0.0 KiB"),
        (50 * KIB, 1, "50.0 KiB"),
        (MIB // 2, 1, "0.5 MiB"),
        (64 * MIB, 1, "64.0 MiB"),
        (GIB // 2, 2, "0.50 GiB"),
        (1536 * GIB, 1, "1,536.0 GiB"),
    ],
)
def test_bytes(num_bytes: int, digits: int, text: str) -> None:
    assert in_bytes(num_bytes, digits) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (600, "10 min"), (750, "12.5 min"), (5400, "1.5 h"), (100_000, "27.8 h"), (864_000, "10.0 days")],
)
def test_times(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (307_156, "307k"), (1_328_256, "1.33M"), (70.56e9, "70.6B"), (15e12, "15T")]
)
def test_counts(number: float, text: str) -> None:
    assert in_digits(number) == text
