"""Which parameters the training data reach, found before any value is read: a forward on `meta` and its graph."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from trainers.batch import Batch, Needs, Output
from trainers.model.attention import VARLEN
from trainers.model.forward import Head, forward, gives_scores
from trainers.processes import raise_exhausted

log = logging.getLogger("fulltune")
aten = torch.ops.aten
LENGTH = 8
"""Tokens of the first row that is asked for."""


def find_unreached(model: PreTrainedModel, seq_len: int) -> set[str]:
    """Return the parameters of a model on `meta` on which no log-probability or score of a text row depends, by name; it stays as it is.

    They get no gradient, whatever the values are. Experts that no token was sent to count as reached.
    A short row reaches all of most models. Others are asked again with a row of `seq_len` tokens, as some parts only see long rows, and
    with another answer wherever the model's code looks at a value to decide. Code that needs values where there are none tells nothing:
    then all parameters count as reached, and a warning says so.
    """
    twin = twin_of(model)
    left = {name for name, parameter in twin.named_parameters() if parameter.requires_grad}
    try:
        for length, answer in ((LENGTH, False), (seq_len, True)):
            output = ask(twin, length, answer)
            found = set(map(id, _leaves(output.logps if output.scores is None else output.scores)))
            left = {name for name in left if id(twin.get_parameter(name)) not in found}
            if not left:
                return left
    except Exception as error:  # of the model's own code, which may be anybody's
        raise_exhausted(error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        log.warning("which parts of %s the data reach is not known (%s): all are trained", type(model).__name__, reason)
        return set()
    return left - _without_tokens(twin, left)


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on `meta`, with kernels that run without a device and without values; what a model reads does not depend on them.

    Values of a model that has some are not copied on the way.
    """
    filled = [p for p in model.parameters() if type(p) is nn.Parameter and not p.is_meta]
    outlines = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in filled}
    twin: Any = copy.deepcopy(model, outlines)
    twin.to("meta")
    if twin.config._attn_implementation not in ("sdpa", VARLEN):
        twin.set_attn_implementation("eager")
    if twin._can_set_experts_implementation():
        twin.set_experts_implementation("batched_mm")
    return twin  # type: ignore[no-any-return]


def ask(twin: PreTrainedModel, length: int = LENGTH, answer: bool = False, head: Head | None = None) -> Output:
    """Return what a twin makes of a row of so many tokens, without values; wherever its code looks at a value it gets `answer`."""
    ids, encodes = torch.zeros(1, length, dtype=torch.int64), twin.config.is_encoder_decoder
    batch = Batch.of(ids, ids.clone(), torch.arange(length)[None], ids if encodes else None).map(lambda tensor: tensor.to("meta"))
    with torch.enable_grad(), torch.device("meta"), _NoValues(answer):
        return forward(twin, batch, Needs(scores=gives_scores(twin)), head=head)


class _NoValues(TorchDispatchMode):
    """Answers what asks for values: a number is 0, a claim is `answer`, and no element of a mask is left out."""

    def __init__(self, answer: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on tensors without values."""
        if func is aten._local_scalar_dense.default:
            return self.answer if args[0].dtype is torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        if func is aten.nonzero.default:
            return torch.empty((args[0].numel(), args[0].ndim), dtype=torch.int64, device="meta")
        return func(*args, **(kwargs or {}))


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a result has a gradient for."""
    seen: set[Any] = set()
    left: list[Any] = [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        left += [following for following, _ in node.next_functions]


def _without_tokens(model: nn.Module, unreached: Collection[str]) -> set[str]:
    """Return the parameters of items of a list that were left out by the data: another item of the same class is reached."""
    found: set[str] = set()
    for path, items in model.named_modules():
        if not isinstance(items, nn.ModuleList):
            continue
        names = [[f"{path}.{number}.{name}" for name, _ in item.named_parameters()] for number, item in enumerate(items)]
        used = {type(item) for item, own in zip(items, names, strict=True) if not set(own) <= set(unreached)}
        found |= {name for item, own in zip(items, names, strict=True) if type(item) in used for name in own if set(own) <= set(unreached)}
    return found


def groups_of(names: Collection[str], numels: Mapping[str, int]) -> dict[str, int]:
    """Return how many parameters are below each of the fewest modules that hold these names and no others, by path; the largest first."""
    others = [name for name in numels if name not in names]
    taken = {".".join(name.split(".")[:depth]) for name in others for depth in range(1, name.count(".") + 2)}
    sizes: dict[str, int] = {}
    for name in [name for name in numels if name in names]:
        parts = name.split(".")
        path = next(whole for depth in range(1, len(parts) + 1) if (whole := ".".join(parts[:depth])) not in taken)
        sizes[path] = sizes.get(path, 0) + numels[name]
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
