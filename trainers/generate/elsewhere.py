"""Where a rank's generator is, if not on the rank's machine: whoever started the rank says how a process is started there. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

SEAT = "FULLTUNE_GENERATOR"
"""The variable that has it."""


@dataclass(frozen=True)
class Seat:
    """A machine, and the words before a command that is to run there, with its standard streams and signals handed on."""

    host: str
    words: tuple[str, ...]


def seat_of(environment: Mapping[str, str] = os.environ) -> Seat | None:
    """Return where this rank's generator is; None where it has none. Only where `is_apart`."""
    found = json.loads(environment.get(SEAT) or "{}")
    return Seat(found["host"], tuple(found["words"])) if found else None


def is_apart(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the generators of this run are on machines of their own."""
    return SEAT in environment
