"""TRL: SFTTrainer, with best-fit packing as its documentation recommends for speed."""

from __future__ import annotations

from typing import Any

from tools.bench.peers.drivers.recorder import Recorder, callback, settings


def train(order: dict[str, Any]) -> None:
    """Train as ordered."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    given = settings(order)
    config = SFTConfig(
        output_dir=order["folder"],
        max_length=order["seq_len"],
        packing=order["packing"],
        **given,
    )
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(order["model"], dtype="float32"),
        args=config,
        train_dataset=Dataset.from_json(order["rows"], cache_dir=order["folder"]),
        processing_class=AutoTokenizer.from_pretrained(order["model"]),
        callbacks=[callback(Recorder(order["events"]))],
    ).train()
