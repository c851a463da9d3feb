"""Run directories made up for tests of what only reads them: as many as wanted, with known figures, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launcher.job import frozen_text
from tools.evaluate import record
from trainers.config.choices import Metric, PeftMethod
from trainers.config.schema import EvaluationConfig, ModelConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig, plain
from trainers.generate.identity import digest_of

DOCUMENTS = 80


def make_run(
    folder: Path,
    method: str = "none",
    lr: float = 1e-5,
    steps: int = 20,
    seed: int = 0,
    better: float = 0.0,
    state: str = "done",
    evaluated: bool = True,
    final_loss: float | None = 2.0,
    noise: float = 0.05,
    seconds: float = 0.5,
) -> Path:
    """Write a run of `method`, whose losses are lower by `better` nats a token, and whose answers are more often right."""
    folder.mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "export" / "model.safetensors").write_bytes(b"0" * (4096 if method == "none" else 512))
    config = RunConfig(
        name="sweep",
        run_dir=str(folder),
        model=ModelConfig(id="someone/base"),
        peft=PeftConfig(method=PeftMethod(method)),
        optim=OptimConfig(lr=lr),
        train=TrainConfig(steps=steps),
        evaluation=EvaluationConfig(metrics=[Metric.exact_match, Metric.rouge_l]),
    )
    (folder / "config.yaml").write_text(frozen_text(config))
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "eval_loss": 4.0, "eval_tokens": 900}]
    for step in range(1, steps + 1):
        loss = 4.0 - 2.0 * step / steps
        rows.append(
            {"step": step, "epoch": 0.1, "loss": loss, "lr": lr, "grad_norm": 1.0, "tokens": 100 * step, "tokens_per_second": 200.0}
        )
        rows[-1] |= {"step_seconds": seconds, "host_bytes_peak": 1 << 30, "skipped": 0, "rows_hash": f"{step:08x}"}
        if step % max(1, steps // 4) == 0:
            rows.append({"step": step, "tokens": 100 * step, "eval_loss": loss - better, "eval_tokens": 900})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status: dict[str, Any] = {"state": state, "step": steps if state == "done" else 7}
    status |= {"error": {"message": "the disk is full\nmore"}} if state == "failed" else {}
    (folder / "status.json").write_text(json.dumps(status))
    manifest = {"prepared": "data-one", "base_revision": None, "command": ["python", "-m", "launcher"], "wandb_id": "a1", "code": {}}
    manifest["data"] = {"template_hash": "t", "tokenizer_hash": "k", "fingerprint": "f", "layout": "messages"}
    manifest["data"]["splits"] = {"eval": {"documents": DOCUMENTS, "tokens": 1800, "supervised_tokens": 900}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if state == "done":
        write_summary(folder, method, steps, None if final_loss is None else final_loss - better, seconds)
        if evaluated:
            write_evaluation(folder, config, seed, better, noise)
    return folder


def write_summary(folder: Path, method: str, steps: int, loss: float | None, seconds: float) -> None:
    trained = {"none": 1000, "lora": 50}.get(method, 10)
    summary = {"eval_loss_before": 4.0, "eval_loss_after": loss, "train_loss": 2.0, "steps": steps, "tokens": 100 * steps, "rows": steps}
    summary |= {"input_tokens": 150 * steps, "tokens_per_second": 200.0, "input_tokens_per_second": 300.0, "mfu": None, "world_size": 2}
    summary |= {"device_bytes_peak": None, "host_bytes_peak": (1 << 30) if method == "none" else (1 << 29), "skipped_steps": 0}
    summary |= {"train_seconds": seconds * steps, "gpu_hours": None, "parameters": 1000 + trained % 1000}
    (folder / "summary.json").write_text(json.dumps(summary | {"trainable_parameters": trained}))


def write_evaluation(folder: Path, config: RunConfig, seed: int, better: float, noise: float) -> None:
    """Write what tools.evaluate would: the same documents, as hard for all; the base is `better` = 0 without noise."""
    shared = np.random.default_rng(0)
    tokens, hard = shared.integers(5, 40, DOCUMENTS), shared.gamma(4.0, 0.5, DOCUMENTS)
    threshold = shared.random(DOCUMENTS)
    own = np.random.default_rng(seed + 1).normal(0, noise, DOCUMENTS)
    sets = {"held_out": "data-one", "general": "data-general-200", "answers": "data-one"}
    for name, gain, wobble in (("run", better, own), ("base", 0.0, np.zeros(DOCUMENTS))):
        about: dict[str, Any] = {"name": name, "files": digest_of(folder / "export")}
        about |= {"model": name, "weights": f"weights of {name}" if name == "run" else "base weights", "settings": plain(config.evaluation)}
        losses = [
            {"document": at, "tokens": int(count), "nats": float(count * (level - gain + wander))}
            for at, (count, level, wander) in enumerate(zip(tokens, hard, wobble, strict=True))
        ]
        general = [row | {"nats": row["nats"] + (0.1 + gain / 2) * row["tokens"] * (name == "run")} for row in losses]
        answers = [
            record.scored(
                {
                    "document": at,
                    "prompt": f"<|user|> {at}?",
                    "reference": f"#### {at}",
                    "answer": f"#### {at if chance < 0.2 + gain else -1}",
                }
                | {"tokens": 5, "repetition": 0.1, "finished": True},
                config.evaluation,
            )
            for at, chance in enumerate(threshold)
        ]
        rows = {"held_out": losses, "general": general, "answers": answers}
        record.write(folder / "evaluation", name, about | {"dtype": "float32", "sets": sets, "time": ""}, rows)


def change(file: Path, **values: Any) -> None:
    """Change settings of config.yaml (a__b=1 is a.b), or keys of a JSON file."""
    content = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text())
    for path, value in values.items():
        node = content
        *parents, last = path.split("__")
        for name in parents:
            node = node[name]
        node[last] = value
    file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))
