"""What a run names as module:name: whether it is there, without importing it, so that a wrong name costs a second."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from trainers.config.choices import RewardKind
from trainers.config.errors import ConfigError, alike
from trainers.config.schema import RunConfig

DYNAMIC = re.compile(r"import\s*\(?\s*\*|__getattr__|\bglobals\(|\bexec\(")
"""In the text of a module whose names only an import can tell."""
DEFINED = re.compile(r"^\s*(?:class|(?:async\s+)?def)\s+(\w+)", re.MULTILINE)


def require_named(config: RunConfig) -> None:
    """Raise ConfigError for an environment or a function that is not there. What only an import can tell is left to rank 0."""
    named = {f"reward.{name}.path": str(reward.path) for name, reward in config.reward.items() if reward.kind is RewardKind.function}
    if config.rl.environment is not None:
        named["rl.environment"] = config.rl.environment
    importlib.invalidate_caches()
    if config.data.tasks and _found("reasoning_gym", None) is not None:  # else rank 0 says that it is not there
        from trainers.data.tasks import open_tasks

        open_tasks(config.data.tasks, config.data.task_rows, config.data.task_seed)
    for field, path in named.items():
        module, _, name = path.replace(":", ".").rpartition(".")
        form = f"module:{'Class' if field == 'rl.environment' else 'function'}, in this folder or in PYTHONPATH"
        if not module:
            raise ConfigError(field, path, "names no module", form)
        reason, near = _absent(module, name)
        if reason:
            raise ConfigError(field, path, reason, f"{field}={module}:{near[0]}" if near else form)


def _absent(module: str, name: str) -> tuple[str, list[str]]:
    """Return why a name of a module is not there, and names like it; an empty reason where it is, or where only an import can tell."""
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        whole = ".".join(parts[:number])
        spec = _found(whole, places)
        if spec is None:
            return f"there is no module `{whole}` in {os.getcwd()}, PYTHONPATH or this Python's packages", []
        places = spec.submodule_search_locations
        if places is None and number < len(parts):  # os.path: a module that another one has put there
            return "", []
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return "", []
    text = Path(spec.origin).read_text("utf-8", "replace")
    if re.search(rf"\b{re.escape(name)}\b", text) or DYNAMIC.search(text):
        return "", []
    return f"{spec.origin} has no `{name}`", alike(name, DEFINED.findall(text))


def _found(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """Return where a module is, as an import would find it in a rank: there this folder is searched too."""
    for finder in sys.meta_path:
        if (spec := finder.find_spec(name, places)) is not None:
            return spec
    return PathFinder.find_spec(name, [os.getcwd()]) if places is None else None
