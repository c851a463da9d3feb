"""Rows of a data set on the Hugging Face hub, through `datasets`: its configurations, splits and revisions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from trainers.config.derived import Source
from trainers.config.errors import ConfigError
from trainers.data.containers import arrow_rows
from trainers.model import hub as asked
from trainers.processes import raise_exhausted


def name_of(source: Source) -> str:
    """Return what a bad row's place is called by, such as openai/gsm8k/main[train]."""
    return f"{source.path}{f'/{source.config}' if source.config else ''}[{source.split}]"


def rows(source: Source) -> Iterator[tuple[Any, int]]:
    """Yield the rows with their numbers, counted from 1, read from the arrow files that `datasets` keeps."""
    tables = open_hub(source).with_format("arrow").iter(1024)
    yield from arrow_rows(batch for table in tables for batch in table.combine_chunks().to_batches())


def fingerprint(source: Source) -> str:
    """Return what `datasets` knows the content by."""
    found: str = open_hub(source)._fingerprint
    return found


@lru_cache(maxsize=4)
def open_hub(source: Source) -> Any:
    """Return the `datasets.Dataset` of a source; raises ConfigError on the field that it does not have."""
    import datasets

    why = asked.ask(source.path, source.revision, kind="dataset").why
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or bool(asked.unanswered)  # read when it was imported
    files = {source.split: list(source.patterns)} if source.patterns else None
    try:
        return datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision, data_files=files)
    except Exception as error:  # whatever the hub client raises: no network, no such data set, a gated one
        raise_exhausted(error)
        raise _explained(source, error, why) from None


def _explained(source: Source, error: Exception, why: str = "") -> ConfigError:
    """Return the error of the setting that is wrong, with the names that there are; `why` is the hub's own refusal."""
    text = " ".join(str(error).split()) or type(error).__name__
    missing = re.search(r"(?:available configs: |BuilderConfig .* not found\. Available: )\[([^\]]*)\]", text)
    if missing is not None:
        names = re.findall(r"'([^']*)'", missing.group(1))
        reason = f"{source.path} has the configurations {', '.join(names)}" + ("" if source.config else ", and one is to be named")
        return ConfigError("data.config", source.config, reason, f"data.config={names[0] if names else 'NAME'}")
    splits = re.search(r"Unknown split .* Should be one of \[([^\]]*)\]", text)
    if splits is not None:
        names = re.findall(r"'([^']*)'", splits.group(1))
        return ConfigError(
            "data.split", source.split, f"{source.path} has the splits {', '.join(names)}", f"data.split={(names or ['NAME'])[0]}"
        )
    if source.revision is not None and "no revision" in why:
        return ConfigError("data.revision", source.revision, f"{source.path}: {why}", "data.revision=main, or another that it has")
    reason = f"is not a file here and could not be loaded from the hub: {why or asked.first_line(error)}"
    remedy = f"hf download --repo-type dataset {source.path} --local-dir DIR where there is a network, and data.path=DIR"
    return ConfigError("data.path", source.path, reason, remedy)
