"""Trials: a small run each, with one fault that a seed draws, continued by the same command to its end and compared with a run without."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.chaos.attempts import Run, Wrong, digest, send
from tools.chaos.faults import FILLER, KINDS, Fault, Kind, disk, server
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.beats import Phase, read_beats
from trainers.rundir.checkpoints import number_of
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import try_json
from trainers.rundir.rows import last_step, read_rows

ENGINES = ("fsdp", "zero3", "fsdp_offload", "zero3_offload")
METHODS = ("none", "lora")
PHASES = {
    "preparing": (Phase.starting, Phase.preparing),
    "loading": (Phase.connecting, Phase.checking, Phase.loading),
    "training": (Phase.step,),
    "evaluating": (Phase.evaluating,),
    "saving": (Phase.saving,),
    "exporting": (Phase.exporting,),
}
STEPS = 12
TRIALS = "trials.jsonl"
"""What came of each trial, in the folder of all."""
ATTEMPT_S = 240.0
AGAIN = 4
"""Times that the command is given again at most."""
WANDB = {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_SILENT": "true"}


@dataclass
class Verdict:
    """What came of a trial; empty words where all was right."""

    fault: Fault
    setting: str
    hit: bool = True
    """The fault was done in the phase that was drawn, and not after the run had ended."""
    inexact: str = ""
    lost: str = ""
    wrong: str = ""
    """An exit code or a reason that does not fit, a process that is left, or no end."""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Tell whether all was right."""
        return not (self.inexact or self.lost or self.wrong)


@dataclass
class Place:
    """A folder for trials: the base and rows that all train on, and an undisturbed run of each setting."""

    folder: Path
    whole: dict[str, Run] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write rows, and train a small base on this Python's documentation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"What is {n} and {n + 1}?", "completion": f"It is {2 * n + 1}: {n} comes before {n + 1}."} for n in range(300)]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tiny = ["model.train_tokenizer=512", "model.architecture.hidden_size=64", "model.architecture.num_hidden_layers=2"]
        few = ["data.seq_len=64", "train.steps=4", "optim.warmup_steps=0", "train.eval_every=null", "data.eval_fraction=0"]
        base = Run(
            run_dir=self.folder / "base", overrides=["+exp=quickstart_base", *tiny, *few, "launch.processes=1"], variables=self.cache()
        )
        base.finish()

    def known(self) -> dict[tuple[int, int, str], Verdict]:
        """Return the verdicts that an earlier command has left in this folder, by seed, number and fault."""
        found = {}
        for line in (self.folder / TRIALS).read_text().splitlines() if (self.folder / TRIALS).exists() else []:
            row = json.loads(line)
            verdict = Verdict(**row["verdict"] | {"fault": Fault(**row["verdict"]["fault"])})
            found[row["seed"], row["number"], str(verdict.fault)] = verdict
        return found

    def note(self, seed: int, number: int, verdict: Verdict) -> None:
        """Append a verdict at once: a command that is stopped loses no other, and the same one continues."""
        with (self.folder / TRIALS).open("a") as file:
            file.write(json.dumps({"seed": seed, "number": number, "verdict": asdict(verdict)}) + "\n")

    def cache(self, own: str = "") -> dict[str, str]:
        """Return the variable that says where data are prepared: once for all, or anew for one."""
        return {"FULLTUNE_CACHE": str(self.folder / f"cache{own}"), "OMP_NUM_THREADS": "1"}

    def overrides(self, engine: str, method: str) -> list[str]:
        """Return the settings of a run."""
        data = [f"data.path={self.folder / 'rows.jsonl'}", "data.seq_len=64", "data.eval_fraction=0.1", "objective=sft"]
        steps = [f"train.steps={STEPS}", "train.global_batch=4", "train.microbatch=1", "train.precision=fp32", "train.eval_every=4"]
        saves = ["checkpoint.every=2", "checkpoint.keep_last=3", "train.sample_tokens=0", "optim.lr=1e-2", "optim.warmup_steps=2"]
        limits = ["train.step_timeout_s=12", *(f"limits.{name}=30" for name in ("prepare_s", "load_s", "evaluate_s", "save_s", "export_s"))]
        machine = ["launch.processes=2", "launch.gpus_per_node=0", "launch.grace_s=20", "log.wandb=disabled"]
        model = ["model=hf", f"model.id={self.folder / 'base' / paths.EXPORT}", "data=files", f"engine={engine}", f"peft={method}"]
        return [*model, *data, *steps, *saves, *limits, *machine]

    def undisturbed(self, engine: str, method: str) -> Run:
        """Return a run of this setting that nobody harms, made once."""
        name = f"{engine}, peft={method}"
        if name not in self.whole:
            run = Run(run_dir=self.folder / f"whole-{engine}-{method}", overrides=self.overrides(engine, method), variables=self.cache())
            run.finish()
            self.whole[name] = run
        return self.whole[name]


