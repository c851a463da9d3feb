"""Tasks of reasoning-gym as rows: made here, from settings and a seed, with no network and no files.

A row names its task, so that its reward makes the task again and asks that what an answer is worth (github.com/open-thought/reasoning-gym).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from trainers.config.derived import TASKS
from trainers.config.errors import ConfigError, did_you_mean

TASK = "task"
"""The field of a row that names its task."""


def make_task(name: str, settings: Mapping[str, Any], rows: int, seed: int) -> Any:
    """Return a task of reasoning-gym with so many rows; raises ConfigError for one that is not there, or settings that it does not have."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:  # of it, or of the many packages that it needs
        raise ConfigError("data.source", "reasoning_gym", f"cannot be imported: {error}", "pip install 'fulltune[tasks]'") from error

    if name not in DATASETS:
        raise ConfigError("data.tasks", name, "reasoning-gym has no such task", did_you_mean(name, sorted(DATASETS)))
    if not isinstance(settings, Mapping):
        raise ConfigError(f"data.tasks.{name}", settings, "is not settings of the task", f"data.tasks.{name}={{}}")
    own = {key: value for key, value in settings.items() if key not in ("seed", "size")}
    if len(own) < len(settings):
        raise ConfigError(f"data.tasks.{name}", dict(settings), "is of all tasks", "data.task_rows and data.task_seed")
    try:
        return reasoning_gym.create_dataset(name, size=rows, seed=seed, **own)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "are not values that the task takes"
        raise ConfigError(f"data.tasks.{name}", own, reason, f"the settings of reasoning-gym's {name}") from None


def open_tasks(tasks: Mapping[str, Any], rows: int, seed: int) -> dict[str, Any]:
    """Return each task, with as many rows as it has of all; raises ConfigError."""
    shares = {name: len(range(number, rows, len(tasks))) for number, name in enumerate(tasks)}
    return {name: make_task(name, settings or {}, shares[name], seed) for name, settings in tasks.items()}


def rows_of(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a source whose path `trainers.config.derived` has made, the tasks in turn."""
    about = json.loads(path.removeprefix(TASKS))
    opened = open_tasks(about["tasks"], about["rows"], about["seed"])
    names = list(opened)
    for number in range(about["rows"]):
        name, index = names[number % len(names)], number // len(names)
        made = opened[name][index]
        settings = about["tasks"][name] or {}
        task = {"name": name, "settings": settings, "seed": about["seed"], "rows": len(opened[name]), "index": index}
        yield {"question": made["question"], "answer": str(made["answer"]), TASK: task}


def marks(path: str) -> list[str]:
    """Return what identifies the rows: settings and the package that makes them."""
    return [path, version("reasoning-gym")]
