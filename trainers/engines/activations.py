"""What is kept of a block's forward for its backward; the rest is computed again there.

`torch.utils.checkpoint` computes again and replays the random numbers of dropout. It is given a block's own `forward`, so that hooks
of fully_shard and DeepSpeed are outside, and names of modules and parameters stay: torch's checkpoint_wrapper would change them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainers.config.choices import Activations
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig

ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    "flex_attention",
}
"""Attention by the names of its operators: sdpa's on a CPU and its four on a GPU, torch's varlen, flash-attn 2 and 3, and flex."""
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::linear": 0, "aten::_grouped_mm": 0, "aten::_scaled_mm": 0}
"""Matrix products by the names of their operators, and which argument is the left matrix."""
NARROW = 16
"""A product is computed again where its output is more than so many times as wide as what it sums over: little work, much memory."""

WORDS = {
    Activations.keep: "all kept for backward",
    Activations.selective: "attention and matrix products kept for backward, the rest of a block computed again",
    Activations.block: "a block's input kept for backward, the block computed again",
    Activations.offload: "a block's input kept for backward in host memory, the block computed again",
}
"""For the start-up table."""


def keep_for_backward(blocks: Sequence[nn.Module], how: Activations, pin_memory: bool) -> HostInputs | None:
    """Let blocks keep what `how` names; call it before they are compiled or sharded. Returns where their inputs wait, if elsewhere."""
    if how is Activations.keep:
        return None
    inputs = HostInputs(pin_memory) if how is Activations.offload else None
    for block in blocks:
        block.forward = _computed_again(block.forward, how is Activations.selective, inputs)
    return inputs


def bytes_on_host(config: RunConfig, num_blocks: int, hidden_size: int, itemsize: int, pinned: bool) -> int:
    """Return the bytes of a rank's inputs of blocks on the host, where rows are as long as they may be."""
    each = config.train.microbatch * -(-config.data.seq_len // config.engine.context) * hidden_size * itemsize
    return num_blocks * (page_locked(each) if pinned else each)


def page_locked(size: int) -> int:
    """Return what torch's allocator of page-locked memory takes for so many bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _computed_again(forward: Callable[..., Any], selective: bool, inputs: HostInputs | None) -> Callable[..., Any]:
    """Return a block's forward that keeps its first argument, the hidden states, and what attention and products return."""
    is_watched = False

    @functools.wraps(forward)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal is_watched
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        hidden, rest = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())

        def again(states: Tensor) -> Any:
            return forward(states, *rest, **named)

        if selective and (torch.compiler.is_compiling() or is_watched):
            return checkpoint(again, hidden, use_reentrant=False, context_fn=KEEPING)
        if selective:
            is_watched = True
            return checkpoint(again, hidden, use_reentrant=False, context_fn=_watched)
        with nullcontext() if inputs is None else inputs.moved():
            return checkpoint(again, hidden, use_reentrant=False)

    return call


def _watched() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a block's first forward, watched for what would spoil the kept, and of computing it again."""
    keeping, finding = KEEPING()
    return _both(keeping, _InPlace()), finding


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


class _InPlace(TorchDispatchMode):
    """Refuses a block that changes in place what is kept: it would be changed a second time, which torch does not see of a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: set[int] = set()
        """Storages by address; all live until backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            written = [arg for arg, item in zip(args, schema.arguments, strict=False) if item.alias_info and item.alias_info.is_write]
            if any(isinstance(arg, Tensor) and arg.untyped_storage()._cdata in self.kept for arg in written):
                reason = f"a block of this model changes in place ({func.name()}) what would be kept"
                raise ConfigError("train.activations", "selective", reason, "train.activations=block")
        out = func(*args, **(kwargs or {}))
        if _keeps(func, args):
            self.kept |= {item.untyped_storage()._cdata for item in tree_leaves(out) if isinstance(item, Tensor)}
        return out


