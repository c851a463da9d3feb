"""AdamW with states of 8 bits, or paged ones, by bitsandbytes' kernels on this rank's elements: bitsandbytes knows no DTensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes.functional as kernels
import torch
from bitsandbytes.functional import GlobalPageManager
from torch import Tensor

from trainers.config.choices import OptimizerName
from trainers.config.optimizers import PAGED
from trainers.config.schema import OptimConfig
from trainers.optim.sharded import ByRank, Piece, Placed, Sharded, counted_step, local

BLOCK = 256
"""Elements that share a scale; the kernels' own."""
SMALLEST = 4096
"""Elements below which a tensor keeps float32 state, as in bitsandbytes: of the whole tensor, so that no split decides."""
PAGED_FROM = 100_000
"""Elements from which bitsandbytes takes paged memory."""
CODES = {"state1": "absmax1", "state2": "absmax2"}
"""The codes of the two moments, with the scales of their blocks."""


class BlockwiseAdamW(Sharded):
    """bitsandbytes' AdamW8bit (arXiv 2110.02861), PagedAdamW8bit and PagedAdamW32bit (arXiv 2305.14314, section 3).

    Embeddings and heads keep float32 state, as transformers' Trainer lets bitsandbytes do. Blocks begin where this rank's part
    of a tensor begins: another split has other blocks, unless the parts are multiples of 256 elements, as in most models.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        """Keep no state yet."""
        super().__init__(groups, optim)
        self.is_paged = optim.name in PAGED
        self.has_codes = optim.name is not OptimizerName.paged_adamw_32bit
        self.blocks: dict[Tensor, dict[str, dict[str, Tensor]]] = {}
        self.maps = {"state1": kernels.create_dynamic_map(signed=True), "state2": kernels.create_dynamic_map(signed=False)}

    def begin(self, pieces: Mapping[Tensor, list[Piece]]) -> None:
        """Make the state of each piece at step 0."""
        self.pieces = dict(pieces)
        for p, parts in pieces.items():
            device = local(p).device
            self.maps = {kind: values.to(device) for kind, values in self.maps.items()}
            self.state[p] = {"step": torch.zeros((), dtype=torch.float64)}
            self.blocks[p] = {piece.name: self._made(piece, device) for piece in parts}

    def _made(self, piece: Piece, device: torch.device) -> dict[str, Tensor]:
        if not self._is_coded(piece):
            return {kind: self._buffer(piece.end - piece.begin, torch.float32, device) for kind in CODES}
        state = {kind: self._buffer(piece.end - piece.begin, torch.uint8, device) for kind in CODES}
        blocks = -(-piece.share(piece.ranks) // BLOCK)
        return state | {scale: torch.zeros(blocks, dtype=torch.float32, device=device) for scale in CODES.values()}

    def _is_coded(self, piece: Piece) -> bool:
        return self.has_codes and not piece.is_table and math.prod(piece.shape) >= SMALLEST

    def _buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros; in memory that the driver pages to the host where a GPU's is short, if asked for."""
        if not self.is_paged or device.type != "cuda" or numel < PAGED_FROM:
            return torch.zeros(numel, dtype=dtype, device=device)
        paged: Tensor = kernels.get_paged(numel, dtype=dtype, device=device)
        kernels.fill(paged, 0)
        GlobalPageManager.get_instance().paged_tensors.append(paged)
        return paged

    def held(self) -> list[Tensor]:
        """Return the live tensors of the state."""
        return [value for parts in self.blocks.values() for kinds in parts.values() for value in kinds.values()]

    def update(self, group: dict[str, Any], p: Tensor, value: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """Update piece by piece, each as if it were a parameter of its own."""
        step, values, grads = counted_step(state), value.view(-1), grad.reshape(-1)
        for piece in self.pieces[p]:
            part = slice(piece.begin, piece.end)
            if piece.end > piece.begin:
                self._update_piece(group, values[part], grads[part], self.blocks[p][piece.name], step)
        if self.is_paged and value.device.type == "cuda":
            torch.cuda.synchronize(value.device)  # paged memory is moved while kernels run

    def _update_piece(self, group: dict[str, Any], value: Tensor, grad: Tensor, state: dict[str, Tensor], step: int) -> None:
        beta1, beta2 = group["betas"]
        shared: dict[str, Any] = {"eps": group["eps"], "step": step, "lr": group["lr"], "weight_decay": group["weight_decay"]}
        first, second = (state[kind] for kind in CODES)
        for tensor in (first, second):
            if getattr(tensor, "is_paged", False):
                kernels.prefetch_tensor(tensor)
        if first.dtype is torch.float32 and value.device.type == "cpu":
            _update_on_cpu(value, grad, first, second, step, group)
            return
        if first.dtype is torch.float32:
            kernels.optimizer_update_32bit("adam", grad, value, first, beta1=beta1, state2=second, beta2=beta2, **shared)
            return
        kernels.optimizer_update_8bit_blockwise(
            "adam",
            grad,
            value,
            first,
            second,
            beta1=beta1,
            beta2=beta2,
            beta3=0.0,
            alpha=0.0,
            qmap1=self.maps["state1"],
            qmap2=self.maps["state2"],
            absmax1=state["absmax1"][: -(-value.numel() // BLOCK)],
            absmax2=state["absmax2"][: -(-value.numel() // BLOCK)],
            **shared,
        )

    def elements(self, p: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return codes or float32 moments of each piece, without the scales of blocks."""
        return {name: {kind: kinds[kind] for kind in CODES} for name, kinds in self.blocks[p].items()}

    def saved(self, placed: Placed, by_rank: ByRank) -> dict[str, Any]:
        """Return codes by element and scales by rank, with the number of ranks that tells which elements these are of."""
        saved = super().saved(placed, by_rank)
        for parts in self.blocks.values():
            for name, kinds in parts.items():
                saved["state"][name] |= {scale: by_rank(kinds[scale]) for scale in CODES.values() if scale in kinds}
        return saved | {"ranks": torch.tensor(float(self._ranks))}

    @property
    def _ranks(self) -> int:
        return next((piece.ranks for parts in self.pieces.values() for piece in parts), 1)

    def expect(self, saved: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        """Expect the scales of all ranks on each, where other ranks have written them."""
        wanted = {"ranks": torch.zeros(())}
        load(wanted)
        ranks = int(wanted["ranks"])
        if ranks == self._ranks:
            return
        for parts in self.pieces.values():
            for piece in parts:
                if self._is_coded(piece):
                    blocks = ranks * -(-piece.share(ranks) // BLOCK)
                    saved["state"][piece.name] |= {scale: torch.zeros(blocks) for scale in CODES.values()}
        saved["ranks"] = wanted["ranks"]

    def take(self, saved: dict[str, Any]) -> None:
        """Take codes and scales over; where another number of ranks has written them, code the moments anew in blocks of this rank."""
        super().take(saved)
        ranks = int(saved["ranks"])
        for p, parts in self.pieces.items():
            for piece in parts:
                state, given = self.blocks[p][piece.name], saved["state"][piece.name]
                for kind, scale in CODES.items() if self._is_coded(piece) else ():
                    if ranks == piece.ranks:
                        state[scale].copy_(local(given[scale]))
                    elif piece.end > piece.begin:
                        self._recode(piece, ranks, state, kind, given[scale].to(state[kind].device))

    def _recode(self, piece: Piece, ranks: int, state: dict[str, Tensor], kind: str, scales: Tensor) -> None:
        """Turn codes whose blocks began at other places into codes of this rank's blocks; each moves by at most one rounding."""
        codes, share = state[kind], piece.share(ranks)
        place = torch.arange(piece.start, piece.start + codes.numel(), device=codes.device)
        block = place // share * -(-share // BLOCK) + place % share // BLOCK
        values = self.maps[kind][codes.long()] * scales[block]
        blocks = -(-codes.numel() // BLOCK)
        made, scale = kernels.quantize_blockwise(values, code=self.maps[kind], blocksize=BLOCK)
        codes.copy_(made)
        state[CODES[kind]][:blocks].copy_(scale.absmax)


def _update_on_cpu(value: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]) -> None:
    """Update as bitsandbytes' kernel of 32 bits does; on a CPU its own is compiled anew for each shape, for minutes."""
    beta1, beta2 = group["betas"]
    first.mul_(beta1).add_(grad, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction = math.sqrt(1 - beta2**step)
    value.addcdiv_(first, second.sqrt().add_(group["eps"] * correction), value=-group["lr"] * correction / (1 - beta1**step))
    value.mul_(1 - group["lr"] * group["weight_decay"])
