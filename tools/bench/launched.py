"""A run by the command that a user types, to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainers.processes import prepare_child

LIMIT_S = 3600.0


def launch(folder: Path, words: Sequence[str]) -> None:
    """Run `python -m launcher` with words; what it says goes to folder/log, and data is kept in folder/cache. Raises RuntimeError."""
    line = [sys.executable, "-m", "launcher", *words]
    with (folder / "log").open("w+") as log:
        env = os.environ | {"FULLTUNE_CACHE": str(folder / "cache")}
        child = subprocess.Popen(line, env=env, stdout=log, stderr=log, preexec_fn=prepare_child())
        if child.wait(LIMIT_S):
            log.seek(0)
            raise RuntimeError(f"{' '.join(line[1:])} failed:\n{log.read()[-3000:]}")