def draw(number: int, seed: int, kinds: list[str], engines: list[str]) -> tuple[Fault, str, str]:
    """Return a trial's fault, engine and method: all kinds come equally often, the rest is drawn."""
    order = random.Random(f"{seed}/{number // len(kinds)}").sample(kinds, len(kinds))
    rng = random.Random(f"{seed}/trial/{number}")
    kind = KINDS[order[number % len(kinds)]]
    phase = rng.choice(list(PHASES))
    roles = kind.roles + (("worker",) if kind.roles[1:] and phase == "preparing" else ())
    delay = rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 1.0)))
    fault = Fault(order[number % len(kinds)], phase, rng.randint(1, STEPS), rng.choice(roles) if roles else "", delay)
    return fault, rng.choice(engines), rng.choice(METHODS)


def try_all(place: Place, numbers: list[int], seed: int, kinds: list[str], engines: list[str]) -> list[Verdict]:
    """Do these trials one after another, with a bar; what went wrong is said at once, and its folder stays."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console, verdicts = Console(stderr=True), []
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("a base to train", total=len(numbers))
        known = place.known()
        if not (place.folder / "base" / paths.EXPORT).is_dir():
            place.prepare()
        for number in numbers:
            fault, engine, method = draw(number, seed, kinds, engines)
            bar.update(task, description=f"{fault}, {engine}, peft={method}")
            verdict = known.get((seed, number, str(fault)))
            if verdict is None:
                verdict = try_one(place, number, random.Random(f"{seed}/harm/{number}"), fault, engine, method)
                place.note(seed, number, verdict)
            verdicts.append(verdict)
            if not verdict.is_good:
                what = verdict.inexact or verdict.lost or verdict.wrong
                console.print(f"{number}: {fault}, {verdict.setting}: {what}", markup=False, highlight=False)
            bar.advance(task)
    return verdicts


def try_one(place: Place, number: int, rng: random.Random, fault: Fault, engine: str, method: str) -> Verdict:
    """Start a run, do the fault, give the command again until it is done, and compare."""
    kind, began = KINDS[fault.kind], time.monotonic()
    whole = place.undisturbed(engine, method)
    folder = place.folder / f"{number:04d}"
    own = f"-{number:04d}" if fault.phase == "preparing" else ""
    run = Run(run_dir=folder / "run", overrides=whole.overrides, variables=place.cache(own))
    verdict = Verdict(fault, f"{engine}, peft={method}")
    with ExitStack() as stack:
        if kind.disk and not stack.enter_context(disk(run.run_dir)):
            verdict.hit = False
            return verdict
        folder.mkdir(parents=True, exist_ok=True)
        try:
            before = _harmed_attempt(run, kind, fault, rng, verdict)
            _continue(run, before, verdict)
        except (Wrong, subprocess.TimeoutExpired) as error:
            verdict.wrong = verdict.wrong or str(error)
        if not verdict.wrong:
            same = run.trace() == whole.trace()
            verdict.inexact = "" if same else f"its losses are not those of {whole.run_dir}: {run.run_dir}"
            if same and digest(run.run_dir / paths.EXPORT) != digest(whole.run_dir / paths.EXPORT):
                verdict.inexact = f"its export is not that of {whole.run_dir}: {run.run_dir}"
        if kind.disk and not verdict.is_good:
            shutil.copytree(run.run_dir, folder / "left")
    if verdict.is_good:
        shutil.rmtree(folder, ignore_errors=True)
        if own:
            shutil.rmtree(place.folder / f"cache{own}", ignore_errors=True)
    verdict.seconds = time.monotonic() - began
    return verdict


def _harmed_attempt(run: Run, kind: Kind, fault: Fault, rng: random.Random, verdict: Verdict) -> dict[Path, str]:
    """Start an attempt and do the fault in its phase; what comes of it goes into the verdict.

    Returns the checkpoints before files were harmed, with their hashes.
    """
    before: dict[Path, str] = {}
    with ExitStack() as stack:
        if kind.network:
            address = stack.enter_context(server(kind.network))
            run.overrides = [word if word != "log.wandb=disabled" else "log.wandb=online" for word in run.overrides]
            run.variables = run.variables | WANDB | {"WANDB_BASE_URL": address}
        process = run.start()
        try:
            verdict.hit = _reached(run, process, fault)
            time.sleep(fault.delay_s)
            if kind.kills:
                for pid in run.processes():
                    send(pid, 9)
                process.wait(ATTEMPT_S)
                run.wait_gone()
                before = run.complete()
            pids = [pid for pid, role in run.processes().items() if role == fault.role]
            if fault.role and not pids:
                verdict.hit = False
            if verdict.hit:
                kind.harm(run, fault, rng, pids[0] if pids else None)
            try:
                code = process.wait(ATTEMPT_S)
            except subprocess.TimeoutExpired:
                raise Wrong(f"no end in {ATTEMPT_S:.0f} s: {run.log}") from None
            run.wait_gone()
        finally:
            run.kill_all(process)
    (run.run_dir / FILLER).unlink(missing_ok=True)
    verdict.wrong = _judge(run, kind, fault, code)
    return before


def _reached(run: Run, process: subprocess.Popen[bytes], fault: Fault) -> bool:
    """Wait until a rank is in the fault's phase; False where the attempt ended before."""
    until = time.monotonic() + ATTEMPT_S
    while process.poll() is None and time.monotonic() < until:
        beats = read_beats(run.run_dir).values()
        if fault.phase == "training" and last_step(read_rows(run.run_dir, 4096)) >= fault.step:
            return True
        least = 0 if fault.phase not in ("evaluating", "saving") else min(fault.step, STEPS - 2)
        if fault.phase != "training" and any(beat.phase in PHASES[fault.phase] and (beat.step or 0) >= least for beat in beats):
            return True
        time.sleep(0.002)
    return False


