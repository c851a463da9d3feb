"""Which attention backend a run takes and why: the fastest that the model, the device and the run's settings allow."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from trainers.config.choices import Attention
from trainers.config.errors import ConfigError
from trainers.config.schema import EngineConfig
from trainers.config.sharding import SHARED
from trainers.model.attention import VARLEN, kernel_options

ON_GPU = (
    Attention.flash_attention_3,
    Attention.varlen,
    Attention.flash_attention_2,
    Attention.flex,
    Attention.sdpa,
    Attention.eager,
)
"""The order in which `auto` asks: FlashAttention 3 is 1.5 to 2 times as fast as 2 on a Hopper GPU (arXiv 2407.08608); torch's own kernel
is 2 and needs no package; flex is a compiled kernel; sdpa with a mask falls back to a slower one; eager writes (S, S) out."""
ON_CPU = (Attention.varlen, Attention.sdpa, Attention.eager)
"""Measured: varlen takes 0.05 to 0.9 of sdpa's time."""
WIDEST = 256
"""Largest head that FlashAttention takes."""
DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
"""Fields of configs."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a backend has to work with, besides the model."""

    device: str
    """`cuda` or `cpu`."""
    compute: torch.dtype
    virtual: bool = False
    """Trained tokens are in front of every row."""
    compiled: bool = False
    """Blocks are compiled."""
    shared: bool = False
    """Ranks share rows, a slice of each, and attend with some of the heads."""


@dataclass(frozen=True)
class Choice:
    """A backend by transformers' name for it, None for what transformers takes by itself, and why it is that one."""

    name: str | None
    why: str

    def __str__(self) -> str:
        """Say both, for the start-up table and the plan."""
        return f"{self.name or 'as transformers chooses'}: {self.why}"


def stand_in(choice: Choice) -> Choice:
    """Return what takes as much memory and as many FLOPs on the CPU of a plan: varlen for every kernel that makes no mask.

    It leaves out softcapping and sinks, which the kernels that have them compute in passing.
    """
    return choice if choice.name in (None, "sdpa", "eager") else Choice(VARLEN, choice.why)


def choose(wanted: Attention, config: PreTrainedConfig, known: type[PreTrainedModel] | None, where: Surroundings) -> Choice:
    """Return the backend that a setting means for a model; raises ConfigError where one that is named does not work here.

    `known` is transformers' class of the model; None is code that comes with the model, of which nothing is known.
    """
    if known is None:
        if wanted is Attention.varlen:
            raise ConfigError("model.attention", str(wanted), "code that comes with a model makes masks of its own", "model.attention=auto")
        return Choice(None if wanted is Attention.auto else library_name(wanted), "the model brings its own code")
    if wanted is not Attention.auto:
        if (reason := obstacle(wanted, config, known, where)) is not None:
            raise ConfigError("model.attention", str(wanted), reason, "model.attention=auto")
        return Choice(library_name(wanted), "as model.attention says")
    passed: dict[str, list[str]] = {}
    for backend in ON_GPU if where.device == "cuda" else ON_CPU:
        if (reason := obstacle(backend, config, known, where)) is None:
            slower = "; ".join(f"not {', '.join(backends)}: {reason}" for reason, backends in passed.items())
            return Choice(library_name(backend), f"the fastest here{f' ({slower})' if slower else ''}")
        passed.setdefault(reason, []).append(str(backend))
    raise AssertionError("eager always works")


def library_name(backend: Attention) -> str:
    """Return transformers' name of a backend."""
    return "flex_attention" if backend is Attention.flex else str(backend)


def obstacle(backend: Attention, config: PreTrainedConfig, known: type[PreTrainedModel], where: Surroundings) -> str | None:
    """Say why a backend would be wrong or would not run; None where it is right."""
    if backend is Attention.eager:
        return None
    if where.shared and backend not in SHARED:
        return "it looks for documents in positions, of which a rank that shares rows has a slice"
    if where.virtual and backend is not Attention.sdpa:
        return "it gets all rows as one, and the method needs its virtual tokens in front of each"
    return _RULES[backend](config, known, where)


