"""`python -m tools.bench peers`: our run and other trainers' in turn, each by its own command in processes of its own."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from tools.bench.arguments import at_least
from tools.bench.machine import gpu_words, versions
from tools.bench.peers.inputs import SHAPES, Inputs, make
from tools.bench.peers.measure import Measured, RunFailed, Step, measure, recorded
from tools.bench.peers.venvs import NAMES, Environment, NotInstalled, default_folder, environment
from tools.bench.ranks import raise_on_signals
from tools.markdown import cell_of, put_section
from trainers import host
from trainers.processes import prepare_child
from trainers.rundir import paths
from trainers.rundir.ending import Exit
from trainers.rundir.rows import number, read_rows, steps
from trainers.units import in_bytes

ROOT = Path(__file__).parents[3]
OURS = "fulltune"
ROWS = {"packed": True, "padded": False}
LEARNING_RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
START_WITHIN, END_WITHIN = 1e-3, 1e-2
"""By how much, of ours, a peer's first loss and its last may differ."""
INSTALL_S = 3600.0


@dataclass
class Trainer:
    """A trainer, with its runs by what they are given."""

    name: str
    environment: Environment | None = None
    """None of ours."""
    runs: dict[tuple[str, int], list[Measured]] = field(default_factory=dict)
    """By rows and microbatch."""
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    """Why there are none."""

    def best(self, rows: str) -> tuple[int, list[Measured]] | None:
        """Return the microbatch with the shortest steps, and its runs."""
        found = [(micro, runs) for (what, micro), runs in self.runs.items() if what == rows and runs]
        return min(found, key=lambda each: statistics.median(run.step_seconds for run in each[1]), default=None)

    def reason(self, rows: str) -> str:
        """Say why there are no numbers."""
        return next((why for (what, _), why in self.failed.items() if what == rows), "not run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench peers`."""
    from trainers.config.choices import Precision

    parser.add_argument("--peer", nargs="+", choices=NAMES, default=list(NAMES), help="trainers to compare with (default all of these)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="packed, padded, or both (default)")
    parser.add_argument("--runs", type=at_least(1), default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--steps", type=at_least(2), default=4, help="optimizer steps a run; the first is not timed (default 4)")
    parser.add_argument("--model", choices=SHAPES, help="size of the Llama (default 9m, on a GPU 1b)")
    parser.add_argument("--seq-len", type=at_least(64), default=512, help="longest row in tokens (default 512)")
    parser.add_argument("--step-rows", type=at_least(1), default=16, help="packed rows a step (default 16)")
    parser.add_argument(
        "--microbatch", type=at_least(1), nargs="+", default=[1, 4], help="rows a forward; each takes its best (default 1 4)"
    )
    parser.add_argument(
        "--precision", choices=[Precision.fp32, Precision.bf16], help="compute type; weights are float32 (default fp32, on a GPU bf16)"
    )
    parser.add_argument("--venvs", type=Path, help="where the peers' environments are kept (default FULLTUNE_CACHE/peers)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that a run may take (default 1800)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, our speed and memory next to the peers'; 1 where ours fails, 130 on Ctrl-C."""
    if options.out is not None and not options.out.resolve().parent.is_dir():
        options.error(f"--out {options.out}: there is no such directory")
    raise_on_signals()
    console = Console(stderr=True)
    trainers = {OURS: Trainer(OURS)} | {peer: Trainer(NAMES[peer]) for peer in dict.fromkeys(options.peer)}
    with tempfile.TemporaryDirectory(prefix="fulltune-peers-") as folder, console.status("") as status:
        inputs, code = None, 0
        try:
            on_gpu = _device()
            options.model = options.model or ("1b" if on_gpu else "9m")
            options.precision = options.precision or ("bf16" if on_gpu else "fp32")
            _install(trainers, options, status)
            status.update("making a model and rows")
            inputs = _inputs(Path(folder), options)
            _measure_all(trainers, inputs, Path(folder), options, status)
        except KeyboardInterrupt:
            console.print("stopped: the table has what was measured")
            code = int(Exit.interrupted)
    if inputs is None:
        return code
    text = section(options, inputs, trainers, on_gpu)
    print(text, end="")
    if options.out is not None and not code:
        put_section(options.out, text)
    return code or (Exit.failed if any(trainers[OURS].best(rows) is None for rows in options.rows) else Exit.done)


def _device() -> str:
    """Return the GPU's name, empty where there is none; asked by another process, which holds no memory of it afterwards."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def _install(trainers: dict[str, Trainer], options: argparse.Namespace, status: Status) -> None:
    """Give each peer its environment, or the reason why there is none."""
    for peer, trainer in trainers.items():
        if peer == OURS:
            continue
        try:
            trainer.environment = environment(peer, options.venvs or default_folder(), INSTALL_S, status.update)
        except NotInstalled as error:
            trainer.failed |= {(rows, micro): str(error) for rows in options.rows for micro in options.microbatch}
            status.console.print(f"{trainer.name}: {error}", highlight=False)


def _inputs(folder: Path, options: argparse.Namespace) -> Inputs:
    """Make model and rows in a process of its own: this one stays small next to what is measured."""
    line = [sys.executable, "-m", "tools.bench", "peer-inputs", str(folder / "inputs"), options.model]
    multiple = math.lcm(*options.microbatch)
    line += [str(options.seq_len), str(-(-options.step_rows // multiple) * multiple), str(multiple)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=prepare_child())
    if done.returncode:
        raise RuntimeError(f"the model and rows could not be made: {done.stderr[-2000:]}")
    return Inputs.read(folder / "inputs")


def make_inputs(options: argparse.Namespace) -> None:
    """Make model and rows."""
    make(Path(options.folder), options.shape, options.seq_len, options.rows, options.multiple)


def _measure_all(trainers: dict[str, Trainer], inputs: Inputs, folder: Path, options: argparse.Namespace, status: Status) -> None:
    """Run all in turn: a machine that slows down does so for all. After the first round each keeps to its best microbatch."""
    for round_ in range(options.runs):
        for rows in options.rows:
            for peer, trainer in trainers.items():
                best = trainer.best(rows)
                for micro in options.microbatch if not round_ else [best[0]] if best else []:
                    if (rows, micro) in trainer.failed:
                        continue
                    what = f"run {round_ + 1} of {options.runs}, {rows} rows, microbatch {micro}: {trainer.name}"
                    try:
                        found = _measure(peer, trainer, rows, micro, inputs, folder, options, partial(_show, status, what, options.steps))
                    except RunFailed as error:
                        trainer.failed[rows, micro] = str(error)
                        status.console.print(f"{what}: {error}", highlight=False)
                        continue
                    trainer.runs.setdefault((rows, micro), []).append(found)
                    speed = inputs.tokens / found.step_seconds
                    said = f"{speed:,.0f} tokens/s, {in_bytes(found.peak_bytes)}, first step after {found.first_step_s:.1f} s"
                    status.console.print(f"{what}: {said}, losses {found.losses[0]:.5f} to {found.losses[-1]:.5f}", highlight=False)


def _show(status: Status, what: str, num_steps: int, done: int) -> None:
    status.update(f"{what}, step {done} of {num_steps}")


def _measure(
    peer: str,
    trainer: Trainer,
    rows: str,
    microbatch: int,
    inputs: Inputs,
    folder: Path,
    options: argparse.Namespace,
    show: Callable[[int], None],
) -> Measured:
    """Run a trainer once, with nothing kept from an earlier run."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        run_dir, work = Path(own) / "run", Path(own)
        if trainer.environment is None:
            line = our_command(folder / "inputs", run_dir, inputs, rows, microbatch, options)
            return measure(line, ROOT, env_of(work), options.steps, options.limit, OurSteps(run_dir), show, log=work / "log")
        order = {
            "model": str(folder / "inputs" / "model"),
            "rows": str(folder / "inputs" / "rows.jsonl"),
            "folder": own,
            "events": str(work / "steps.jsonl"),
            "documents": inputs.documents,
            "packed_rows": inputs.packed_rows,
            "steps": options.steps,
            "seq_len": options.seq_len,
            "packing": ROWS[rows],
            "microbatch": microbatch,
            "lr": LEARNING_RATE,
            "betas": BETAS,
            "clip": CLIP,
            "precision": str(options.precision),
        }
        (work / "order.json").write_text(json.dumps(order))
        boot = Path(__file__).parent / "drivers" / "boot.py"
        line = [str(trainer.environment.python), str(boot), str(ROOT), peer.replace("-", ""), str(work / "order.json")]
        return measure(line, work, env_of(work), options.steps, options.limit, partial(recorded, work / "steps.jsonl"), show)


def env_of(work: Path) -> dict[str, str]:
    """Return the environment of a run: no network, and no caches of an earlier one."""
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled", "DO_NOT_TRACK": "1"}
    own |= {"HF_HOME": str(work / "hub"), "FULLTUNE_CACHE": str(work / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    dropped = {"PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | own


def our_command(inputs: Path, run_dir: Path, made: Inputs, rows: str, microbatch: int, options: argparse.Namespace) -> list[str]:
    """Return the command that a user types: one rank, full parameters, and a step that is a pass over all rows."""
    given = [
        *("model=hf", f"model.id={inputs / 'model'}", "data=files", f"data.path={inputs / 'rows.jsonl'}", "objective=sft", "peft=none"),
        *(f"data.seq_len={options.seq_len}", f"data.packing={str(ROWS[rows]).lower()}", "engine=fsdp", "launch.processes=1"),
        *(f"train.steps={options.steps}", f"train.global_batch={made.packed_rows if ROWS[rows] else made.documents}"),
        *(f"train.microbatch={microbatch}", f"train.precision={options.precision}", f"optim.lr={LEARNING_RATE}"),
        *("optim.schedule=constant", f"optim.betas={list(BETAS)}".replace(" ", ""), "optim.weight_decay=0", f"optim.clip={CLIP}"),
        *("train.sample_tokens=0", "log.wandb=disabled", f"run_dir={run_dir}"),
    ]
    return [sys.executable, "-m", "launcher", *given]


class OurSteps:
    """The steps of metrics.jsonl, each at the time at which it was first seen there."""

    def __init__(self, run_dir: Path) -> None:
        """Begin with none."""
        self.run_dir, self.seen = run_dir, list[Step]()

    def __call__(self) -> list[Step]:
        """Return those that are there by now."""
        found = steps(read_rows(self.run_dir)) if (self.run_dir / paths.METRICS).exists() else []
        at = (self.run_dir / paths.METRICS).stat().st_mtime if found else 0.0
        for row in found[len(self.seen) :]:
            self.seen.append(Step(loss=number(row["loss"]), at=at, device_bytes=row["device_bytes_peak"]))
        return self.seen


def section(options: argparse.Namespace, inputs: Inputs, trainers: dict[str, Trainer], on_gpu: str) -> str:
    """Return the Markdown of a comparison: command, machine, versions and table."""
    machine = gpu_words(on_gpu) if on_gpu else f"{host.cores()} cores, {in_bytes(host.memory_limit().bytes)} of memory, no GPU"
    about = (
        f"{time.strftime('%Y-%m-%d')}, {machine}; ours with {versions('torch', 'transformers')}. A Llama of {inputs.parameters:,} "
        f"parameters, {options.precision}, {options.seq_len} tokens a row. Each step is a pass over the same {inputs.documents} documents: "
        f"{inputs.tokens:,} tokens, of which {inputs.labels:,} are trained. {options.steps} steps a run, "
        f"median of {options.runs} runs each, in turn."
    )
    peers = {peer: trainer for peer, trainer in trainers.items() if peer != OURS}
    parts = [about, table(options.rows, inputs.tokens, trainers[OURS], peers.values()), _versions(peers.values())]
    return "\n\n".join([f"## `{command_words(options.line)}`", *(part for part in parts if part)]) + "\n"


def command_words(line: str) -> str:
    """Return the command without folders of this machine."""
    words = line.split()
    kept = [word for place, word in enumerate(words) if "--venvs" not in (word, words[place - 1])]
    return " ".join(Path(word).name if "/" in word else word for word in kept)


def table(all_rows: Iterable[str], tokens: int, ours: Trainer, peers: Iterable[Trainer]) -> str:
    """Return the table: a line for each peer and kind of rows, ratios being ours over the peer's.

    No ratio is given where the first losses differ: the two would not train the same.
    """
    ratio = "ours : peer"
    heads = ["peer", "rows", "microbatch", "tokens/s", ratio, "CPU s a step", ratio, "peak memory", ratio, "to the first step", ratio]
    lines = [[*heads, "first and last loss"], ["---"] * (len(heads) + 1)]
    for rows in all_rows:
        best = ours.best(rows)
        lines.append([OURS, rows, *([cell_of(ours.reason(rows))] if best is None else _own(tokens, *best)), ""][: len(lines[0])])
        lines += [_against(rows, tokens, best, peer) for peer in peers]
    return "\n".join(f"| {' | '.join([*line, *[''] * (len(lines[0]) - len(line))])} |" for line in lines)


def _own(tokens: int, microbatch: int, runs: list[Measured]) -> list[str]:
    speed, cpu, peak, first = _medians(tokens, runs)
    return [str(microbatch), f"{speed:,.0f}", "", f"{cpu:.1f}", "", in_bytes(peak), "", f"{first:.1f} s", "", _losses(runs)]


def _against(rows: str, tokens: int, ours: tuple[int, list[Measured]] | None, peer: Trainer) -> list[str]:
    """Return a peer's line."""
    theirs = peer.best(rows)
    if theirs is None:
        return [peer.name, rows, cell_of(peer.reason(rows))]
    cells = _own(tokens, *theirs)
    if ours is None:
        return [peer.name, rows, *cells]
    differs = difference(ours[1], theirs[1])
    ratios = ["-"] * 4
    if not differs:
        speed, cpu, peak, first = (a / b for a, b in zip(_medians(tokens, ours[1]), _medians(tokens, theirs[1]), strict=True))
        ratios = [f"**{speed:.2f}**", f"{cpu:.2f}", f"**{peak:.2f}**", f"{first:.2f}"]
    for place, found in zip((2, 4, 6, 8), ratios, strict=True):
        cells[place] = found
    cells[-1] += f": {differs}" if differs else ""
    return [peer.name, rows, *cells]


def difference(ours: list[Measured], theirs: list[Measured]) -> str:
    """Say what of two trainers' losses differs; empty where they train the same."""
    for words, place, within in (("first", 0, START_WITHIN), ("last", -1, END_WITHIN)):
        mine, other = ours[0].losses[place], theirs[0].losses[place]
        if not math.isfinite(other) or abs(mine - other) > within * abs(mine):
            return f"the {words} is not ours, so no ratio is given"
    return ""


def _medians(tokens: int, runs: list[Measured]) -> tuple[float, float, float, float]:
    """Return tokens a second, CPU seconds a step, bytes, and seconds to the first step."""
    found: list[Any] = [[getattr(run, name) for run in runs] for name in ("step_seconds", "cpu_seconds", "peak_bytes", "first_step_s")]
    seconds, cpu, peak, first = map(statistics.median, found)
    return tokens / seconds, cpu, peak, first


def _losses(runs: list[Measured]) -> str:
    return f"{runs[0].losses[0]:.4f}, {runs[0].losses[-1]:.4f}"


def _versions(peers: Iterable[Trainer]) -> str:
    """Say which versions the peers' environments have."""
    said = []
    for peer in peers:
        if peer.environment is not None:
            found = peer.environment.versions()
            said.append(f"{peer.name}: {', '.join(f'{name} {version}' for name, version in found.items())}")
    return ". ".join(said) + "." if said else ""
