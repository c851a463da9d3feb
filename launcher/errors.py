"""Bad input in one clear message: the field, its value, where it was set, and the nearest valid name."""

from __future__ import annotations

import difflib
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from launcher.fields import all_fields, choices, expected, names_at
from launcher.origin import UNSET, shown, where_set
from trainers.config.errors import ConfigError

# What other trainers call it: too far from our names for a comparison of letters to find.
OTHER_NAMES = {
    "batch_size": "train.global_batch",
    "per_device_train_batch_size": "train.microbatch",
    "gradient_accumulation_steps": "train.global_batch",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip",
    "warmup_ratio": "optim.warmup_steps",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "gradient_checkpointing": "train.activation_checkpointing",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "dataset": "data.path",
    "model_name_or_path": "model.id",
    "output_dir": "run_dir",
    "bf16": "train.precision",
    "save_steps": "checkpoint.every",
    "eval_steps": "train.eval_every",
    "nproc_per_node": "launch.processes",
    "nnodes": "launch.nodes",
}
BAD_INPUT = (HydraException, OmegaConfBaseException, ConfigError, yaml.YAMLError, ValueError)


def explain(error: Exception, overrides: list[str]) -> str:
    """Return the message for an error of composing, typing or validating; needs Hydra initialised."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, ConfigError):
        return _report(error.path, error.value, error.reason, overrides, error.remedy and f"try     {error.remedy}")
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"error: {shown(Path(error.problem_mark.name))}:{error.problem_mark.line + 1}: is no YAML: {error.problem}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_preset(error.missing_cfg_file, overrides)
    if isinstance(cause, (ConfigKeyError, AttributeError)) and isinstance(cause, OmegaConfBaseException):
        return unknown(_attempted(str(cause.full_key), error, overrides), overrides)
    if isinstance(cause, ValidationError):
        return _wrong_type(str(cause.full_key), _first_line(cause), overrides)
    if isinstance(cause, OmegaConfBaseException):
        return _report(str(cause.full_key), UNSET, _first_line(cause), overrides)
    return _from_text(str(error), overrides)


def unknown(path: str, overrides: list[str]) -> str:
    """Return the message for a dotted path that names no setting."""
    parent = path.rpartition(".")[0]
    field = all_fields().get(parent)
    if field is not None and expected(field.type).startswith("a mapping"):
        return _report(path, UNSET, f"`{parent}` takes any key, and a new one needs a +", overrides, f"try     +{path}=VALUE")
    if field is not None:
        return _report(path, UNSET, f"`{parent}` holds no fields: it is {expected(field.type)}", overrides, f"try     {parent}=VALUE")
    siblings = names_at(parent)
    level = parent if siblings else ""
    known = f"`{level or 'top level'}` has: {', '.join(names_at(level))}"
    near = nearest(path)
    return _report(path, UNSET, "there is no such setting", overrides, f"nearest {', '.join(near)}" if near else known)


def nearest(path: str) -> list[str]:
    """Return up to three valid dotted paths close to a wrong one: at its own level first, then anywhere."""
    parent, _, name = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    level = [prefix + match for match in difflib.get_close_matches(name, names_at(parent), n=2, cutoff=0.55)]
    whole = difflib.get_close_matches(path, list(all_fields()), n=2, cutoff=0.78)
    same_name = [known for known in all_fields() if _close(name, known.rpartition(".")[2])]
    other = [OTHER_NAMES[name]] if name in OTHER_NAMES else []
    return list(dict.fromkeys(other + level + whole + same_name))[:3]


def _close(name: str, known: str) -> bool:
    return difflib.SequenceMatcher(None, name, known).ratio() >= 0.85


def _report(path: str, value: Any, reason: str, overrides: list[str], *advice: str) -> str:
    """Lay out one error; `advice` is whole lines such as `try     optim.lr=1e-5`, empty ones left out."""
    where, raw = where_set(path, overrides)
    value = raw if value is UNSET else value
    lines = [f"error: `{path}`" + ("" if value is UNSET else f" = {_show(value)}") + f": {reason}"]
    lines += [f"  set by  {where}"] if where else []
    lines += [f"  {line}" for line in advice if line]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value!r}" if isinstance(value, str) else str(value)


def _first_line(error: Exception) -> str:
    return str(getattr(error, "msg", None) or error).splitlines()[0]


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        near = nearest(override.lstrip("+~"))
        return f"error: {override!r} sets nothing: write FIELD=VALUE" + (f"\n  try     {near[0]}=VALUE" if near else "")
    quoted = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    fixed = shlex.quote(f'{key}="{quoted}"')
    return f"error: {override!r} cannot be read: the value has characters that need quotes\n  try     {fixed}"


def _no_preset(file: str, overrides: list[str]) -> str:
    group, _, name = file.rpartition("/")
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    setter = next((text for text in overrides if text.lstrip("+").startswith(f"{group}=")), "")
    lines = [f"error: `{group}` = {name!r}: there is no conf/{group}/{name}.yaml"]
    lines += [f"  set by  command line: {setter}" if setter else "  set by  the defaults list of a file in conf/"]
    sign = "+" if group in ("exp", "method") else ""
    lines += [f"  nearest {', '.join(f'{sign}{group}={item}' for item in near)}"] if near else []
    return "\n".join([*lines, f"  there are: {', '.join(known)}"])


def _attempted(full_key: str, error: Exception, overrides: list[str]) -> str:
    """Return the whole path that was tried: OmegaConf stops at the first name that it does not know."""
    match = re.search(r"Could not override '([^']+)'", str(error))
    tried = match[1] if match else full_key
    return tried if tried.startswith(full_key) else full_key


def _wrong_type(full_key: str, reason: str, overrides: list[str]) -> str:
    path = re.sub(r"\[\d+\]$", "", full_key)
    below = next((text for text in overrides if text.lstrip("+~").startswith(f"{path}.")), None)
    if below is not None and path in all_fields():
        return unknown(below.lstrip("+~").partition("=")[0], overrides)
    field = all_fields().get(path)
    if field is None and names_at(path):
        return _report(path, UNSET, "is a group of fields, not a value", overrides, f"try     {path}.{names_at(path)[0]}=VALUE")
    if field is None:
        return _report(path, UNSET, reason, overrides)
    value = where_set(path, overrides)[1]
    near = difflib.get_close_matches(str(value), choices(field.type), n=1, cutoff=0.4)
    return _report(path, UNSET, f"must be {expected(field.type)}", overrides, f"nearest {path}={near[0]}" if near else "")


def _from_text(text: str, overrides: list[str]) -> str:
    """Turn the Hydra errors that carry nothing but their text into ours."""
    if match := re.search(r"^In '.+': (\w+) raised while composing config:\n(.*)\n\s+full_key: (\S+)", text):
        return unknown(match[3], overrides) if "Key" in match[1] or "Attribute" in match[1] else _wrong_type(match[3], match[2], overrides)
    if match := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        setter = next((item for item in overrides if item.startswith(f"{match[1]}=")), f"{match[1]}=NAME")
        return f"error: `{match[1]}` is not chosen yet, so choosing it needs a +\n  set by  command line: {setter}\n  try     +{setter}"
    if match := re.search(r"^(?:Multiple values for )?(\S+?)(?: appears more than once|\. To override a value)", text):
        setter = next((item for item in overrides if item.startswith(f"+{match[1]}=")), "")
        return f"error: `{match[1]}` is already chosen: leave out the +\n  set by  command line: {setter}\n  try     {setter[1:]}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        key, _, value = match[1].partition("=")
        return f"error: {match[1]!r}: one value is expected\n  try     '{key}=[{value}]' for a list, '{key}=\"{value}\"' for text"
    if "Config group override must be a string" in text:
        return _no_name(overrides)
    return "error: " + text.strip().splitlines()[0] if text.strip() else "error: the settings cannot be composed"


def _no_name(overrides: list[str]) -> str:
    """Return the message for a group that was given something else than the name of a preset."""
    loader = GlobalHydra.instance().config_loader()
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        group = override.key_or_group
        if group in loader.list_groups("") and not isinstance(override.value(), str):
            return f"error: {text!r}: a group takes the name of a preset\n  there are: {', '.join(loader.get_group_options(group))}"
    return "error: an override has no name before its =: write FIELD=VALUE"
