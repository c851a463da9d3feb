"""The export: a directory that plain transformers opens, written tensor by tensor, read again and checked."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainers.config.errors import ConfigError
from trainers.model.blueprint import Blueprint, num_ids
from trainers.model.safetensors_files import INDEX, TYPES, Weights, listed
from trainers.model.saved_form import Pieces, SavedForm, misfit
from trainers.processes import raise_exhausted
from trainers.units import in_bytes

log = logging.getLogger("fulltune")
SHARD_BYTES = 4 << 30
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
"""Settings that mean nothing without do_sample."""
Sums = dict[str, int]
"""CRC-32 of the bytes of each tensor as they were written."""


def export(
    weights: Pieces,
    form: SavedForm,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    folder: Path,
    write: bool,
    shard_bytes: int = SHARD_BYTES,
    mark: str = "",
) -> Sums:
    """Write a Hugging Face directory, complete or absent. Every rank drains `weights`; the one with `write` writes.

    `weights` yields each of the model's tensors whole, or the consecutive pieces of its elements, and one is held at a time; of those
    that files hold in another shape all that belongs together.
    """

    def configure(staging: Path) -> None:
        write_configs(form.config, blueprint, tokenizer, stop_ids, staging)

    pieces = form.written(weights) if write else weights
    return write_folder(pieces, form.contents, configure, folder, write, shard_bytes, mark=mark)


def write_folder(
    weights: Iterable[tuple[str, Tensor]],
    contents: dict[str, Tensor],
    configure: Callable[[Path], None],
    folder: Path,
    write: bool,
    shard_bytes: int | None = None,
    file: str = "model.safetensors",
    mark: str = "",
) -> Sums:
    """Write what `configure` adds and the tensors of `contents` to a folder that is complete or absent; without `write` drain them only.

    Returns the checksums of what was written, for `check_export`.
    `file` names the one file that they are in; with `shard_bytes` there may be several. `mark` tells the staging folder from that of
    others who write the same at the same time. Nothing is put into place where the end of `weights` raises, the last thing that is done.
    """
    if not write:
        for _ in weights:
            pass
        return {}
    staging = folder.with_name(f"{folder.name}{mark}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    older = folder.exists()
    staging.mkdir(parents=True)
    try:
        require_space(contents, staging)
        configure(staging)
        sums = _write_weights(weights, contents, staging, _shards(contents, shard_bytes) if shard_bytes else [contents], file)
        if older:
            shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
        return sums
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def require_space(contents: dict[str, Tensor], folder: Path) -> None:
    """Raise RuntimeError unless the tensors fit on the disk that `folder` is on."""
    need, have = sum(tensor.nbytes for tensor in contents.values()), shutil.disk_usage(folder).free
    if need > have:
        raise RuntimeError(f"not exported: {folder} needs {need:,} bytes and has {have:,} free; free space, then the same command again")


def _write_weights(
    weights: Iterable[tuple[str, Tensor]], contents: dict[str, Tensor], folder: Path, shards: list[dict[str, Tensor]], file: str
) -> Sums:
    """Write the files' headers, then each piece to its place as it comes; raises RuntimeError for what is missing or does not fit."""
    sums = dict.fromkeys(contents, 0)
    places = _begin_files(shards, folder, file)
    left = {name: tensor.nbytes for name, tensor in contents.items()}
    for name, piece in weights:
        if name not in contents or piece.dtype != contents[name].dtype or piece.nbytes > left[name]:
            raise misfit(name, piece)
        path, end = places[name]
        with path.open("r+b") as opened:
            opened.seek(end - left[name])
            data = _bytes_of(piece)
            opened.write(data)
        sums[name] = zlib.crc32(data, sums[name])
        left[name] -= piece.nbytes
    if missing := [name for name, count in left.items() if count]:
        raise RuntimeError(f"not exported: {listed(missing)} did not come whole")
    return sums


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shards(contents: dict[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Split the tensors over files of at most `shard_bytes`, in their order; a larger tensor has a file of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in contents.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _begin_files(shards: list[dict[str, Tensor]], folder: Path, file: str) -> dict[str, tuple[Path, int]]:
    """Write each file's header, and the index where there are several; return each tensor's file and the place of its end in it."""
    places: dict[str, tuple[Path, int]] = {}
    for number, tensors in enumerate(shards, 1):
        path = folder / (file if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        header, ends = _header(tensors)
        path.write_bytes(header)
        places |= {name: (path, end) for name, end in ends.items()}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: path.name for name, (path, _) in places.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return places


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a safetensors file, byte for byte that of save_file, and where in the file each tensor ends."""
    names = {dtype: name for name, dtype in TYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # large items first: all are aligned
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + entries[name]["data_offsets"][1] for name in tensors}


def write_configs(
    config: PreTrainedConfig, blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], folder: Path
) -> list[str]:
    """Write config, tokenizer and a generation config that stops at the end of a turn, with the processors and code of the base.

    Returns the settings of the base's generation config that transformers refuses to save, and that are left out.
    """
    generation, refused = generation_config(blueprint, tokenizer, stop_ids)
    own = _ids(getattr(config, "eos_token_id", None))
    if own and stop_ids and not set(own) & set(_ids(generation.eos_token_id)):
        config.eos_token_id = stop_ids[0]  # some servers read this one alone
    config.dtype = blueprint.saved_dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not blueprint.scores:
        generation.save_pretrained(folder)
    if blueprint.folder is not None:
        processors = blueprint.folder.glob("*processor_config.json") if type(config) is type(blueprint.config) else ()
        for path in (*processors, *(blueprint.folder.glob("*.py") if blueprint.trust_remote_code else ())):
            shutil.copyfile(path, folder / path.name)
    return refused


def generation_config(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> tuple[GenerationConfig, list[str]]:
    """Return the base's generation config with the stop ids of training, and the names of settings that transformers refuses to save."""
    file = blueprint.folder / "generation_config.json" if blueprint.folder else None
    refused: list[str] = []
    try:
        known = file is not None and file.is_file()
        generation = (
            GenerationConfig.from_pretrained(str(blueprint.folder)) if known else GenerationConfig.from_model_config(blueprint.config)
        )
    except Exception as error:  # whatever transformers raises for values of another version, or written by hand
        raise_exhausted(error)
        generation, refused = _savable(_settings_in(file))
    stops = [number for number in _ids(generation.eos_token_id) if _is_end(tokenizer, number)]
    generation.eos_token_id = list(dict.fromkeys([*stops, *stop_ids])) or None
    if generation.pad_token_id is None and tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    if generation.do_sample is None and any(getattr(generation, name) not in (None, 0.0, 1.0, 50) for name in SAMPLING):
        generation.do_sample = True  # older models ship sampling settings without it, which is no longer saved
    if not _is_savable(generation):
        generation, more = _savable({name: value for name, value in vars(generation).items() if not name.startswith("_")})
        refused += more
    return generation, refused


def _settings_in(file: Path | None) -> dict[str, Any]:
    """Return what a generation config's file says; empty where it is not such a file."""
    try:
        settings = json.loads(file.read_text("utf-8")) if file is not None else {}
    except (OSError, ValueError):
        log.warning("%s is not JSON: the export has a generation config of its own", file)
        settings = {}
    return settings if isinstance(settings, dict) else {}


def _is_savable(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
        generation.to_json_string()
    except Exception as error:  # transformers checks types by using them
        raise_exhausted(error)
        return False
    return True


def _savable(settings: dict[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """Return a generation config of those settings that transformers saves together, and the names of the others.

    One is added at a time, again and again, since some are valid only with others.
    """
    kept, left, count = GenerationConfig(), dict(settings), -1
    while len(left) != count:
        count = len(left)
        for name, value in list(left.items()):
            trial = copy.deepcopy(kept)
            setattr(trial, name, value)
            if _is_savable(trial):
                kept = trial
                del left[name]
    return kept, sorted(left)


def _ids(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or [])


def _is_end(tokenizer: PreTrainedTokenizerBase, number: int) -> bool:
    """Tell whether an id at which the base stops ends a text for the run's tokenizer too, and is not some word of another one."""
    token = tokenizer.convert_ids_to_tokens(number) if 0 <= number < num_ids(tokenizer) else None
    return token is not None and (token in tokenizer.all_special_tokens or token in tokenizer.get_added_vocab() or token[:1] == "<")


def check_export(folder: Path, contents: Iterable[tuple[str, Tensor]], sums: Sums, read: bool, file: str = "model.safetensors") -> None:
    """Read the export again and compare type, shape and checksum of each tensor with what was written.

    Every rank drains `contents`; one reads. Raises RuntimeError that names the first tensor that is missing, left over or different.
    """
    weights = Weights(folder, file) if read else None
    left = set(weights.stored) if weights else set()
    for name, tensor in contents:
        if weights is None:
            continue
        found = weights.read_whole(name) if name in left else None
        if found is None or (found.dtype, found.shape, zlib.crc32(_bytes_of(found))) != (tensor.dtype, tensor.shape, sums[name]):
            raise RuntimeError(f"the export in {folder} is wrong at {name}: {'missing' if found is None else 'another value'}")
        left.remove(name)
    if left:
        raise RuntimeError(f"the export in {folder} holds {min(left)}, which the model does not")


def rehearse(
    contents: dict[str, Tensor],
    configure: Callable[[Path], None],
    reopened: Callable[[Path], None],
    blueprint: Blueprint,
    folder: Path,
    file: str = "model.safetensors",
) -> None:
    """Try the end of a run before it begins: write next to `folder` what `configure` adds and one tensor, open it and remove it.

    Raises ConfigError for a disk that is full or cannot be written, and for what cannot be saved or opened again.
    """
    need, have = sum(tensor.nbytes for tensor in contents.values()), shutil.disk_usage(folder.parent).free
    if need > have:
        reason = f"the export needs {in_bytes(need)}, and {in_bytes(have)} are free on its disk"
        raise ConfigError("run_dir", str(folder.parent), reason, "free space, or name another run_dir")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            "run_dir", str(folder.parent), f"{folder} is not a directory, and the export will be", f"mv {folder} {folder}.old"
        )
    name = min(contents, key=lambda name: contents[name].nbytes)
    one = {name: torch.zeros(contents[name].shape, dtype=contents[name].dtype)}
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent) as place:
            configure(Path(place))
            _write_weights(one.items(), one, Path(place), [one], file)
            Weights(Path(place), file).read_whole(name)
            reopened(Path(place))
    except Exception as error:  # whatever transformers raises for what it loads and does not save
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise_exhausted(error)
        if isinstance(error, OSError) and error.errno is not None:  # transformers raises OSError without a number, for files that it misses
            reason, remedy = f"the export cannot be written there: {said}", "free space, or name another run_dir"
            raise ConfigError("run_dir", str(folder.parent), reason, remedy) from error
        reason = f"what this run would export cannot be saved and opened again: {said}"
        raise ConfigError("model.id", str(blueprint.folder), reason, "correct the config and tokenizer files there") from error


def rehearse_export(form: SavedForm, blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], folder: Path) -> None:
    """Rehearse the export of a whole model; raises ConfigError, and says what of the base it will leave out."""

    def configure(place: Path) -> None:
        if refused := write_configs(form.config, blueprint, tokenizer, stop_ids, place):
            log.warning("the export leaves out of generation_config.json what transformers does not save: %s", ", ".join(refused))

    def reopened(place: Path) -> None:
        config = AutoConfig.from_pretrained(place, trust_remote_code=blueprint.trust_remote_code)
        if not blueprint.scores:
            GenerationConfig.from_pretrained(place)
        require_same(tokenizer, place, blueprint.trust_remote_code)
        replace(blueprint, config=config, folder=None).build()

    rehearse(form.contents, configure, reopened, blueprint, folder)


def require_same(tokenizer: PreTrainedTokenizerBase, folder: Path, trust_remote_code: bool) -> None:
    """Raise RuntimeError unless the tokenizer saved in a folder is opened as it was."""
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if len(again) != len(tokenizer) or again.chat_template != tokenizer.chat_template:
        raise RuntimeError(f"the tokenizer had {len(tokenizer)} tokens and has {len(again)}, or another chat template, once saved")


def reopen(folder: Path, trust_remote_code: bool, config: PreTrainedConfig | None = None, encodes: bool = False) -> PreTrainedModel:
    """Load the export as a user would, with plain transformers, on the CPU; a base with `config` in place of its own."""
    opener, more = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM, {} if config is None else {"config": copy.deepcopy(config)}
    model: PreTrainedModel = opener.from_pretrained(folder, trust_remote_code=trust_remote_code, **more)
    model.eval()
    return model


def sample_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], num_tokens: int) -> dict[str, str]:
    """Return a greedy answer to a prompt as {"prompt", "answer"}, within the model's positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(prompt_ids) + num_tokens
    ids = torch.tensor([list(prompt_ids)[-max(1, longest - num_tokens) :]])
    more: dict[str, Any]
    limit, begin, ends, more = min(num_tokens, longest - ids.shape[1]), ids.shape[1], model.generation_config, {}
    model.generation_config = GenerationConfig(  # the base's may ask for other decoding
        max_new_tokens=max(1, limit), do_sample=False, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
    )
    if model.config.is_encoder_decoder:
        from trainers.model.seq2seq import decoder_cache

        begin, more = 1, decoder_cache(model.config)
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)  # type: ignore[operator]
    prompt, answer = tokenizer.decode(ids[0]), tokenizer.decode(output[0, begin:], skip_special_tokens=True)
    return {"prompt": str(prompt), "answer": str(answer).strip()}
