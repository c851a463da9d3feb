"""Virtual tokens: trained embeddings, or keys and values, in front of every row of a frozen model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.config.choices import AdapterInit, PeftMethod
from trainers.config.schema import PeftConfig, RunConfig
from trainers.model.weights import Origin, slices
from trainers.peft.base import ADAPTER, VirtualTokens, base_name, seeded

ENCODER, PROMPT = "prompt_encoder", "prompt_embeddings"
"""peft's names of the network that makes virtual tokens, and of what it saves of them."""


def prepend_tokens(model: PreTrainedModel, origin: Origin, config: RunConfig) -> VirtualTokens:
    """Freeze the model and put trained tokens, or keys and values, in front of every row."""
    from peft.utils.other import _prepare_prompt_learning_config

    settings = config.peft
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
    return VirtualTokens(
        origin=virtual, trained=trained, expected=probe, make=partial(_virtual, copy.deepcopy(encoder)), library_config=saved
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


def _virtual(encoder: nn.Module, parameters: Mapping[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """Return what peft saves of an encoder: its output for every virtual token, (tokens, width) float32."""
    prefix = f"{ENCODER}.{ADAPTER}."
    values = {name.removeprefix(prefix): value.detach().to(device, torch.float32) for name, value in parameters.items()}
    tokens = torch.arange(len(values["embedding.weight"]), device=device)[None]
    with torch.no_grad():
        made: Tensor = torch.func.functional_call(encoder, values, (tokens,))[0]
    return {PROMPT: made}


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
