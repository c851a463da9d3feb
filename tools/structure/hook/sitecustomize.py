"""Python imports this at the start of each process that `tools.structure` traces: it notes our lines and torch's collectives.

A step begins where `seed_step` is called and ends where it is called again. The main thread alone is traced.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from inspect import CO_OPTIMIZED
from types import FrameType
from typing import Any

FOLDER = os.environ["FULLTUNE_STRUCTURE"]
ROOT = os.path.join(os.environ["FULLTUNE_STRUCTURE_ROOT"], "")
COLLECTIVES = [
    *("all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor", "all_gather_object", "all_to_all_single", "barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "reduce_scatter_single"),
    *("reduce_scatter_tensor", "scatter"),
]
steps: list[dict[str, Any]] = [{"lines": {}, "collectives": []}]


def trace(frame: FrameType, event: str, argument: Any) -> Any:
    """Note a call of ours and follow its lines; `argument` is unused."""
    code = frame.f_code
    if not code.co_filename.startswith(ROOT) or not code.co_flags & CO_OPTIMIZED:
        return None
    name = code.co_filename[len(ROOT) :]
    if not name.startswith(("trainers/", "launcher/")):
        return None
    if code.co_name == "seed_step":
        if len(steps) == 1:
            watch_collectives()
        steps.append({"lines": {}, "collectives": []})
    lines = steps[-1]["lines"].setdefault(name, set())
    lines.add(frame.f_lineno)
    size = len(steps)

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines, size
        if size != len(steps):
            lines, size = steps[-1]["lines"].setdefault(name, set()), len(steps)
        if event == "line":
            lines.add(frame.f_lineno)
        return line

    return line


def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a collective that notes its name, its caller's file and its number of elements."""

    @wraps(collective)
    def call(*arguments: Any, **named: Any) -> Any:
        elements = max((value.numel() for value in (*arguments, *named.values()) if hasattr(value, "numel")), default=0)
        caller = sys._getframe(1).f_code.co_filename.removeprefix(ROOT)
        steps[-1]["collectives"].append([name, caller.partition("site-packages/")[2] or caller, elements])
        return collective(*arguments, **named)

    return call


def watch_collectives() -> None:
    """Count the collectives of torch.distributed that are called through the module."""
    import torch.distributed as dist

    for name in COLLECTIVES:
        if hasattr(dist, name):  # later torches have further names
            setattr(dist, name, counted(name, getattr(dist, name)))


def write() -> None:
    """Leave what this process did in FOLDER."""
    sys.settrace(None)
    found = [
        {"lines": {name: sorted(lines) for name, lines in step["lines"].items()}, "collectives": step["collectives"]} for step in steps
    ]
    with open(os.path.join(FOLDER, f"{os.getpid()}.json"), "w") as file:
        json.dump({"line": sys.orig_argv, "rank": os.environ.get("RANK"), "steps": found}, file)


def leave(code: int) -> None:
    """Write, then end the process at once, as os._exit does."""
    write()
    really_leave(code)


really_leave = os._exit
os._exit = leave  # type: ignore[assignment]
atexit.register(write)
sys.settrace(trace)
