"""A loss without whole logits: the head reads a few tokens at a time, and backward makes their logits again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainers.model.forward import entropy_of, measure, write_slopes
from trainers.model.reach import ask, twin_of
from trainers.processes import raise_exhausted

log = logging.getLogger("fulltune")
Step = Callable[[Tensor], Tensor]


class NotUnderstood(Exception):
    """A model does something to its logits that needs them whole."""


class Unmade:
    """Takes the place of logits that are never made whole: what the head reads, and what the model does to its output, recorded.

    Softcapping, a scale, a bias and padding of the vocabulary are steps on each logit by itself: they give the same a few tokens at a
    time. Anything else raises NotUnderstood, or AttributeError or TypeError where torch refuses it.
    """

    def __init__(self, hidden: Tensor, size: int, dtype: torch.dtype, tail: tuple[Step, ...] = ()) -> None:
        """Take the head's input (B, S, H) and the vocabulary's size."""
        self.hidden, self.size_, self.dtype, self.tail = hidden, size, dtype, tail
        self.shape, self.device, self.ndim = torch.Size((*hidden.shape[:-1], size)), hidden.device, hidden.ndim

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer torch.tanh(logits) and the like as the methods do."""
        method = getattr(cls, getattr(func, "__name__", ""), None)
        if method is None or kwargs or not isinstance(args[0], cls):
            raise NotUnderstood(f"torch.{getattr(func, '__name__', func)} of its logits")
        return method(*args)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def _then(self, step: Step, dtype: torch.dtype | None = None, size: int | None = None) -> Unmade:
        return type(self)(self.hidden, self.size_ if size is None else size, dtype or self.dtype, (*self.tail, step))

    def _with(self, other: Any, step: Step) -> Unmade:
        """Record arithmetic with a number, or with a tensor that is the same for all tokens and not trained."""
        if isinstance(other, Tensor):
            if other.requires_grad or other.numel() != (other.shape[-1] if other.ndim else 1):
                raise NotUnderstood("its logits are combined with a tensor that is trained, or that differs from token to token")
            return self._then(step, torch.result_type(self.hidden.new_empty(1, dtype=self.dtype), other))
        if not isinstance(other, int | float):
            raise NotUnderstood(f"its logits are combined with a {type(other).__name__}")
        return self._then(step)

    def __mul__(self, other: Any) -> Unmade:
        """Scale."""
        return self._with(other, lambda logits: logits * other)

    def __truediv__(self, other: Any) -> Unmade:
        """Scale."""
        return self._with(other, lambda logits: logits / other)

    def __add__(self, other: Any) -> Unmade:
        """Add a bias."""
        return self._with(other, lambda logits: logits + other)

    __rmul__, __radd__, mul, div, add = __mul__, __add__, __mul__, __truediv__, __add__

    def tanh(self) -> Unmade:
        """Cap softly."""
        return self._then(torch.tanh)

    def float(self) -> Unmade:
        """Compute in float32 from here."""
        return self._then(Tensor.float, torch.float32)

    def to(self, where: Any) -> Unmade:
        """Change the type; the device is the same."""
        return self if isinstance(where, torch.device) else self._then(lambda logits: logits.to(where), where)

    def contiguous(self) -> Unmade:
        """Return itself: a few tokens' logits are."""
        return self

    def __getitem__(self, key: Any) -> Unmade:
        """Leave out the vocabulary's padding."""
        first, last = key if isinstance(key, tuple) and len(key) == 2 else (None, None)
        if first is not Ellipsis or not isinstance(last, slice):
            raise NotUnderstood("it takes some tokens' logits and leaves out others")
        return self._then(lambda logits: logits[..., last], size=len(range(self.size_)[last]))


