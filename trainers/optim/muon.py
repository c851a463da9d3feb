"""Muon for matrices that are split over ranks: each is orthogonalised whole, by one rank, and the ranks take turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from trainers.optim.sharded import Piece, Sharded, adamw_update, counted_step, local

MOMENTUM = 0.95
"""torch.optim.Muon's own, as in Jordan's."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen for the steepest slope at 0 (Jordan et al., "Muon", 2024)."""
ITERATIONS = 5
SMALLEST = 1e-7
RMS = 0.2
"""Root mean square of an update of AdamW, which Muon's is scaled to: so both take one learning rate (arXiv 2502.16982, section 2.2)."""


class Muon(Sharded):
    """Muon for matrices, AdamW for embeddings, head, norms and biases, both at the learning rate and weight decay of AdamW.

    The update of a matrix is that of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`. A tensor of three dimensions
    is a stack of matrices, as of experts.
    """

    def begin(self, pieces: Mapping[Tensor, list[Piece]]) -> None:
        """Make a momentum for each matrix, and AdamW's two moments for all else."""
        self.pieces = dict(pieces)
        for p in pieces:
            kinds = ("momentum_buffer",) if self.is_matrix(p) else ("exp_avg", "exp_avg_sq")
            self.state[p] = {kind: torch.zeros_like(p, requires_grad=False) for kind in kinds}
            self.state[p]["step"] = torch.zeros((), dtype=torch.float64)

    def is_matrix(self, p: Tensor) -> bool:
        """Tell whether a parameter is a matrix or a stack of them: a table of tokens is not, nor is a vector with a dimension more."""
        [piece] = self.pieces[p]
        return len(piece.shape) in (2, 3) and min(piece.shape[-2:]) > 1 and not piece.is_table

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update matrices of one shape together, so that each rank has one to orthogonalise, and all else by itself."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and self.is_matrix(p):
                    alike.setdefault(tuple(p.shape), []).append(p)
                elif p.grad is not None:
                    self.update(group, p, local(p), local(p.grad), self.state[p])
            for matrices in alike.values():
                turn = _num_ranks(matrices[0])
                for first in range(0, len(matrices), turn):
                    self._update_matrices(group, matrices[first : first + turn])

    def update(self, group: dict[str, Any], p: Tensor, value: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Update what is not a matrix with AdamW."""
        adamw_update(value, grad, local(state["exp_avg"]), local(state["exp_avg_sq"]), counted_step(state), group)

    def _update_matrices(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        """Update matrices of one shape, at most as many as there are ranks."""
        moves = []
        for p in matrices:
            assert p.grad is not None
            counted_step(self.state[p])
            grad, mean = local(p.grad), local(self.state[p]["momentum_buffer"])
            mean.lerp_(grad, 1 - MOMENTUM)
            moves.append(grad.lerp(mean, MOMENTUM).bfloat16())
        rate = group["lr"] * RMS * max(matrices[0].shape[-2:]) ** 0.5
        for p, move in zip(matrices, orthogonalised(moves, matrices[0]), strict=True):
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-rate)


def _num_ranks(p: Tensor) -> int:
    """Return over how many ranks a parameter is split."""
    if not isinstance(p, DTensor):
        return 1
    return int(p.device_mesh.size(_sharded_dim(p)))


def _sharded_dim(p: DTensor) -> int:
    """Return the dimension of the mesh over which rows are split."""
    [found] = [number for number, placement in enumerate(p.placements) if placement == Shard(0)]
    return found


def orthogonalised(moves: list[Tensor], p: Tensor) -> list[Tensor]:
    """Return this rank's rows of the orthogonalised matrices, given its rows of each (rows, C) bfloat16; all split as `p` is. Collective.

    Matrix number n goes whole to rank n and its rows come back: two all-to-alls for as many matrices as there are ranks.
    """
    if moves[0].ndim == 3:  # whole matrices are here, and their stack is split
        return [torch.stack([orthogonal(matrix) for matrix in move]) if len(move) else move for move in moves]
    ranks = _num_ranks(p)
    if ranks == 1 or not isinstance(p, DTensor):
        return [orthogonal(move) for move in moves]
    group, rank = p.device_mesh.get_group(_sharded_dim(p)), p.device_mesh.get_local_rank(_sharded_dim(p))
    rows, columns = p.shape
    share = -(-rows // ranks)
    sizes = [columns * max(0, min(share, rows - number * share)) for number in range(ranks)]
    given = [sizes[rank] if number < len(moves) else 0 for number in range(ranks)]
    taken = sizes if rank < len(moves) else [0] * ranks
    rows_of_all = torch.cat([move.reshape(-1) for move in moves])
    whole = rows_of_all.new_empty(sum(taken))
    dist.all_to_all_single(whole, rows_of_all, taken, given, group=group)
    if rank < len(moves):
        whole = orthogonal(whole.view(rows, columns)).reshape(-1)
    dist.all_to_all_single(rows_of_all, whole, given, taken, group=group)
    return [part.view(-1, columns) for part in rows_of_all.split(sizes[rank])] if sizes[rank] else [move.float() for move in moves]


def orthogonal(matrix: Tensor) -> Tensor:
    """Return nearly U V^T of a matrix U S V^T, in bfloat16, by Newton and Schulz's iteration as torch.optim.Muon takes it."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=SMALLEST)
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found
