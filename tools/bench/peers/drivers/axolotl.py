"""axolotl: its `train` command's configuration, with sample packing and torch's attention where flash-attn is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench.peers.drivers.recorder import Recorder, callback


def train(order: dict[str, Any]) -> None:
    """Train as ordered."""
    import yaml
    from axolotl.cli.train import do_cli
    from axolotl.integrations.base import BasePlugin

    class Steps(BasePlugin):  # type: ignore[misc]
        def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
            return [callback(Recorder(order["events"]))]

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            # It looks for `num_items_in_batch` in the forward of the model without its head, finds none, and takes the mean of the
            # microbatches' means: rows of few labels then count as much as others, and the first loss is not ours.
            trainer.model_accepts_loss_kwargs = True

    globals()["Steps"] = Steps
    folder = Path(order["folder"])
    text = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}", "no_input_format": "{instruction}"}
    config = {
        "base_model": order["model"],
        "plugins": [f"{__name__}.Steps"],
        "datasets": [{"path": order["rows"], "ds_type": "json", "type": text}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "val_set_size": 0,
        "sequence_len": order["seq_len"],
        "sample_packing": order["packing"],
        "pad_to_sequence_len": order["packing"],
        "attn_implementation": "sdpa",
        "num_epochs": order["steps"],
        "micro_batch_size": order["microbatch"],
        # no more than a pass has: it counts steps by rows, and ends after one where microbatch x accumulation is more than all rows
        "gradient_accumulation_steps": -(-order["documents"] // order["microbatch"]),
        "gradient_checkpointing": False,
        "optimizer": "adamw_torch_fused",
        "adam_beta1": order["betas"][0],
        "adam_beta2": order["betas"][1],
        "weight_decay": 0.0,
        "max_grad_norm": order["clip"],
        "learning_rate": order["lr"],
        "lr_scheduler": "constant",
        "bf16": order["precision"] == "bf16",
        "train_on_inputs": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    do_cli(str(folder / "config.yaml"))
