"""TRL's own losses on log-probabilities that are drawn here: python tests/record_trl.py writes tests/golden/trl.json.

In an environment of its own with trl 1.16.0 (pip install trl==1.16.0), which no test needs. TRL's methods run as they are, with a model
that returns the log-probabilities. Preferred answers have one length, but for the cases that end with `ragged`: TRL's own loss of the
preferred answer is a mean over the tokens of a microbatch, ours one over answers. ORPO's is over prompt and answer there, and prompts
are one token long here. Policies are GRPO's and what came after it, on sampled answers with advantages.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

GOLDEN = Path(__file__).parent / "golden" / "trl.json"
PAIRS, LENGTH = 4, 4
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"name": "dpo", "beta": 0.3}, {}),
    "dpo hinge": ({"name": "dpo", "beta": 0.3, "loss": "hinge"}, {"loss_types": ["hinge"]}),
    "dpo ipo": ({"name": "dpo", "beta": 0.3, "loss": "ipo", "length_normalised": True}, {"loss_types": ["ipo"]}),
    "dpo length-normalised": ({"name": "dpo", "beta": 0.3, "length_normalised": True}, {"loss_types": ["sigmoid_norm"]}),
    "dpo robust": (
        {"name": "dpo", "beta": 0.3, "label_smoothing": 0.2, "robust": True},
        {"loss_types": ["robust"], "label_smoothing": 0.2},
    ),
    "dpo with the answer's own loss": (
        {"name": "dpo", "beta": 0.3, "nll_weight": 0.7},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    "dpo with the answer's own loss, ragged": (
        {"name": "dpo", "beta": 0.3, "nll_weight": 0.7},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    "dpo forward_kl": ({"name": "dpo", "beta": 0.3, "f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "dpo jensen_shannon": ({"name": "dpo", "beta": 0.3, "f_divergence": "jensen_shannon"}, {"f_divergence_type": "js_divergence"}),
    "dpo alpha": (
        {"name": "dpo", "beta": 0.3, "f_divergence": "alpha", "f_alpha": 0.4},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},  # 1 - alpha of arXiv 2309.16240
    ),
    "cpo": ({"name": "cpo", "beta": 0.3, "nll_weight": 1.0}, {}),
    "cpo smoothed": ({"name": "cpo", "beta": 0.3, "nll_weight": 0.0, "label_smoothing": 0.2}, {"cpo_alpha": 0.0, "label_smoothing": 0.2}),
    "cpo hinge": ({"name": "cpo", "beta": 0.3, "nll_weight": 0.0, "loss": "hinge"}, {"cpo_alpha": 0.0, "loss_type": "hinge"}),
    "simpo": ({"name": "simpo", "beta": 2.5, "margin": 1.375}, {"cpo_alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 1.375}),
    "orpo": ({"name": "orpo", "beta": 0.2}, {}),
    "orpo, ragged": ({"name": "orpo", "beta": 0.2}, {}),
    "kto": ({"name": "kto", "beta": 0.3}, {}),
    "kto weighted": (
        {"name": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5},
        {"desirable_weight": 1.0, "undesirable_weight": 1.5},
    ),
    "kto below the reference": ({"name": "kto", "beta": 0.3}, {}),
}

POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {}),
    "grpo with a reference": ({"kl_weight": 0.3}, {"beta": 0.3}),
    "dapo": ({"average": "tokens", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"average": "constant", "constant": 7}, {"loss_type": "dr_grpo"}),
    "gspo": ({"ratio": "sequence"}, {"importance_sampling_level": "sequence"}),
    "gspo with a reference": ({"ratio": "sequence", "kl_weight": 0.3}, {"importance_sampling_level": "sequence", "beta": 0.3}),
    "grpo corrected": ({"importance_cap": 1.3}, {}),
    "dapo corrected, with a reference": (
        {"average": "tokens", "importance_cap": 1.3, "kl_weight": 0.3},
        {"loss_type": "dapo", "beta": 0.3},
    ),
    "grpo corrected, at the first step": ({"importance_cap": 1.3}, {}),
}
LONGEST = 7
"""Tokens of an answer at most: what Dr. GRPO divides by."""


def answers(name: str) -> tuple[list[list[float]], list[float], list[float]]:
    """Return the log-probabilities of the tokens of each answer, preferred ones first, their references, and log-ratios of mismatches."""
    drawn = torch.Generator().manual_seed(7)
    chosen = [1 + number if "ragged" in name else LENGTH for number in range(PAIRS)]
    rejected = [2, 5, 1, 3]
    logps = [(-3 * torch.rand(length, generator=drawn) - 0.05).tolist() for length in [*chosen, *rejected]]
    reference = [sum(values) + float(torch.randn((), generator=drawn)) for values in logps]
    ratios = (torch.randn(2 * PAIRS, generator=drawn) + (-2.0 if "below" in name else 0.8)).tolist()
    return logps, reference, ratios


def padded(logps: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (answers, tokens) as a leaf, 0 where there is none, and where there is one."""
    size = max(map(len, logps))
    values = torch.tensor([row + [0.0] * (size - len(row)) for row in logps], requires_grad=True)
    return values, torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in logps])