class Head:
    """The output layer of a model, of which no more than `tokens` tokens' logits exist at once.

    While `reading`, the model's own forward gets an Unmade from its head, and the model returns (N,) log-probabilities as its logits.
    The head then runs inside the model's and its own call, so that an engine has gathered its weights, forward and backward.
    """

    kind: type[Unmade] = Unmade
    """What takes the place of the logits."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        """Take a model after its adapters and before its sharding; it computes as before outside of `reading`."""
        layer = model.get_output_embeddings()
        if layer is None:
            raise NotUnderstood("it names no output layer")
        self.tokens, self.layer = tokens, layer
        self.owner, self.name = _owner(model, layer)
        self.vocab_size = int(getattr(layer, "out_features", model.config.get_text_config().vocab_size))
        self.plain: Callable[[Tensor], Tensor] = layer.forward
        self.is_linear = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not layer._forward_hooks
        self.labels, self.with_entropy, self.entropy = torch.empty(0), False, torch.empty(0)
        self.ids: Tensor | None = None
        self.gathered = torch.empty(0)
        self.tail: tuple[Step, ...] | None = None
        layer.forward = self._forward
        model.register_forward_hook(self._after, prepend=True)

    @contextmanager
    def reading(self, labels: Tensor, entropy: bool, ids: Tensor | None = None) -> Iterator[None]:
        """Let the model return log-probabilities of these labels (N,).

        Leaves `entropy` (N,) where it is asked for, and `gathered` (N, k + 1) where there are ids (N, k).
        """
        self.labels, self.with_entropy, self.ids = labels, entropy, ids
        vars(self.owner)[self.name] = _StandIn(self)  # before the module, which stays registered under the same name
        try:
            yield
        finally:
            vars(self.owner).pop(self.name, None)

    def _after(self, model: nn.Module, given: Any, output: Any) -> None:
        """Turn an Unmade into log-probabilities, as the last part of the model's forward."""
        unmade = getattr(output, "logits", None)
        if self.name not in vars(self.owner):
            return
        vars(self.owner).pop(self.name)
        if not isinstance(unmade, Unmade):
            raise NotUnderstood("it has not returned what its head made")
        self.tail = unmade.tail
        try:
            output.logits = self.layer(unmade.hidden)
        finally:
            self.tail = None

    def _forward(self, hidden: Tensor) -> Tensor:
        """Return logits as ever; for `_after` the labels' log-probabilities, (N,) float32."""
        if self.tail is None:
            return self.plain(hidden)
        rows = hidden.flatten(0, -2)
        if self.is_linear:
            made = _LinearLogps.apply(rows, self.layer.weight, self.layer.bias, self.labels, self.ids, self)  # type: ignore[no-untyped-call]
            logps, self.entropy, self.gathered = made
            return logps  # type: ignore[no-any-return]
        tail, parts = self.tail, self.parts(rows, self.labels, self.ids)
        found = [checkpoint(self._part, *part, tail, use_reentrant=False) for part in parts]
        logps, self.entropy, self.gathered = map(torch.cat, zip(*found, strict=True))
        return logps  # type: ignore[no-any-return]

    def parts(self, hidden: Tensor, labels: Tensor, ids: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return (N, H), (N,) and (N, k) a few tokens at a time."""
        few = hidden.split(self.tokens)
        return list(zip(few, labels.split(self.tokens), (None,) * len(few) if ids is None else ids.split(self.tokens), strict=True))

    def _part(self, hidden: Tensor, labels: Tensor, ids: Tensor | None, tail: tuple[Step, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return self.measure(run(tail, self.plain(hidden)), labels, ids)

    def measure(self, logits: Tensor, labels: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of a few tokens' labels, and where they are asked for the entropy, and those of `ids`."""
        none = logits.new_empty(0)
        entropy = entropy_of(logits, labels) if self.with_entropy else none
        logps, gathered = measure(logits, labels, ids)
        return logps, entropy, none if gathered is None else gathered


def run(tail: tuple[Step, ...], logits: Tensor) -> Tensor:
    """Do what a model does to its head's output."""
    for step in tail:
        logits = step(logits)
    return logits


class _StandIn:
    """Is called in the head's place."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def __call__(self, hidden: Tensor) -> Unmade:
        return self.head.kind(hidden, self.head.vocab_size, hidden.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head.layer, name)


class _LinearLogps(torch.autograd.Function):
    """Log-probabilities of a linear head, a few tokens at a time. Backward makes their logits again and adds to one weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ids: Tensor | None, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read (N, H) with weight (V, H) and bias (V,): log-probabilities (N,) float32, entropy (N,) and (N, k + 1) of ids, or nothing."""
        tail = head.tail or ()
        parts = head.parts(hidden, labels, ids)
        found = [head.measure(run(tail, logits_of(part, weight, bias)), label, those) for part, label, those in parts]
        logps, entropy, gathered = map(torch.cat, zip(*found, strict=True))
        ctx.tail, ctx.tokens = tail, head.tokens
        ctx.save_for_backward(hidden, weight, bias, labels, ids)
        ctx.mark_non_differentiable(*((entropy,) if ids is not None else (entropy, gathered)))
        return logps, entropy, gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of what was read, of the weight and of the bias, in their types."""
        hidden, weight, bias, labels, ids = ctx.saved_tensors
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for start in range(0, len(hidden), ctx.tokens):
            part = slice(start, start + ctx.tokens)
            slopes = _slopes(logits_of(hidden[part], weight, bias), _writer(labels, ids, grads, part), ctx.tail)
            if to_hidden is not None:
                torch.mm(slopes, weight, out=to_hidden[part])
            if to_weight is not None:
                torch.addmm(to_weight, slopes.T, hidden[part], out=to_weight)  # as addmm_, which no counter of FLOPs knows
            if to_bias is not None:
                to_bias.add_(slopes.sum(0))
            del slopes  # before the next ones are made
        return to_hidden, to_weight, to_bias, None, None, None


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear head's logits, (n, H) -> (n, V)."""
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def _writer(labels: Tensor, ids: Tensor | None, grads: tuple[Tensor, ...], part: slice) -> Callable[..., None]:
    """Return what writes the gradient of a few tokens' logits."""
    if ids is None:
        return partial(write_slopes, labels=labels[part], grad=grads[0][part])
    if not ids.shape[-1]:
        from trainers.model import uniform

        return partial(uniform.write_slopes, labels=labels[part], grad=grads[0][part], grads=grads[2][part])
    from trainers.model import gathered

    return partial(gathered.write_slopes, labels=labels[part], ids=ids[part], grad=grads[0][part], grads=grads[2][part])


def _slopes(logits: Tensor, write: Callable[..., None], tail: tuple[Step, ...]) -> Tensor:
    """Return the gradient of a head's output (n, V), which `write` writes of logits into `out`; without a tail in its place."""
    if not tail:
        write(logits, out=logits)
        return logits
    with torch.enable_grad():
        made = logits.requires_grad_()
        capped = run(tail, made)
    slopes = torch.empty_like(capped)
    write(capped.detach(), out=slopes)
    return torch.autograd.grad(capped, made, slopes)[0]


def _owner(model: nn.Module, layer: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that has the head as an attribute, and the attribute's name."""
    for module in model.modules():
        for name, child in module.named_children():
            if child is layer:
                return module, name
    raise NotUnderstood("its output layer is not one of its modules")


def why_not(model: PreTrainedModel, make: type[Head] = Head) -> str | None:
    """Return why a model's head cannot be read a few tokens at a time, None where it can: tried on a twin on `meta`."""
    try:
        for training in (True, False):
            twin = twin_of(model)
            ask(twin.train(training), head=make(twin, 3))
    except Exception as error:  # of the model's own code, which may be anybody's
        raise_exhausted(error)
        return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return None
