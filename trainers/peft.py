"""Parameter-efficient methods: what of a model is trained, where an adapter's values come from, and what is exported.

The peft library says what an adapter is, how it begins and how it is saved; nothing else imports it. `adapt` changes a model on
`meta`, before an engine shards it.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from trainers.config import VIRTUAL, AdapterBias, AdapterInit, ConfigError, PeftConfig, PeftMethod, RunConfig, looks_local
from trainers.model import Blueprint, write_folder
from trainers.stored import Weights, listed
from trainers.weights import Origin, is_finite, slices, tied_names

ADAPTER = "default"
"""peft's name for the one adapter, which stands in the names of live tensors and not in those of the export."""
FILE = "adapter_model.safetensors"
ENCODER, PROMPT = "prompt_encoder", "prompt_embeddings"
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)


@dataclass(kw_only=True)
class Adaptation:
    """What a method made of a model: where values come from, what is trained, and what is exported under which name."""

    origin: Origin
    trained: set[str]
    """Names of the parameters that are trained."""
    names: dict[str, str]
    """Tensors of the export by their names in the model, with the names they are saved under."""
    live: Collection[str]
    """Those of `names` that are taken from the engine; the rest stands in `origin` as it was."""
    dtype: torch.dtype
    """Type of the export."""
    lr_ratio: float = 1.0
    """Learning rate of LoRA's B matrices over that of the rest."""
    vectors: set[str] = field(default_factory=set)
    """Trained parameters of one dimension, which LoRA+ trains as fast as B."""
    library_config: Any = None
    """peft's own config; None where the export is a whole model."""
    expected: dict[str, Tensor] = field(default_factory=dict)
    """An adapter's tensors on `meta`, as they are saved."""
    encoder: nn.Module | None = None
    """The network on `meta` that makes virtual tokens; they are saved, not its parameters."""

    def lr_scale(self, name: str) -> float:
        """Return a parameter's learning rate over the run's, divided as peft's create_loraplus_optimizer does."""
        return self.lr_ratio if "lora_B" in name or name in self.vectors else 1.0

    def exported(self, gather: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the export's tensors whole, one at a time, on the CPU; collective where `gather` is, which returns a live one."""
        if self.encoder is not None:
            yield PROMPT, _virtual(self.encoder, {name: gather(name) for name in sorted(self.trained)})
            return
        for name, key in self.names.items():
            whole = gather(name) if name in self.live else read_whole(self.origin, name)
            if isinstance(self.origin, Adapters):
                whole = self.origin.as_saved(name, whole)
            yield key, (whole.to(self.dtype) if whole.is_floating_point() else whole).cpu()


def read_whole(origin: Origin, name: str) -> Tensor:
    """Return a whole tensor of an origin."""
    shape = origin.shape(name)
    return origin.read(name, (0,) * len(shape), shape)


def adapt(model: PreTrainedModel, origin: Origin, config: RunConfig, blueprint: Blueprint, compute: torch.dtype) -> Adaptation:
    """Apply the run's method to a model on `meta`: what is frozen is stored in the compute type, what is trained in float32.

    Raises ConfigError, before any value is read, for what the model does not have or the method cannot do with it.
    """
    method, settings = config.peft.method, config.peft
    if method is PeftMethod.none or method is PeftMethod.freeze:
        adaptation = _train_part(model, origin, settings, blueprint)
    elif blueprint.vocab_on_disk is not None:
        reason = f"the model grows from {blueprint.vocab_on_disk} rows, and an adapter is loaded onto a base that has not grown"
        raise ConfigError("peft.method", str(method), reason, "train with tokens that the base has rows for, or peft=none or freeze")
    else:
        adaptation = _prepend_tokens(model, origin, config) if method in VIRTUAL else _inject(model, origin, config)
    if settings.adapter is not None:
        _require_same_adapter(settings.adapter, adaptation.library_config)
        adaptation.origin = Continued(adaptation, Path(settings.adapter))
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    return adaptation


def _train_part(model: PreTrainedModel, origin: Origin, settings: PeftConfig, blueprint: Blueprint) -> Adaptation:
    """Train every parameter, or those that are not frozen; the export is a whole model, with frozen tensors as the base has them."""
    if settings.method is PeftMethod.freeze:
        frozen = _before_last_blocks(model, settings.last_blocks) if settings.last_blocks else _matching(model, settings.freeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("peft.freeze", settings.freeze, "freezes every parameter", "fewer patterns")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tied, parameters = tied_names(model), dict(model.named_parameters())
    names = {name: name for name in model.state_dict() if name not in tied}
    live = {name for name in names if name not in parameters or name in trained}
    return Adaptation(origin=origin, trained=trained, names=names, live=live, dtype=blueprint.saved_dtype)


def _matching(model: PreTrainedModel, patterns: list[str]) -> set[str]:
    """Return the parameters that any pattern matches; raises ConfigError for a pattern without."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError("peft.freeze", pattern, "matches no parameter of the model", _near(pattern, names))
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _before_last_blocks(model: PreTrainedModel, count: int) -> set[str]:
    """Return what stands in front of the last `count` blocks in the model's order; raises ConfigError where it has not so many."""
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists or count > lists[0][1]:
        reason = f"the model has {lists[0][1] if lists else 'no'} blocks"
        raise ConfigError("peft.last_blocks", count, reason, f"at most {lists[0][1]}" if lists else "peft.freeze=[PATTERN]")
    names = [name for name, _ in model.named_parameters()]
    prefix = f"{lists[0][0]}.{lists[0][1] - count}."
    return set(names[: next(number for number, name in enumerate(names) if name.startswith(prefix))])


def _inject(model: PreTrainedModel, origin: Origin, config: RunConfig) -> Adaptation:
    """Put an adapter beside each layer that is aimed at, and freeze the rest."""
    settings = config.peft
    _require_modules(model, settings)
    before: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    library_config = _library_config(settings, model)
    library_config.base_model_name_or_path = base_name(config)
    library_config.revision = config.model.revision
    _put_in(library_config, model)
    layers = _tuner_layers(model)
    _require_single(layers)
    _require_rank(settings, layers)
    after: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    _require_untied(model, before, after)
    adapters = Adapters(origin, after, before, layers, library_config, settings, config.seed)
    adapters.begin_names(tied_names(model))
    keys = _keys(model, after)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Adaptation(
        origin=adapters,
        trained=trained,
        names=keys,
        live=keys,
        dtype=torch.float32,
        lr_ratio=settings.lr_ratio,
        vectors={name for name in trained if after[name].ndim == 1},
        library_config=adapters.saved_config(),
        expected={key: torch.empty(adapters.saved_shape(name), device="meta") for name, key in keys.items()},
    )


def base_name(config: RunConfig) -> str | None:
    """Return what an adapter calls its base: a hub id, or a directory wherever it is loaded from; None for random weights."""
    name = config.model.id
    return str(Path(name).resolve()) if name is not None and looks_local(name) else name


def _library_config(settings: PeftConfig, model: PreTrainedModel) -> Any:
    import peft

    targets: Any = "all-linear" if settings.targets == ["all-linear"] else settings.targets or None
    same = {"task_type": "CAUSAL_LM", "target_modules": targets, "modules_to_save": settings.modules_to_save or None}
    if settings.method is PeftMethod.ia3:
        return peft.IA3Config(**same, feedforward_modules=_feedforward(settings, model))
    return peft.LoraConfig(
        **same,
        r=settings.rank,
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        bias="lora_only" if settings.bias is AdapterBias.adapted else str(settings.bias),  # type: ignore[arg-type]
        use_rslora=settings.rank_stabilised,
        use_dora=settings.method is PeftMethod.dora,
    )


def _feedforward(settings: PeftConfig, model: PreTrainedModel) -> list[str] | None:
    """Return IA3's targets that scale inputs: those that peft knows as feed-forward; None leaves both lists to peft."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as KNOWN

    known = KNOWN.get(model.config.model_type, ["down_proj", "fc2", "wo"])
    if not settings.targets:
        return None
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)] if "all-linear" in settings.targets else []
    aimed = [*settings.targets, *names]
    return [name for name in aimed if any(_ends(name, suffix) for suffix in known)]


def _put_in(library_config: Any, model: nn.Module, empty: bool = True) -> None:
    """Let peft put its layers into a model; raises ConfigError for what it refuses."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of base types and tied weights, which are checked here
        try:
            peft.inject_adapter_in_model(library_config, model, ADAPTER, low_cpu_mem_usage=empty)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason, remedy = " ".join(str(error).split()), ""
            if not library_config.target_modules:
                reason, remedy = f"peft has no choice of its own for {type(model).__name__}", "peft.targets=[NAME,...] or [all-linear]"
            raise ConfigError("peft.targets", plain_list(library_config.target_modules or []), reason, remedy) from error


def plain_list(names: Any) -> Any:
    """Return a set of names as a sorted list."""
    return sorted(names) if isinstance(names, (set, list)) else names


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _keys(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors that peft saves by their names in the model, with the names it gives them."""
    import peft

    saved = peft.get_peft_model_state_dict(model, dict(state), ADAPTER, save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in state.items()}
    return {names[id(tensor)]: f"base_model.model.{key}" for key, tensor in saved.items()}


def _ends(path: str, name: str) -> bool:
    """Tell whether a name means the module at a path, as peft matches them."""
    return path == name or path.endswith(f".{name}")


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), 3)
    return f"did you mean {', '.join(close)}?" if close else ""


def _require_modules(model: PreTrainedModel, settings: PeftConfig) -> None:
    """Raise ConfigError for a name that no module has, with those that are near."""
    modules = dict(model.named_modules())
    adaptable = [path for path, module in modules.items() if isinstance(module, ADAPTABLE)]
    weighty = [path for path, module in modules.items() if path and next(module.parameters(), None) is not None]
    wanted = [("targets", name, adaptable, "layer") for name in settings.targets if name != "all-linear"]
    wanted += [("modules_to_save", name, weighty, "module with weights") for name in settings.modules_to_save]
    for where, name, paths, what in wanted:
        if not any(_ends(path, name) for path in paths):
            leaves = [path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()]
            remedy = _near(name, leaves) or f"it has {listed(list(dict.fromkeys(leaves)), 12)}"
            raise ConfigError(f"peft.{where}", name, f"{type(model).__name__} has no {what} of this name", remedy)


def _require_single(layers: Mapping[str, Any]) -> None:
    """Raise ConfigError where peft would adapt a stack of matrices as one, such as all experts of a block."""
    for path, layer in layers.items():
        if not isinstance(layer.get_base_layer(), ADAPTABLE):
            reason = f"peft adapts the matrices of {path} as one stack, which is not sharded here yet"
            raise ConfigError("peft.targets", path, reason, "the attention's layers: peft.targets=[q_proj,k_proj,v_proj,o_proj]")


def _require_rank(settings: PeftConfig, layers: Mapping[str, Any]) -> None:
    """Raise ConfigError where a matrix has fewer rows or columns than LoRA's rank."""
    for path, layer in layers.items() if settings.method is not PeftMethod.ia3 else ():
        smaller = min(layer.in_features, layer.out_features)
        if settings.rank > smaller:
            reason = f"{path} is {layer.out_features} x {layer.in_features}, so that no larger rank can be told from {smaller}"
            raise ConfigError("peft.rank", settings.rank, reason, f"peft.rank={smaller} or less, or leave it out of peft.targets")


def _require_untied(model: PreTrainedModel, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where an adapter stands on one of two tied tensors: the base's file would not hold the pair any more."""
    for alias, name in tied_names(model).items():
        for tied in (alias, name):
            if after.get(tied) is not before[tied]:
                reason = f"the model ties {alias} and {name}: trained apart, they would not be one any more"
                raise ConfigError("peft.targets", tied.rpartition(".")[0], reason, "leave it out of peft.targets and peft.modules_to_save")


class Adapters:
    """The Origin of a base with adapters: values that peft itself makes, layer by layer, as a function of (seed, layer's name).

    Initialisations that look at the base (PiSSA, DoRA) read one layer's weight whole, one layer at a time, on every rank.
    """

    def __init__(
        self,
        origin: Origin,
        state: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        layers: Mapping[str, Any],
        library_config: Any,
        settings: PeftConfig,
        seed: int,
    ) -> None:
        """Take the tensors of the model on `meta` with and without adapters, and the layers that peft made."""
        self.origin, self.library_config, self.settings, self.seed = origin, library_config, settings, seed
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.bases = {path: copy.deepcopy(layer.get_base_layer()) for path, layer in layers.items()}
        self.inward = {path for path, layer in layers.items() if getattr(layer, "is_feedforward", False)}
        self.is_pissa = settings.init is AdapterInit.pissa
        self.held: tuple[str | None, dict[str, Tensor]] = (None, {})
        self.sources = _sources(state, base)
        self.made = {name: path for path in layers for name in state if name.startswith(f"{path}.") and name not in self.sources}
        if self.is_pissa:
            self.made |= {f"{path}.base_layer.weight": path for path in layers}
        self.order: list[str] = []

    def begin_names(self, tied: Collection[str]) -> None:
        """Put names into the base's order, an adapter's behind the weight of its layer; names that are others' aliases are left out."""
        place = {name: number for number, name in enumerate(self.origin.names())}
        of_layer = {path: place[self.sources[f"{path}.base_layer.weight"]] for path in self.bases}
        places = {name: of_layer[self.made[name]] if name in self.made else place.get(self.sources[name]) for name in self.shapes}
        kept = [(number, name) for name, number in places.items() if number is not None and name not in tied]
        self.order = [name for _, name in sorted(kept, key=lambda item: item[0])]

    def names(self) -> list[str]:
        """Return the base's order, an adapter behind its layer's weight."""
        return self.order

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.shapes[name]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of the base as it is, or of what is made for a layer, which is held until the next one's."""
        if name not in self.made:
            return self.origin.read(self.sources[name], offset, shape)
        return self._layer(self.made[name])[name][slices(offset, shape)]

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Adapters are float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)

    def _layer(self, path: str) -> dict[str, Tensor]:
        if path != self.held[0]:
            self.held = (None, {})
            self.held = (path, self._make(path))
        return self.held[1]

    def _make(self, path: str) -> dict[str, Tensor]:
        """Let peft adapt this one layer alone, and return what it made by the model's names."""
        base = copy.deepcopy(self.bases[path])
        for name, parameter in base.named_parameters():
            whole = name == "weight" and (self.is_pissa or self.settings.method is PeftMethod.dora)
            base_name = self.sources[f"{path}.base_layer.{name}"]
            value = self._whole(base_name, parameter.shape).float() if whole else torch.zeros(()).expand(parameter.shape)
            setattr(base, name, nn.Parameter(value, requires_grad=False))
        alone = nn.Module()
        alone.add_module("layer", base)
        with seeded(self.seed, path):
            _put_in(self._config_of_one(path), alone, empty=False)
        state = {f"{path}{name.removeprefix('layer')}": tensor for name, tensor in alone.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if self.made.get(name) == path}

    def _whole(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.origin.read(name, (0,) * len(shape), tuple(shape))

    def _config_of_one(self, path: str) -> Any:
        config = copy.deepcopy(self.library_config)
        config.target_modules, config.modules_to_save, config.bias = {"layer"}, None, "none"
        if self.settings.method is PeftMethod.ia3:
            config.feedforward_modules = {"layer"} if path in self.inward else set()
        elif self.settings.init is not AdapterInit.default:
            config.init_lora_weights = str(self.settings.init)
        return config

    def as_saved(self, name: str, whole: Tensor) -> Tensor:
        """Return an exported tensor. PiSSA changed the base, so that B A - B0 A0 is saved: LoRA of twice the rank on the base as it was.

        The conversion of peft's save_pretrained (`path_initial_model_for_weight_conversion`); A0 and B0 are made again.
        """
        if not self.is_pissa or name not in self.made:
            return whole
        first = self._layer(self.made[name])[name].to(whole.device)
        return torch.cat([whole, first]) if ".lora_A." in name else torch.cat([whole, -first], dim=1)

    def saved_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an exported tensor."""
        shape = self.shapes[name]
        if not self.is_pissa or name not in self.made:
            return shape
        return (2 * shape[0], *shape[1:]) if ".lora_A." in name else (shape[0], 2 * shape[1])

    def saved_config(self) -> Any:
        """Return peft's config of the export, which says how it is loaded and not how it began."""
        config = copy.deepcopy(self.library_config)
        config.inference_mode = True
        config.target_modules = plain_list(config.target_modules)
        if self.is_pissa:  # the scale, alpha / rank or alpha / sqrt(rank), stays what it was
            config.r = 2 * config.r
            config.lora_alpha *= math.sqrt(2) if self.settings.rank_stabilised else 2
        return config


def _sources(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the base's name of each tensor that is the base's own, or a trained copy of it (`modules_to_save`)."""
    names = {id(tensor): name for name, tensor in base.items()}
    found = {name: name if base.get(name) is tensor else names[id(tensor)] for name, tensor in state.items() if id(tensor) in names}
    copied = {name: name.replace(f".modules_to_save.{ADAPTER}.", ".") for name in state.keys() - found.keys()}
    return found | {name: source for name, source in copied.items() if source != name and source in base}


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw random numbers that are a function of (seed, name) alone."""
    digest = hashlib.sha256(f"{seed} adapter {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
        yield


def _prepend_tokens(model: PreTrainedModel, origin: Origin, config: RunConfig) -> Adaptation:
    """Freeze the model and put trained tokens, or keys and values, in front of every row."""
    from peft.utils.other import _prepare_prompt_learning_config

    settings = config.peft
    if "flash" in str(model.config._attn_implementation):
        reason = f"flash attention gets all rows as one, and peft.method={settings.method} needs its tokens in front of each"
        raise ConfigError("model.attention", str(config.model.attention), reason, "model.attention=sdpa")
    library_config = _prepare_prompt_learning_config(_virtual_config(settings, model), model.config)
    library_config.num_transformer_submodules = 1
    library_config.base_model_name_or_path, library_config.revision = base_name(config), config.model.revision
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with init_empty_weights():
        encoder = _encoder(library_config, None)
    model.add_module(ENCODER, nn.ModuleDict({ADAPTER: encoder}))
    model.forward = partial(_forward, model, model.forward, _prompter(model, library_config), settings)  # type: ignore[method-assign]
    virtual = Virtual(origin, model, library_config, config.seed)
    saved = copy.deepcopy(library_config)
    saved.inference_mode = True
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    probe = _virtual(encoder, {name: torch.empty(virtual.shape(name), device="meta") for name in trained}, "meta")
    return Adaptation(
        origin=virtual,
        trained=trained,
        names=dict.fromkeys(trained, PROMPT),
        live=trained,
        dtype=torch.float32,
        library_config=saved,
        expected={PROMPT: probe},
        encoder=copy.deepcopy(encoder),
    )


def _virtual_config(settings: PeftConfig, model: PreTrainedModel) -> Any:
    import peft

    same: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": settings.virtual_tokens}
    width = model.config.get_text_config().hidden_size
    if settings.method is PeftMethod.prompt:
        start = "SAMPLE_VOCAB" if settings.init is AdapterInit.vocabulary else "RANDOM"
        return peft.PromptTuningConfig(**same, prompt_tuning_init=start)
    if settings.method is PeftMethod.ptuning:
        return peft.PromptEncoderConfig(**same, encoder_hidden_size=settings.encoder_size or width)  # type: ignore[arg-type]
    size = settings.encoder_size
    return peft.PrefixTuningConfig(**same, prefix_projection=size is not None, encoder_hidden_size=size)  # type: ignore[arg-type]


def _encoder(library_config: Any, words: Any) -> nn.Module:
    """Return peft's module of a method; `words` answers for the model's embedding, None where no value is asked for."""
    import peft

    made: nn.Module
    if isinstance(library_config, peft.PromptTuningConfig):
        if words is None:
            library_config = copy.deepcopy(library_config)
            library_config.prompt_tuning_init = "RANDOM"
        made = peft.PromptEmbedding(library_config, words)
        return made
    kind = peft.PrefixEncoder if isinstance(library_config, peft.PrefixTuningConfig) else peft.PromptEncoder
    made = kind(library_config)
    return made


def _prompter(model: PreTrainedModel, library_config: Any) -> Callable[[int], Any]:
    """Return peft's get_prompt for a number of rows: embeddings, or a cache of keys and values in the architecture's own form."""
    from peft import PeftModel

    tokens = {ADAPTER: torch.arange(library_config.num_virtual_tokens)}

    def prompt(rows: int) -> Any:
        stands_for = SimpleNamespace(
            active_peft_config=library_config,
            active_adapter=ADAPTER,
            prompt_encoder=model.get_submodule(ENCODER),
            prompt_tokens=tokens,
            base_model_torch_dtype=None,
            base_model=model,
            config=model.config,
            get_base_model=lambda: model,
        )
        return PeftModel.get_prompt(stands_for, rows)  # type: ignore[arg-type]

    return prompt


def _forward(model: PreTrainedModel, forward: Callable[..., Any], prompt: Callable[[int], Any], settings: PeftConfig, **inputs: Any) -> Any:
    """Call the model with virtual tokens at the first positions; the output holds the columns asked for, without theirs."""
    ids, count = inputs.pop("input_ids"), settings.virtual_tokens
    positions = inputs.pop("position_ids") + count
    if settings.method is PeftMethod.prefix:
        return forward(input_ids=ids, position_ids=positions, past_key_values=prompt(len(ids)), **inputs)
    words = model.get_input_embeddings()(ids)
    first = torch.arange(count, device=ids.device).expand(len(ids), count)
    keep = inputs.pop("logits_to_keep")
    columns = torch.arange(ids.shape[1], device=ids.device) if isinstance(keep, int) else keep
    embeddings = torch.cat([prompt(len(ids)).to(words.dtype), words], dim=1)
    return forward(inputs_embeds=embeddings, position_ids=torch.cat([first, positions], dim=1), logits_to_keep=columns + count, **inputs)


def _virtual(encoder: nn.Module, parameters: Mapping[str, Tensor], device: str = "cpu") -> Tensor:
    """Return what peft saves of an encoder: its output for every virtual token, (tokens, width) float32."""
    prefix = f"{ENCODER}.{ADAPTER}."
    values = {name.removeprefix(prefix): value.detach().to(device, torch.float32) for name, value in parameters.items()}
    tokens = torch.arange(len(values["embedding.weight"]), device=device)[None]
    with torch.no_grad():
        made: Tensor = torch.func.functional_call(encoder, values, (tokens,))[0]
    return made


class Virtual:
    """The Origin of a base with virtual tokens, which peft's own module makes as a function of the seed."""

    def __init__(self, origin: Origin, model: PreTrainedModel, library_config: Any, seed: int) -> None:
        """Take the model on `meta`, its encoder in place."""
        self.origin, self.library_config, self.seed = origin, library_config, seed
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        embedding = model.get_input_embeddings()
        paths = {id(module): path for path, module in model.named_modules()}
        self.embedding = f"{paths[id(embedding)]}.weight"
        self.made = [name for name in self.shapes if name.startswith(f"{ENCODER}.")]
        self.held: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        """Return the base's order, then the encoder's."""
        return [*self.origin.names(), *self.made]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.shapes[name]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of the base, or of the encoder."""
        if name not in self.made:
            return self.origin.read(name, offset, shape)
        if not self.held:
            with seeded(self.seed, ENCODER):
                state = _encoder(self.library_config, self._words()).state_dict()
            self.held = {f"{ENCODER}.{ADAPTER}.{key}": tensor for key, tensor in state.items()}
        return self.held[name][slices(offset, shape)]

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """An encoder is float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)

    def _words(self) -> Any:
        """Return what answers as the model's embedding does, reading only the rows asked for."""
        rows, width = self.shapes[self.embedding]
        words = _Words(lambda row: self.origin.read(self.embedding, (row, 0), (1, width)))
        words.num_embeddings = rows
        return words


class _Words(nn.Module):
    """Rows of an embedding that is on disk."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.read, self.num_embeddings = read, 0
        self.weight = torch.empty(0)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.read(int(row)) for row in ids]).float()


def _require_same_adapter(adapter: str, ours: Any) -> None:
    """Raise ConfigError where an adapter to begin with is of another method, base or size than the run's."""
    import peft

    theirs = peft.PeftConfig.from_pretrained(adapter)
    if theirs.peft_type != ours.peft_type:
        raise ConfigError("peft.adapter", adapter, f"is {theirs.peft_type.value}, the run {ours.peft_type.value}", "the same peft.method")
    if theirs.base_model_name_or_path != ours.base_model_name_or_path:
        reason = f"belongs to {theirs.base_model_name_or_path}, the run to {ours.base_model_name_or_path}"
        remedy = f"model.id={theirs.base_model_name_or_path}, or correct its adapter_config.json where it is the same base elsewhere"
        raise ConfigError("peft.adapter", adapter, reason, remedy)
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "num_virtual_tokens"):
        wanted, found = (getattr(config, name, None) for config in (ours, theirs))
        if wanted != found:
            raise ConfigError("peft.adapter", adapter, f"was made with {name}={found}, the run asks for {wanted}", "give it the same")


class Continued:
    """An Origin whose adapter is another run's, read from its directory; the base comes from the origin below."""

    def __init__(self, adaptation: Adaptation, folder: Path) -> None:
        """Match the files with what the run's adapter has; raises ConfigError that names what is missing, left over or misshapen."""
        if adaptation.encoder is not None and len(adaptation.trained) > 1:
            reason = "holds tokens, and not the network that made them, which would be trained further"
            raise ConfigError("peft.adapter", str(folder), reason, "leave it out, or peft=prompt")
        self.origin, self.names_there = adaptation.origin, adaptation.names
        try:
            self.weights = Weights(folder, FILE)
        except ConfigError as error:
            raise ConfigError("peft.adapter", str(folder), error.reason, error.remedy) from error
        stored, expected = self.weights.stored, adaptation.expected
        wrong = [f"lacks {listed(lost)}"] if (lost := sorted(expected.keys() - stored.keys())) else []
        wrong += [f"holds {listed(more)}, which the run's has not"] if (more := sorted(stored.keys() - expected.keys())) else []
        wrong += [
            f"has {key} as {list(stored[key].shape)}, the run's as {list(tensor.shape)}"
            for key, tensor in expected.items()
            if key in stored and stored[key].shape != tuple(tensor.shape)
        ][:3]
        if wrong:
            raise ConfigError("peft.adapter", str(folder), "; ".join(wrong), "the peft settings that it was made with, on its base")

    def names(self) -> list[str]:
        """Return the names of the origin below."""
        return self.origin.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.origin.shape(name)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of the adapter as it was left, or of the base."""
        if name not in self.names_there:
            return self.origin.read(name, offset, shape)
        block = self.weights.read(self.names_there[name], offset, shape)
        if not is_finite(block):
            raise ConfigError("peft.adapter", str(self.weights.folder), f"{name} holds values that are not finite", "it is unusable")
        return block

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """An adapter is trained in float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)


def export_adapter(
    weights: Iterable[tuple[str, Tensor]], adaptation: Adaptation, tokenizer: PreTrainedTokenizerBase, folder: Path, write: bool
) -> None:
    """Write a PEFT adapter directory, complete or absent. Every rank drains `weights`; the one with `write` writes."""

    def configure(staging: Path) -> None:
        adaptation.library_config.save_pretrained(str(staging))
        tokenizer.save_pretrained(staging)

    write_folder(weights, lambda: adaptation.expected, configure, folder, write, file=FILE)


def require_moved(folder: Path) -> None:
    """Raise RuntimeError where a matrix that begins at zero, and that every update moves, is zero in the export: it was not trained."""
    weights = Weights(folder, FILE)
    still = [name for name in weights.stored if "lora_B" in name and not weights.read_whole(name).any()]
    if still:
        raise RuntimeError(f"the export in {folder} is wrong: {listed(still)} is zero after training")


def reopen_adapter(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Load the adapter onto its base as a user would, with plain peft; raises RuntimeError where a key is missing or left over."""
    import peft

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened: Any = peft.PeftModel.from_pretrained(base, str(folder))
    lost = [str(word.message) for word in said if "missing" in str(word.message) or "unexpected" in str(word.message)]
    if lost:
        raise RuntimeError(f"the export in {folder} is wrong: {lost[0]}")
    opened.eval()
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # said by peft as often as it generates
    if opened.active_peft_config.is_prompt_learning:
        opened.forward = partial(_forward_of_rows, opened, opened.forward)
    return opened  # type: ignore[no-any-return]


def _forward_of_rows(model: Any, forward: Callable[..., Any], logits_to_keep: Any, **inputs: Any) -> Any:
    """Call plain peft, which numbers positions itself and counts virtual tokens among the columns, as a model without is called."""
    in_front = 0 if model.active_peft_config.peft_type == "PREFIX_TUNING" else model.active_peft_config.num_virtual_tokens
    length = inputs["input_ids"].shape[1]
    columns = torch.arange(length) if isinstance(logits_to_keep, int) else logits_to_keep
    del inputs["position_ids"]
    return forward(logits_to_keep=columns + in_front, **inputs)