def model_of(values: Tensor) -> Any:
    """Return a model whose fused head gives these log-probabilities."""
    zeros = torch.zeros_like(values)
    made = {"log_probs": values, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros > 0, "log_sum_sq_probs": zeros}
    return lambda **_: SimpleNamespace(**made)


def trainer(**settings: Any) -> Any:
    """Return what the methods read of a trainer."""
    same = lambda tensor: tensor  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    metrics = {mode: {} for mode in ("train", "eval")}
    for mode in metrics:
        metrics[mode] = _Lists()
    model = SimpleNamespace(training=True)
    return SimpleNamespace(
        **{
            "accelerator": accelerator,
            "model": model,
            "_metrics": metrics,
            "aux_loss_enabled": False,
            "_total_train_tokens": 0,
            "_tp_size": 1,
        }
        | settings
    )


class _Lists(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


def with_first(mask: Tensor) -> Tensor:
    """Return a mask of rows that begin with a token that nothing predicts."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)


def dpo(values: Tensor, mask: Tensor, reference: Tensor, theirs: dict[str, Any], beta: float) -> Tensor:
    settings: dict[str, Any] = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0, "f_divergence_type": "reverse_kl"}
    self = trainer(**settings | {"beta": beta, "ld_alpha": None, "precompute_ref_logps": True, "use_weighting": False} | theirs)
    whole = with_first(mask)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole}
    inputs |= {"ref_chosen_logps": reference[:PAIRS], "ref_rejected_logps": reference[PAIRS:]}
    return DPOTrainer._compute_loss(self, model_of(values), inputs, False)


def kto(values: Tensor, mask: Tensor, reference: Tensor, ratios: Tensor, theirs: dict[str, Any], beta: float) -> Tensor:
    settings = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": "kto", "calculate_KL": True, "precompute_ref_logps": True}
    self = trainer(**settings | {"beta": beta} | theirs)
    self._compute_kl_logps = lambda model, batch: ratios  # as of a reference of 0
    whole = with_first(mask)
    label = torch.tensor([True] * PAIRS + [False] * PAIRS)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole, "label": label}
    inputs |= {"ref_logps": reference, "ref_KL_logps": torch.zeros_like(ratios)}
    return KTOTrainer._compute_loss(self, model_of(values), inputs, False)


def concatenated(kind: Any, values: Tensor, mask: Tensor, theirs: dict[str, Any], beta: float) -> Tensor:
    """Let CPO's or ORPO's trainer work its loss out from logits of two tokens that have these log-probabilities."""
    settings: dict[str, Any] = {"beta": beta, "label_smoothing": 0.0, "loss_type": "sigmoid", "cpo_alpha": 1.0, "alpha": 0.0}
    self = trainer(**settings | {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0} | theirs)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(self, name, getattr(kind, name))
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(self, name, getattr(kind, name).__get__(self))
    whole = with_first(mask)
    real = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    batch: dict[str, Tensor] = {}
    for number, name in enumerate(("chosen", "rejected")):
        part = slice(number * PAIRS, (number + 1) * PAIRS)
        batch |= {f"{name}_input_ids": whole[part], f"{name}_attention_mask": real[part]}
        batch[f"{name}_labels"] = torch.where(whole[part] > 0, 1, -100)
    logits = torch.stack([torch.log1p(-torch.exp(values.clamp(max=-1e-6))), values], dim=-1)
    model = lambda *_, **__: SimpleNamespace(logits=torch.cat([logits, logits[:, :1] * 0], dim=1))  # noqa: E731
    loss, _ = kind.get_batch_loss_metrics(self, model, batch)
    return loss


def measured(name: str) -> dict[str, Any]:
    """Return TRL's loss of a case, and its gradient at each token's log-probability."""
    ours, theirs = CASES[name]
    logps, reference, ratios = answers(name)
    values, mask = padded(logps)
    known = torch.tensor(reference)
    if ours["name"] == "dpo":
        loss = dpo(values, mask, known, theirs, ours["beta"])
    elif ours["name"] == "kto":
        loss = kto(values, mask, known, torch.tensor(ratios), theirs, ours["beta"]).nanmean()
    else:
        loss = concatenated(ORPOTrainer if ours["name"] == "orpo" else CPOTrainer, values, mask, theirs, ours["beta"])
    loss.backward()
    assert math.isfinite(float(loss))
    assert values.grad is not None
    gradient = [row[: len(of)].tolist() for row, of in zip(values.grad, logps, strict=True)]
    return {"settings": ours, "logps": logps, "reference": reference, "ratios": ratios, "loss": float(loss), "gradient": gradient}


def policy(name: str) -> dict[str, Any]:
    """Return GRPO's loss of a case by TRL, and its gradient at each token's log-probability.

    Log-probabilities are those of the policy, of what sampled, of the trainer before the first step on these answers, and of the reference.
    """
    ours, theirs = POLICIES[name]
    drawn = torch.Generator().manual_seed(11)
    lengths = [4, 2, 7, 1, 3, 5]
    logps = [(-3 * torch.rand(length, generator=drawn) - 0.05).tolist() for length in lengths]

    def near() -> list[list[float]]:
        return [[value + 0.4 * float(torch.randn((), generator=drawn)) for value in row] for row in logps]

    sampled, old, reference = near(), near(), near()
    advantages = torch.randn(len(lengths), generator=drawn)
    values, mask = padded(logps)
    is_corrected, is_first = "corrected" in name, "first" in name
    known = {of: padded(rows)[0].detach() for of, rows in (("sampled", sampled), ("old", old), ("reference", reference))}
    trained = values.detach() if is_first else known["old"]
    inputs = {"prompt_ids": torch.zeros(len(lengths), 1, dtype=torch.int64), "prompt_mask": torch.ones(len(lengths), 1)}
    inputs |= {"completion_ids": mask, "completion_mask": mask, "advantages": advantages, "ref_per_token_logps": known["reference"]}
    inputs |= {"old_per_token_logps": trained if is_corrected else known["sampled"], "num_items_in_batch": mask.sum()}
    inputs["importance_sampling_ratio"] = torch.exp(trained - known["sampled"]).clamp(max=ours.get("importance_cap", math.inf))
    loss = GRPOTrainer._compute_loss(_grpo_trainer(values, is_corrected, theirs), None, inputs)
    loss.backward()
    assert values.grad is not None
    gradient = [row[:length].tolist() for row, length in zip(values.grad, lengths, strict=True)]
    signals = {"sampled_logps": sampled, "reference_logps": reference} | ({"old_logps": old} if is_corrected and not is_first else {})
    found = {"settings": {"name": "grpo", **ours}, "logps": logps, "signals": signals, "advantages": advantages.tolist()}
    return found | {"loss": float(loss), "gradient": gradient}


def _grpo_trainer(values: Tensor, is_corrected: bool, theirs: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "max_completion_length": LONGEST}
    settings |= {"epsilon_low": 0.2, "epsilon_high": 0.2, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    settings |= {"use_vllm": is_corrected, "vllm_importance_sampling_correction": True, "current_gradient_accumulation_steps": 1}
    self = trainer(**settings | {"_entropy_bonus_enabled": False} | theirs)
    self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    self.accelerator.num_processes, self.accelerator.reduce = 1, lambda tensor, reduction: tensor
    self._get_per_token_logps_and_entropies = lambda *_, **__: (values, torch.zeros_like(values), None)
    return self


def _rounded(value: Any) -> Any:
    """Return nested numbers with the nine digits that a float32 has."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main() -> None:
    """Write the table."""
    found = {name: measured(name) for name in CASES}
    policies = {name: policy(name) for name in POLICIES}
    head = f'"made by": "python tests/record_trl.py", "trl": "{trl.__version__}", "torch": "{torch.__version__}"'
    GOLDEN.write_text(f'{{\n {head},\n "cases": {{\n{_lines(found)}\n }},\n "policies": {{\n{_lines(policies)}\n }}\n}}\n')


def _lines(cases: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(name)}: {json.dumps(_rounded(case))}" for name, case in cases.items())


if __name__ == "__main__":
    main()
