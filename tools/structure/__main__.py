"""Print what the code's structure costs: lengths, imports, and the lines and collectives of a run and of a step.

python -m tools.structure
python -m tools.structure --source
python -m tools.structure --longest 10
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tools.command import parser_of
from tools.structure import run, source


def main(arguments: list[str] | None = None) -> int:
    """Print the numbers of this checkout; returns the exit code."""
    parser = parser_of("structure", __doc__)
    parser.add_argument("--source", action="store_true", help="read the source alone and train nothing")
    parser.add_argument("--longest", type=int, default=0, metavar="N", help="list the longest functions")
    parser.add_argument("--files", action="store_true", help="list the files of a run with their lines")
    parser.add_argument("--code", type=Path, default=run.ROOT, help="the checkout to measure (default this one)")
    options = parser.parse_args(arguments)
    root = options.code.resolve()
    print_source(root, options.longest)
    if not options.source:
        print_runs(root, options.files)
    return 0


def print_source(root: Path, longest: int) -> None:
    """Print lengths, cycles and imports that go up."""
    lengths = dict(source.functions(root))
    print(f"files            {source.file_lengths(root)}")
    print(f"functions        {source.quantiles(list(lengths.values()))}")
    for name in sorted(lengths, key=lambda name: -lengths[name])[:longest]:
        print(f"  {lengths[name]:4} {name}")
    found = source.imports(root)
    for words, edges in (("at import", found.at_start), ("lazy included", found.all())):
        cycles = source.cycles(edges)
        print(f"import cycles    {len(cycles)} ({words})", *map(" <-> ".join, cycles), sep="\n  ")
    upward = source.upward(root, found.all())
    print(f"imports upwards  {len(upward)}", *upward, sep="\n  ")


def print_runs(root: Path, each_file: bool) -> None:
    """Print what a run on one rank executes, and the collectives of a step on two."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = (run.trace(Path(folder) / str(ranks), ranks, code=root) for ranks in (1, 2))
    print(f"a run            {one.run_files} files, {one.run_lines:,} lines ({two.run_files} and {two.run_lines:,} on two ranks)")
    for name, lines in one.by_file.items() if each_file else ():
        print(f"  {lines:4} {name}")
    print(f"a steady step    {one.step_files} files, {one.step_lines:,} lines ({two.step_files} and {two.step_lines:,} on two ranks)")
    for name, lines in one.step_by_file.items():
        print(f"  {lines:4} {name}")
    print(f"collectives      {len(two.collectives)} a step on two ranks, {two.small_collectives} of them small")
    for name in sorted(set(two.collectives)):
        print(f"  {two.collectives.count(name):4} {name}")


if __name__ == "__main__":
    sys.exit(main())
