"""One small configuration of each parameter-efficient method, and the rows that all of them train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.bench.orders import engine_preset
from trainers.batch import IGNORE, Batch
from trainers.config.choices import AdapterActivation, AdapterBias, AdapterInit, DataSource, PeftMethod, Precision, Quantisation
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig

STEPS, ROWS, LENGTH, LR, REL = 20, 6, 12, 2e-3, 1e-5


ATTENTION = ["q_proj", "v_proj"]


CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "targets": ["all-linear"]},
    "lora_more": {
        "method": "lora",
        "rank": 4,
        "targets": ATTENTION,
        "bias": "adapted",
        "modules_to_save": ["lm_head"],
        "rank_stabilised": True,
        "init": "gaussian",
    },
    "lora_bias": {"method": "lora", "rank": 2, "targets": ATTENTION, "bias": "all"},
    "lora_ends": {"method": "lora", "rank": 4, "targets": ["embed_tokens", "lm_head"]},
    "freeze": {"method": "freeze", "last_blocks": 1},
    "freeze_pattern": {"method": "freeze", "freeze": ["*mlp*", "*embed*", "lm_head*"]},
    "dora": {"method": "dora", "rank": 4, "targets": ["q_proj", "down_proj"]},
    "loraplus": {"method": "lora", "rank": 4, "targets": ["all-linear"], "lr_ratio": 4.0},
    "ia3": {"method": "ia3"},
    "pissa": {"method": "lora", "rank": 4, "targets": ["all-linear"], "init": "pissa"},
    "qlora": {"method": "lora", "rank": 4, "targets": ATTENTION, "quantise": "nf4", "modules_to_save": ["lm_head"]},
    "loftq": {"method": "lora", "rank": 4, "targets": ["all-linear"], "quantise": "nf4", "init": "loftq"},
    "adalora": {
        "method": "adalora",
        "rank": 6,
        "target_rank": 3,
        "targets": ["all-linear"],
        "modules_to_save": ["lm_head"],
        "tinit": 3,
        "tfinal": 5,
        "delta_t": 2,
        "beta2": 0.75,
    },
    "houlsby": {"method": "bottleneck", "bottleneck": 6, "activation": "gelu", "targets": ["o_proj", "down_proj"]},
    "parallel": {"method": "bottleneck", "bottleneck": 6, "scale": 4.0, "parallel": True, "targets": ["mlp"]},
    "prompt": {"method": "prompt", "virtual_tokens": 5, "init": "vocabulary"},
    "prefix": {"method": "prefix", "virtual_tokens": 5, "encoder_size": 8},
    "ptuning": {"method": "ptuning", "virtual_tokens": 5},
}


KINDS: dict[str, Any] = {
    "method": PeftMethod,
    "bias": AdapterBias,
    "init": AdapterInit,
    "quantise": Quantisation,
    "activation": AdapterActivation,
}


def settings(case: str) -> PeftConfig:
    return PeftConfig(**{key: KINDS.get(key, lambda same: same)(value) for key, value in CASES[case].items()})


def config_for(folder: Path, case: str, engine: str = "fsdp", **train: Any) -> RunConfig:
    """A run of a case; `engine.NAME=VALUE` in `train` changes a field of the engine's preset."""
    run_dir = folder.parent / f"run-{engine}"
    run_dir.mkdir(exist_ok=True)
    more = {key.removeprefix("engine."): train.pop(key) for key in list(train) if key.startswith("engine.")}
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(id=str(folder)),
        data=DataConfig(path="unused", packing=False),
        peft=settings(case),
        engine=EngineConfig(**(engine_preset(engine) | more)),
        optim=OptimConfig(lr=LR, clip=0.5, weight_decay=0.1),
        train=TrainConfig(**({"precision": Precision.fp32} | train)),
    )


def with_bottlenecks(base: torch.nn.Module, given: PeftConfig, value: Callable[[str], torch.Tensor]) -> torch.nn.Module:
    """Return a frozen model with bottleneck adapters by forward hooks, written without peft; `value` gives what a tensor begins at."""
    base.requires_grad_(False)
    act: Any = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[given.activation]
    aimed = {path: module for path, module in base.named_modules() if path.rpartition(".")[2] in given.targets}
    for path, module in aimed.items():
        for name in ("bottleneck_down", "bottleneck_up"):
            weight, bias = (value(f"{path}.{name}.default.{kind}") for kind in ("weight", "bias"))
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
            module.add_module(name, linear)

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            x = inputs[0] if given.parallel else output
            added: torch.Tensor = given.scale * module.bottleneck_up(act(module.bottleneck_down(x)))
            return output + added

        module.register_forward_hook(hook)
    return base


def rows_of_steps() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Steps of rows (input_ids, labels) with different numbers of labels, one row with none."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        ids = torch.randint(3, 33, (ROWS, LENGTH), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -1] = IGNORE
        for row in range(ROWS):
            labels[row, : row * 2] = IGNORE
        labels[2] = IGNORE
        yield ids, labels


def batch_of(ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    positions = torch.arange(LENGTH).expand(ids.shape)
    return Batch.of(ids, labels, positions)


def locals_of(engine: Any) -> dict[str, tuple[Any, torch.Tensor]]:
    """This rank's part of each parameter, by name; DeepSpeed pads the last part with memory as it finds it, which may be NaN."""

    def local(p: Any) -> torch.Tensor:
        if hasattr(p, "ds_tensor"):
            begin = dist.get_rank(p.ds_process_group) * p.ds_tensor.numel()
            return p.ds_tensor.flatten()[: max(0, p.ds_numel - begin)]
        return p.to_local() if hasattr(p, "to_local") else p

    return {name: (p, local(p)) for name, p in engine.model.named_parameters()}


class NoTokenizer:
    pad_token_id = None

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def get_vocab(self) -> dict[str, int]:
        return {}


def config_for_method(method: PeftMethod) -> RunConfig:
    return RunConfig(
        model=ModelConfig(architecture={"model_type": "llama"}, train_tokenizer=300),
        data=DataConfig(source=DataSource.python_docs),
        peft=PeftConfig(method=method),
        optim=OptimConfig(lr=1e-4),
    )