def require_shareable(config: PreTrainedConfig, known: type[PreTrainedModel] | None, engine: EngineConfig) -> None:
    """Raise ConfigError unless a model computes a slice of a row's tokens as it computes them in whole rows, but for its attention."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if known is None:
        reason: str | None = "the model brings its own code"
    elif not (known._supports_attention_backend or known._can_set_attn_implementation()):
        reason = f"{known.__name__} does not take attention functions from outside"
    elif "position_ids" not in inspect.signature(known.forward).parameters:
        reason = f"{known.__name__} counts positions by itself, and a slice does not begin at 0"
    elif kinds:
        reason = f"{known.__name__} has layers of {' and '.join(sorted(kinds))}, whose state runs along a row"
    else:
        reason = _beyond(config, known, ("sinks", "position bias", "chunks", "an index of its own"))
    if reason is not None:
        raise ConfigError("engine.context", engine.context, reason, "engine.context=1")


def _no_varlen(config: PreTrainedConfig, known: type[PreTrainedModel], where: Surroundings) -> str | None:
    if not (known._supports_attention_backend or known._can_set_attn_implementation()):
        return f"{known.__name__} does not take attention functions from outside"
    if (lacks := _beyond(config, known, ("softcapping", "sinks", "position bias", "chunks", "an index of its own"))) is not None:
        return lacks
    if where.device != "cuda":
        return "on a CPU the lengths of documents would be compiled into each block" if where.compiled else None
    if "window_size" not in kernel_options():
        return f"torch {torch.__version__} has no varlen_attn with windows"
    return _no_kernel(config, where) or _beyond(config, known, ("dropout",))


def _no_flash(config: PreTrainedConfig, known: type[PreTrainedModel], where: Surroundings, version: int) -> str | None:
    there = {2: is_flash_attn_2_available, 3: is_flash_attn_3_available}[version]
    if where.device != "cuda":
        return "flash attention needs a GPU"
    if not known._supports_flash_attn:
        return f"{known.__name__} has no flash attention in transformers"
    if not there() and importlib.util.find_spec("kernels") is None:
        return f"{'flash-attn' if version == 2 else 'flash-attn-3'} is not installed, nor kernels, which brings builds of it"
    beyond = ["chunks", "an index of its own"] if version == 2 else ["chunks", "an index of its own", "dropout"]
    if getattr(known, "_compatible_flash_implementations", None) is None:  # those that name a build have one that reads sinks
        beyond.append("sinks")
    return _no_kernel(config, where, (9, 0) if version == 3 else (8, 0)) or _beyond(config, known, beyond)


def _no_kernel(config: PreTrainedConfig, where: Surroundings, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Say why no FlashAttention kernel runs; a plan, on a machine without the GPU, takes the GPU to be new enough."""
    if where.compute is torch.float32:
        return "its kernel computes in 16 bits, and train.precision=fp32"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < capability:
        return f"its kernel needs compute capability {capability[0]}.{capability[1]}"
    if (width := _head_width(config)) > WIDEST or width % 8:
        return f"its kernel takes heads of a multiple of 8 up to {WIDEST}, and the model's have {width}"
    return None


def _no_flex(config: PreTrainedConfig, known: type[PreTrainedModel], where: Surroundings) -> str | None:
    if where.device != "cuda":
        return "flex attention has no backward on a CPU"
    if not known._supports_flex_attn:
        return f"{known.__name__} has no flex attention in transformers"
    return _beyond(config, known, ("dropout", "position bias", "an index of its own"))


def _no_sdpa(config: PreTrainedConfig, known: type[PreTrainedModel], where: Surroundings) -> str | None:
    if (lacks := _beyond(config, known, ("softcapping", "sinks"))) is not None:  # Gemma 2 claims it in older transformers
        return lacks
    return None if known._supports_sdpa else f"{known.__name__} has no sdpa in transformers"


_RULES: dict[Attention, Callable[[PreTrainedConfig, type[PreTrainedModel], Surroundings], str | None]] = {
    Attention.varlen: _no_varlen,
    Attention.flash_attention_2: lambda config, known, where: _no_flash(config, known, where, 2),
    Attention.flash_attention_3: lambda config, known, where: _no_flash(config, known, where, 3),
    Attention.flex: _no_flex,
    Attention.sdpa: _no_sdpa,
}


def _beyond(config: PreTrainedConfig, known: type[PreTrainedModel], kinds: tuple[str, ...] | list[str]) -> str | None:
    """Say which of these kinds of attention the model has, of which a backend knows nothing."""
    text, source = config.get_text_config(), _source(known)
    has = {
        "softcapping": bool(getattr(text, "attn_logit_softcapping", None)),
        "sinks": "s_aux=" in source,
        "position bias": "position_bias=" in source,
        "chunks": bool(getattr(text, "attention_chunk_size", None)),
        "an index of its own": "index_topk" in source or "indexed_attention" in source,
        "dropout": any(getattr(text, name, None) for name in DROPOUT),
    }
    found = [kind for kind in kinds if has[kind]]
    return f"the model's attention has {' and '.join(found)}, which it does not compute" if found else None


def _source(known: type[PreTrainedModel]) -> str:
    """Return the source of a model's module: what its attention passes on is written nowhere else."""
    return inspect.getsource(sys.modules[known.__module__])


def _head_width(config: PreTrainedConfig) -> int:
    """Return the width of a query's head."""
    text = config.get_text_config()
    if getattr(text, "qk_nope_head_dim", None):
        return int(text.qk_nope_head_dim + text.qk_rope_head_dim)
    return int(getattr(text, "head_dim", None) or text.hidden_size // (getattr(text, "num_attention_heads", None) or 1))
