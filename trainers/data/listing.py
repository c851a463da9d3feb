"""Which files of a directory are its rows: a split's, as `datasets` tells splits apart, and nothing that only lies next to them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainers.config.derived import Source
from trainers.config.errors import ConfigError
from trainers.config.local import COMPRESSED, FILE_TYPES, file_type, is_remote
from trainers.data.remote import RemotePath

PREFERRED = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
"""Of files with the same rows in two formats the first of these is read, as in `datasets`."""
SAME_FORMAT = {".ndjson": ".json", ".jsonl": ".json", ".md": ".txt"}
TEXT_TYPES = (".txt", ".md")
SHOWN = 5
NOT_ROWS = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "generation_config.json"),
    *("metadata.json", "index.json", "stats.json", "vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("package.json", "requirements.txt", "_metadata", "_common_metadata", "robots.txt"),
}
CARD = re.compile(r"(readme|licen[cs]e|changelog|contributing|code_of_conduct|citation|notice|authors|security)([-_. ].*)?(\.(md|txt))?")
INDEX = re.compile(r".*\.index\.json|cache-.*\.arrow|tmp.*\.arrow|indices.*\.arrow")

Names = list[str]
LeftOut = dict[str, Names]


class Listing(NamedTuple):
    """The files that are read, in sorted order, and by their reason the names of those that are not."""

    files: list[Path | RemotePath]
    left_out: LeftOut


def listing(source: Source) -> Listing:
    """Return which files of a directory hold the rows of a source.

    Raises ConfigError where there are none, for a split or a configuration that is not there with those that are, and
    where it cannot be told which files are the rows.
    """
    if is_remote(source.path):
        return _listed(RemotePath(source.path), source)
    root = Path(source.path)
    return _saved(root, source) or _listed(root, source)


def _saved(root: Path, source: Source) -> Listing | None:
    """Return the files of what `datasets` has saved to disk, by its own index; None for other directories."""
    index = root / "dataset_dict.json"
    if index.is_file():
        splits = json.loads(index.read_text("utf-8"))["splits"]
        _require_split(source, splits)
        others = [f"{name}/" for name in splits if name != source.split]
        inner = _saved(root / source.split, source)
        if inner is not None:
            return Listing(inner.files, {"another split": others} if others else {})
    state = root / "state.json"
    if not state.is_file() or not (root / "dataset_info.json").is_file():
        return None
    return Listing([root / part["filename"] for part in json.loads(state.read_text("utf-8"))["_data_files"]], {})


def _listed(root: Path | RemotePath, source: Source) -> Listing:
    left_out: LeftOut = {}
    names = _candidates(root, source.patterns, left_out)
    structured = [name for name in names if file_type(name) not in TEXT_TYPES]
    if structured and not source.patterns:
        _leave(left_out, "text next to rows", [name for name in names if name not in structured])
        names = structured
    names = _of_split(root, source, names, left_out)
    if not source.patterns:
        names = _one_format(root, names, left_out)
    if not names:
        raise _nothing(source, left_out)
    return Listing([root / name for name in names], left_out)


def _leave(left_out: LeftOut, reason: str, names: Names) -> None:
    if names:
        left_out.setdefault(reason, []).extend(names)


def _nothing(source: Source, left_out: LeftOut) -> ConfigError:
    there = "; ".join(f"{reason}: {', '.join(names[:SHOWN])}" for reason, names in left_out.items())
    reason = "holds no data file" + (f" ({there})" if there else "")
    known = f"known types are {' '.join(FILE_TYPES)}, also with {' '.join(COMPRESSED)}"
    asked = f'; "data.data_files=[{left_out["not rows"][0]}]" reads what is left out' if "not rows" in left_out else ""
    return ConfigError("data.path", source.path, reason, known + asked)


def _candidates(root: Path | RemotePath, patterns: tuple[str, ...], left_out: LeftOut) -> Names:
    """Return the files that may be rows, relative to `root` and sorted: by their names, or as `patterns` ask for them.

    The others, but for hidden ones, are left out.
    """
    found: dict[Path | str, str] = {}
    visible = sorted(_visible(root))
    asked = set(_matching(patterns, visible))
    for name in visible:
        file = root / name
        reason = _reason(file, name in asked)
        real = file.resolve()
        if reason is None and real in found:
            reason = f"the same file as {found[real]}"
        if reason is None:
            found[real] = name
        else:
            _leave(left_out, reason, [name])
    return list(found.values())


def _visible(root: Path | RemotePath) -> Iterable[str]:
    """Yield the files below a directory, links followed once, without hidden ones and what is in folders like __MACOSX."""
    if isinstance(root, RemotePath):
        hidden = re.compile(r"(.*/)?\.|(.*/)?__[^/]*/")
        yield from (name for name in root.files if not hidden.match(name))
        return
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        if (real := Path(folder).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (str((Path(folder) / name).relative_to(root)) for name in files if not name.startswith("."))


def _reason(file: Path | RemotePath, asked: bool) -> str | None:
    """Return why a file cannot be rows; None where it can, or is asked for. Raises ConfigError for a link to nothing."""
    name = file.name.lower()
    if not asked and (name in NOT_ROWS or CARD.fullmatch(name) or INDEX.fullmatch(name)):
        return "not rows"
    if file_type(name) not in FILE_TYPES:
        return "no known type"
    if not file.exists():
        raise ConfigError("data.path", str(file), f"is a link to {os.readlink(str(file))}, which is not there", "fetch the files again")
    return "empty" if not file.stat().st_size else None


def _of_split(root: Path | RemotePath, source: Source, names: Names, left_out: LeftOut) -> Names:
    """Return the files of a source's split: by `data.data_files`, by the configurations in README.md, or by their names."""
    if source.patterns:
        chosen = _matching(source.patterns, names)
        if not chosen:
            there = f"{', '.join(names[:SHOWN])}{' and others' if len(names) > SHOWN else ''}" or "no data file"
            raise ConfigError("data.data_files", list(source.patterns), f"matches nothing in {root}, which has {there}")
        _leave(left_out, "not in data.data_files", [name for name in names if name not in chosen])
        return chosen
    patterns = _patterns(root, source, names) if names else {}
    if not patterns:
        return names
    splits = {split: _matching(found, names) for split, found in patterns.items()}
    _require_split(source, list(splits))
    chosen = splits.pop(source.split)
    for split, others in splits.items():
        _leave(left_out, f"split {split}", [name for name in others if name not in chosen])
    rest = set(names) - {*chosen, *(name for others in splits.values() for name in others)}
    _leave(left_out, "in no split", sorted(rest))
    return chosen


