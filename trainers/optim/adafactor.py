"""Adafactor for matrices that are split by rows over ranks: means of columns and sizes of updates are those of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainers.optim.sharded import ByRank, Piece, Placed, Sharded, counted_step, local

DECAY = -0.8
"""Exponent by which the second moment's decay rate comes near 1 (arXiv 1804.04235, section 7.2)."""
SMALLEST = 1e-30
"""Added to each squared gradient."""
LARGEST_RMS = 1.0
"""Root mean square above which an update is scaled down, section 6."""


class Adafactor(Sharded):
    """Adafactor (arXiv 1804.04235, algorithm 4) at a given learning rate, without momentum and without scaling by the parameter.

    The same as transformers' Adafactor with scale_parameter=False and relative_step=False, which its Trainer takes. Sums over
    ranks travel together: one all-reduce for the columns of all matrices, one for the sizes of all updates.
    """

    def begin(self, pieces: Mapping[Tensor, list[Piece]]) -> None:
        """Make means of rows and columns for each matrix, and of each element for a vector."""
        self.pieces = dict(pieces)
        for p in pieces:
            if p.ndim < 2:
                state = {"exp_avg_sq": torch.zeros_like(p, requires_grad=False)}
            else:
                column = _zeros(p, (*p.shape[:-2], p.shape[-1]), has_rows=p.ndim > 2)
                state = {"exp_avg_sq_row": _zeros(p, p.shape[:-1], has_rows=True), "exp_avg_sq_col": column}
            self.state[p] = state | {"step": torch.zeros((), dtype=torch.float64)}

    def saved(self, placed: Placed, by_rank: ByRank) -> dict[str, Any]:
        """Return the means themselves: they are split by rows, or the same on each rank."""
        return {"state": {pieces[0].name: self.state[p] for p, pieces in self.pieces.items()}}

    def take(self, saved: dict[str, Any]) -> None:
        """Do nothing: what `saved` returned is live."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the means, then the parameters by what these say; collective."""
        todo = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        decays = {p: 1.0 - counted_step(self.state[p]) ** DECAY for _, p in todo}
        self._update_means([p for _, p in todo], decays)
        squares = [_unscaled(self.state[p], local(p.grad)).square_().sum() for _, p in todo]
        for (group, p), square in zip(todo, _summed(squares, [p for _, p in todo]), strict=True):
            rms = square.div(p.numel()).sqrt_()
            move = _unscaled(self.state[p], local(p.grad)).div_((rms / LARGEST_RMS).clamp_(min=1.0))
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"])

    def _update_means(self, parameters: list[Tensor], decays: Mapping[Tensor, float]) -> None:
        """Move each mean of squared gradients towards that of this step; sums of columns come from all ranks."""
        matrices = [p for p in parameters if p.ndim == 2]
        columns = dict(zip(matrices, _summed([_squares(p).sum(0) for p in matrices], matrices), strict=True))
        for p in parameters:
            state, decay = self.state[p], decays[p]
            if p.ndim < 2:
                local(state["exp_avg_sq"]).mul_(decay).add_(_squares(p), alpha=1.0 - decay)
                continue
            local(state["exp_avg_sq_row"]).mul_(decay).add_(_squares(p).mean(-1), alpha=1.0 - decay)
            column = columns[p] / p.shape[0] if p in columns else _squares(p).mean(-2)
            local(state["exp_avg_sq_col"]).mul_(decay).add_(column, alpha=1.0 - decay)


def _squares(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad).square().add_(SMALLEST)


def _unscaled(state: dict[str, Tensor], grad: Tensor) -> Tensor:
    """Return this rank's rows of the gradient over its root mean square; the mean of all rows' means is that of the columns'."""
    if "exp_avg_sq" in state:
        return local(state["exp_avg_sq"]).rsqrt().mul_(grad)
    row, column = local(state["exp_avg_sq_row"]), local(state["exp_avg_sq_col"])
    rows = (row / column.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return (rows * column.rsqrt().unsqueeze(-2)).mul_(grad)


def _zeros(p: Tensor, shape: tuple[int, ...], has_rows: bool) -> Tensor:
    """Return zeros of a shape that lacks one of the parameter's last two dimensions: split as its rows are, or on each rank."""
    if not isinstance(p, DTensor):
        return p.new_zeros(shape, requires_grad=False)
    placements = [Replicate() if isinstance(place, Shard) and not has_rows else place for place in p.placements]
    return dtensor.zeros(shape, dtype=p.dtype, device_mesh=p.device_mesh, placements=placements)


def _summed(values: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Return sums over the ranks that hold different rows, by one all-reduce; each value belongs to a parameter. Collective."""
    split: Any = next((p for p in parameters if isinstance(p, DTensor)), None)
    if split is None or not values:
        return values
    [dim] = [number for number, placement in enumerate(split.placements) if isinstance(placement, Shard)]
    if split.device_mesh.size(dim) == 1:
        return values
    flat = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(flat, group=split.device_mesh.get_group(dim))
    return [part.view(value.shape) for part, value in zip(flat.split([value.numel() for value in values]), values, strict=True)]
