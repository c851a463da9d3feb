"""Mixtures of experts: how experts are computed, which parts route tokens to them, in which type, and how evenly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.batch import IGNORE, Batch, Output, label_weights
from trainers.config.choices import Experts
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig

FIRST = "first_expert"
"""What a module of experts that are dealt over ranks calls the number of its first one."""
ALIGNED = 8
"""What torch's grouped product asks of the sizes of bfloat16 matrices: rows that begin at multiples of 16 bytes."""
WORDS = {
    "grouped_mm": "grouped_mm, all experts of a block in one product",
    "batched_mm": "batched_mm, with a copy of an expert's weights for each token",
    "eager": "eager, one expert after the other",
}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The parts of one block that belong to its mixture of experts, by path."""

    experts: str
    """What holds the experts' weights in stacks and computes (tokens, their experts, these experts' shares)."""
    router: str
    """What gives each token its experts."""
    logits: int
    """Which of the router's results are its logits (N, E)."""
    is_sigmoid: bool
    """Whether an expert's affinity is the sigmoid of its logit, as in DeepSeek-V3; else the softmax over all."""


def stacks(model: nn.Module) -> dict[str, Any]:
    """Return the modules that hold experts in stacks of matrices and let transformers compute them, by path."""
    return {path: module for path, module in model.named_modules() if hasattr(type(module), "_apply_gate")}


def mixtures(model: PreTrainedModel) -> list[Mixture]:
    """Return the mixtures of a model without adapters whose router transformers knows and whose experts are in stacks."""
    recorders = [
        known["router_logits"] for part in model.modules() if "router_logits" in (known := getattr(part, "_can_record_outputs", None) or {})
    ]
    parents = {path.rpartition(".")[0]: path for path in stacks(model)}
    kinds = [(getattr(item, "target_class", item), getattr(item, "index", 0), getattr(item, "layer_name", None)) for item in recorders]
    found: list[Mixture] = []
    for path, module in model.named_modules():
        experts = parents.get(path.rpartition(".")[0])
        places = [index for kind, index, place in kinds if isinstance(module, kind) and (place is None or place in path)]
        if experts is None or path == experts or not (places or (not kinds and _routes(module, model.get_submodule(experts)))):
            continue
        sigmoid = "sigmoid(" in inspect.getsource(type(module))
        found.append(Mixture(experts=experts, router=path, logits=(places or [0])[0], is_sigmoid=sigmoid))
    return found


