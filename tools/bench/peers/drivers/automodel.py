"""NeMo Automodel: its recipe for fine-tuning, as its example of Llama 3.2 1B has it, packed where rows are to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench.peers.drivers.recorder import Recorder


def train(order: dict[str, Any]) -> None:
    """Train as ordered."""
    import torch
    import yaml
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    folder, recorder = Path(order["folder"]), Recorder(order["events"])
    rows = order["packed_rows"] if order["packing"] else order["documents"]
    a_step = order["microbatch"] * (rows // order["microbatch"])
    config: dict[str, Any] = {
        "dist_env": {"backend": "nccl" if torch.cuda.is_available() else "gloo", "timeout_minutes": 30},
        "rng": {"_target_": "nemo_automodel.components.training.rng.StatefulRNG", "seed": 0, "ranked": True},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": order["model"],
            "torch_dtype": "bfloat16" if order["precision"] == "bf16" else "float32",
        },
        "distributed": {"strategy": "fsdp2", "dp_size": 1, "tp_size": 1, "cp_size": 1},
        "step_scheduler": {
            "global_batch_size": a_step,
            "local_batch_size": order["microbatch"],
            "num_epochs": order["steps"],
            "ckpt_every_steps": 10**9,
            "val_every_steps": 10**9,
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": order["lr"], "betas": list(order["betas"]), "weight_decay": 0.0},
        "max_grad_norm": order["clip"],
        "checkpoint": {"enabled": False, "checkpoint_dir": str(folder / "checkpoints")},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset",
            "path_or_dataset_id": order["rows"],
            "split": "train",
            "column_mapping": {"question": "prompt", "answer": "completion"},
            "seq_length": order["seq_len"],
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
    }
    if order["packing"]:
        config["packed_sequence"] = {"packed_sequence_size": order["seq_len"], "split_across_pack": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    recipe = TrainFinetuneRecipeForNextTokenPrediction(load_yaml_config(str(folder / "config.yaml")))
    recipe.setup()
    log = recipe.log_train_metrics

    def note(sample: Any) -> None:
        recorder.write(sample.metrics["loss"])
        log(sample)

    recipe.log_train_metrics = note
    recipe.run_train_validation_loop()
