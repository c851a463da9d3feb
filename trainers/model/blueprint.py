"""The model outside any engine: built without weights, grown to its tokenizer, exported and reopened."""

from __future__ import annotations

import copy
import difflib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainers.config.checks import looks_local
from trainers.config.errors import ConfigError
from trainers.config.schema import Attention, ModelConfig
from trainers.model.safetensors_files import INDEX, TYPES, Weights, listed
from trainers.model.weights import is_finite, load_parts, materialise, origin_of, tied_names

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
    vocab_on_disk: int | None = None
    """Rows of the checkpoint's embedding where `config` has more; None where they agree."""

    def build(self, device: str = "meta") -> PreTrainedModel:
        """Build the model in float32: parameters on `meta` (buffers are real), or whole and with its values on `cpu`."""
        model = self._build()
        if device == "cpu":
            origin = origin_of(model, self)
            materialise(model, torch.device("cpu"))
            state, tied = model.state_dict(), tied_names(model)
            load_parts(origin, {name: (tensor, (0,) * tensor.ndim) for name, tensor in state.items() if name not in tied})
        return model

    def _build(self) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
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
        config = from_architecture(model.architecture, tokenizer)
    else:
        folder, revision = _fetch(model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    return blueprint_of(model, seed, config, len(tokenizer), folder, revision)


def blueprint_of(
    model: ModelConfig, seed: int, config: PreTrainedConfig, num_tokens: int, folder: Path | None = None, revision: str | None = None
) -> Blueprint:
    """Return the Blueprint of a transformers config for a tokenizer of `num_tokens`; without a folder, one that has no values to read."""
    vocab_on_disk = _grow(model, config, num_tokens)
    saved_dtype = config.dtype if model.id is not None and isinstance(config.dtype, torch.dtype) else torch.float32
    config._attn_implementation = _attention(model.attention, config)
    return Blueprint(
        config=config,
        folder=folder,
        revision=revision,
        seed=seed,
        trust_remote_code=model.trust_remote_code,
        saved_dtype=saved_dtype,
        vocab_on_disk=vocab_on_disk,
    )


def _grow(model: ModelConfig, config: PreTrainedConfig, num_tokens: int) -> int | None:
    """Give `config` a vocabulary of `num_tokens` if it has fewer and may grow; return what it had, or None. It never shrinks."""
    text = config.get_text_config()
    vocab_size: int = text.vocab_size or 0
    if num_tokens <= vocab_size:
        return None
    reason = f"has {num_tokens} tokens, the model only {vocab_size}"
    if model.id is None:
        raise ConfigError(
            "model.architecture.vocab_size", vocab_size, f"the tokenizer {reason}", "leave it out: it comes from the tokenizer"
        )
    if not (model.grow_vocabulary or model.add_tokens):
        raise ConfigError("model.tokenizer", model.tokenizer, reason, "model.grow_vocabulary=true gives the model a row for each new one")
    for part in (config, text):
        if getattr(part, "vocab_size", None) == vocab_size:
            part.vocab_size = num_tokens
    return vocab_size


class Vocabulary(Protocol):
    """What a model must know of its tokenizer."""

    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...


def from_architecture(fields: dict[str, Any], tokenizer: Vocabulary) -> PreTrainedConfig:
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
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    known: type[PreTrainedModel] | None = mapping.get(type(config), None)
    return known


def export_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what an export of `model` holds, on `meta`: its tensors by name, in its order, in the type of the export; tied ones once."""
    tied = tied_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    return {name: torch.empty(tensor.shape, dtype=types[name], device="meta") for name, tensor in state.items()}


def export(
    weights: Iterable[tuple[str, Tensor]],
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    folder: Path,
    write: bool,
    shard_bytes: int = SHARD_BYTES,
    mark: str = "",
) -> None:
    """Write a Hugging Face directory, complete or absent. Every rank drains `weights`; the one with `write` writes.

    `weights` yields each tensor of `export_plan` whole, or the consecutive pieces of its elements, and one is held at a time.
    """

    def configure(staging: Path) -> None:
        _write_configs(blueprint, tokenizer, stop_ids, staging)

    write_folder(weights, lambda: export_plan(blueprint.build(), blueprint.saved_dtype), configure, folder, write, shard_bytes, mark=mark)


def write_folder(
    weights: Iterable[tuple[str, Tensor]],
    plan_of: Callable[[], dict[str, Tensor]],
    configure: Callable[[Path], None],
    folder: Path,
    write: bool,
    shard_bytes: int | None = None,
    file: str = "model.safetensors",
    mark: str = "",
) -> None:
    """Write what `configure` adds and the tensors of a plan to a folder that is complete or absent; without `write` drain them only.

    `file` names the one file that they are in; with `shard_bytes` there may be several. `mark` tells the staging folder from that of
    others who write the same at the same time. Nothing is put into place where the end of `weights` raises, the last thing that is done.
    """
    if not write:
        for _ in weights:
            pass
        return
    staging = folder.with_name(f"{folder.name}{mark}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    older = folder.exists()
    staging.mkdir(parents=True)
    try:
        plan = plan_of()
        require_space(plan, staging)
        configure(staging)
        _write_weights(weights, plan, staging, _shards(plan, shard_bytes) if shard_bytes else [plan], file)
        if older:
            shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def require_space(plan: dict[str, Tensor], folder: Path) -> None:
    """Raise RuntimeError unless the tensors fit on the disk that `folder` is on."""
    need, have = sum(tensor.nbytes for tensor in plan.values()), shutil.disk_usage(folder).free
    if need > have:
        raise RuntimeError(f"not exported: {folder} needs {need:,} bytes and has {have:,} free; free space, then the same command again")


def _write_weights(
    weights: Iterable[tuple[str, Tensor]], plan: dict[str, Tensor], folder: Path, shards: list[dict[str, Tensor]], file: str
) -> None:
    """Write the files' headers, then each piece to its place as it comes; raises RuntimeError for values that are not finite."""
    places = _begin_files(shards, folder, file)
    left = {name: tensor.nbytes for name, tensor in plan.items()}
    for name, piece in weights:
        if name not in plan or piece.dtype != plan[name].dtype or piece.nbytes > left[name]:
            raise RuntimeError(f"not exported: {name} is {piece.dtype} of {list(piece.shape)}, which does not fit the model")
        if not is_finite(piece):
            raise RuntimeError(f"not exported: {name} holds values that are not finite in {str(piece.dtype).removeprefix('torch.')}")
        path, end = places[name]
        with path.open("r+b") as opened:
            opened.seek(end - left[name])
            opened.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        left[name] -= piece.nbytes
    if missing := [name for name, count in left.items() if count]:
        raise RuntimeError(f"not exported: {listed(missing)} did not come whole")


def _shards(plan: dict[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Split the tensors over files of at most `shard_bytes`, in their order; a larger tensor has a file of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in plan.items():
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


def check_export(folder: Path, live: Iterable[tuple[str, Tensor]], read: bool, file: str = "model.safetensors") -> None:
    """Reopen the export and compare each tensor with the live one, bit for bit. Every rank drains `live`; one reads.

    Raises RuntimeError that names the first tensor that is missing, left over or different.
    """
    weights = Weights(folder, file) if read else None
    left = set(weights.stored) if weights else set()
    for name, tensor in live:
        if weights is None:
            continue
        if name not in left or not torch.equal(weights.read_whole(name), tensor):
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


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of an architecture, the outermost ones: what transformers' own sharding plan names `layers.*`.

    Where the plan does not fit the architecture (GPT-2's `h`), the lists of modules that transformers must not split. Some have none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    planned = [name for name in lists if f"{name}.*" in (model.fsdp_plan or {})]
    unsplit = set(model._no_split_modules or [])
    names = planned or [name for name, layers in lists.items() if type(layers[0]).__name__ in unsplit]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [block for name in outermost for block in lists[name]]


def flops_per_token(shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, attended: float, frozen: Collection[str] = ()) -> float:
    """Return the FLOPs of forward and backward for one token: 6 a parameter, 12 x layers x width x `attended` for attention.

    A frozen one takes 4: there is no gradient of its own.

    PaLM, appendix B (Chowdhery et al. 2022), without recomputation. `attended` is the mean length of the document a token
    is in. Untied input embeddings do no matrix work; of experts only those that a token is sent to count.
    """
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or chosen
    active = 0.0
    for name, shape in shapes.items():
        active += (4 / 6 if name in frozen else 1.0) * math.prod(shape) * (chosen / experts if ".experts." in name else 1.0)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    embeddings = 0.0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size * (4 / 6 if frozen else 1.0)
    flops: float = 6 * (active - embeddings) + 12 * text.num_hidden_layers * width * attended
    return flops


def positions_limit(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """Return the longest document the model was made for, or None, and whether longer ones are impossible (learned positions)."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) is None