def _patterns(root: Path | RemotePath, source: Source, names: Names) -> dict[str, Names]:
    """Return the patterns of each split, as `datasets` finds them."""
    from datasets.data_files import _get_data_files_patterns, sanitize_patterns

    of_config = _configuration(root, source)
    if "data_files" in of_config:
        return {split: list(found) for split, found in sanitize_patterns(of_config["data_files"]).items()}
    below = f"{of_config['data_dir'].strip('/')}/" if "data_dir" in of_config else ""
    inside = [name.removeprefix(below) for name in names if name.startswith(below)]
    try:
        found = _get_data_files_patterns(_resolver(inside))
    except ValueError as error:
        raise ConfigError("data.path", source.path, f"its splits cannot be told: {error}", '"data.data_files=[**/train*]"') from None
    return {str(split): [below + pattern for pattern in patterns] for split, patterns in found.items()}


def _configuration(root: Path | RemotePath, source: Source) -> dict[str, Any]:
    """Return the named or default configuration of a data set's README.md; empty where it has none."""
    configs = _card(root)
    if not configs and source.config is None:
        return {}
    name = source.config or configs.get_default_config_name()
    if name not in configs:
        there = f"the configurations {', '.join(configs)}" if configs else "no configurations"
        need = "" if source.config else ", and one is to be named"
        remedy = f"data.config={next(iter(configs))}" if configs else "leave data.config out"
        raise ConfigError("data.config", source.config, f"{source.path} has {there}{need}", remedy)
    found: dict[str, Any] = configs[name]
    return found


def _card(root: Path | RemotePath) -> Any:
    """Return the configurations that a data set's README.md has; raises ConfigError where its header is not valid."""
    card = root / "README.md"
    if not card.is_file() or "configs:" not in card.read_text("utf-8", "replace"):
        return {}
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        return MetadataConfigs.from_dataset_card_data(DatasetCard(card.read_text("utf-8")).data)
    except (ValueError, yaml.YAMLError) as error:
        reason = f"its header does not say which files are read: {' '.join(str(error).split())[:200]}"
        raise ConfigError("data.path", str(card), reason, '"data.data_files=[**/train*]", or mend it') from None


def _resolver(names: Names) -> Callable[[str], Names]:
    def resolve(pattern: str) -> Names:
        found = _matching([pattern], names)
        if not found:
            raise FileNotFoundError(pattern)
        return found

    return resolve


def _matching(patterns: Iterable[str], names: Names) -> Names:
    """Return the names that match a pattern, as fsspec's glob would, which `datasets` asks."""
    from fsspec.utils import glob_translate

    whole = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
    return [name for name in names if any(pattern.match(name) for pattern in whole)]


def _require_split(source: Source, splits: Names) -> None:
    if source.split not in splits:
        there = f"has the splits {', '.join(splits)}" if len(splits) > 1 else f"has one split, {splits[0]}"
        raise ConfigError(
            "data.split", source.split, f"{source.path} {there}", f"data.split={splits[0]}, or data.eval_split for data.eval_path"
        )


def _one_format(root: Path | RemotePath, names: Names, left_out: LeftOut) -> Names:
    """Return one file of those that differ in their format only; raises ConfigError where more than one format is left."""
    kept: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (PREFERRED.index(file_type(name)), name.endswith(COMPRESSED), name)):
        first = kept.setdefault(_stem(name), name)
        if first != name:
            _leave(left_out, f"the same rows as {first} by its name", [name])
    chosen = sorted(kept.values())
    formats: dict[str, Names] = {}
    for name in chosen:
        kind = file_type(name)
        formats.setdefault(SAME_FORMAT.get(kind, kind), []).append(name)
    if len(formats) > 1:
        seen = ", ".join(f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else found[0] for found in formats.values())
        remedy = f'"data.data_files=[**/*{file_type(chosen[0])}]", or "data.data_files=[**]" for all of them'
        raise ConfigError(
            "data.path", str(root), f"holds files of {len(formats)} formats, which may be the same rows twice: {seen}", remedy
        )
    return chosen


def _stem(name: str) -> str:
    """Return a name without its format and compression; a text's format is a part of it."""
    plain = name[: -len(Path(name).suffix)] if name.lower().endswith(COMPRESSED) else name
    return plain if file_type(name) in TEXT_TYPES else plain[: -len(file_type(name))]
