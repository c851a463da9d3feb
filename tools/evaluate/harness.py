"""Standard benchmarks by EleutherAI's lm-evaluation-harness, an optional extra: its tasks, its prompts, its metrics."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tools.evaluate.intervals import Estimate
from tools.evaluate.record import as_json
from trainers.config.errors import ConfigError


def benchmark(model: PreTrainedModel, tokenizer: Any, tasks: list[str], include: str | None, batch: int) -> dict[str, dict[str, Any]]:
    """Return {task: {metric: {"value", "low", "high", "documents"}}} of each task, with the harness's own settings of it.

    `include` is a directory of more task files. Raises ConfigError where the package is not installed, has no such
    task, or cannot have its data.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("--lm-eval", ",".join(tasks), f"lm-eval cannot be imported: {error}", "pip install lm-eval") from error
    manager = TaskManager(include_path=include, include_defaults=include is None or not _are_in(tasks, include))
    try:
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found = simple_evaluate(model=asked, tasks=tasks, task_manager=manager, log_samples=False, bootstrap_iters=1000)
    except KeyError as error:
        raise ConfigError("--lm-eval", ",".join(tasks), f"lm-eval has no task {error}", "lm-eval ls tasks") from error
    except (ConnectionError, OSError) as error:
        raise ConfigError(
            "--lm-eval", ",".join(tasks), f"a task's data could not be loaded: {str(error).splitlines()[0]}", "a network"
        ) from error
    counts = found.get("n-samples", {})
    return {task: _figures(figures, counts.get(task, {}).get("effective")) for task, figures in found["results"].items()}


def _are_in(tasks: list[str], include: str) -> bool:
    """Tell whether a directory names all tasks: the harness need not read its own thousands then."""
    named = {
        line.partition(":")[2].strip()
        for file in Path(include).glob("*.yaml")
        for line in file.read_text("utf-8").splitlines()
        if line.startswith("task:")
    }
    return set(tasks) <= named


def _figures(figures: dict[str, Any], count: int | None) -> dict[str, Any]:
    """Return a task's metrics with the 95 % intervals of the harness's standard errors."""
    found: dict[str, Any] = {}
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        error = figures.get(f"{metric}_stderr,{kind}")
        reach = 1.96 * error if isinstance(error, int | float) and math.isfinite(error) else None
        low, high = (None, None) if reach is None else (value - reach, value + reach)
        found[metric if kind == "none" else f"{metric} ({kind})"] = as_json(Estimate(value=value, low=low, high=high, count=count or 0))
    return found
