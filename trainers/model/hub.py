"""A model's or tokenizer's directory: a local one, or the snapshot of a hub repository, which is asked for once.

The hub's client asks for each file anew and waits for each. Here one question finds the commit. Where it is not answered, this process
asks no more, as with HF_HUB_OFFLINE=1, and reads what the cache has.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import socket
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.local import looks_local
from trainers.processes import raise_exhausted
from trainers.rundir.files import try_json

log = logging.getLogger("fulltune")
TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
WEIGHTS = ("*.safetensors", *TOKENIZER)
BINS = ("pytorch_model*.bin", *TOKENIZER)
unanswered: list[str] = []
"""Why the hub is asked no more."""


@dataclass(frozen=True)
class Repository:
    """What the hub has said of a repository."""

    commit: str | None = None
    """None where it has not answered."""
    files: list[str] = field(default_factory=list)
    why: str = ""
    """Why it has not, or has refused."""


def fetch(setting: str, name: str, revision: str | None, patterns: tuple[str, ...]) -> tuple[Path, str | None]:
    """Return the directory of a model or tokenizer, and its commit; None of a local one. Files of `patterns` that are missing are fetched.

    Raises ConfigError, with `setting`, where the hub refuses, or does not answer and the cache has none.
    """
    if looks_local(name):
        return Path(name), None
    from huggingface_hub import snapshot_download

    found = ask(name, revision)
    wanted, here = found.commit or revision, found.commit is None
    try:
        folder = snapshot_download(name, revision=wanted, allow_patterns=list(patterns), local_files_only=here)
    except Exception as error:  # whatever the hub's client and its HTTP library raise
        raise_exhausted(error)
        raise _refused(setting, name, found.why or f"cannot be fetched from the hub: {first_line(error)}") from error
    if found.commit is not None:
        _note_commit(Path(folder), revision or "main", found.commit)
    return Path(folder), Path(folder).name


def _note_commit(folder: Path, revision: str, commit: str) -> None:
    """Note which commit a branch or tag was, where the hub's client looks for it offline: it does not do so for a commit."""
    note = folder.parents[1] / "refs" / revision
    if revision != commit and (not note.is_file() or note.read_text("utf-8") != commit):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{note.name}.{socket.gethostname()}.{os.getpid()}")
        partial.write_text(commit, "utf-8")
        partial.rename(note)


def require_readable(name: str, revision: str | None, convert: bool) -> bool:
    """Tell whether a model on the hub has pickled weights alone; raises ConfigError where these are not to be converted."""
    files = ask(name, revision).files
    pickled = bool(fnmatch.filter(files, "pytorch_model*.bin")) and not fnmatch.filter(files, "*.safetensors")
    if pickled and not convert:
        remedy = "model.convert=true, or model.revision=refs/pr/N where the hub has converted it"
        raise ConfigError("model.id", name, "has only pytorch_model.bin, and safetensors is what is read", remedy)
    return pickled


def require_weights(name: str, folder: Path, convert: bool) -> None:
    """Raise ConfigError where a snapshot has no weights that can be read: of a cache that was filled in part."""
    if any(folder.glob("*.safetensors")):
        return
    if not any(folder.glob("pytorch_model*.bin")):
        remedy = f"hf download {name} where there is a network; and model.convert=true if the model has only pytorch_model.bin"
        raise ConfigError("model.id", name, f"there are no weights of it in {folder}", remedy)
    if not convert:
        raise ConfigError("model.id", name, "has only pytorch_model.bin here, and safetensors is what is read", "model.convert=true")


def ask(name: str, revision: str | None = None, kind: str = "model") -> Repository:
    """Ask the hub for the commit and files of a repository, once. What is not an answer is logged, and stops all further questions."""
    from huggingface_hub import is_offline_mode

    return Repository(why=unanswered[0] if unanswered else "HF_HUB_OFFLINE is set") if is_offline_mode() else _ask(name, revision, kind)


@lru_cache
def _ask(name: str, revision: str | None, kind: str) -> Repository:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info: Any = huggingface_hub.HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Repository(info.sha, [item.rfilename for item in info.siblings or []])
    except RevisionNotFoundError:
        return Repository(why=f"the hub has no revision {revision} of it")
    except RepositoryNotFoundError:
        return Repository(why=f"the hub has no such {kind}, or it asks for a token")
    except HFValidationError as error:
        return Repository(why=first_line(error))
    except Exception as error:  # no network, no name, no answer in time, an error of the server: each HTTP library has its own
        raise_exhausted(error)
        why = f"the hub at {constants.ENDPOINT} does not answer ({first_line(error)})"
    unanswered.append(why)
    os.environ["HF_HUB_OFFLINE"] = "1"  # of the processes that this one starts
    constants.HF_HUB_OFFLINE = True
    log.warning("%s: only files of this machine are read from here on; HF_HUB_OFFLINE=1 does not ask", why)
    return Repository(why=why)


def _refused(setting: str, name: str, why: str) -> ConfigError:
    from huggingface_hub import constants

    if "token" in why:
        return ConfigError(setting, name, why, "hf auth login")
    if "revision" in why:
        return ConfigError("model.revision", name, why, "model.revision=main, or another that it has")
    reason = f"{why}, and the cache {constants.HF_HUB_CACHE} does not have it"
    return ConfigError(setting, name, reason, f"hf download {name} on a machine with a network and this cache, or {setting}=DIR")


def first_line(error: Exception) -> str:
    """Return an error's first line, or its name where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@lru_cache
def say_whose_code(name: str, folder: Path, commit: str | None) -> None:
    """Say whose code transformers runs of a directory: its own, and that of repositories that its configs name."""
    named: set[str] = set()
    for file in ("config.json", "tokenizer_config.json"):
        classes = try_json(folder / file).get("auto_map")
        for entry in classes.values() if isinstance(classes, dict) else ():
            named |= {str(item) for item in (entry if isinstance(entry, list) else [entry]) if item}
    others = sorted({item.partition("--")[0] for item in named if "--" in item})
    own = [f"{name}{f' (commit {commit})' if commit else ''}"] if any("--" not in item for item in named) else []
    if own or others:
        log.warning("model.trust_remote_code: Python code of %s runs here, with all that you may do", " and of ".join(own + others))
