"""What a benchmark's ranks are told to train: presets of engines, and models of a size. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.config.choices import Activations, EngineName, ObjectiveName, Offload, Precision, Schedule, WandbMode
from trainers.config.schema import DataConfig, EngineConfig, LogConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig

PRESETS = sorted(file.stem for file in (Path(__file__).parents[2] / "conf" / "engine").glob("*.yaml") if not file.stem.endswith("nvme"))
"""Engines by the names that the launcher has for them; NVMe needs a path of this machine."""


def engine_preset(name: str) -> dict[str, Any]:
    """Return the fields of EngineConfig that conf/engine/NAME.yaml sets; the launcher and Hydra may not be there."""
    import yaml

    preset: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "conf" / "engine" / f"{name}.yaml").read_text())
    kinds: dict[str, Callable[[Any], Any]] = {"name": EngineName, "offload_param": Offload, "offload_optimizer": Offload}
    return {key: kinds[key](value) if key in kinds else value for key, value in preset.items()}


def config_of(order: dict[str, Any], run_dir: Path, ranks: int) -> RunConfig:
    """Return the config of a run that trains what is ordered, on so many ranks."""
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(architecture={"model_type": "llama"} | llama_sizes(order["parameters"], order["seq_len"])),
        data=DataConfig(path="unused", seq_len=order["seq_len"]),
        objective=ObjectiveConfig(name=ObjectiveName.cpt),
        engine=EngineConfig(**engine_preset(order["engine"])),
        optim=OptimConfig(lr=1e-4, schedule=Schedule.constant),
        train=TrainConfig(
            steps=order["steps"],
            global_batch=ranks * order["microbatch"],
            microbatch=order["microbatch"],
            precision=Precision(order["precision"]),
            activations=Activations(order["activations"]),
        ),
        log=LogConfig(wandb=WandbMode.disabled),
    )


def llama_sizes(parameters: int, seq_len: int) -> dict[str, int]:
    """Return a Llama of about so many parameters: width / depth near 128, a quarter of the weights or less for the vocabulary."""
    width = 128 * max(1, round((parameters * 128 / 12) ** (1 / 3) / 128))
    inner = 64 * round(width * 8 / 3 / 64)
    vocabulary = 1 << max(8, min(15, int(math.log2(max(1, parameters / (8 * width))))))
    block = 3 * width * width + 3 * width * inner + 2 * width
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": max(1, round((parameters - 2 * vocabulary * width) / block)),
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": max(2048, seq_len),
    }
