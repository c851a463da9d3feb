"""What the settings of a run and of a command differ in, and which of it a continued run takes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from trainers.config.choices import EngineName, OnSpike
from trainers.config.derived import peak_lr
from trainers.config.schema import RunConfig, plain

TAKEN = (
    *("name", "checkpoint.", "evaluation.", "limits.", "log.", "data.processes", "data.prepared_dir"),
    *("train.microbatch", "train.activations", "train.eval_microbatch", "train.eval_every", "train.sample_tokens"),
    *("train.compile", "train.logits_chunk", "train.step_timeout_s", "train.max_skipped", "train.deterministic", "train.export"),
    *("train.profile", "rl.timeout_s", "rl.restarts", "rl.mismatch", "rl.eval_samples", "rl.eval_temperature"),
    *("rl.environment_processes", "rl.environment_timeout_s"),
)
"""Settings, and groups that end with a point, that change nothing of what is trained: how much memory, how fast, what is written.

A microbatch or a kernel may round differently, as another number of ranks does."""
TAKEN_UNDER_FSDP = tuple(
    f"engine.{name}"
    for name in (
        *("offload_param", "offload_optimizer", "pin_memory", "reshard_after_forward", "reshard_after_backward"),
        *("mesh", "replicate", "shard", "context", "tensor", "expert", "prefetch", "sync_each_microbatch"),
    )
)
ACCEPT = ("data.skip_bad_rows", "data.max_lost_fraction", "data.max_left_out_fraction")
"""Settings that decide whether rows are accepted."""
PERMISSION = "train.extend"
"""Allows a change without being one."""


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `field: old -> new` for each field that differs; `run_dir` itself may be named in another way."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        path, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, path + ".")
        elif before != after and path not in ("run_dir", PERMISSION):
            lines.append(f"{path}: {_yaml(before)} -> {_yaml(after)}")
    return lines


def field_of(line: str) -> str:
    """Return the field that a line of `differences` is about."""
    return line.partition(": ")[0]


def differing(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the settings in which two runs differ; of learning rates the one that is used."""
    return differences(_at_one_rate(old), _at_one_rate(new))


def kept(changed: list[str], old: RunConfig, new: RunConfig) -> list[str]:
    """Return those of changed settings that a continued run must keep."""
    return [line for line in changed if not _is_taken(field_of(line), old, new)]


def _is_taken(path: str, old: RunConfig, new: RunConfig) -> bool:
    if path in ("checkpoint.every", "checkpoint.every_minutes") and OnSpike.rollback in (old.train.on_spike, new.train.on_spike):
        return False  # a rollback goes to the last checkpoint
    if path == "train.eval_every" and (old.train.patience, new.train.patience) != (None, None):
        return False  # patience counts evaluations
    if new.data.streaming and path in ACCEPT and (path != "data.skip_bad_rows" or new.data.skip_bad_rows):
        return True  # rows that were read before are the same, and a stream comes to others
    if path == "rl.servers":  # they may have moved, and another kind of generator draws other answers
        return bool(old.rl.servers and new.rl.servers)
    known = TAKEN + (TAKEN_UNDER_FSDP if new.engine.name is EngineName.fsdp else ())
    return any(path == name or (name.endswith(".") and path.startswith(name)) for name in known)


def _at_one_rate(run: RunConfig) -> dict[str, Any]:
    """Return settings with the rate that is used as `optim.lr`, wherever it comes from: a run may have begun before its preset had one."""
    peak = peak_lr(run.optim, run.peft)
    optim = dataclasses.replace(run.optim, lr=peak.rate * peak.of_adamw, full_lr=0.0, adamw_factor=1.0)
    peft = dataclasses.replace(run.peft, lr=None)
    return dict(plain(dataclasses.replace(run, optim=optim, peft=peft)))


def _yaml(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)