def _policy(_context: Any, operator: Any, *args: Any, **_named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _keeps(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE


KEEPING = functools.partial(create_selective_checkpoint_contexts, _policy)
"""The contexts of a block's forward and of computing it again; torch.compile takes no other callable than a partial."""


def _keeps(operator: Any, args: Sequence[Any]) -> bool:
    """Tell whether what an operator returns is kept: attention, and matrix products that are dear."""
    name = operator.name()
    return name in ATTENTION or (name in PRODUCTS and _is_dear(name, args))


def _is_dear(name: str, args: Sequence[Any]) -> bool:
    """Tell whether a product costs more to compute again than its output is worth: not a LoRA's second one, nor attention's scores."""
    left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
    width = right.shape[0] if name == "aten::linear" else right.shape[-1]
    return bool(width <= NARROW * left.shape[-1])


class HostInputs:
    """Inputs of blocks, in host memory between forward and backward.

    They leave on a CUDA stream of their own while the block computes, and come back one block ahead of backward. Unlike
    torch.autograd.graph.save_on_cpu, which copies on the stream that computes. On a CPU both copies are made just so.
    """

    def __init__(self, pin_memory: bool) -> None:
        """`pin_memory` page-locks the host's copies, without which no copy is made while the GPU computes."""
        self.pin_memory = pin_memory
        self.stream: torch.cuda.Stream | None = None
        self.waiting: list[weakref.ref[_Moved]] = []
        """In the order of forward; autograd's graph owns them."""
        self.leaving: tuple[_Moved, Tensor, torch.cuda.Event | None] | None = None
        """The last input on its way to the host, still on the device, and when it has arrived."""

    def moved(self) -> AbstractContextManager[Any]:
        """Move what is saved inside for backward."""
        return saved_tensors_hooks(self._leave, self._return)

    def tensors(self) -> list[Tensor]:
        """Return the host's copies that wait for backward."""
        return [moved.host for item in self.waiting if (moved := item()) is not None and moved.host is not None]

    def _leave(self, tensor: Tensor) -> Tensor | _Moved:
        if not tensor.numel():  # a mark of the checkpoint's own
            return tensor
        self._let_go()
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.pin_memory, requires_grad=False)
        with self._beside(tensor.device):
            host.copy_(tensor.detach(), non_blocking=True)
        moved = _Moved(host, tensor.device)
        self.leaving = (moved, tensor.detach(), self._event())
        self.waiting = [item for item in self.waiting if item() is not None]
        self.waiting.append(weakref.ref(moved))
        return moved

    def _return(self, moved: Tensor | _Moved) -> Tensor:
        if isinstance(moved, Tensor):
            return moved
        if self.leaving is not None and self.leaving[0] is moved:
            moved.fetched = self.leaving[1]  # the last block's has not gone yet
        self._let_go()
        self._fetch(moved)
        tensor, moved.fetched, moved.host = moved.fetched, None, None
        self._wait_for(moved.arrived)
        self.waiting = [item for item in self.waiting if (other := item()) is not None and other is not moved]
        if self.waiting and (before := self.waiting[-1]()) is not None:
            self._fetch(before)
        assert tensor is not None
        return tensor

    def _fetch(self, moved: _Moved) -> None:
        """Begin to bring an input back, unless that has begun."""
        if moved.fetched is None and moved.host is not None:
            moved.fetched = torch.empty_like(moved.host, device=moved.device, pin_memory=False)
            with self._beside(moved.device):
                moved.fetched.copy_(moved.host, non_blocking=True)
            moved.arrived = self._event()

    def _let_go(self) -> None:
        """Free the last input that left, once it has: what computes next waits, and may have its memory."""
        if self.leaving is not None:
            self._wait_for(self.leaving[2])
            self.leaving = None

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """Copy on the stream of its own, after what has been computed so far."""
        if device.type != "cuda":
            yield
            return
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            yield

    def _event(self) -> torch.cuda.Event | None:
        return None if self.stream is None else self.stream.record_event()

    @staticmethod
    def _wait_for(event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class _Moved:
    """One block's input in host memory, and its copy on the device once that is on its way back."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host: Tensor | None = host
        self.device = device
        self.fetched: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
