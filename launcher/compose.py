"""From override strings to a JobConfig, with the errors of the command line: for tools, tests and the launcher itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher import config as schema
from launcher.config import JobConfig, ranks_per_node, run_config, validate_launch, world_size
from launcher.errors import BAD_INPUT, explain, unknown
from launcher.fields import all_fields, names_at
from launcher.generators import require_place
from launcher.named import require_named
from launcher.presets import CONF
from trainers.config.checks import validate
from trainers.config.choices import MeshChoice
from trainers.config.errors import ConfigError
from trainers.config.sharding import check_world

BAD_INPUT_EXIT = 2


class UnknownSettingError(Exception):
    """A key that `+` or `++` put where the schema has none: Hydra lets these in."""


def compose(overrides: list[str]) -> JobConfig:
    """Return the checked job of these overrides; bad input prints one message and raises SystemExit(2)."""
    with explained(overrides):
        schema.register()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", overrides)
        return checked(composed)


def unchecked(overrides: list[str]) -> JobConfig:
    """Return the job of these overrides, typed but neither checked nor of this machine; raises what Hydra and OmegaConf raise."""
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(hydra.compose("config", overrides))


def compose_with(overrides: list[str], more: list[str], config_dir: str | None = None) -> JobConfig | None:
    """Return the checked job of a command line with more overrides in the place of its own; None where they do not go together."""
    keys = {text.partition("=")[0] for text in more}
    kept = [text for text in overrides if text.partition("=")[0].lstrip("+~") not in keys]
    searched = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return checked(hydra.compose("config", [*kept, *more, *searched]))
    except (HydraException, OmegaConfBaseException, ConfigError, UnknownSettingError):
        return None


def checked(composed: DictConfig) -> JobConfig:
    """Return a composed config as a JobConfig that can work; raises ConfigError, or UnknownSettingError for a `+` of an unknown key."""
    job = typed(composed)
    make_paths_absolute(job)
    validate(run_config(job))
    validate_launch(job.launch)
    if job.launch.generators:
        require_place(job)
    if (job.reward or job.rl.environment) and job.launch.container is None:  # else it may be in the container alone
        require_named(run_config(job))
    if job.engine.mesh is not MeshChoice.auto:  # launcher/meshes.py: the mesh is not known yet
        check_world(run_config(job), world_size(job.launch), ranks_per_node(job.launch))
    return job


def typed(composed: DictConfig) -> JobConfig:
    """Return a composed config as a JobConfig; raises UnknownSettingError for a `+` of an unknown key."""
    refuse_unknown(composed)
    job = OmegaConf.to_object(composed)
    assert isinstance(job, JobConfig)
    return job


def make_paths_absolute(job: JobConfig) -> None:
    """Resolve what names a file or folder that is there: ranks, and a second start from elsewhere, must mean the same."""
    for part, name in (
        (job.model, "id"),
        (job.model, "tokenizer"),
        *((job.data, name) for name in ("path", "eval_path", "template", "prepared_dir")),
        *((source, name) for source in job.data.mix.values() for name in ("path", "eval_path", "template")),
        *((job.evaluation, name) for name in ("path", "general")),
        (job.rl, "vllm"),
        *((reward, name) for reward in job.reward.values() for name in ("path", "schema")),
    ):
        value = getattr(part, name)
        if value and (Path(value).expanduser().exists() or value.startswith("~")):
            setattr(part, name, os.path.abspath(Path(value).expanduser()))


def refuse_unknown(node: DictConfig, prefix: str = "") -> None:
    """Raise UnknownSettingError for the first key that the dataclasses do not have."""
    for key in map(str, node):
        path = prefix + key
        if path in all_fields():
            continue
        if key not in names_at(prefix.rstrip(".")):
            raise UnknownSettingError(path)
        refuse_unknown(node[key], f"{path}.")


@contextmanager
def explained(
    overrides: list[str], config_dir: str | None = None, kinds: tuple[type[Exception], ...] = (*BAD_INPUT, UnknownSettingError)
) -> Iterator[None]:
    """Turn errors of these kinds into one message on stderr and exit code 2; HYDRA_FULL_ERROR=1 lets the traceback through."""
    try:
        yield
    except kinds as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(message_of(error, overrides, config_dir), file=sys.stderr)
        raise SystemExit(BAD_INPUT_EXIT) from None


def message_of(error: Exception, overrides: list[str], config_dir: str | None) -> str:
    """Explain an error, with Hydra initialised again: the composing that failed has torn it down."""
    search_path = create_config_search_path(str(CONF))
    if config_dir is not None and Path(config_dir).is_dir():
        search_path.prepend("command-line", str(Path(config_dir).resolve()), SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("launcher", search_path)
    try:
        return unknown(str(error), overrides) if isinstance(error, UnknownSettingError) else explain(error, overrides)
    finally:
        GlobalHydra.instance().clear()
