"""Check what is asked to be merged, write it as a directory that plain transformers opens, and compare it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.command import Refused
from tools.export import Damaged, require_absent, require_space, with_bar
from trainers.config.errors import ConfigError, plural
from trainers.config.local import looks_local
from trainers.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from tools.merge.adapter import AdapterFiles
    from tools.merge.combine import Combination, Merge
    from trainers.model.saved_form import SavedForm

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
"""What a tokenizer may consist of."""


def write(options: argparse.Namespace) -> int:
    """Check everything that can be checked before the first weight is read, write OUT, and compare it; returns the exit code."""
    started = time.monotonic()
    out: Path = options.out
    require_absent(out)
    dtype = None if options.dtype == "saved" else options.dtype
    merge, base, form = matched(options, dtype)
    require_space(sum(tensor.nbytes for tensor in form.contents.values()), out)
    write_model(merge, base, form, dtype, out, int(options.shard_gib * 2**30))

    from tools.merge.probe import probe  # torch is there by now

    names = " + ".join(f"{weight:g} x {folder}" if weight != 1 else str(folder) for folder, weight in options.adapters)
    print(f"{out}: {base} + {names}")
    print(summary(merge, form.live, out, time.monotonic() - started))
    if merge.untied:
        print(f"{', '.join(sorted(merge.untied))} is no longer tied: OUT has a copy, and tie_word_embeddings=false")
    code = 0 if options.no_probe else probe(merge, form.live, out)
    print(f'open it: AutoModelForCausalLM.from_pretrained("{out}"), AutoTokenizer.from_pretrained("{out}")')
    return code


def matched(options: argparse.Namespace, dtype: str | None) -> tuple[Merge, Path, SavedForm]:
    """Return the adapters put on their base, the base's directory, and what OUT will hold; raises Refused for what does not fit."""
    combination = read_combination(options)

    import torch

    from tools.merge.adapter import Unfit, read_adapter
    from tools.merge.combine import Merge, base_blueprint

    try:
        adapters = [read_adapter(folder) for folder, _ in options.adapters]
        base = find_base(adapters, options.model)
        require_apart(options.out, [base, *(files.folder for files in adapters)])
        blueprint = base_blueprint(base, options.trust_remote_code, adapters)
        merge = Merge(blueprint, adapters, [weight for _, weight in options.adapters], combination)
        return merge, base, merge.form(None if dtype is None else getattr(torch, dtype))
    except Unfit as error:
        raise Refused(str(error)) from error
    except ConfigError as error:
        raise Refused(f"the base {error.value}: {'; '.join(filter(None, (error.reason, error.remedy)))}") from error


def write_model(merge: Merge, base: Path, form: SavedForm, dtype: str | None, out: Path, shard_bytes: int) -> None:
    """Write the merged model as `form` says to OUT, with the base's config and a tokenizer; OUT is complete or absent."""
    from trainers.model.export import write_folder

    def configure(staging: Path) -> None:
        write_config(merge, base, form, dtype, staging)
        copy_rest(base, [adapter.files.folder for adapter in merge.adapters], staging)

    weights = with_bar(readable(merge, form.live), sum(tensor.nbytes for tensor in form.live.values()), "merging")
    write_folder(form.written(weights), form.contents, configure, out.resolve(), write=True, shard_bytes=shard_bytes)


def summary(merge: Merge, contents: dict[str, Tensor], out: Path, seconds: float) -> str:
    """Return in one line what was written."""
    files = list(out.glob("*.safetensors"))
    changed = sum(any(one.changes(name) for one in merge.adapters) for name in contents)
    size = sum(path.stat().st_size for path in files)
    return (
        f"{changed} of {plural(len(contents), 'tensor')} changed, {plural(len(files), 'file')} of weights, {size:,} bytes, {seconds:.1f} s"
    )


def read_combination(options: argparse.Namespace) -> Combination:
    """Return how adapters are combined; raises Refused for what does not go together."""
    from tools.merge.combine import LIBRARY_METHODS, METHODS, Combination

    if options.method not in METHODS + LIBRARY_METHODS:
        raise Refused(f"--method {options.method}: one of {', '.join(METHODS + LIBRARY_METHODS)}")
    combination = Combination(method=options.method, density=options.density, svd_rank=options.svd_rank, seed=options.seed)
    if combination.prunes and options.density is None:
        raise Refused(f"--method {options.method} needs --density, the share of each change that it keeps (0.2 is usual for ties)")
    if options.density is not None and not (combination.prunes and 0 < options.density <= 1):
        raise Refused(f"--density {options.density:g}: a number in (0, 1], for ties, dare and magnitude_prune")
    if options.svd_rank is not None and not (options.method.endswith("svd") and options.svd_rank > 0):
        raise Refused(f"--svd-rank {options.svd_rank}: a number greater than 0, for peft:svd and peft:*_svd")
    return combination


