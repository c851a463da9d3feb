"""Make rows ready for training: faults, duplicates, personal data and more, a step at a time, as a config says.

python -m tools.curate conf/curate/default.yaml chats.jsonl --out curated
python -m tools.curate conf/curate/default.yaml chats.jsonl more/ --out curated --processes 8
python -m tools.curate conf/curate/default.yaml shards/ --out curated --slurm 32 --sbatch partition=cpu --sbatch mem=8G

Rows of any layout come out in the same layout, as JSON lines in DIR/rows, or in DIR/train and other sets where the config splits.
A row that no step changes keeps every byte. What is removed is in removed.jsonl, what is changed in changed.jsonl, each row with the
reason. Both hold the originals, personal data included. The report is in report.txt, report.json and report.html.

The same command continues a curation that was stopped. The result does not depend on the number of processes or tasks.

Exit codes: 0 done, 1 failed, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from tools.command import ended, parser_of
from tools.curate import pipeline, say
from tools.curate.checks import check
from tools.curate.choose import SETS
from tools.curate.config import read_settings
from tools.curate.job import Job
from tools.curate.page import page
from tools.curate.quality import require_scorer
from tools.curate.stages import RECORD, STAGING, Pool
from trainers.config.derived import Source
from trainers.config.errors import ConfigError, plural
from trainers.data.sources import files
from trainers.host import cores
from trainers.rundir.files import read_json, write_json

WORK = ".curate"
"""Folder in --out of a curation that is not done."""
PRIVATE = ("removed.jsonl", "changed.jsonl")
"""They hold what was taken out of the rows, and only their owner may read them."""


def main(arguments: list[str] | None = None) -> int:
    """Curate rows; returns the exit code."""
    parser = parser_of("curate", __doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="which steps run and how, such as conf/curate/default.yaml")
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or directories of rows")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes; a new or an empty directory")
    parser.add_argument("--processes", type=int, default=cores(), metavar="N", help="at once (default the cores); changes no result")
    parser.add_argument("--slurm", type=int, metavar="TASKS", help="instead, by tasks of SLURM arrays, at most so many; waits for them")
    parser.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="an option of sbatch, such as time=2:00:00")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    options = parser.parse_args(arguments)
    return ended(lambda: curate(options), lambda: "stopped: the same command continues", (OSError, MemoryError))


def curate(options: argparse.Namespace) -> int:
    """Do a curation, or what is missing of it, and print its report; raises ConfigError."""
    out: Path = options.out
    if options.processes < 1:
        raise ConfigError("--processes", options.processes, "is less than 1", "--processes 1")
    if options.slurm is not None and options.slurm < 1:
        raise ConfigError("--slurm", options.slurm, "is less than 1", "--slurm 8")
    settings = read_settings(options.config)
    check(settings)
    found = tuple(str(file) for name in options.inputs for file in _files(name))
    job = Job(settings, found, _names(found))
    require_free(out, job)
    key = job.key()
    report = read_json(out / "report.json")
    if report and report.get("key") != key:
        raise ConfigError("--out", str(out), "holds the result of other settings or inputs", "another directory, or remove this one")
    if report:
        print(f"{say.text(report)}\nnothing to do: {out} holds this result already")
        return 0
    if settings.quality:
        require_scorer(settings.quality)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / WORK / "lock", timeout=0):
            report = work(job, key, out, options)
    except Timeout:
        raise ConfigError("--out", str(out), "another process curates into it", "wait for it, or take another directory") from None
    shutil.rmtree(out / WORK)
    print(f"{say.text(report)}\n{plural(report['rows']['after'], 'row')} in {out}; the report: {out / 'report.html'}")
    return 0


def _files(name: str) -> list[Path]:
    path = Path(name)
    if not path.exists():
        raise ConfigError("IN", name, "no such file or directory")
    return [Path(file) for file in map(str, files(Source(name, "train"))) if not path.is_dir() or Path(file).is_file()]


def _names(found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the name of each input in the result: its own without its types, with its folder or a number where two are alike."""
    if twice := [name for name in found if found.count(name) > 1]:
        raise ConfigError("IN", twice[0], "is named twice", "once")
    stems = [Path(name).name.split(".")[0] for name in found]
    longer = [
        f"{Path(name).resolve().parent.name}-{stem}" if stems.count(stem) > 1 else stem for name, stem in zip(found, stems, strict=True)
    ]
    return tuple(f"{number}-{name}" if longer.count(name) > 1 else name for number, name in enumerate(longer, 1))


