"""What --help fills in: presets, experiments and fields, read off conf/ and the dataclasses so that they cannot go stale."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launcher.fields import all_fields, choices, named_fields
from launcher.presets import CONF, files, groups, own
from trainers.config.schema import plain


def register(config_dir: str | None = None) -> None:
    """Make `${presets:}`, `${experiments:}`, `${pipelines:}` and `${fields:}` known to conf/config.yaml, with one's own presets."""
    folders = [CONF, *own(config_dir)]
    of_files = {"presets": presets, "experiments": experiments, "pipelines": pipelines}
    OmegaConf.register_new_resolver("fields", fields, replace=True)
    for name, made in of_files.items():
        OmegaConf.register_new_resolver(name, partial(made, folders), replace=True)


def presets(folders: Sequence[Path] = (CONF,)) -> str:
    """Return one line a group."""
    return "\n".join(f"  {group:<10} {', '.join(file.stem for file in files(group, folders))}" for group in groups())


def experiments(folders: Sequence[Path] = (CONF,)) -> str:
    """Return one line an experiment: its name and the first comment of its file."""
    return "\n".join(f"  +exp={file.stem:<17} {_summary(file)}" for file in files("exp", folders))


def pipelines(folders: Sequence[Path] = (CONF,)) -> str:
    """Return one line a pipeline: its name and the first comment of its file."""
    return "\n".join(f"  +pipeline={file.stem:<20} {_summary(file)}" for file in files("pipeline", folders))


def _summary(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line), "")


def fields() -> str:
    """Return each field: path, default, the first line of its docstring and its choices, wrapped to the terminal."""
    width = shutil.get_terminal_size((160, 40)).columns
    lines = []
    for field in (*all_fields().values(), *named_fields().values()):
        names = f" [{'|'.join(choices(field.type))}]" if choices(field.type) else ""
        start = f"  {field.path + f' ({_default(field.default)})':<44} "
        lines.append(textwrap.fill(f"{field.doc}{names}", max(width, 80), initial_indent=start, subsequent_indent=" " * 47))
    return "\n".join(lines).replace("$", "$$")


def _default(value: Any) -> str:
    return "null" if value is None else str(plain(value)).replace("True", "true").replace("False", "false")