def _judge(run: Run, kind: Kind, fault: Fault, code: int) -> str:
    """Say what is wrong with how an attempt ended; empty where nothing is."""
    if code not in kind.codes:
        return f"exit code {code}: {run.log}"
    error = try_json(run.run_dir / paths.STATUS).get("error", {})
    reason = f"{error.get('message', '')}\n{run.log.read_text(errors='replace')}"
    if code == 1 and kind.words and not re.search(kind.words, reason):
        return f"the reason given is `{error.get('message')}`: {run.log}"
    if code == 1 and fault.kind in ("kill", "stop") and fault.role.startswith("rank") and f"rank {error.get('rank')}" != fault.role:
        return f"rank {error.get('rank')} is blamed: {run.log}"
    return ""


def _continue(run: Run, before: dict[Path, str], verdict: Verdict) -> None:
    """Give the command until the run is done; the first time it continues from the newest checkpoint that is complete."""
    whole = [path for path, content in run.complete().items() if before.get(path, content) == content]
    expected = max(map(number_of, whole), default=0)
    if before and not whole:
        _require_refusal(run)
        for path in before:
            shutil.rmtree(path)
    was_done = read_state(run.run_dir) == State.done
    for again in range(AGAIN):
        code = run.attempt(ATTEMPT_S)
        if again == 0 and not was_done and (begun := run.begun_from()) != expected:
            verdict.lost = f"continued from step {begun}, and step {expected} was there: {run.log}"
        if code == 0:
            return
    raise Wrong(f"not done after giving the command {AGAIN} times more (exit code {code}): {run.log}")


def _require_refusal(run: Run) -> None:
    """Give the command where every checkpoint is harmed; raises Wrong where the run begins anew without having been told to."""
    code = run.attempt(ATTEMPT_S)
    if code != Exit.failed or "move them away" not in run.log.read_text(errors="replace"):
        raise Wrong(f"no checkpoint could be read, and the run ended with {code}: {run.log}")


def report(verdicts: list[Verdict]) -> int:
    """Print what came of each kind, and where it was tried; returns the exit code."""
    table = Table()
    for name in ("fault", "tried", "exact", "inexact", "lost", "wrong", "phases"):
        table.add_column(name, justify="left" if name in ("fault", "phases") else "right")
    kinds = sorted({verdict.fault.kind for verdict in verdicts})
    for kind in kinds:
        of_kind = [verdict for verdict in verdicts if verdict.fault.kind == kind and verdict.hit]
        phases = ", ".join(
            f"{name} {sum(v.fault.phase == name for v in of_kind)}" for name in PHASES if any(v.fault.phase == name for v in of_kind)
        )
        table.add_row(kind, *_counts(of_kind), phases)
    hit = [verdict for verdict in verdicts if verdict.hit]
    table.add_row("all", *_counts(hit), "", style="bold")
    Console(width=150).print(table)
    if missed := len(verdicts) - len(hit):
        print(f"{missed} came too late, when the attempt or the process had ended, or need a disk that this user may not mount")
    return 0 if all(verdict.is_good for verdict in verdicts) else 1


def _counts(verdicts: list[Verdict]) -> list[str]:
    figures = [len(verdicts), sum(v.is_good for v in verdicts), sum(bool(v.inexact) for v in verdicts)]
    return [str(number) for number in [*figures, sum(bool(v.lost) for v in verdicts), sum(bool(v.wrong) for v in verdicts)]]
