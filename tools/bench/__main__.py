"""Measure this checkout on this machine: preparation and packing, the loop, reading a model, saving, engines and methods in comparison.

python -m tools.bench data
python -m tools.bench data --path FILE --tokenizer DIR --seq-len 2048
python -m tools.bench curate --rows 50000
python -m tools.bench stream --bytes 2e9
python -m tools.bench train
python -m tools.bench load --ranks 2 4
python -m tools.bench checkpoint --engine fsdp zero3
python -m tools.bench engines --parameters 1e9 --precision bf16 --out FILE.md
python -m tools.bench methods --model DIR --data FILE --out FILE.md
python -m tools.bench peers --peer trl --out FILE.md
python -m tools.bench preferences --trl --out FILE.md
python -m tools.bench plan
python -m tools.bench context --real
python -m tools.bench meshes --out FILE.md
python -m tools.bench generate --vllm .venv-vllm/bin/python --out FILE.md
python -m tools.bench seeds --out FILE.md
python -m tools.bench staleness --out FILE.md
python -m tools.bench learning --out FILE.md
python -m tools.bench rlhf --out FILE.md
python -m tools.bench gpu --out benchmarks/gpu.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tools.bench import (
    checkpoint,
    context,
    curate,
    data,
    engines,
    generate,
    learning,
    load,
    meshes,
    methods,
    plan,
    preferences,
    rlhf,
    seeds,
    staleness,
    stream,
    train,
)
from tools.bench.gpu import command as gpu
from tools.bench.peers import command as peers
from tools.command import parser_of

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "data": (data, "preparation speed and packing efficiency, next to the best public packer's on GSM8K"),
    "curate": (curate, "rows a second and peak memory of a curation with the steps of conf/curate/default.yaml"),
    "stream": (stream, "time to the first step, memory and disk of a run that streams a large file; needs disk for it, and minutes"),
    "train": (train, "tokens a second and peak memory against a bare transformers loop; minutes; losses must agree"),
    "load": (load, "memory of all ranks while they load a model, against its size; needs 3 x the size as memory"),
    "checkpoint": (
        checkpoint,
        "how long training waits for a checkpoint, asynchronous against synchronous; needs disk for two, and minutes",
    ),
    "engines": (engines, "speed, memory and parity of engines on the same random model and rows; a rank a GPU, or gloo between CPU ranks"),
    "methods": (methods, "parameter-efficient methods and full fine-tuning on the same rows, each at the best of its learning rates"),
    "peers": (peers, "tokens a second, memory and time to the first step next to other trainers'; installs them once; minutes a run"),
    "preferences": (preferences, "DPO next to supervised training, to a second model and to TRL's DPOTrainer (--trl); losses must agree"),
    "plan": (plan, "a plan's bytes next to those of real runs on CPU ranks; minutes; state must be equal"),
    "context": (context, "what a rank keeps of rows that ranks share, by the plan and of real runs on CPU ranks (--real)"),
    "meshes": (meshes, "plans of meshes next to real runs on 2 and 4 CPU ranks, and plans of 30B to 405B; minutes"),
    "generate": (generate, "tokens a second and memory of answers: plain generate, continuous batching, ours and vLLM (--vllm); minutes"),
    "seeds": (seeds, "memory of 7B and 70B, full, LoRA and QLoRA, by mode=plan, next to rules of thumb; minutes"),
    "staleness": (staleness, "steps an hour of a run that samples ahead of training, and the time of a step by part; minutes"),
    "learning": (learning, "what quickstart_grpo learns over seeds, next to runs whose rewards are drawn by lot; 20 minutes"),
    "rlhf": (rlhf, "what PPO makes of a reward model's score on held-out questions, next to rewards drawn by lot; 20 minutes"),
    "gpu": (gpu, "all that matters on one GPU, the most valuable first, in 25 minutes; --rehearse on a CPU"),
}
"""By name: the module that measures, and what it measures."""
RANKS: dict[str, tuple[Callable[[argparse.Namespace], None], dict[str, dict[str, Any]]]] = {
    "plan-rank": (plan.run_rank, {"folder": {}, "cases": {"type": int, "nargs": "+"}}),
    "gpu-row": (gpu.run_rank, {"folder": {}}),
    "engine-rank": (engines.run_rank, {"run_dir": {}}),
    "checkpoint-rank": (checkpoint.run_rank, {"run_dir": {}}),
    "load-rank": (load.run_rank, {"folder": {}, "engine": {}, "run_dir": {}}),
    "peer-inputs": (peers.make_inputs, {"folder": {}, "shape": {}} | {name: {"type": int} for name in ("seq_len", "rows", "multiple")}),
    "preference-inputs": (
        preferences.make_inputs,
        {"folder": {}, "shape": {}} | {name: {"type": int} for name in ("seq_len", "rows", "multiple")},
    ),
    "preference-one": (
        preferences.run_one,
        {"folder": {}, "variant": {}} | {name: {"type": int} for name in ("steps", "seq_len", "microbatch")},
    ),
    "generate-inputs": (generate.make_inputs, {"folder": {}}),
    "generate-one": (generate.run_one, {"folder": {}, "way": {"choices": generate.WAYS}}),
    "one": (
        train.run_one,
        {"shape": {"choices": train.SHAPES}, "variant": {"choices": train.VARIANTS}, "--steps": {"type": int, "default": 12}},
    ),
}
"""What these start: by name, what runs, and its arguments."""


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    options = _parser().parse_args(arguments)
    options.line = shlex.join(["python", "-m", "tools.bench", *(sys.argv[1:] if arguments is None else arguments)])
    return options.command(options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bench", __doc__)
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name, (module, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words)
        module.add_arguments(command)
        command.set_defaults(command=module.run, error=command.error)
    for name, (run, taken) in RANKS.items():
        command = commands.add_parser(name)
        for argument, settings in taken.items():
            command.add_argument(argument, **settings)
        command.set_defaults(command=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
