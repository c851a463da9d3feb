"""AdaLoRA (arXiv 2303.10512): ranks dealt out among layers while training, as peft's AdaLoraModel and RankAllocator do in one process.

An update of a layer is B diag(E) A: triplet i is row i of A, entry i of E and column i of B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from trainers.config.methods import require_pruning
from trainers.config.schema import PeftConfig
from trainers.optim.sharded import local
from trainers.peft.update import Part

KINDS = ("ipt", "unc")
"""peft's names of the two running means, of an element's sensitivity and of how far it strays from that mean."""


def library_config(settings: PeftConfig, alpha: float, **same: Any) -> Any:
    """Return peft's config of a run, whose steps `Pruning.at` fills in: peft's own check of them needs a number."""
    import peft

    return peft.AdaLoraConfig(
        **same,
        init_r=settings.rank,
        target_r=settings.target_rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        tinit=settings.tinit,
        tfinal=settings.tfinal,
        deltaT=settings.delta_t,
        beta1=settings.beta1,
        beta2=settings.beta2,
        orth_reg_weight=settings.orth_reg_weight,
        total_step=settings.tinit + settings.tfinal + 1,
    )


class Pruning:
    """The Update of AdaLoRA: the regulariser of A and B, the importance of each element, and the triplets that are kept.

    Step s of a run is update_and_allocate(s) of plain peft in the loop of its documentation: backward, clipping, the optimizer's step,
    allocation, zero_grad. The gradient that it looks at is the clipped one, the values are the new ones. A step that is skipped changes
    nothing here; the ranks become final in the first one that is not, from num_steps - tfinal on.
    """

    name, bytes_per_element = "importance", 4 * len(KINDS)

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], settings: PeftConfig, saved_config: Any) -> None:
        """Take the shapes of what is trained, by name, and peft's config of the export, which gets the final ranks."""
        self.shapes = {name: shape for name, shape in shapes.items() if ".lora_" in name}
        self.names: Collection[str] = self.shapes.keys()
        self.settings, self.saved_config = settings, saved_config
        self.paths = sorted({_parse(name)[0] for name in self.shapes})
        self.places = {path: number * settings.rank for number, path in enumerate(self.paths)}
        """Where a layer's triplets begin among those of all layers."""
        self.elements: Mapping[str, Mapping[str, Tensor]] = {}
        """The running means of this rank's elements, by tensor and kind."""
        self.kept: Tensor | None = None
        """Which triplets of all layers are kept, (triplets,) bool on the CPU; None until that is final."""
        self.step, self.num_steps = 0, 0

    def at(self, step: int, num_steps: int) -> None:
        """Say which step is next, counted from 0, of how many; raises ConfigError where none is left to prune in."""
        require_pruning(self.settings, num_steps)
        self.step, self.num_steps = step, num_steps
        self.saved_config.total_step = num_steps

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Begin the running means at zero."""
        self.elements = {name: {kind: torch.zeros_like(value, dtype=torch.float32) for kind in KINDS} for name, value in values.items()}

    @torch.no_grad()
    def before(self, parts: Mapping[str, Part], gather: Callable[[str], Tensor]) -> None:
        """Add the regulariser's gradient to that of the objective, one matrix at a time; collective where `gather` is.

        What peft adds to the loss of a forward: orth_reg_weight times the mean of ||A A^T - I||_F and ||B^T B - I||_F over all layers
        (section 3.1, without the square). It does not depend on data, so that it is added once a step and not to the loss that is reported.
        """
        factor = self.settings.orth_reg_weight / (2 * len(self.paths))
        for name, part in parts.items() if factor else ():
            if _parse(name)[1] != "E":
                gradient = _pull_to_orthogonal(gather(name), rows=_parse(name)[1] == "A").reshape(-1)
                part.grad.add_(gradient[part.start : part.start + part.grad.numel()].to(part.grad.device), alpha=factor)

    @torch.no_grad()
    def after(self, parts: Mapping[str, Part], total: Callable[[list[float]], list[float]]) -> bool:
        """Add a step to the running means and set E to zero where a triplet is pruned; algorithm 1 of the paper."""
        settings, first_final = self.settings, self.num_steps - self.settings.tfinal
        kept = self.kept
        if self.step < first_final:
            self._observe(parts)
            if self.step <= settings.tinit or self.step % settings.delta_t:
                return False
            kept = self._choose(parts, total)
        elif kept is None:
            kept = self._choose(parts, total)
            self._finish(kept)
        assert kept is not None
        for name, part in parts.items():
            path, kind = _parse(name)
            if kind == "E":
                place = self.places[path] + part.start
                part.value.masked_fill_(~kept[place : place + part.value.numel()].to(part.value.device), 0.0)
        return True

    def state(self, placed: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """Return which triplets are kept for good, all zero as long as that is open, and the running means."""
        triplets = torch.zeros(len(self.paths) * self.settings.rank, dtype=torch.uint8)
        importance = {name: {kind: placed(name, mean) for kind, mean in means.items()} for name, means in self.elements.items()}
        return {"ranks": triplets if self.kept is None else self.kept.to(torch.uint8), "importance": importance}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the triplets and running means of a checkpoint."""
        self._finish(state["ranks"].bool() if state["ranks"].any() else None)
        for name, means in self.elements.items():
            for kind, mean in means.items():
                mean.copy_(local(state["importance"][name][kind]).reshape(-1))

    def as_saved(self, name: str, whole: Tensor) -> Tensor:
        """Return an exported tensor, named as in the model or the export, without pruned triplets; whole while ranks are not final."""
        path, kind = _parse(name.removeprefix("base_model.model."))
        if self.kept is None or not kind:
            return whole
        return whole.index_select(1 if kind == "B" else 0, self._of_layer(path, self.kept).nonzero()[:, 0].to(whole.device))

    def _finish(self, kept: Tensor | None) -> None:
        """Keep the final ranks, also in peft's config, under the names that its save_pretrained writes."""
        self.kept = kept
        self.saved_config.rank_pattern = (
            None if kept is None else {f"{path}.lora_E": self._of_layer(path, kept).tolist() for path in self.paths}
        )

    def _of_layer(self, path: str, triplets: Tensor) -> Tensor:
        return triplets[self.places[path] : self.places[path] + self.settings.rank]

    def _observe(self, parts: Mapping[str, Part]) -> None:
        """Update the running means with |value x gradient| of each element (section 3.2)."""
        for name, part in parts.items():
            means, beta1, beta2 = self.elements[name], self.settings.beta1, self.settings.beta2
            sensitivity = (part.value * part.grad.to(part.value.device)).abs()
            means["ipt"].mul_(beta1).add_(sensitivity, alpha=1 - beta1)
            means["unc"].mul_(beta2).add_((sensitivity - means["ipt"]).abs_(), alpha=1 - beta2)

    def _choose(self, parts: Mapping[str, Part], total: Callable[[list[float]], list[float]]) -> Tensor:
        """Return which triplets of all layers fit into this step's budget, (triplets,) bool, the same on every rank."""
        scores = torch.tensor(total(self._scores(parts)), dtype=torch.float64)
        threshold: Tensor = scores.kthvalue(len(scores) - self._budget()).values
        return scores > threshold

    def _budget(self) -> int:
        """Return how many triplets stay after this step, over all layers: fewer than all, by section 3.3's cubic schedule."""
        settings, first_final = self.settings, self.num_steps - self.settings.tfinal
        left = 1 - (min(self.step, first_final) - settings.tinit) / (first_final - settings.tinit)
        first, last = (rank * len(self.paths) for rank in (settings.rank, settings.target_rank))
        return int((first - last) * left**3 + last)

    def _scores(self, parts: Mapping[str, Part]) -> list[float]:
        """Return what this rank's elements add to each triplet's score: that of E, and the means over a row of A and a column of B."""
        device = next(iter(parts.values())).value.device
        scores = torch.zeros(len(self.paths) * self.settings.rank, dtype=torch.float64, device=device)
        for name, part in parts.items():
            path, kind = _parse(name)
            (rows, columns), means = self.shapes[name], self.elements[name]
            elements = torch.arange(part.start, part.start + part.value.numel(), device=device)
            triplets, count = (elements % columns, rows) if kind == "B" else (elements // columns, columns)
            scores.index_add_(0, self.places[path] + triplets, (means["ipt"] * means["unc"]).double() / count)
        return [float(score) for score in scores.tolist()]


def _parse(name: str) -> tuple[str, str]:
    """Return the layer's path and A, B or E of an adapter's tensor; another's kind is empty."""
    path, _, rest = name.partition(".lora_")
    return path, rest[:1]


def _pull_to_orthogonal(whole: Tensor, rows: bool) -> Tensor:
    """Return the gradient of ||P P^T - I||_F by P, where P is a matrix or, where its columns are to be orthogonal, its transpose.

    2 (P P^T - I) P / ||P P^T - I||_F; zero, as torch.norm has it, where the norm is.
    """
    matrix = whole.float() if rows else whole.float().T
    excess = matrix @ matrix.T - torch.eye(len(matrix), device=matrix.device)
    norm = torch.linalg.matrix_norm(excess)
    gradient: Tensor = 2 * excess @ matrix / norm.where(norm > 0, 1.0)
    return gradient if rows else gradient.T