def find_base(adapters: Sequence[AdapterFiles], model: str | None) -> Path:
    """Return the directory of the base that is meant; raises Refused, or ConfigError where the hub cannot be asked."""
    from trainers.model.blueprint import _fetch

    named = {str(files.config.base_model_name_or_path): files for files in adapters if files.config.base_model_name_or_path}
    if model is None and len(named) > 1:
        says = "; ".join(f"{files.folder} is of {name}" for name, files in named.items())
        raise Refused(f"the adapters name different bases: {says}. --model DIR says which is meant")
    if model is None and not named:
        raise Refused(f"{adapters[0].folder} names no base: --model DIR says which it is")
    name = next(iter(named)) if model is None else model
    revisions = {files.config.revision for files in adapters} if model is None else {None}
    if len(revisions) > 1:
        raise Refused(f"the adapters name different revisions of {name}: {', '.join(map(str, revisions))}. --model DIR says which is meant")
    if looks_local(name) and not (Path(name) / "config.json").is_file():
        whose = f"the base {name}" if model is not None else f"{name}, the base that {next(iter(named.values())).folder} names,"
        wrong = "has no config.json" if Path(name).is_dir() else "is not there"
        raise Refused(f"{whose} {wrong}: --model DIR says where it is")
    folder, _ = _fetch(ModelConfig(id=name, revision=revisions.pop()))
    return folder


def require_apart(out: Path, sources: Sequence[Path]) -> None:
    """Raise Refused where writing OUT, or OUT.tmp before it, would remove what is read."""
    out = out.resolve()
    for written in (out, out.with_name(out.name + ".tmp")):
        for source in sources:
            if source.resolve().is_relative_to(written):
                raise Refused(f"{out} would be written over {source}: name another directory")


def readable(merge: Merge, contents: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged tensors; raises Damaged for values that cannot be used."""
    from tools.merge.adapter import Unfit

    try:
        yield from merge.pieces(contents)
    except ConfigError as error:
        raise Damaged(f"the base {error.value}: {error.reason}") from error
    except Unfit as error:
        raise Refused(str(error)) from error


def write_config(merge: Merge, base: Path, form: SavedForm, dtype: str | None, folder: Path) -> None:
    """Write the base's config as it is but for the type, a vocabulary that has grown and tensors that are no longer tied."""
    from trainers.model.blueprint import QUANTISED

    config: dict[str, Any] = json.loads((base / "config.json").read_text("utf-8"))
    text = merge.blueprint.config.get_text_config()
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for name in QUANTISED:
            part.pop(name, None)
    for part in parts if dtype is not None else ():
        if part.keys() & {"dtype", "torch_dtype"}:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    if dtype is not None:
        config["dtype"] = dtype
    for part in parts if merge.blueprint.vocab_on_disk is not None else ():
        if part.get("vocab_size") == merge.blueprint.vocab_on_disk:
            part["vocab_size"] = text.vocab_size
    if merge.untied:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    config["architectures"] = form.config.architectures
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def copy_rest(base: Path, adapters: Sequence[Path], folder: Path) -> None:
    """Copy the base's generation config and code, and the tokenizer of the first adapter that has one, or the base's."""
    with_tokenizer = [place for place in adapters if (place / "tokenizer_config.json").is_file()]
    tokenizer = (with_tokenizer or [base])[0]
    places = [(base, ("generation_config.json", "*.py", "*processor_config.json")), (tokenizer, TOKENIZER)]
    for place, patterns in places:
        for path in [path for pattern in patterns for path in place.glob(pattern) if path.is_file()]:
            shutil.copyfile(path, folder / path.name)
    if with_tokenizer:
        add_stops(folder)


def add_stops(folder: Path) -> None:
    """Add the ids that end an answer in the adapter's chat template to the base's, which may know another template."""
    from transformers import AutoTokenizer

    from trainers.data.ends import stop_ids

    try:
        ends = stop_ids(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # whatever transformers raises; the base's ends are kept
        print(f"the adapter's tokenizer could not be opened, so generation_config.json stops where the base does: {error}", file=sys.stderr)
        return
    file = folder / "generation_config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    known = config.get("eos_token_id") or []
    ids = list(dict.fromkeys([*([known] if isinstance(known, int) else known), *ends]))
    if ids != known and ids != [known]:
        file.write_text(json.dumps(config | {"eos_token_id": ids}, indent=2) + "\n", "utf-8")
