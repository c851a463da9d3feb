"""Names that settings give to files and directories, and what they must be. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trainers.config.choices import PeftMethod
from trainers.config.errors import ConfigError

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""What the name of a file of FILE_TYPES may have after it; parquet and arrow compress their own content."""


REMOTE = ("s3", "gs", "az", "hf", "https", "http")
"""What a URL of data may begin with."""
MADE = ("quickstart", "quickstart_base", "quickstart_digits", "llama8b_reward")
"""Experiments whose exports others of conf/exp begin with."""


def is_remote(name: str) -> bool:
    """Tell a URL from a path and a hub id."""
    return "://" in name


def require_known_scheme(path: str, url: str) -> None:
    """Raise ConfigError unless rows can be read from where a URL says."""
    if url.partition("://")[0] not in REMOTE:
        known = ", ".join(f"{scheme}://" for scheme in REMOTE)
        raise ConfigError(path, url, f"nothing here reads such a URL: known are {known}", "one of these, or a path on this machine")


def looks_local(name: str) -> bool:
    """Tell a path from a hub id: it exists, or has not the form OWNER/NAME."""
    if Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        return True
    return file_type(name) in FILE_TYPES or name.startswith("runs/")


def file_type(name: str) -> str:
    """Return the suffix that says what a file holds, in small letters and without that of its compression; '' where none does."""
    plain = re.sub(r"[?#].*", "", name) if is_remote(name) else name
    suffixes = [suffix.lower() for suffix in Path(plain).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def require_model_directory(path: str, value: str) -> None:
    """Raise ConfigError unless `value` is a directory with a config.json."""
    folder = Path(value)
    if not folder.is_dir():
        top, _, rest = value.partition("/")
        run = rest.split("/")[0]
        remedy = f"make it first: python -m launcher +exp={run}" if top == "runs" and run in MADE else ""
        raise ConfigError(path, value, "no such directory, and not a hub id of the form OWNER/NAME", remedy)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(path, value, "is an adapter, not a model", _of_adapter(folder))
    if not (folder / "config.json").is_file():
        raise ConfigError(path, value, "the directory has no config.json", "name a model directory in Hugging Face form")


def _of_adapter(folder: Path) -> str:
    """Return the settings that train an adapter further, as far as its own config says what it is for."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        base, method = config["base_model_name_or_path"], str(config["peft_type"]).lower()
    except (ValueError, KeyError, TypeError, OSError):
        base, method = "", ""
    named = f"model.id={base}" if base else "model.id with its base"
    presets = {*PeftMethod} - {PeftMethod.bottleneck}  # of which there are three
    return f"{named} peft={method if method in presets else 'METHOD'} peft.adapter={folder} to train it further"
