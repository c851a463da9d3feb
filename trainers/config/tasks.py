"""What `data.tasks` may be. No torch."""

from __future__ import annotations

from trainers.config.choices import DataSource
from trainers.config.errors import ConfigError, plural
from trainers.config.foreign import refuse_foreign
from trainers.config.schema import RunConfig

OWN = ("tasks", "task_rows", "task_seed")
"""Settings of `data` that are of tasks alone."""


def validate_tasks(config: RunConfig) -> None:
    """Raise ConfigError for tasks that cannot be made, before anything is."""
    data = config.data
    if data.source is not DataSource.reasoning_gym:
        refuse_foreign("data", data, f"data.source={data.source}", dict.fromkeys(OWN, "data=reasoning_gym"))
        return
    if not data.tasks:
        raise ConfigError(
            "data.tasks", None, "names no task of reasoning-gym", "tasks with their settings, such as {chain_sum: {max_terms: 3}}"
        )
    if data.path is not None:
        raise ConfigError("data.path", data.path, "data=reasoning_gym makes its rows", "data=files, or no data.path")
    if data.task_rows < len(data.tasks):
        reason = f"is less than one row for each of {plural(len(data.tasks), 'task')}"
        raise ConfigError("data.task_rows", data.task_rows, reason, "data.task_rows=1000")
