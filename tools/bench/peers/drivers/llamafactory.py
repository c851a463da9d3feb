"""LLaMA-Factory: stage sft; packed with `neat_packing`, its packing without attention between documents."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.bench.peers.drivers.recorder import Recorder, callback, settings


def train(order: dict[str, Any]) -> None:
    """Train as ordered."""
    if importlib.util.find_spec("torchaudio") is None:  # it imports it for any data, and the registry's build needs CUDA's libraries
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp
    from transformers import AutoTokenizer

    folder, end = Path(order["folder"]), AutoTokenizer.from_pretrained(order["model"]).eos_token
    with Path(order["rows"]).open() as rows, (folder / "rows.jsonl").open("w") as file:
        for row in map(json.loads, rows):  # the template `empty` adds nothing, not even the end
            file.write(json.dumps({"instruction": row["prompt"], "input": "", "output": row["completion"] + end}) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    given = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": order["model"],
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": order["seq_len"],
        "packing": order["packing"],
        "neat_packing": order["packing"],
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
        "output_dir": str(folder / "out"),
        **settings(order),
    }
    run_exp(given, callbacks=[callback(Recorder(order["events"]))])
