"""What a peer leaves of its training: a line of JSON a step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Recorder:
    """The file of a run's steps."""

    def __init__(self, file: str) -> None:
        """Begin with no steps."""
        self.file = Path(file)

    def write(self, loss: float) -> None:
        """Note that a step has ended: its loss, when, and the largest CUDA memory allocated so far in bytes, None on a CPU."""
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        with self.file.open("a") as file:
            file.write(json.dumps({"loss": float(loss), "at": time.time(), "device_bytes": peak}) + "\n")


def callback(recorder: Recorder) -> Any:
    """Return a callback of transformers' Trainer that notes each step when its loss is logged."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                recorder.write(logs["loss"])

    return Steps()


def settings(order: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers' TrainingArguments are given, by all peers that have them: what our run is given.

    A step is a pass over all rows: gradients are accumulated until the epoch ends.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "num_train_epochs": order["steps"],
        "per_device_train_batch_size": order["microbatch"],
        "gradient_accumulation_steps": order["documents"],
        "gradient_checkpointing": False,
        "learning_rate": order["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": order["betas"][0],
        "adam_beta2": order["betas"][1],
        "weight_decay": 0.0,
        "max_grad_norm": order["clip"],
        "optim": "adamw_torch_fused",
        "bf16": order["precision"] == "bf16",
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "use_cpu": not on_gpu,
    }
