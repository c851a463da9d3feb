"""Where a setting was set: the command line, a file of conf/ with its line, or the default of its dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from launcher.fields import all_fields

UNSET = object()


def where_set(path: str, overrides: list[str]) -> tuple[str, Any]:
    """Return where a dotted path got its value, in words, and the raw value, UNSET where nobody set it."""
    return _from_command_line(path, overrides) or _from_files(path, overrides) or _from_schema(path)


def _from_command_line(path: str, overrides: list[str]) -> tuple[str, Any] | None:
    for text in reversed(overrides):
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            continue
        if override.is_sweep_override():  # a point's value, which this does not say
            if override.key_or_group == path:
                return f"command line: {text}", UNSET
            continue
        inside = _inside(override.value(), path, override.key_or_group)
        if inside is not UNSET:
            return f"command line: {text}", inside
    return None


def _inside(value: Any, path: str, key: str) -> Any:
    """Return what `key=value` gives `path`; UNSET where it says nothing about it."""
    if key == path:
        return value
    if not path.startswith(key + "."):
        return UNSET
    if key.startswith("reward.") and path == f"{key}.kind" and isinstance(value, str):  # reward.NAME=KIND
        return value
    for name in path[len(key) + 1 :].split("."):
        if not isinstance(value, dict) or name not in value:
            return UNSET
        value = value[name]
    return value


def _from_files(path: str, overrides: list[str]) -> tuple[str, Any] | None:
    for default in reversed(_files(overrides)):
        package = default.package or ""
        if package and not path.startswith(package + "."):
            continue
        name = path[len(package) + 1 :] if package else path
        found = _in_file(default, name)
        if found is not None:
            return found
    return None


def _files(overrides: list[str]) -> list[ResultDefault]:
    """Return the files that these overrides merge, in order; none where Hydra cannot say."""
    try:
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list("config", overrides, RunMode.RUN).defaults
    except (HydraException, ValueError, yaml.YAMLError):
        return []
    return [item for item in found if item.config_path and item.config_path != "base_config" and not item.config_path.startswith("hydra/")]


def _in_file(default: ResultDefault, name: str) -> tuple[str, Any] | None:
    for source in GlobalHydra.instance().config_loader().get_sources():
        file = Path(source.path) / f"{default.config_path}.yaml"
        if source.scheme() == "file" and file.is_file():
            node = yaml.compose(file.read_text(encoding="utf-8"))
            line = _line(node, name.split("."))
            value = OmegaConf.select(OmegaConf.load(file), name)
            return None if line is None else (f"{shown(file)}:{line}", value)
    return None


def _line(node: yaml.Node | None, names: list[str]) -> int | None:
    """Return the line, from 1, of a path of names in a YAML document."""
    line = None
    for name in names:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key, value) for key, value in pairs if key.value == name), None)
        if match is None:
            return None
        line, node = match[0].start_mark.line + 1, match[1]
    return line


def shown(file: Path) -> str:
    """Return a path as a reader knows it: below the checkout as conf/..., else in full."""
    root = Path(__file__).resolve().parent.parent
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _from_schema(path: str) -> tuple[str, Any]:
    field = all_fields().get(path)
    if field is None:
        return "", UNSET
    place = "launcher/config.py" if path.split(".")[0] in ("mode", "launch") else "trainers/config/schema.py"
    return f"default of {place}", field.default
