"""Short runs whose numbers stay: python tests/record_losses.py [CODE] writes tests/golden/losses.json from the code in CODE.

A change that leaves the arithmetic alone leaves these numbers alone, to the bit. Record them with the code of before a change, never
with the code that is to be checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "far", "over"),
    *("green", "hills", "home", "again", "and", "nobody", "knew"),
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n"]

COMMON = [
    *("train.steps=8", "train.eval_every=4", "train.precision=fp32", "train.sample_tokens=0", "data.seq_len=64", "data.eval_fraction=0.15"),
    *("data.template=chatml", "optim.lr=1e-2", "optim.weight_decay=0.1", "optim.warmup_steps=2", "optim.clip=0.5", "log.wandb=disabled"),
]
TWO = ["launch.processes=2", "train.global_batch=8"]  # 4 microbatches of a packed row on each rank
PADDED = ["data.packing=false", "train.microbatch=2"]
THREE = ["launch.processes=3", "train.global_batch=12"]  # 2 microbatches of 2 padded rows
ONE = ["launch.processes=1", "train.global_batch=3"]
LORA = ["peft=lora", "peft.rank=4", "peft.alpha=8", "peft.dropout=0.1"]
QLORA = ["peft=qlora", "peft.rank=4", "peft.alpha=8", "peft.dropout=0.1"]
ADALORA = ["peft=adalora", "peft.rank=4", "peft.target_rank=2", "peft.tinit=1", "peft.tfinal=2"]
CASES: dict[str, list[str]] = {
    "fsdp full packed": TWO,
    "fsdp full padded, 3 ranks": [*THREE, *PADDED],
    "fsdp full cpt, 1 rank": [*ONE, "objective=cpt", "optim.schedule=wsd"],
    "fsdp full packed, checkpointed activations": [
        *TWO,
        *("train.activations=block", "engine.sync_each_microbatch=false", "train.on_spike=skip", "optim.schedule=linear"),
    ],
    "fsdp lora packed": [*TWO, *LORA],
    "fsdp lora padded, 3 ranks": [*THREE, *PADDED, *LORA],
    "fsdp qlora packed": [*TWO, *QLORA],
    "fsdp dora padded": [*TWO, *PADDED, "peft=dora", "peft.rank=4", "peft.lr_ratio=4"],
    "fsdp adalora packed": [*TWO, *ADALORA],
    "fsdp prefix padded, 1 rank": [*ONE, "data.packing=false", "peft=prefix", "peft.virtual_tokens=3", "peft.encoder_size=16"],
    "zero3 full packed": [*TWO, "engine=zero3"],
    "zero3 full padded, 3 ranks": [*THREE, *PADDED, "engine=zero3"],
    "zero3 lora padded": [*TWO, *PADDED, *LORA, "engine=zero3"],
    "zero3 qlora packed": [*TWO, *QLORA, "engine=zero3"],
    "zero3 adalora padded": [*TWO, *PADDED, *ADALORA, "engine=zero3"],
}
QUICK = ["fsdp full packed", "zero3 full padded, 3 ranks"]


def make_inputs(folder: Path) -> list[str]:
    """Write a tiny Llama with a vocabulary of 29 and 60 ragged chats, from numpy's numbers; return the overrides that name them."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": len(fast), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=128, tie_word_embeddings=True))
    numbers = np.random.default_rng(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                parameter.copy_(torch.from_numpy(numbers.uniform(-0.2, 0.2, parameter.shape)))
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    rng = random.Random(7)

    def say(longest: int) -> str:
        return " ".join(WORDS[rng.randrange(len(WORDS))] for _ in range(1 + rng.randrange(longest)))

    rows = [
        {"messages": [{"role": "user", "content": say(9)}, {"role": "assistant", "content": say(14)}] * (1 + number % 2)}
        for number in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["model=hf", f"model.id={folder / 'model'}", "data=files", f"data.path={folder / 'chats.jsonl'}"]


def run(name: str, inputs: list[str], run_dir: Path, launch: Callable[[list[str]], Any]) -> dict[str, Any]:
    """Run a case by the command that a user types and return its numbers."""
    launch([sys.executable, "-m", "launcher", *inputs, f"run_dir={run_dir}", *COMMON, *CASES[name]])
    return read(run_dir)


def read(run_dir: Path) -> dict[str, Any]:
    """Return a finished run's losses and gradient norms as hexadecimal floats, and SHA-256 of the exported tensors."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = hashlib.sha256()
    for path in sorted((run_dir / "export").glob("*.safetensors")):
        for key, tensor in sorted(load_file(path).items()):
            weights.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    numbers = {key: [float(row[key]).hex() for row in rows if key in row] for key in ("loss", "grad_norm", "eval_loss")}
    return numbers | {"weights": weights.hexdigest()}


def machine() -> dict[str, str]:
    """Return what the last bits of a float depend on: torch, and the CPU for which it and MKL choose their kernels."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    kind = " ".join(about.get(key, "") for key in ("vendor_id", "cpu family", "model")).strip()
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu": kind,
    }


def main(code: Path) -> None:
    """Record every case with the code in a directory."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=code, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        variables = {"PYTHONPATH": str(code), "FULLTUNE_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

        def launch(line: list[str]) -> None:
            done = subprocess.run(line, cwd=code, env=os.environ | variables, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stdout[-2000:] + done.stderr[-4000:])

        inputs, runs = make_inputs(Path(folder)), {}
        for number, name in enumerate(CASES):
            print(name, flush=True)
            runs[name] = run(name, inputs, Path(folder) / f"run{number}", launch)
    version = re.search(r"^NUMERICS = (\d+)", (code / "trainers" / "config" / "numerics.py").read_text(), re.MULTILINE)
    numerics = int(version[1]) if version else None
    GOLDEN.write_text(json.dumps({"commit": commit, "numerics": numerics, "machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
