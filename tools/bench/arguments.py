"""Types of arguments that several benchmarks take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument's type: a whole number, which may be written as 10e6, of at least `least`."""

    def number(text: str) -> int:
        value = float(text)
        if value != int(value) or value < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(value)

    return number