def _routes(module: nn.Module, experts: Any) -> bool:
    """Tell a router that transformers does not name, as DeepSeek-V3's before 5.18: its one matrix has a row for each expert."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    return len(matrices) == 1 and matrices[0].shape[0] == getattr(experts, "num_experts", None)


def choose(model: PreTrainedModel, wanted: Experts) -> None:
    """Let a model compute its experts as `model.experts` says; raises ConfigError where it cannot."""
    holders = stacks(model)
    if not holders:
        if wanted not in (Experts.auto, Experts.eager):
            reason = f"{type(model).__name__} has no experts whose weights are stacks"
            raise ConfigError("model.experts", str(wanted), reason, "model.experts=auto")
        return
    reason = _not_grouped(holders)
    if wanted is Experts.grouped_mm and reason:
        raise ConfigError("model.experts", "grouped_mm", reason, "model.experts=auto, which takes eager here")
    automatic = Experts.eager if reason else Experts.grouped_mm
    model.set_experts_implementation(str(automatic if wanted is Experts.auto else wanted))


def _not_grouped(holders: dict[str, Any]) -> str:
    """Return why a grouped product cannot compute some experts; empty where it can."""
    for path, module in holders.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and any(size % ALIGNED for size in parameter.shape[1:]):
                shape = " x ".join(map(str, parameter.shape))
                return f"{path}.{name} is {shape}, and a grouped product needs matrices of multiples of {ALIGNED}"
    return ""


def own_of(experts: Any, factors: Tensor) -> Tensor:
    """Return the part of something of all experts, (E, ...), that is of those of this rank."""
    first: int | None = getattr(experts, FIRST, None)
    return factors if first is None else factors.narrow(0, first, experts.num_experts)


def one_by_one(model: PreTrainedModel) -> list[str]:
    """Return the classes of experts that are computed one by one, as paths: their graph differs between ranks."""
    holders = [module for module in stacks(model).values() if module.config._experts_implementation == "eager"]
    kinds = {next(kind for kind in type(module).__mro__ if kind.__module__.startswith("transformers.models")) for module in holders}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def experts_words(model: PreTrainedModel) -> dict[str, str]:
    """Say how experts are computed and why not otherwise, for the start-up table; nothing of a model without any."""
    holders = stacks(model)
    if not holders:
        return {}
    name = str(next(iter(holders.values())).config._experts_implementation)
    why = _not_grouped(holders) if name == "eager" else ""
    return {"experts": WORDS.get(name, name) + (f": {why}" if why else "")}


def routing_of(model: PreTrainedModel, config: RunConfig) -> Routing | None:
    """Return what notes the balance loss of a model without adapters, hooks in place; None where the run asks for none.

    Raises ConfigError for a model whose routers are not known.
    """
    if config.train.balance_loss is None:
        return None
    routing = Routing(mixtures=mixtures(model))
    if not routing.mixtures:
        reason = f"{type(model).__name__} has no router whose logits transformers names and whose experts are in stacks"
        raise ConfigError("train.balance_loss", config.train.balance_loss, reason, "train.balance_loss=null")
    routing.watch(model)
    return routing


def compute_in_float32(router: nn.Module) -> None:
    """Let a router with parameters of 16 bits compute in float32: its inputs, and its weights where its code reads them."""

    def widened(name: str) -> property:
        return property(lambda module: module._parameters[name].float())

    kind = type(router)
    own = {name: widened(name) for name, parameter in router.named_parameters(recurse=False) if parameter.is_floating_point()}
    router.__class__ = type(kind.__name__, (kind,), own)
    router.register_forward_pre_hook(lambda _, args: tuple(item.float() if isinstance(item, Tensor) else item for item in args))


@dataclass(kw_only=True)
class Routing:
    """What a model's routers decide in a forward, and how evenly they do it: the balance loss.

    Hooks stay on the model; they note something only inside `with_balance`, so that what backward computes again is not noted twice.
    """

    mixtures: Sequence[Mixture]
    is_noting: bool = False
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Put the hooks on a model, before anything else has put its own there."""
        for mixture in self.mixtures:
            model.get_submodule(mixture.router).register_forward_hook(lambda _, __, out, place=mixture.logits: self._note(out, place))
            model.get_submodule(mixture.experts).register_forward_pre_hook(
                lambda _, args, kwargs: self._note_chosen(args, kwargs), with_kwargs=True
            )

    def _note(self, out: Any, place: int) -> None:
        if self.is_noting:
            self.logits.append(out if isinstance(out, Tensor) else out[place])

    def _note_chosen(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if self.is_noting:
            self.chosen.append(args[1] if len(args) > 1 else kwargs["top_k_index"])

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is decided inside."""
        self.is_noting = True
        try:
            yield
        finally:
            self.is_noting = False
            self.logits, self.chosen = [], []

    def with_balance(self, batch: Batch, run: Callable[[], Output], summed: Callable[[Tensor], Tensor] = lambda sums: sums) -> Output:
        """Return what `run` makes of a batch, with the balance loss of its routers.

        `summed` adds up what ranks with slices of the batch's documents have.
        """
        with self.noting():
            output = run()
            layers = zip(self.mixtures, self.logits, self.chosen, strict=True)
            routed = batch if len(self.logits[0]) == batch.labels.numel() else batch.in_one_row()
            sums = [balance(logits, chosen, routed, mixture.is_sigmoid, summed) for mixture, logits, chosen in layers]
        output.balance = torch.stack(sums).mean()
        return output


def balance(
    logits: Tensor, chosen: Tensor, batch: Batch, is_sigmoid: bool = False, summed: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """Return how unevenly one router treats each document, summed over the labels of all with their weights: a scalar float32.

    `logits` is (N, E) and `chosen` (N, K), N being the tokens of the batch in order. With f the tokens that a document sends to an
    expert and P the mean probability of the expert, each a share of the document's tokens, padding left out, a document has
    E x sum(f P): K where all experts are alike. The formula is Switch Transformer's (Fedus et al. 2022, eq. 4 to 6), in the scale of
    transformers' load_balancing_loss_func, and the sequence is what it is taken of, as in DeepSeek-V3 (2024, eq. 17 to 20): a sum over
    documents is the same under any split of a step, and the product of two means over a step is not.
    """
    num_experts, documents = logits.shape[-1], batch.documents.flatten() + 1  # 0 is padding
    count = batch.num_documents + 1
    affinities = logits.float().sigmoid() if is_sigmoid else logits.float().softmax(-1)
    shares = affinities / affinities.sum(-1, keepdim=True) if is_sigmoid else affinities
    tokens = shares.new_zeros(count).index_add(0, documents, torch.ones_like(documents, dtype=shares.dtype))
    weights = label_weights(batch)
    weights = (batch.labels != IGNORE).to(shares.dtype) if weights is None else weights
    labels = shares.new_zeros(count).index_add(0, documents, weights.flatten())
    sent = shares.new_zeros(count * num_experts)
    sent = sent.index_add(0, (documents[:, None] * num_experts + chosen).flatten(), torch.ones_like(chosen, dtype=shares.dtype).flatten())
    probabilities = shares.new_zeros(count, num_experts).index_add(0, documents, shares)
    sizes = [1, 1, num_experts, num_experts]
    own = torch.cat([tokens[:, None], labels[:, None], sent.view(count, num_experts), probabilities], 1)
    tokens, labels, sent, probabilities = summed(own).split(sizes, 1)
    each = num_experts * (sent * probabilities).sum(-1, keepdim=True) / tokens.clamp(min=1).square()
    value: Tensor = (labels * each)[1:].sum()
    return value
