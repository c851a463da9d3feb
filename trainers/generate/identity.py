"""What identifies the files of a model. No torch."""

from __future__ import annotations

from pathlib import Path

from trainers.cache import content_key
from trainers.config.errors import ConfigError
from trainers.data.sources import digest


def digest_of(folder: Path) -> str:
    """Return what identifies a model or adapter directory: a digest of its weights and its config, kept for large files while they stay.

    Raises ConfigError where there are no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError("RUN_OR_MODEL", str(folder), "holds no safetensors file", "a run that is done, or a model directory")
    configs = [folder / name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
    return content_key(*((file.name, digest(file)) for file in [*weights, *configs]))
