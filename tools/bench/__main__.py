"""Measure this checkout on this machine: preparation and packing, the loop, reading a model, saving, engines and methods in comparison.

python -m tools.bench data
python -m tools.bench data --path FILE --tokenizer DIR --seq-len 2048
python -m tools.bench train
python -m tools.bench load --ranks 2 4
python -m tools.bench checkpoint --engine fsdp zero3
python -m tools.bench engines --parameters 1e9 --precision bf16 --out FILE.md
python -m tools.bench methods --model DIR --data FILE --out FILE.md
python -m tools.bench plan
python -m tools.bench plan --gpu --out benchmarks/gpu.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tools.bench import checkpoint, data, engines, load, methods, plan, train
from trainers.config.schema import EngineName, Precision


def _at_least(least: int) -> Callable[[str], int]:
    """Return an argument's type: a whole number, which may be written as 10e6, of at least `least`."""

    def number(text: str) -> int:
        value = float(text)
        if value != int(value) or value < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(value)

    return number


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="data|train|load|checkpoint|engines|methods|plan")
    of_data = commands.add_parser("data", help="preparation speed and packing efficiency, next to the best public packer's on GSM8K")
    of_data.add_argument("--path", help="rows (default: the documentation of this Python, as conversations)")
    of_data.add_argument("--tokenizer", help="tokenizer directory or hub id (default: one trained on the rows)")
    of_data.add_argument("--template", help="chat template: a Jinja file or `chatml`")
    of_data.add_argument("--seq-len", type=int, default=2048, help="tokens a row (default 2048)")
    of_data.set_defaults(command=data.run)
    of_train = commands.add_parser(
        "train", help="tokens a second and peak memory against a bare transformers loop; minutes; losses must agree"
    )
    of_train.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 rows of 512 tokens (default 12)")
    of_train.add_argument("--runs", type=int, default=3, help="runs of each loop, in turn (default 3)")
    of_train.set_defaults(command=train.run)
    of_load = commands.add_parser(
        "load", help="memory of all ranks while they load a model, against its size; needs 3 x the size as memory"
    )
    of_load.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks, each in turn (default 2 4)")
    of_load.add_argument(
        "--gigabytes", type=float, default=1.0, help="size of the checkpoint in bfloat16; float32 is twice that (default 1)"
    )
    of_load.add_argument("--engine", nargs="+", choices=list(EngineName), default=["fsdp"], help="engines, each in turn (default fsdp)")
    of_load.set_defaults(command=load.run)
    of_checkpoint = commands.add_parser(
        "checkpoint", help="how long training waits for a checkpoint, asynchronous against synchronous; needs disk for two, and minutes"
    )
    of_checkpoint.add_argument(
        "--engine", nargs="+", choices=engines.PRESETS, default=["fsdp"], help="presets of conf/engine, each in turn (default fsdp)"
    )
    of_checkpoint.add_argument("--ranks", type=_at_least(1), help="ranks (default: one a GPU, else 2)")
    of_checkpoint.add_argument(
        "--parameters", type=_at_least(1), default=50_000_000, help="about so many, 12 bytes of state each (default 50e6: 0.6 GB)"
    )
    of_checkpoint.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    of_checkpoint.add_argument("--seq-len", type=_at_least(16), default=128, help="tokens a row (default 128)")
    of_checkpoint.add_argument("--microbatch", type=_at_least(1), default=1, help="rows a rank and step (default 1)")
    of_checkpoint.add_argument(
        "--saves", type=_at_least(1), default=5, help="saves of each kind, after one that does not count (default 5)"
    )
    of_checkpoint.add_argument("--every", type=_at_least(2), default=6, help="optimizer steps from save to save (default 6)")
    of_checkpoint.add_argument(
        "--folder", type=Path, help="where the checkpoints are written, and removed at the end (default: that of temporary files)"
    )
    of_checkpoint.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")
    of_checkpoint.set_defaults(command=checkpoint.run, error=of_checkpoint.error)
    of_engines = commands.add_parser(
        "engines", help="speed, memory and parity of engines on the same random model and rows; a rank a GPU, or gloo between CPU ranks"
    )
    of_engines.add_argument(
        "--engine", nargs="+", choices=engines.PRESETS, default=engines.PRESETS, help="presets of conf/engine, each in turn (default all)"
    )
    of_engines.add_argument("--ranks", type=_at_least(1), help="ranks (default: one a GPU, else 2)")
    of_engines.add_argument("--parameters", type=_at_least(1), default=10_000_000, help="about so many, as 1e9 (default 10e6)")
    of_engines.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    of_engines.add_argument("--seq-len", type=_at_least(16), default=512, help="tokens a row (default 512)")
    of_engines.add_argument("--microbatch", type=_at_least(1), default=2, help="rows a rank and step (default 2)")
    of_engines.add_argument("--steps", type=_at_least(2), default=12, help="optimizer steps; the first is not timed (default 12)")
    of_engines.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    of_engines.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")
    of_engines.set_defaults(command=engines.run, error=of_engines.error)
    of_methods = commands.add_parser(
        "methods", help="parameter-efficient methods and full fine-tuning on the same rows, each at the best of its learning rates"
    )
    of_methods.add_argument("overrides", nargs="*", help="settings of every run as for `python -m launcher`, such as data.template=chatml")
    of_methods.add_argument("--model", required=True, help="model directory or hub id")
    of_methods.add_argument("--data", required=True, help="rows, 1 in 20 held out; those over --seq-len are left out")
    of_methods.add_argument(
        "--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS), help="presets of conf/peft (default all of these)"
    )
    of_methods.add_argument("--engine", choices=engines.PRESETS, default="fsdp", help="preset of conf/engine (default fsdp)")
    of_methods.add_argument("--processes", type=_at_least(1), default=2, help="ranks (default 2)")
    of_methods.add_argument("--precision", choices=list(Precision), default="fp32", help="compute type (default fp32)")
    of_methods.add_argument("--steps", type=_at_least(2), default=200, help="optimizer steps a run (default 200)")
    of_methods.add_argument("--rows", type=_at_least(1), default=8, help="rows a step over all ranks (default 8)")
    of_methods.add_argument("--seq-len", type=_at_least(16), default=256, help="longest row in tokens (default 256)")
    of_methods.add_argument("--rank", type=_at_least(1), default=8, help="rank of the low-rank methods (default 8)")
    of_methods.add_argument("--rates", type=_at_least(1), default=3, help="learning rates around each preset's (default 3)")
    of_methods.add_argument("--factor", type=float, default=10.0, help="a rate over the next lower one (default 10)")
    of_methods.add_argument("--most", type=_at_least(1), default=5, help="rates at most: further ones while the last is best (default 5)")
    of_methods.add_argument("--timeout", type=float, default=900.0, help="seconds that a run may take (default 900)")
    of_methods.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the runs are kept (default runs/methods)")
    of_methods.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")
    of_methods.set_defaults(command=methods.run, error=of_methods.error)
    of_plan = commands.add_parser("plan", help="a plan's bytes next to those of real runs on CPU ranks; minutes; state must be equal")
    of_plan.add_argument("--ranks", type=_at_least(1), nargs="+", default=[1, 2, 3, 4], help="numbers of ranks (default 1 2 3 4)")
    of_plan.add_argument("--sizes", nargs="+", choices=plan.SIZES, default=list(plan.SIZES), help="sizes of models (default all of these)")
    of_plan.add_argument("--gpu", action="store_true", help="models of 1B to 8B on one GPU with 139 GiB, against torch.cuda's peak")
    of_plan.add_argument("--out", type=Path, help="with --gpu: Markdown file in which this command's section is replaced, or appended")
    of_plan.set_defaults(command=plan.run, error=of_plan.error)
    of_plan_rank = commands.add_parser("plan-rank")  # what `plan` starts
    of_plan_rank.add_argument("folder")
    of_plan_rank.add_argument("cases", type=int, nargs="+")
    of_plan_rank.set_defaults(command=plan.run_rank)
    of_engine_rank = commands.add_parser("engine-rank")  # what `engines` starts
    of_engine_rank.add_argument("run_dir")
    of_engine_rank.set_defaults(command=engines.run_rank)
    of_checkpoint_rank = commands.add_parser("checkpoint-rank")  # what `checkpoint` starts
    of_checkpoint_rank.add_argument("run_dir")
    of_checkpoint_rank.set_defaults(command=checkpoint.run_rank)
    of_rank = commands.add_parser("load-rank")  # what `load` starts
    for name in ("folder", "engine", "run_dir"):
        of_rank.add_argument(name)
    of_rank.set_defaults(command=load.run_rank)
    of_one = commands.add_parser("one")  # what `train` starts
    of_one.add_argument("shape", choices=train.SHAPES)
    of_one.add_argument("variant", choices=train.VARIANTS)
    of_one.add_argument("--steps", type=int, default=12)
    of_one.set_defaults(command=train.run_one)
    options = parser.parse_args(arguments)
    options.line = shlex.join(["python", "-m", "tools.bench", *(sys.argv[1:] if arguments is None else arguments)])
    return options.command(options) or 0


if __name__ == "__main__":
    sys.exit(main())
