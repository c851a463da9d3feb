"""The model outside any engine: built without weights, read slice by slice, exported and reopened."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from trainers.config import Attention, ConfigError, ModelConfig, looks_local

SHARD_BYTES = 4 << 30


@dataclass(kw_only=True)
class Blueprint:
    """What every rank needs to build its part of a model."""

    config: PreTrainedConfig
    folder: Path | None
    """Directory of safetensors files; None for random weights."""
    revision: str | None
    """Commit of a hub model."""
    seed: int
    trust_remote_code: bool
    saved_dtype: torch.dtype = torch.float32
    """Type of the export: the base checkpoint's own, so that the export can take its place."""

    def converted(self) -> PreTrainedModel:
        """Load the whole checkpoint on the CPU through transformers, which fuses and renames tensors on the way."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(self.folder), dtype=torch.float32, trust_remote_code=self.trust_remote_code
        )
        return model

    def build(self, device: str = "meta") -> PreTrainedModel:
        """Build the model in float32, parameters on `meta` (buffers are real) or, with random weights, on `cpu`."""
        torch.manual_seed(self.seed)
        with init_empty_weights(include_buffers=False) if device == "meta" else contextlib.nullcontext():
            try:
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self.config), dtype=torch.float32, trust_remote_code=self.trust_remote_code
                )
            except ValueError as error:  # from_config writes the type into the config it is given, hence the copy
                reason = str(error).split(" yet.")[0].splitlines()[0]
                if "attention" in reason:
                    raise ConfigError("model.attention", self.config._attn_implementation, reason, "model.attention=auto") from error
                raise ConfigError("model.id" if self.folder else "model.architecture", self.config.model_type, reason) from error
        model.tie_weights()
        return model


def make_blueprint(model: ModelConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """Resolve a hub id or directory, or random weights, into a Blueprint; raises ConfigError naming the field."""
    if model.id is None:
        folder, revision = None, None
        config = _architecture(model.architecture, tokenizer)
    else:
        folder, revision = _fetch(model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    vocab_size = config.get_text_config().vocab_size or 0
    if len(tokenizer) > vocab_size:
        raise ConfigError("model.tokenizer", model.tokenizer, f"has {len(tokenizer)} tokens, the model only {vocab_size}")
    saved_dtype = config.dtype if folder is not None and isinstance(config.dtype, torch.dtype) else torch.float32
    config._attn_implementation = _attention(model.attention, config)
    return Blueprint(
        config=config,
        folder=folder,
        revision=revision,
        seed=seed,
        trust_remote_code=model.trust_remote_code,
        saved_dtype=saved_dtype,
    )


def _architecture(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return a transformers config for random weights; raises ConfigError for a field its class does not have."""
    fields = dict(fields)
    kind = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            "model.architecture.model_type", kind, "transformers has no such architecture", _near(kind, CONFIG_MAPPING)
        ) from error
    for name, value in fields.items():
        if not hasattr(known, name):
            raise ConfigError(f"model.architecture.{name}", value, f"{type(known).__name__} has no such field", _near(name, vars(known)))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return AutoConfig.for_model(kind, **({"vocab_size": len(tokenizer)} | special | fields))
    except Exception as error:  # transformers' own check of types and of sizes that do not divide
        raise ConfigError("model.architecture", fields, " ".join(str(error).split())) from error


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean {close[0]}?" if close else ""


def _fetch(model: ModelConfig) -> tuple[Path, str | None]:
    assert model.id is not None
    if looks_local(model.id):
        return Path(model.id), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            model.id, revision=model.revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.py"]
        )
    except RepositoryNotFoundError as error:
        raise ConfigError("model.id", model.id, "the hub has no such model, or it asks for a token", "hf auth login") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError("model.id", model.id, f"cannot be fetched from the hub: {error}", "name a local directory") from error
    return Path(folder), Path(folder).name


def _attention(wanted: Attention, config: PreTrainedConfig) -> str | None:
    """Choose the backend; `auto` is flash where package, GPU and architecture have it, else what transformers takes: sdpa, or eager."""
    flash = torch.cuda.is_available() and transformers.utils.is_flash_attn_2_available()
    if wanted is Attention.flash_attention_2 and not flash:
        raise ConfigError(
            "model.attention", str(wanted), "flash-attn or a GPU is missing", "pip install flash-attn, or model.attention=sdpa"
        )
    if wanted is not Attention.auto:
        return str(wanted)
    known = model_class(config)
    return "flash_attention_2" if flash and known is not None and known._supports_flash_attn else None


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class transformers has for a config; None for code that comes with the model."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    known: type[PreTrainedModel] | None = mapping.get(type(config), None)
    return known


class Weights:
    """The safetensors files of a model directory, read one slice at a time so that no rank holds more than its own."""

    def __init__(self, folder: Path) -> None:
        """Open every file's header; raises ConfigError naming a missing or truncated file."""
        self.files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        for name in names:
            for key, handle in self._open(folder / name):
                self.files[key] = handle

    @staticmethod
    def _open(path: Path) -> Iterator[tuple[str, Any]]:
        if not path.is_file():
            remedy = "convert it: safetensors is the only format that is read" if list(path.parent.glob("*.bin")) else ""
            raise ConfigError("model.id", str(path.parent), f"{path.name} is missing", remedy)
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ConfigError("model.id", str(path), f"is damaged or truncated: {error}", "fetch the file again") from error
        for key in handle.keys():  # noqa: SIM118 - not a mapping
            yield key, handle

    def find(self, name: str, base_prefix: str) -> str | None:
        """Return the checkpoint's key of a parameter; a base model saved alone has no head prefix."""
        short = name.removeprefix(f"{base_prefix}.")
        return name if name in self.files else short if short in self.files else None

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the block of `shape` at `offset` of a tensor, in the type it has on disk."""
        part = self.files[key].get_slice(key)
        block: Tensor = part[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        return block

    def shape(self, key: str) -> list[int]:
        """Return a tensor's full shape."""
        shape: list[int] = self.files[key].get_slice(key).get_shape()
        return shape


