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
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.export import DTYPES, Damaged, Refused, require_absent, require_space, with_bar
from trainers.config.checks import looks_local
from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from tools.merge.modules import AdapterFiles, Combination, Merge

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
"""What a tokenizer may consist of."""
TOLERANCE = 1e-3
"""Largest difference over the largest logit that rounding makes of float32."""
USAGE = "python -m tools.merge ADAPTER[=WEIGHT] [ADAPTER[=WEIGHT] ...] OUT [options]"


def main(arguments: list[str] | None = None) -> int:
    """Merge adapters; returns the exit code."""
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
    options = parser.parse_intermixed_args(arguments)
    if not 0 < options.shard_gib < math.inf:
        parser.error(f"--shard-gib {options.shard_gib:g}: must be a number greater than 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: nothing half-written stays
    try:
        return write(options)
    except KeyboardInterrupt:
        complete = (options.out / "config.json").is_file()
        print(f"stopped: {options.out} {'is complete, and was not compared' if complete else 'was not written'}", file=sys.stderr)
        return 130
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Damaged, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


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


def write(options: argparse.Namespace) -> int:
    """Check everything that can be checked before the first weight is read, write OUT, and compare it; returns the exit code."""
    started = time.monotonic()
    out: Path = options.out
    require_absent(out)
    combination = read_combination(options)

    import torch

    from tools.merge.modules import Merge, Unfit, base_blueprint, read_adapter
    from trainers.model.blueprint import write_folder

    try:
        adapters = [read_adapter(folder) for folder, _ in options.adapters]
        base = find_base(adapters, options.model)
        require_apart(out, [base, *(files.folder for files in adapters)])
        merge = Merge(base_blueprint(base, options.trust_remote_code, adapters), adapters, [w for _, w in options.adapters], combination)
        plan = merge.plan(None if options.dtype == "saved" else getattr(torch, options.dtype))
    except Unfit as error:
        raise Refused(str(error)) from error
    except ConfigError as error:
        raise Refused(f"the base {error.value}: {'; '.join(filter(None, (error.reason, error.remedy)))}") from error
    num_bytes = sum(tensor.nbytes for tensor in plan.values())
    require_space(num_bytes, out)

    def configure(staging: Path) -> None:
        write_config(merge, base, None if options.dtype == "saved" else options.dtype, staging)
        copy_rest(base, [files.folder for files in adapters], staging)

    weights = with_bar(readable(merge, plan), num_bytes, "merging")
    write_folder(weights, lambda: plan, configure, out.resolve(), write=True, shard_bytes=int(options.shard_gib * 2**30))
    files = list(out.glob("*.safetensors"))
    size, seconds = sum(path.stat().st_size for path in files), time.monotonic() - started
    names = " + ".join(f"{weight:g} x {folder}" if weight != 1 else str(folder) for folder, weight in options.adapters)
    changed = sum(any(one.changes(name) for one in merge.adapters) for name in plan)
    print(f"{out}: {base} + {names}")
    print(f"{changed} of {len(plan)} tensors changed, {len(files)} files of weights, {size:,} bytes, {seconds:.1f} s")
    if merge.untied:
        print(f"{', '.join(sorted(merge.untied))} is no longer tied: OUT has a copy, and tie_word_embeddings=false")
    code = 0 if options.no_probe else probe(merge, plan, out)
    print(f'open it: AutoModelForCausalLM.from_pretrained("{out}"), AutoTokenizer.from_pretrained("{out}")')
    return code


def read_combination(options: argparse.Namespace) -> Combination:
    """Return how adapters are combined; raises Refused for what does not go together."""
    from tools.merge.modules import LIBRARY_METHODS, METHODS, Combination

    if options.method not in METHODS + LIBRARY_METHODS:
        raise Refused(f"--method {options.method}: one of {', '.join(METHODS + LIBRARY_METHODS)}")
    combination = Combination(method=options.method, density=options.density, svd_rank=options.svd_rank, seed=options.seed)
    if combination.prunes and options.density is None:
        raise Refused(f"--method {options.method} needs --density, the share of each change that it keeps (0.2 is usual for ties)")
    if options.density is not None and not (combination.prunes and 0 < options.density <= 1):
        raise Refused(f"--density {options.density:g}: a number in (0, 1], for ties, dare and magnitude_prune")
    if options.svd_rank is not None and not (options.method.endswith("svd") and options.svd_rank > 0):
        raise Refused(f"--svd-rank {options.svd_rank}: a number greater than 0, for peft:svd and peft:*_svd")
    return combination


def find_base(adapters: Sequence[AdapterFiles], model: str | None) -> Path:
    """Return the directory of the base that is meant; raises Refused, or ConfigError where the hub cannot be asked."""
    from trainers.model.blueprint import _fetch

    named = {str(files.config.base_model_name_or_path): files for files in adapters if files.config.base_model_name_or_path}
    if model is None and len(named) > 1:
        says = "; ".join(f"{files.folder} is of {name}" for name, files in named.items())
        raise Refused(f"the adapters name different bases: {says}. --model DIR says which is meant")
    if model is None and not named:
        raise Refused(f"{adapters[0].folder} names no base: --model DIR says which it is")
    name = next(iter(named)) if model is None else model
    revisions = {files.config.revision for files in adapters} if model is None else {None}
    if len(revisions) > 1:
        raise Refused(f"the adapters name different revisions of {name}: {', '.join(map(str, revisions))}. --model DIR says which is meant")
    if looks_local(name) and not (Path(name) / "config.json").is_file():
        whose = f"the base {name}" if model is not None else f"{name}, the base that {next(iter(named.values())).folder} names,"
        wrong = "has no config.json" if Path(name).is_dir() else "is not there"
        raise Refused(f"{whose} {wrong}: --model DIR says where it is")
    folder, _ = _fetch(ModelConfig(id=name, revision=revisions.pop()))
    return folder


def require_apart(out: Path, sources: Sequence[Path]) -> None:
    """Raise Refused where writing OUT, or OUT.tmp before it, would remove what is read."""
    out = out.resolve()
    for written in (out, out.with_name(out.name + ".tmp")):
        for source in sources:
            if source.resolve().is_relative_to(written):
                raise Refused(f"{out} would be written over {source}: name another directory")


def readable(merge: Merge, plan: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged tensors; raises Damaged for values that cannot be used."""
    from tools.merge.modules import Unfit

    try:
        yield from merge.pieces(plan)
    except ConfigError as error:
        raise Damaged(f"the base {error.value}: {error.reason}") from error
    except Unfit as error:
        raise Refused(str(error)) from error


def write_config(merge: Merge, base: Path, dtype: str | None, folder: Path) -> None:
    """Write the base's config as it is but for the type, a vocabulary that has grown and tensors that are no longer tied."""
    from trainers.model.blueprint import model_class

    config: dict[str, Any] = json.loads((base / "config.json").read_text("utf-8"))
    text = merge.blueprint.config.get_text_config()
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts if dtype is not None else ():
        if part.keys() & {"dtype", "torch_dtype"}:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    if dtype is not None:
        config["dtype"] = dtype
    for part in parts if merge.blueprint.vocab_on_disk is not None else ():
        if part.get("vocab_size") == merge.blueprint.vocab_on_disk:
            part["vocab_size"] = text.vocab_size
    if merge.untied:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if (architecture := model_class(merge.blueprint.config)) is not None:
        config["architectures"] = [architecture.__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def copy_rest(base: Path, adapters: Sequence[Path], folder: Path) -> None:
    """Copy the base's generation config and code, and the tokenizer of the first adapter that has one, or the base's."""
    with_tokenizer = [place for place in adapters if (place / "tokenizer_config.json").is_file()]
    tokenizer = (with_tokenizer or [base])[0]
    places = [(base, ("generation_config.json", "*.py", "*processor_config.json")), (tokenizer, TOKENIZER)]
    for place, patterns in places:
        for path in [path for pattern in patterns for path in place.glob(pattern) if path.is_file()]:
            shutil.copyfile(path, folder / path.name)


def probe(merge: Merge, plan: dict[str, Tensor], out: Path) -> int:
    """Print how far the merged model is from base and adapter; returns 1 where float32 rounding does not explain it."""
    import transformers

    from tools.merge.modules import PROBE_ROWS, compare
    from trainers.host import memory_available

    transformers.utils.logging.disable_progress_bar()
    need, have = sum(tensor.numel() for tensor in plan.values()) * 4 * 5 // 4, memory_available()
    if need > have:
        print(f"not compared: the model whole and in float32 needs {need:,} bytes of memory, and {have:,} are free")
        return 0
    try:
        found = compare(out, merge)
    except Exception as error:  # whatever peft, transformers or the model's own code raise
        print(f"error: {out} is written, and could not be compared: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 1
    if found is None:
        print(f"not compared: peft cannot run these adapters with their base as --method {merge.combination.method} combines them")
        return 0
    rounded = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in plan.values() if tensor.is_floating_point()} - {"float32"})
    print(
        f"largest difference of a logit to base and adapter: {found.largest:.2g}, of logits up to {found.scale:.3g};"
        f" the same most likely token at {found.same} of {found.positions} positions"
        f" ({PROBE_ROWS} x {found.positions // PROBE_ROWS} random tokens, computed in float32)"
    )
    if rounded:
        print(f"the merged weights are rounded to {' and '.join(rounded)}, the adapter's own are not: most of the difference is this")
    elif not found.largest <= TOLERANCE * max(found.scale, 1.0):
        print(f"error: {out} is written, and is not the same model: rounding would be below {TOLERANCE * found.scale:.2g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
