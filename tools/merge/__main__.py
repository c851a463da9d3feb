"""Merge an adapter into its base model, and write what plain transformers loads.

python -m tools.merge runs/run/export merged                      # any PEFT directory; the base is the one that it names
python -m tools.merge adapter merged --dtype bfloat16 --shard-gib 2
python -m tools.merge adapter merged --model /place/of/the/base
python -m tools.merge maths=0.7 chat=0.3 merged                   # base + 0.7 x what maths changes + 0.3 x what chat changes
python -m tools.merge maths chat merged --method ties --density 0.2

One process on the CPU merges tensor by tensor in float32, with the peft library's own layers, and then casts; it never holds the
model. Any method that changes weights is merged: LoRA, DoRA, rank-stabilised and PiSSA, AdaLoRA, IA3, LoHa, LoKr, OFT and more, with
their modules_to_save, trained biases and trained tokens. Prompt, prefix and p-tuning change none, and are refused.

Several adapters: `linear` is the weighted sum of what each alone changes, W + sum of w_i (W_i - W), for any methods; a negative
weight takes away. ties, dare_linear, dare_ties and magnitude_prune do the same to these changes that peft's functions of the name do to
matrices. peft:linear, peft:svd, peft:cat, peft:ties and so on are add_weighted_adapter's, which combines the factors A and B of plain
LoRA (peft:linear is not a weighted sum of changes: it multiplies sums). An adapter that is alone may have a weight, too.

OUT has the base's config and generation config, and the tokenizer of the first adapter that has one, else the base's. Where an adapter
changes one of two tied tensors, OUT holds both. OUT is complete or absent. At the end base and adapter run next to the merged model on a
fixed batch, both whole and in float32, one after the other, if the memory is enough: --no-probe leaves that out.

Exit codes: 0 written, 1 values are not finite, the disk fails or the models disagree, 2 bad arguments, adapter or base, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from tools.command import Refused, ended
from tools.export import DTYPES, Damaged
from tools.merge.write import write
from trainers.processes import never_fail

USAGE = "python -m tools.merge ADAPTER[=WEIGHT] [ADAPTER[=WEIGHT] ...] OUT [options]"


def main(arguments: list[str] | None = None) -> int:
    """Merge adapters; returns the exit code."""
    never_fail()
    options = make_parser().parse_intermixed_args(arguments)

    def stopped() -> str:
        complete = (options.out / "config.json").is_file()
        return f"stopped: {options.out} {'is complete, and was not compared' if complete else 'was not written'}"

    def merge() -> int:
        require(options)
        return write(options)

    return ended(merge, stopped, failures=(Damaged, RuntimeError, OSError))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "adapters", metavar="ADAPTER[=WEIGHT]", nargs="+", type=adapter, help="a PEFT directory, and its weight (default 1)"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to write; absent, or empty")
    parser.add_argument("--model", metavar="DIR", help="the base, a directory or hub id (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type of the weights (default saved: each as in the base)")
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest file in GiB; a larger tensor has its own (default 4)")
    parser.add_argument("--method", default="linear", help="how several adapters are combined (default linear)")
    parser.add_argument("--density", type=float, help="share of each change that ties, dare and magnitude_prune keep, in (0, 1]")
    parser.add_argument("--svd-rank", type=int, help="rank that peft:svd and peft:*_svd cut to (default: the largest of the adapters)")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops (default 0)")
    parser.add_argument("--no-probe", action="store_true", help="do not run the two models to compare them")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    return parser


def require(options: argparse.Namespace) -> None:
    """Raise Refused for options that cannot be."""
    if not 0 < options.shard_gib < math.inf:
        raise Refused(f"--shard-gib {options.shard_gib:g}: must be a number greater than 0")


def adapter(word: str) -> tuple[Path, float]:
    """Read DIR or DIR=WEIGHT."""
    folder, is_there, weight = word.rpartition("=")
    if not is_there or Path(word).exists():
        return Path(word), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{word}: {weight!r} is not a weight")
    return Path(folder), value


if __name__ == "__main__":
    sys.exit(main())
