"""What the suite does with its own tests: it samples those of many slow cases, and ends in time."""

from __future__ import annotations

import os
import subprocess
import sys

from command import ROOT


def collected(*words: str, **variables: str) -> str:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(line, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=200, check=False).stdout


def test_of_many_slow_cases_the_slow_suite_takes_a_third_and_the_soak_suite_the_others() -> None:
    names = {marks: collected("--collect-only", "-m", marks, "tests/test_golden_losses.py") for marks in ("slow and not soak", "soak")}
    slow, soak = (text.count("test_a_run_gives_the_recorded_numbers") for text in names.values())
    assert slow == -(-(slow + soak) // 3) > 3


def test_no_test_begins_after_the_end() -> None:
    assert "3 skipped" in collected("tests/test_units.py", "-k", "bytes or time", FULLTUNE_TESTS_END="1")
