"""TRL's own PPO on numbers that are drawn here: python tests/record_trl_ppo.py writes tests/golden/trl_ppo.json.

In an environment with trl 1.12.0, the last release with a PPO trainer, which no test needs. Its step is one long method, so its lines of
rewards, advantages, returns and losses are read from its file and run as they are. Answers have one length there: TRL puts the reward of
a shorter one after its end, at a token that is not trained. The losses are over ragged answers, with one mask.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "trl_ppo.json"
ANSWERS, LENGTH = 4, 5
LENGTHS = [5, 2, 1, 4]
"""Of the answers whose losses are recorded."""
SETTINGS = {
    "k1": {"kl_weight": 0.05, "gamma": 1.0, "gae_lambda": 0.95},
    "k3": {"kl_weight": 0.3, "kl_estimator": "k3", "gamma": 0.9, "gae_lambda": 0.8},
}


def source() -> str:
    """Return TRL's file, which needs more than torch where it is imported."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.origin is not None
    return (Path(found.origin).parent / "experimental" / "ppo" / "ppo_trainer.py").read_text()


def functions() -> dict[str, Any]:
    """Return its functions of masked means."""
    space: dict[str, Any] = {"torch": torch}
    for node in ast.parse(source()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("masked_"):
            exec(ast.unparse(node), space)
    return space


def lines(first: str, last: str) -> str:
    """Return the lines of TRL's step from the one that begins with `first` to the one before that which begins with `last`."""
    source_lines = source().splitlines()
    begin = next(number for number, line in enumerate(source_lines) if line.strip().startswith(first))
    end = next(number for number, line in enumerate(source_lines) if number > begin and line.strip().startswith(last))
    return textwrap.dedent("\n".join(source_lines[begin:end]))


def run(code: str, **values: Any) -> SimpleNamespace:
    """Run lines of TRL's among its own functions with these values, and return all that there is afterwards."""
    space = functions() | values
    exec(code, space)
    return SimpleNamespace(**space)


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def advantages(ours: dict[str, Any]) -> dict[str, Any]:
    """Return the advantages and returns of answers of one length, from log-probabilities, values and rewards."""
    args = SimpleNamespace(
        kl_estimator=ours.get("kl_estimator", "k1"),
        kl_coef=ours["kl_weight"],
        gamma=ours["gamma"],
        lam=ours["gae_lambda"],
        whiten_rewards=False,
    )
    logprobs = drawn(ANSWERS, LENGTH, seed=1) * 0.3 - 1
    given = {"ref_logprobs": logprobs + 0.3 * drawn(ANSWERS, LENGTH, seed=2), "values": drawn(ANSWERS, LENGTH, seed=3)}
    scores, last = drawn(ANSWERS, seed=4), torch.full((ANSWERS,), LENGTH - 1)
    nothing = torch.zeros(ANSWERS, LENGTH, dtype=torch.bool)
    masks = {"padding_mask": nothing, "padding_mask_p1": nothing, "sequence_lengths": last, "sequence_lengths_p1": last + 1}
    found = run(
        lines("# 4. compute rewards", "empty_cache"), args=args, logprobs=logprobs, scores=scores, responses=nothing, **given, **masks
    )
    told = {"sampled_logps": logprobs, "reference_logps": given["ref_logprobs"], "values": given["values"], "rewards": scores}
    told |= {"advantages": found.advantages, "returns": found.returns}
    return {"settings": ours} | {name: value.tolist() for name, value in told.items()}


def losses() -> dict[str, Any]:
    """Return the policy's and the critic's loss of ragged answers, with gradients at each token's log-probability and value."""
    mask = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None]
    new = (drawn(ANSWERS, LENGTH, seed=5) * 0.3 - 1).requires_grad_()
    vpred = drawn(ANSWERS, LENGTH, seed=6).requires_grad_()
    given = {
        "mb_logprobs": new.detach() + 0.3 * drawn(ANSWERS, LENGTH, seed=7),
        "mb_values": vpred.detach() + 0.3 * drawn(ANSWERS, LENGTH, seed=8),
    }
    given |= {"mb_advantage": drawn(ANSWERS, LENGTH, seed=9), "mb_return": vpred.detach() + drawn(ANSWERS, LENGTH, seed=10)}
    args = SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=1.0)
    masks = {"padding_mask": mask, "padding_mask_p1": mask, "micro_batch_inds": slice(None)}
    found = run(lines("vpredclipped =", "accelerator.backward"), args=args, new_logprobs=new, vpred=vpred, **given, **masks)
    found.loss.backward()
    assert math.isfinite(float(found.loss))
    told = {"logps": new, "sampled_logps": given["mb_logprobs"], "advantages": given["mb_advantage"], "predicted": vpred}
    told |= {"values": given["mb_values"], "returns": given["mb_return"], "logps_gradient": new.grad, "predicted_gradient": vpred.grad}
    numbers = {
        "policy_loss": found.pg_loss,
        "value_loss": found.vf_loss,
        "value_clip_share": found.vf_clipfrac,
    }
    ragged = {name: [row[:length].tolist() for row, length in zip(value.detach(), LENGTHS, strict=True)] for name, value in told.items()}
    return ragged | {name: float(value) for name, value in numbers.items()}


def _rounded(value: Any) -> Any:
    """Return nested numbers with the nine digits that a float32 has."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main() -> None:
    """Write the table."""
    about = {"made by": "python tests/record_trl_ppo.py", "trl": importlib.metadata.version("trl"), "torch": torch.__version__}
    cases = {"advantages": {name: advantages(ours) for name, ours in SETTINGS.items()}, "losses": losses()}
    GOLDEN.write_text(json.dumps(about | _rounded(cases)).replace(', "', ',\n "') + "\n")


if __name__ == "__main__":
    main()