def require_free(out: Path, job: Job) -> None:
    """Raise ConfigError for a directory that holds something else than a curation, or an input of it."""
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", str(out), "is a file", "a new directory")
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir() and not (out / "report.json").is_file():
        raise ConfigError("--out", str(out), "is not empty", "a new directory")
    if inside := [name for name in job.files if out.resolve() in Path(name).resolve().parents]:
        raise ConfigError("--out", str(out), f"holds the input {inside[0]}", "a new directory")


def work(job: Job, key: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Do the stages and write the result; returns the report."""
    folder = out / WORK / key
    for other in (out / WORK).iterdir():
        if (other / RECORD).is_file():
            from tools.curate.cluster import cancel

            cancel(other / RECORD)  # an array of a command that was killed would go on writing there
        if other.is_dir() and other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    with _pool(options, folder) as pool:
        about = pipeline.run(job, folder, pool, Progress(options.quiet))
    write_result(job, folder, out)
    report = {"key": key, "files": list(job.files), "names": list(job.names), "config": options.config.read_text("utf-8")} | about
    write_bytes(out / "report.txt", [say.text(report).encode() + b"\n"])
    write_bytes(out / "report.html", [page(report).encode()])
    write_json(out / "report.json", report)
    return report


def _pool(options: argparse.Namespace, folder: Path) -> contextlib.AbstractContextManager[pipeline.Parts]:
    """Return what does the parts; raises ConfigError where SLURM is asked for and is not here."""
    if options.slurm is None:
        if options.sbatch:
            raise ConfigError("--sbatch", options.sbatch[0], "goes with --slurm", "--slurm 8")
        return Pool(options.processes)
    from tools.curate.cluster import Cluster  # submitit is for those who ask for it

    return Cluster(options.slurm, folder.resolve() / "slurm", options.sbatch)


def write_result(job: Job, folder: Path, out: Path) -> None:
    """Write the rows that stay, and what was removed, changed and listed."""
    names = SETS if job.settings.split else ("rows",)
    with contextlib.ExitStack() as files:
        streams = {}
        for name in names:
            (out / name).mkdir(exist_ok=True)
            for number, source in enumerate(job.names):
                streams[name, number] = files.enter_context(written(out / name / f"{source}.jsonl"))
        for name, item in pipeline.kept(folder):
            streams[name, item.file].write(item.raw + b"\n")
    if job.settings.quality:
        write_bytes(out / "scores.jsonl", pipeline.scores(job, folder))
    for name in PRIVATE:
        write_bytes(out / name, pipeline.aside(folder, Path(name).stem))
    write_bytes(out / "contradictions.jsonl", [(folder / "twins" / "all" / "contradictions.jsonl").read_bytes()])


def write_bytes(file: Path, parts: Iterable[bytes]) -> None:
    """Write a file that is never seen half-written."""
    with written(file) as stream:
        stream.writelines(parts)


@contextlib.contextmanager
def written(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to write it under another name, which becomes its own at the end."""
    staging = file.with_name(f".{file.name}.tmp")
    with open(staging, "wb", opener=lambda path, flags: os.open(path, flags, 0o600 if file.name in PRIVATE else 0o666)) as stream:
        yield stream
    staging.rename(file)


class Progress:
    """A line a stage on stderr: what runs, and how much of it is done."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.began = quiet, time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print how far a stage is; on a terminal in the place of what was printed before."""
        if self.quiet or (not sys.stderr.isatty() and done < total):
            return
        end = "\n" if done == total else "\r"
        print(f"{stage:<8} {done:>6,}/{total:,} parts, {time.monotonic() - self.began:,.0f} s", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
