"""What a stream of shards cannot know, and so does not go with it. No torch."""

from __future__ import annotations

from trainers.config.choices import DataSource, ObjectiveName
from trainers.config.derived import OF_STREAMS
from trainers.config.errors import ConfigError
from trainers.config.local import is_remote, looks_local
from trainers.config.schema import DataConfig, RunConfig

STREAMED = (ObjectiveName.sft, ObjectiveName.cpt, ObjectiveName.orpo, ObjectiveName.simpo, ObjectiveName.cpo)
"""Objectives that ask nothing of all rows before the first step."""


def validate_stream(config: RunConfig) -> None:
    """Raise ConfigError for settings that need all rows at once, and for those of streams where there is none."""
    data, plain = config.data, DataConfig()
    if not data.streaming:
        for name in OF_STREAMS:
            if (value := getattr(data, name)) != getattr(plain, name):
                reason, off = "is of streams, and data.streaming is off", getattr(plain, name)
                raise ConfigError(f"data.{name}", value, reason, f"data.{name}={off}, or data.streaming=true")
        return
    if config.train.steps is None:
        reason = "a stream (data.streaming) does not know how many rows there are"
        epochs = "" if config.train.epochs is None else " train.epochs=null"
        raise ConfigError("train.steps", None, reason, f"train.steps=1000{epochs}, or data.streaming=false")
    if data.mix:
        reason = "names sources, whose shares are of all their rows, and a stream (data.streaming) does not know these"
        raise ConfigError("data.mix", list(data.mix), reason, "data.streaming=false, or one data set")
    if data.eval_fraction:
        reason = "is a share of all rows, and a stream (data.streaming) does not know these"
        remedy = "data.eval_fraction=0 data.eval_path=FILE, or data.streaming=false"
        raise ConfigError("data.eval_fraction", data.eval_fraction, reason, remedy)
    if config.objective.name not in STREAMED:
        reason = f"asks something of all rows before the first step, and a stream (data.streaming) goes with {', '.join(STREAMED)}"
        raise ConfigError("objective.name", str(config.objective.name), reason, "data.streaming=false")
    if data.source is DataSource.files and data.path is not None and not is_remote(data.path) and not looks_local(data.path):
        at = "" if data.revision is None else f"@{data.revision} data.revision=null"
        reason = "is a hub data set, which is downloaded whole and not streamed (data.streaming)"
        raise ConfigError("data.path", data.path, reason, f"data.path=hf://datasets/{data.path}{at}, or data.streaming=false")
