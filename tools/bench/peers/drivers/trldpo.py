"""TRL: DPOTrainer, padded, with a second model as its reference, or with that computed before training."""

from __future__ import annotations

from typing import Any

from tools.bench.peers.drivers.recorder import Recorder, callback, settings


def train(order: dict[str, Any]) -> None:
    """Train as ordered."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=order["folder"],
        max_length=order["seq_len"],
        beta=order["beta"],
        precompute_ref_log_probs=order["kept"],
        **settings(order),
    )
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(order["model"], dtype="float32"),
        args=config,
        train_dataset=Dataset.from_json(order["rows"], cache_dir=order["folder"]),
        processing_class=AutoTokenizer.from_pretrained(order["model"]),
        callbacks=[callback(Recorder(order["events"]))],
    ).train()
