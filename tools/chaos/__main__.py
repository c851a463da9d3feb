"""Do to runs what goes wrong on clusters, and check that the same command continues each exactly.

python -m tools.chaos --faults 40
python -m tools.chaos --faults 300 --seed 7 --engines fsdp,zero3 --dir /tmp/chaos
python -m tools.chaos --trial 17 --seed 7
python -m tools.chaos save --kills 30

`faults`: small runs, each with one fault: a process killed, stopped or terminated, memory or files that run out, a full disk, a byte
flipped, a file cut or gone, a clock a day off, two launchers at once, a W&B server that refuses, is silent or resets. A seed draws the
fault, its process, the phase (preparing to exporting), the engine, and full fine-tuning or LoRA. The command that a user types starts
the run, and continues it until it is done. Losses, gradient norms, rows and export must be those of a run without a fault, to the bit.

`save`: one run, whose ranks are killed (kill -9) at random bytes of a save; then a byte of the newest checkpoint is flipped, a folder
step-999999 is planted, the disk is too small, and the folder is read-only. After each the same command is given again.

Exit codes: 0 every run continued exactly and no checkpoint was lost, 1 not so, 2 bad arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tools.chaos.attempts import Wrong
from tools.chaos.faults import KINDS
from tools.chaos.saves import harm
from tools.chaos.trials import ENGINES, TRIALS, Place, report, try_all
from tools.command import ended, parser_of
from trainers.rundir.ending import Exit


def main(arguments: list[str] | None = None) -> int:
    """Harm runs; returns the exit code."""
    parser = parser_of("chaos", __doc__)
    parser.add_argument("what", nargs="?", choices=["faults", "save"], default="faults", help="what is done (default faults)")
    parser.add_argument("--faults", type=_count, default=40, metavar="N", help="runs, each with a fault (default 40)")
    parser.add_argument("--trial", type=int, metavar="K", help="this one of them alone, counted from 0")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of fault, with commas between them (default all)")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"engine presets (default {','.join(ENGINES)})")
    parser.add_argument("--kills", type=_count, default=30, metavar="N", help="save: kills at random bytes (default 30)")
    parser.add_argument("--engine", default="fsdp", help="save: engine preset (default fsdp)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument(
        "--dir", type=Path, help="where runs and results are kept, and the same command continues (default: deleted if all is well)"
    )
    options = parser.parse_args(arguments)
    kinds, engines = options.kinds.split(","), options.engines.split(",")
    if unknown := [*({*kinds} - {*KINDS}), *({*engines} - {*ENGINES})]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join([*KINDS, *ENGINES])}")

    def work() -> int:
        folder = _workplace(options.dir)
        if options.what == "save":
            code = harm(folder, options.kills, options.engine, options.seed)
        else:
            numbers = list(range(options.faults)) if options.trial is None else [options.trial]
            code = report(try_all(Place(folder), numbers, options.seed, kinds, engines))
        if code == Exit.done and options.dir is None:
            shutil.rmtree(folder)
        elif code != Exit.done:
            print(f"what went wrong is in {folder}")
        return code

    return ended(work, failures=(Wrong,))


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def _workplace(folder: Path | None) -> Path:
    """Return an empty folder for runs."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="fulltune-chaos-"))
    if folder.exists() and any(folder.iterdir()) and not (folder / TRIALS).is_file():
        raise Wrong(f"--dir {folder} exists and is not empty: name another directory")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


if __name__ == "__main__":
    sys.exit(main())
