"""Short runs give the numbers that were recorded before the code was last rearranged, to the bit in fp32."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import launch
from record_losses import CASES, GOLDEN, QUICK, machine, make_inputs, run

from trainers.config.numerics import NUMERICS

TOLERANCE = {"loss": 1e-6, "eval_loss": 1e-6, "grad_norm": 1e-5}
"""Relative, where another torch or another kind of CPU rounds differently: an Intel differs from the AMD that recorded them by 2e-7 in
losses, and by 1.5e-6 in norms, which AdamW's first steps magnify."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_inputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_a_run_gives_the_recorded_numbers(name: str, inputs: list[str], cache: Path, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    got, expected = run(name, inputs, tmp_path / "run", partial(launch, cache)), golden["runs"][name]
    if golden["machine"] == machine():
        assert got == expected
        return
    assert as_floats(got) == {key: pytest.approx(values, rel=TOLERANCE[key]) for key, values in as_floats(expected).items()}
    pytest.skip(f"equal to {TOLERANCE['grad_norm']:g}; not compared to the bit: recorded on {golden['machine']}, this is {machine()}")


def as_floats(numbers: dict[str, Any]) -> dict[str, list[float]]:
    return {key: [float.fromhex(value) for value in values] for key, values in numbers.items() if key != "weights"}


def test_the_numbers_are_of_this_version_of_the_arithmetic() -> None:
    """Whoever raises NUMERICS records them again."""
    assert json.loads(GOLDEN.read_text())["numerics"] == NUMERICS


def test_each_case_is_recorded() -> None:
    assert list(json.loads(GOLDEN.read_text())["runs"]) == list(CASES)
