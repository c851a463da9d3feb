"""Experts that are dealt over ranks: each has some of every mixture's, and tokens go to them and back (expert parallelism).

GShard (Lepikhin et al. 2020, arXiv 2006.16668): an all-to-all sends each token to the ranks of the experts that its router has chosen,
and another one what these make of it. A rank's experts compute as `model.experts` says, as if they were all that there are. Shares are
applied where the token came from, so that routers, their gradients and balance losses are those of a model that is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from trainers.config.errors import ConfigError
from trainers.config.expert import require_divides
from trainers.model.exchange import exchange
from trainers.model.experts import FIRST, stacks
from trainers.model.tensor import Splitting, Team


def deal(model: PreTrainedModel, team: Team) -> Splitting:
    """Leave each rank of a team its experts of every mixture of a model on `meta`; raises ConfigError where that cannot be."""
    done, holders = Splitting(team), stacks(model)
    if not holders:
        reason = f"{type(model).__name__} has no experts whose weights are stacks"
        raise ConfigError("engine.expert", team.size, reason, "engine.expert=1")
    for path, experts in holders.items():
        if "modules_to_save" in path.split("."):
            reason = f"{path} is a second copy of experts, and engine.expert={team.size} deals out the first one"
            raise ConfigError("peft.modules_to_save", path, reason, "peft.targets=[experts] instead")
        count = experts.num_experts
        require_divides(count, team.size, team.size, team.size)
        others = [name for name, p in experts.named_parameters() if "." in name or len(p) != count]
        if others:
            reason = f"{path}.{others[0]} of {type(model).__name__} does not belong to single experts"
            raise ConfigError("engine.expert", team.size, reason, "engine.expert=1")
        for name, _ in list(experts.named_parameters(recurse=False)):
            done.keep_part(experts, name, 0)
        experts.num_experts = count // team.size
        setattr(experts, FIRST, team.rank * experts.num_experts)
        experts.forward = partial(_compute, experts.forward, team, count)
    return done


def read_sizes(sends: Tensor, receives: Tensor, total: int) -> tuple[list[int], list[int]]:
    """Return how many rows go to and come from each rank, from those of each of its experts (ranks, experts).

    `total` rows go out. The host waits for the device here, once a block; a plan has no values, and deals them evenly.
    """
    given, taken = torch.stack([sends.sum(1), receives.sum(1)]).tolist()
    return given, taken


def _compute(
    plain: Callable[..., Tensor], team: Team, count: int, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of each token, of `count` in all: (N, H), chosen (N, K) and their shares (N, K) -> (N, H).

    The parameters are called as transformers calls them.
    """
    numbers = top_k_index.reshape(-1)
    order = numbers.argsort(stable=True)
    sends = torch.zeros(count, dtype=torch.int64, device=numbers.device).scatter_add_(0, numbers, torch.ones_like(numbers))
    sends = sends.view(team.size, -1)
    receives = torch.empty_like(sends)
    dist.all_to_all_single(receives, sends, group=team.group)
    given, taken = read_sizes(sends, receives, len(numbers))
    rows = exchange(hidden_states[order // top_k_index.shape[-1]], team.group, given, taken)
    own = torch.arange(sends.shape[1], device=numbers.device).repeat(team.size)
    made = _compute_own(plain, rows, own.repeat_interleave(receives.flatten(), output_size=sum(taken)))
    back = exchange(made, team.group, taken, given)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return (back[place].view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _compute_own(plain: Callable[..., Tensor], rows: Tensor, experts: Tensor) -> Tensor:
    """Compute this rank's experts, one a row. Without a row one of zeros goes through, so that each weight has a gradient here, too."""
    if len(rows):
        return plain(rows, experts[:, None], rows.new_ones(len(rows), 1))
    none = rows.sum(0, keepdim=True)
    return plain(none, experts.new_zeros(1, 1), rows.new_ones(1, 1))[:0]
