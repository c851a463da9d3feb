"""LoRA on stacks of experts: which stacks are named, and the forward, which computes A and B of all experts as it does the experts.

The peft library says what such an adapter is (`target_parameters`, its ParamWrapper), how it begins and is saved. Its own forward adds
B A to a whole stack and lets backward make the gradient of a whole stack, in every block and microbatch: 1.2 GB a block of
Qwen3-30B-A3B. Here the tokens of an expert go through its A and B, and the stacks, which are frozen, get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward

from trainers.config.errors import ConfigError
from trainers.config.mixtures import STACKS
from trainers.model.experts import ALIGNED, own_of
from trainers.peft.base import ADAPTER

NAME = "grouped_mm_with_lora"
"""What the implementation is called in transformers' table."""
FACTORS = "lora_factors"
"""Where a module of experts finds the factors of its stacks while it computes."""
Factors = Mapping[str, tuple[Tensor, Tensor, float]]
"""By a stack's name: A (E, rank, in), B (E, out, rank) and the scale."""


def compute_grouped(model: PreTrainedModel) -> None:
    """Let the adapted stacks of a model compute their adapters with their experts; raises ConfigError where sizes forbid it."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    for wrapper in wrappers:
        wrapper.__class__ = Adapted
        for layers in (wrapper.lora_A, wrapper.lora_B):
            layers[ADAPTER].__class__ = Factor
        if "grouped_mm" not in str(wrapper.get_base_layer().config._experts_implementation):
            reason = f"its adapters are computed with grouped_mm, which needs matrices of multiples of {ALIGNED}"
            raise ConfigError("peft.targets", STACKS, reason, "targets without it")
    if wrappers:
        ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_with_lora)
        model.set_experts_implementation(NAME)


class Factor(nn.Linear):
    """A or B of all experts of a stack, which is asked for as it is: by a call, so that an engine gathers it for that."""

    def forward(self, zero: Tensor) -> Tensor:
        """Return a copy, which stays where it is when an engine frees what it has gathered.

        DeepSpeed takes backward for done, and frees, when an input has its gradient: `zero` is one, a scalar with a gradient.
        """
        return self.weight.clone()


class Adapted(ParamWrapper):  # type: ignore[misc]
    """peft's layer of one stack, whose forward leaves the stack as it is and hands its factors to the experts."""

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return this stack's factors and those of the layers inside; of this rank's experts, where these are dealt over ranks."""
        inner = self.base_layer.factors() if isinstance(self.base_layer, Adapted) else {}
        zero = self.lora_A[ADAPTER].weight.new_zeros((), requires_grad=torch.is_grad_enabled())
        a, b, num_experts = self.lora_A[ADAPTER](zero), self.lora_B[ADAPTER](zero), self.num_experts
        experts = self.get_base_layer()
        first = own_of(experts, a.reshape(num_experts, -1, a.shape[-1]))
        second = own_of(experts, b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1))
        return inner | {self.parameter_name: (first, second, self.scaling[ADAPTER])}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the experts with the adapters of all their stacks."""
        experts = self.get_base_layer()
        experts.__dict__[FACTORS] = self.factors()
        try:
            out: Tensor = experts(*args, **kwargs)
            return out
        finally:
            del experts.__dict__[FACTORS]


def grouped_with_lora(experts: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Compute the experts of each token: hidden (N, H), chosen (N, K), shares (N, K) -> (N, H).

    As transformers' grouped_mm_experts_forward, with the adapters of the stacks that have one.
    """
    factors: Factors | None = experts.__dict__.get(FACTORS)
    if factors is None:
        out: Tensor = grouped_mm_experts_forward(experts, hidden, chosen, shares)
        return out
    count = chosen.shape[-1]
    numbers, order = torch.sort(chosen.reshape(-1))
    of_cpu = hidden.device.type == "cpu"  # where torch.histc takes floats, and on a GPU integers
    sizes = torch.histc(numbers.float() if of_cpu else numbers.int(), bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    ends = sizes.cumsum(0, dtype=torch.int32)

    def linear(rows: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[numbers] if experts.has_bias else None
        made: Tensor = _grouped_linear(rows, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed)
        return made if name not in factors else made + _low_rank(rows, ends, *factors[name])

    first = linear(hidden[order // count], "gate_up_proj" if experts.has_gate else "up_proj")
    made = linear(experts._apply_gate(first) if experts.has_gate else experts.act_fn(first), "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        made = experts.post_expert_norm(made)
    weighted = made * shares.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def _low_rank(rows: Tensor, ends: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Return scale x B A of each row's expert: rows (S, in), sorted by expert -> (S, out). The rank is filled up with zeros."""
    missing = -first.shape[1] % ALIGNED
    if missing:
        first, second = functional.pad(first, (0, 0, 0, missing)), functional.pad(second, (0, missing))
    made: Tensor = _grouped_linear(_grouped_linear(rows, first, ends), second.contiguous(), ends)
    return made * scale
