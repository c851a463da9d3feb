"""The same model and rows in a bare loop of transformers and peft, and in TRL, as their documentation has it."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tools.bench.gpu.bench import Bench
from tools.bench.training import plain_tokenizer
from trainers.batch import IGNORE
from trainers.config.choices import PeftMethod, Precision
from trainers.rundir.metrics import device_bytes_peak


def bare(bench: Bench) -> dict[str, Any]:
    """Train with labels given to the model, autocast to bf16, AdamW of torch, gradient checkpointing of transformers."""
    model, device = _model(bench), bench.world.device
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) < len(list(model.parameters())):
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    seconds: list[float] = []
    tokens: list[int] = []
    losses: list[float] = []
    model.train()
    _reset()
    for step in range(bench.loader.num_steps):
        started, batches, total = time.perf_counter(), bench.loader.step(step), 0.0
        weight = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        for batch in (batch.to(device) for batch in batches):
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
            with torch.autocast(device.type, torch.bfloat16, enabled=bench.config.train.precision is Precision.bf16):
                loss = model(**inputs, labels=batch.labels, shift_labels=batch.labels, num_items_in_batch=weight).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(batch.num_tokens for batch in batches))
        losses.append(total)
    return bench.speed(seconds, tokens, _flops(bench, model)) | {"peak_bytes": device_bytes_peak(), "losses": losses}


def trl(bench: Bench) -> dict[str, Any]:
    """Train by TRL's SFTTrainer, which packs the same documents."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    config, table = bench.config, bench.table
    bounds = zip(table.offsets[:-1], table.offsets[1:], strict=True)
    documents = Dataset.from_list([{"input_ids": table.tokens[start:end].tolist()} for start, end in bounds])
    marks: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    arguments = SFTConfig(
        output_dir=config.run_dir,
        per_device_train_batch_size=config.train.microbatch,
        max_steps=bench.loader.num_steps,
        max_length=config.data.seq_len,
        packing=True,
        bf16=config.train.precision is Precision.bf16,
        use_cpu=bench.world.device.type == "cpu",
        gradient_checkpointing=True,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if bench.world.device.type == "cuda" else "adamw_torch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = _model(bench, adapted=False)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=documents,
        processing_class=plain_tokenizer(),
        peft_config=_lora() if config.peft.method is not PeftMethod.none else None,
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        mask = batch.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    _reset()
    marks.append(time.perf_counter())
    trainer.train()
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    figures = bench.speed(seconds, tokens[: len(seconds)], _flops(bench, trainer.model))
    return figures | {"peak_bytes": device_bytes_peak(), "words": f"attention: {model.config._attn_implementation}"}


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _model(bench: Bench, adapted: bool = True) -> Any:
    """Return the model from random weights: the frozen base of adapters in bf16, else float32, as masters are."""
    config, lora = copy.deepcopy(bench.blueprint.config), bench.config.peft.method is not PeftMethod.none
    in_bf16 = lora and bench.config.train.precision is Precision.bf16
    with torch.device(bench.world.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if in_bf16 else torch.float32)
    if lora and adapted:
        from peft import get_peft_model

        return get_peft_model(model, _lora())
    return model


def _flops(bench: Bench, model: Any) -> float:
    """Return the FLOPs of a token, counted as ours are."""
    named = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    return bench.flops(shapes, {name for name, parameter in named.items() if not parameter.requires_grad})


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
