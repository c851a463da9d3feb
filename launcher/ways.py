"""Hydra's own ways to say what ours say: those that would be dropped, or would run something else, are refused by name."""

from __future__ import annotations

import argparse
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from trainers.config.errors import ConfigError

HONOURED = (
    "hydra.sweep.dir",
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra.searchpath",
    "hydra.verbose",
    "hydra.mode",
    "hydra.help",
    "hydra/help",
)
INSTEAD = {
    "hydra/launcher": "launch=local, launch=torchrun or launch=slurm",
    "hydra.launcher": "launch=local, launch=torchrun or launch=slurm",
    "hydra.run.dir": "run_dir=DIR",
    "hydra.output_subdir": "run_dir=DIR, in which config.yaml is",
    "hydra.sweep.subdir": "hydra.sweep.dir=DIR: points are named by their overrides",
    "hydra.job.chdir": "run_dir=DIR: relative paths are of the directory that the command is given in",
    "hydra.job.name": "name=NAME",
    "hydra.job.env_set": "the shell's export, or launch.setup for SLURM",
}
"""What of fulltune does what these of Hydra do."""
OURS = {
    "launcher._target_": ("hydra/launcher", "hydra_plugins.fulltune.Points"),
    "run.dir": ("hydra.run.dir", "."),
    "sweep.subdir": ("hydra.sweep.subdir", "."),
    "job.chdir": ("hydra.job.chdir", False),
    "output_subdir": ("hydra.output_subdir", None),
}
"""Values of Hydra's own settings that conf/config.yaml sets, and that a preset of one's own could replace."""


def require_ours(arguments: argparse.Namespace) -> None:
    """Raise ConfigError where a command line says by Hydra's own ways what would be dropped: before Hydra makes a folder."""
    for name in ("config_name", "config_path"):
        if (value := getattr(arguments, name)) is not None:
            flag, remedy = f"--{name.replace('_', '-')}", "+exp=NAME takes an experiment, --config-dir DIR adds a folder of them"
            raise ConfigError(flag, value, "the launcher has one config, conf/config.yaml", remedy)
    experiments = []
    of_basic = not any(text.startswith("hydra/sweeper=") for text in arguments.overrides)
    for text in arguments.overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key.startswith(("hydra.", "hydra/")) and not any(key == name or key.startswith(f"{name}.") for name in HONOURED):
            raise _foreign(key, text.partition("=")[2])
        if key.startswith("hydra.sweeper.params") and of_basic:
            raise ConfigError(
                key, text.partition("=")[2], "a file of an experiment may have it; here values are given as they are", _swept(text)
            )
        if key == "exp" and not text.startswith("~"):
            experiments += _chosen(text)
    if len(experiments) > 1:
        raise ConfigError(
            "exp", " and ".join(experiments), f"a run has one experiment; you gave {len(experiments)}", f"+exp={experiments[0]}"
        )


def require_own_settings(hydra: Any) -> None:
    """Raise ConfigError where a file has replaced Hydra's own settings by others than ours."""
    for path, (key, value) in OURS.items():
        found = OmegaConf.select(hydra, path)
        if found != value:
            raise _foreign(key, found)


def _foreign(key: str, value: object) -> ConfigError:
    known = next((name for name in INSTEAD if key == name or key.startswith(f"{name}.")), "")
    return ConfigError(key, value, "fulltune starts runs and names their directories itself", INSTEAD.get(known, f"leave out {key}"))


def _swept(text: str) -> str:
    """Return the words of a sweep that a dict of Hydra's basic sweeper means."""
    try:
        value = OverridesParser.create().parse_override(text).value()
    except HydraException:
        value = None
    pairs = value.items() if isinstance(value, dict) else [("FIELD", "A,B")]
    return "-m " + " ".join(f"{key}={item}" for key, item in pairs)


def _chosen(text: str) -> list[str]:
    """Return the experiments that one override chooses for a run; of a sweep's, which takes one after another, the override."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return []
    value = override.value()
    if override.is_sweep_override():
        return [text.partition("=")[2]]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
