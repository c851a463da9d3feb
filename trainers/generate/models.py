"""What a person names on a command line: a run, a model directory, a hub id or a server. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainers.config.derived import SCORED
from trainers.config.errors import ConfigError
from trainers.config.local import looks_local, require_model_directory
from trainers.config.schema import ModelConfig, RunConfig
from trainers.config.seq2seq import has_encoder
from trainers.model import hub
from trainers.rundir import paths
from trainers.rundir.base import config_of


@dataclass(frozen=True)
class Named:
    """A model of this machine or the hub: whose settings it is opened with, and its directory; None is the settings' own model."""

    config: RunConfig
    folder: Path | None


def is_url(name: str) -> bool:
    """Tell a server's address."""
    return name.startswith(("http://", "https://"))


def named(name: str) -> Named:
    """Return what a name means; raises ConfigError for what gives no text."""
    path = Path(name)
    if path.name == paths.EXPORT and (path.parent / paths.CONFIG).is_file():
        path = path.parent
    if (path / paths.CONFIG).is_file():
        return _run(path)
    if (path / "adapter_config.json").is_file():
        raise ConfigError("MODEL", name, "is an adapter, and nothing says of which base", "the run that made it, or python -m tools.merge")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError("MODEL", name, "is neither a run nor a model directory")
    if looks_local(name):
        require_model_directory("MODEL", name)
    if not path.is_dir():
        folder, _ = hub.fetch("model.id", name, None, ("config.json",))
        return Named(RunConfig(model=ModelConfig(id=name, encoder_decoder=has_encoder(folder))), None)
    return Named(RunConfig(model=ModelConfig(id=str(path.resolve()), encoder_decoder=has_encoder(path))), None)


def _run(run: Path) -> Named:
    config = config_of(run)
    if config.objective.name in SCORED:
        raise ConfigError("MODEL", str(run), "gives scores of documents, and no text", "a run of another objective")
    if not (run / paths.EXPORT).is_dir():
        remedy = f"wait until it is done, or python -m tools.export {run} --out DIR, and DIR"
        raise ConfigError("MODEL", str(run), f"has no {paths.EXPORT}: the run is not done", remedy)
    return Named(config, run / paths.EXPORT)