def weight_keys(model: PreTrainedModel, weights: Weights) -> dict[str, str] | None:
    """Match every parameter and persistent buffer with its key on disk, tied ones once.

    Returns None where names differ and transformers has a conversion for the architecture (experts that it fuses).
    Raises ConfigError that names what is missing or has another shape, before anything is read.
    """
    tied = tied_names(model)
    keys, missing, misshapen = {}, [], []
    for name, tensor in model.state_dict().items():
        key = weights.find(name, model.base_model_prefix)
        if key is None:
            missing += [] if name in tied else [name]
        elif name not in tied:
            keys[name] = key
            if weights.shape(key) != list(tensor.shape):
                misshapen.append(f"{name} is {weights.shape(key)} on disk, {list(tensor.shape)} by config.json")
    if missing and get_model_conversion_mapping(model, add_legacy=False):
        return None
    if missing or misshapen:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        reason = f"the checkpoint lacks {listed}" if missing else "; ".join(misshapen[:3])
        raise ConfigError("model.id", model.config.name_or_path, reason, "config.json and weights must belong together")
    return keys


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names that are other names of the same tensor, and so are neither read nor written."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def export(
    weights: Iterable[tuple[str, Tensor]],
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    folder: Path,
    write: bool,
) -> None:
    """Write a Hugging Face directory, complete or absent. Every rank drains `weights`; the one with `write` writes.

    At most one file's tensors (4 GiB) are held at a time.
    """
    staging = folder.with_name(folder.name + ".tmp")
    if write:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    for name, tensor in weights:
        if write and held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            files.append(_write_shard(held, staging, len(files)))
            held = {}
        if write:
            held[name] = tensor.contiguous()
    if not write:
        return
    files.append(_write_shard(held, staging, len(files)))
    _name_shards(files, staging)
    _write_configs(blueprint, tokenizer, stop_ids, staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _write_shard(tensors: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise RuntimeError(f"not exported: {bad[0]} holds values that are not finite")
    need, have = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if need > have:
        raise RuntimeError(
            f"not exported: {folder} needs {need:,} bytes more and has {have:,} free; free space, then the same command again"
        )
    save_file(tensors, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
    return list(tensors)


def _name_shards(files: list[list[str]], folder: Path) -> None:
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_configs(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], folder: Path) -> None:
    """Write config, tokenizer and a generation config that stops at the end of a turn."""
    config = blueprint.config
    if (architecture := model_class(config)) is not None:
        config.architectures = [architecture.__name__]
    config.dtype = blueprint.saved_dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = blueprint.folder
    known = base is not None and (base / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(str(base)) if known else GenerationConfig.from_model_config(config)
    stops = [generation.eos_token_id] if isinstance(generation.eos_token_id, int) else list(generation.eos_token_id or [])
    generation.eos_token_id = list(dict.fromkeys([*stops, *stop_ids])) or None
    if generation.pad_token_id is None and tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    if any(getattr(generation, name) not in (None, 1.0, 50) for name in ("temperature", "top_p", "top_k")):
        generation.do_sample = True  # older models ship sampling settings without it, which is no longer saved
    generation.save_pretrained(folder)


def check_export(folder: Path, live: Iterable[tuple[str, Tensor]], read: bool) -> None:
    """Reopen the export and compare each tensor with the live one, bit for bit. Every rank drains `live`; one reads.

    Raises RuntimeError that names the first tensor that is missing, left over or different.
    """
    weights = Weights(folder) if read else None
    left = set(weights.files) if weights else set()
    for name, tensor in live:
        if weights is None:
            continue
        if name not in left or not torch.equal(weights.files[name].get_tensor(name), tensor):
            raise RuntimeError(f"the export in {folder} is wrong at {name}: {'another value' if name in left else 'missing'}")
        left.remove(name)
    if left:
        raise RuntimeError(f"the export in {folder} holds {min(left)}, which the model does not")


def reopen(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Load the export as a user would, with plain transformers, on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model.eval()
    return model


def sample_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], num_tokens: int) -> dict[str, str]:
    """Return a greedy answer to a prompt as {"prompt", "answer"}, within the model's positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(prompt_ids) + num_tokens
    ids = torch.tensor([list(prompt_ids)[-max(1, longest - num_tokens) :]])
    limit = min(num_tokens, longest - ids.shape[1])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(1, limit), do_sample=False)  # type: ignore[operator]
    prompt, answer = tokenizer.decode(ids[0]), tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return {"prompt": str(prompt), "answer": str(answer).strip()}


def flops_per_token(shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, attended: float) -> float:
    """Return the FLOPs of forward and backward for one token: 6 a parameter, 12 x layers x width x `attended` for attention.

    PaLM, appendix B (Chowdhery et al. 2022), without recomputation. `attended` is the mean length of the document a token
    stands in. Untied input embeddings do no matrix work; of experts only those that a token is sent to count.
    """
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or chosen
    active = 0.0
    for name, shape in shapes.items():
        active += math.prod(shape) * (chosen / experts if ".experts." in name else 1.0)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    embeddings = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    flops: float = 6 * (active - embeddings) + 12 * text.num_hidden_layers * width * attended
    return flops


def positions_limit(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """Return the longest document the model was made for, or None, and whether longer ones are impossible (learned positions)."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) is None
