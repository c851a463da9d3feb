"""What works on this machine, and what to do about the rest.

Prints a table: Python, torch and its devices, gloo between two processes, bf16, attention, DeepSpeed and its compiled ops,
cores and memory as cgroups and SLURM allow, disks, ulimits, SLURM, W&B and the Hugging Face hub. DeepSpeed's cpu_adam and
async_io are built ahead, so that no run waits for a compiler: minutes the first time, nothing afterwards.

Exit codes: 0 what every run needs works (torch, bf16, gloo, disks), 1 some of it fails, 2 bad arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import netrc
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.command import ended, parser_of
from trainers import host
from trainers.config.errors import ConfigError
from trainers.processes import die_with_parent
from trainers.rundir.ending import killed_by
from trainers.units import GIB, in_bytes

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "fail"
MARKS = {OK: "[green]✓[/]", NOTE: "[dim]·[/]", WARN: "[yellow]![/]", FAIL: "[bold red]✗[/]"}
OPS = ("cpu_adam", "async_io")
EXTRAS = {
    "torchao": "train.float8",
    "bitsandbytes": "optim=adamw_8bit, paged_adamw_8bit and paged_adamw_32bit",
}
"""What only some runs use, and for what: the extra `speed`."""
IMPORT_LIMIT_S, BUILD_LIMIT_S, HUB_LIMIT_S, GRACE_S = 120.0, 3600.0, 2.0, 10.0
DISK_BYTES, SHM_BYTES, MEMLOCK_BYTES, OPEN_FILES = 20 * GIB, GIB, GIB, 4096
"""Below these a warning: a checkpoint of 1B parameters is 12 GB; nccl and pinned buffers take shared and locked memory."""


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, its state, what was found, and the remedy where it is not fine."""

    name: str
    status: str
    found: str
    remedy: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print them; returns the exit code."""
    parser = parser_of("doctor", __doc__)
    parser.add_argument("--build", action=argparse.BooleanOptionalAction, default=True, help="build DeepSpeed's ops if they are not yet")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)} (default all)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results as JSON too, to a file or, with -, to stdout instead of the table"
    )
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: children are ended first
    if options.probe:
        return _answer(*options.probe)
    sections = options.only.split(",")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: there is {', '.join(SECTIONS)}")
    return ended(lambda: _report(examine(sections, options.build), options.json))


def examine(sections: list[str], build: bool) -> list[Check]:
    """Return the checks of these sections in order, under a spinner that says what is being tried."""
    checks: list[Check] = []
    with Console(stderr=True).status("looking") as spinner:
        for name in sections:
            for title, section in SECTIONS[name](build):
                spinner.update(title)
                checks += section()
    return checks


def _report(checks: list[Check], json_to: str | None) -> int:
    failed = [check for check in checks if check.status == FAIL]
    result = json.dumps({"works": not failed, "checks": [asdict(check) for check in checks]}, indent=1)
    if json_to == "-":
        print(result)
    else:
        Console().print(_table(checks))
        print(f"{len(failed)} of what every run needs fails" if failed else "what every run needs works")
    if json_to not in (None, "-"):
        try:
            Path(str(json_to)).write_text(result + "\n")
        except OSError as error:
            print(f"error: --json {json_to}: {error.strerror}", file=sys.stderr)
            return 2
    return 1 if failed else 0


def _table(checks: list[Check]) -> Table:
    table = Table("", "what", "found", show_lines=False, title="this machine", title_justify="left")
    for check in checks:
        remedy = f"\n[yellow]remedy:[/] {escape(check.remedy)}" if check.remedy else ""
        table.add_row(MARKS[check.status], check.name, escape(check.found) + remedy)
    return table


Titled = Iterator[tuple[str, Callable[[], list[Check]]]]


def _host_section(_build: bool) -> Titled:
    yield "cores, memory, disks", lambda: [_python(), _cores(), _memory(), *_disks(), _shared_memory(), *_ulimits(), _slurm()]


def _torch_section(_build: bool) -> Titled:
    yield "importing torch", lambda: _ask("torch", "torch", IMPORT_LIMIT_S, FAIL)


def _gloo_section(_build: bool) -> Titled:
    yield "two processes over gloo", _gloo


def _flash_section(_build: bool) -> Titled:
    yield "importing flash-attn", _flash


def _extras_section(_build: bool) -> Titled:
    yield "what else is installed", lambda: [_extra(name, use) for name, use in EXTRAS.items()]


def _deepspeed_section(build: bool) -> Titled:
    found: list[Check] = []

    def look() -> list[Check]:
        found.extend(_ask("deepspeed", "DeepSpeed", IMPORT_LIMIT_S, WARN))
        return found

    yield "importing DeepSpeed", look
    for op in OPS if found[0].status == OK else ():
        yield f"DeepSpeed's {op}" + (": a build takes minutes the first time" if build else ""), partial(_op, op, build)


def _op(op: str, build: bool) -> list[Check]:
    probe, limit_s = ("build", BUILD_LIMIT_S) if build else ("look", IMPORT_LIMIT_S)
    return _ask(f"{probe}:{op}", f"DeepSpeed's {op}", limit_s, WARN)


def _network_section(_build: bool) -> Titled:
    yield "W&B and the hub", lambda: [_wandb(), *_ask("hub", "Hugging Face hub", HUB_LIMIT_S + 3, NOTE)]


SECTIONS: dict[str, Callable[[bool], Titled]] = {
    "host": _host_section,
    "torch": _torch_section,
    "gloo": _gloo_section,
    "flash": _flash_section,
    "extras": _extras_section,
    "deepspeed": _deepspeed_section,
    "network": _network_section,
}


def _python() -> Check:
    found = f"{platform.python_version()}, {sys.executable}, {platform.system()} {platform.machine()}"
    return Check("Python", OK, found)


def _cores() -> Check:
    return Check("cores", OK, f"{host.cores()} of the machine's {os.cpu_count()}, as affinity and CPU quota allow")


def _memory() -> Check:
    limit = host.memory_limit()
    return Check("host memory", OK, f"{in_bytes(limit.bytes)} ({limit.source}), {in_bytes(host.memory_available())} of it free")


def _disks() -> list[Check]:
    from huggingface_hub import constants

    from trainers.cache import cache_root

    places = {"disk here": Path.cwd(), "disk of prepared data": cache_root(None), "disk of the hub's cache": Path(constants.HF_HUB_CACHE)}
    return [_disk(name, folder) for name, folder in places.items()]


def _disk(name: str, folder: Path) -> Check:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"probe")
            file.flush()
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(
            name, FAIL, f"{folder}: cannot be written ({error.strerror})", "free space, or FULLTUNE_CACHE / HF_HOME on another disk"
        )
    if free < DISK_BYTES:
        return Check(name, WARN, f"{folder}: {in_bytes(free)} free", "a checkpoint takes 12 bytes a trained parameter: free space")
    return Check(name, OK, f"{folder}: {in_bytes(free)} free")


def _shared_memory() -> Check:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Check("/dev/shm", WARN, "is not there", "nccl between a node's GPUs needs it: mount it")
    remedy = "" if size >= SHM_BYTES else "nccl between a node's GPUs needs more: docker run --ipc=host or --shm-size=16g"
    return Check("/dev/shm", WARN if remedy else OK, in_bytes(size), remedy)


def _ulimits() -> list[Check]:
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    unlimited = resource.RLIM_INFINITY
    few = files != unlimited and files < OPEN_FILES
    little = locked != unlimited and locked < MEMLOCK_BYTES
    return [
        Check("open files", WARN if few else OK, _limit_words(files), f"ulimit -n {OPEN_FILES * 16}" if few else ""),
        Check(
            "locked memory",
            NOTE if little else OK,
            "unlimited"
            if locked == unlimited
            else in_bytes(locked) + ("; enough unless DeepSpeed pins buffers for NVMe" if little else ""),
            "ulimit -l unlimited, or engine.pin_memory=false" if little else "",
        ),
    ]


def _limit_words(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _slurm() -> Check:
    there = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name)]
    inside = f"; inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return Check("SLURM", NOTE, (", ".join(there) or "not on this machine") + inside)


WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Under which `wandb login` stores keys, by its version."""


def _wandb() -> Check:
    if os.environ.get("WANDB_MODE", "online") != "online":
        return Check("W&B", NOTE, f"{os.environ['WANDB_MODE']}, by WANDB_MODE")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
        if "WANDB_API_KEY" in os.environ or netrc.netrc().hosts.keys() & {*WANDB_HOSTS, own}:
            return Check("W&B", OK, "there is a key")
    return Check("W&B", NOTE, "no key: runs are recorded offline", "wandb login, to see them there")


def _flash() -> list[Check]:
    if importlib.util.find_spec("flash_attn") is None:
        return [Check("flash-attn", OK, "not installed, and not needed: model.attention=varlen is torch's own kernel")]
    return _ask(
        "flash", "flash-attn", IMPORT_LIMIT_S, WARN, "model.attention=sdpa, and pip uninstall flash-attn or build it for this torch"
    )


def _extra(name: str, use: str) -> Check:
    try:
        return Check(name, OK, f"{importlib.metadata.version(name)}: {use}")
    except importlib.metadata.PackageNotFoundError:
        return Check(name, NOTE, f"not installed: no {use}", "pip install 'fulltune[speed]', if a run is to use it")


def _gloo() -> list[Check]:
    """Start two ranks that meet through a file and sum; what fails here is a host name that does not resolve, or a firewall."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        start = time.monotonic()
        ranks = []
        for rank in range(2):
            more = {"RANK": str(rank), "WORLD_SIZE": "2", "FULLTUNE_DOCTOR_STORE": f"{folder}/store"}
            ranks.append(stack.enter_context(_Child("gloo", Path(folder) / str(rank), more)))
        answers = [rank.wait(IMPORT_LIMIT_S) for rank in ranks]
        if all(isinstance(answer, list) for answer in answers):
            return [Check("gloo", OK, f"two processes summed correctly, in {time.monotonic() - start:.1f} s with torch's import")]
        words = next(str(answer) for answer in answers if not isinstance(answer, list))
    remedy = "let the host's name resolve (/etc/hosts), or GLOO_SOCKET_IFNAME=lo (a real interface between nodes)"
    return [Check("gloo", FAIL, words, remedy)]


def _ask(probe: str, name: str, limit_s: float, otherwise: str, remedy: str = "") -> list[Check]:
    """Run a probe in a process of its own; where it dies, hangs or raises, return one row of status `otherwise`."""
    with tempfile.TemporaryDirectory() as folder, _Child(probe, Path(folder) / "answer") as child:
        answer = child.wait(limit_s)
    if isinstance(answer, list):
        return [Check(**row) for row in answer]
    remedy = remedy or ("" if otherwise == NOTE else "make venv, or see what it says")
    return [Check(name, otherwise, answer, remedy)]


class _Child:
    """A probe in a session of its own; leaving the `with` ends it and all that it started."""

    def __init__(self, probe: str, answer: Path, environment: dict[str, str] | None = None) -> None:
        self.answer = answer
        self.words = answer.with_suffix(".log")
        with self.words.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.doctor", "--probe", probe, str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1", "FULLTUNE_DOCTOR": str(os.getpid())} | (environment or {}),
                start_new_session=True,
            )

    def __enter__(self) -> _Child:
        return self

    def wait(self, limit_s: float) -> list[dict[str, str]] | str:
        """Return the rows it found, or how it ended and its last words."""
        try:
            code = self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"no answer in {limit_s:.0f} s{self._last_words()}"
        if code == 0 and self.answer.exists():
            rows: list[dict[str, str]] = json.loads(self.answer.read_text())
            return rows
        how = killed_by(code) if code < 0 else "failed"
        return f"{how}{self._last_words()}"

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.words.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""

    def __exit__(self, *_: object) -> None:
        """Ask it to end its own children, which may have sessions of their own; then kill."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _answer(probe: str, path: str) -> int:
    """Be a probe: write the rows to `path`; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    die_with_parent(int(os.environ["FULLTUNE_DOCTOR"]), signal.SIGTERM)
    name, _, argument = probe.partition(":")
    try:
        rows = PROBES[name](argument)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    Path(path).write_text(json.dumps([asdict(row) for row in rows]))
    return 0


def _probe_torch(_: str) -> list[Check]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    return [Check("torch", OK, f"{torch.__version__}, built for {build}"), *_devices(), _bf16("cpu"), *_bf16_on_gpu()]


def _devices() -> list[Check]:
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            return [Check("GPU", NOTE, "none: runs use the CPU")]
        found = f"there is one (driver {driver}), but this torch cannot use it"
        return [Check("GPU", WARN, found, "a torch built for a CUDA that the driver supports: https://pytorch.org/get-started/locally")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {in_bytes(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}, driver {driver}"
        rows.append(Check(f"GPU {index}", OK, found))
    return [*rows, Check("NCCL", OK, ".".join(str(part) for part in torch.cuda.nccl.version()))]


def _driver() -> str | None:
    try:
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _bf16_on_gpu() -> list[Check]:
    import torch

    return [_bf16("cuda")] if torch.cuda.is_available() else []


def _bf16(device: str) -> Check:
    """Compare a product in bf16 with the same in float64: rounding of the result alone stays within 2^-8 of its size."""
    import torch

    torch.manual_seed(0)
    left, right = (torch.randn(256, 256, device=device).bfloat16() for _ in range(2))
    exact = left.double() @ right.double()
    error = float(((left @ right).double() - exact).abs().max() / exact.abs().max())
    if error < 2**-7:
        return Check(f"bf16 on {device}", OK, f"a product differs from float64 by {error:.4f} of its size")
    return Check(f"bf16 on {device}", FAIL, f"a product differs from float64 by {error:.4f} of its size", "train.precision=fp16, or fp32")


def _probe_gloo(_: str) -> list[Check]:
    import datetime

    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    store = dist.FileStore(os.environ["FULLTUNE_DOCTOR_STORE"], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    dist.destroy_process_group()
    if float(value) != 3.0:
        raise ArithmeticError(f"1 + 2 over two processes gave {float(value)}")
    return []


def _probe_flash(_: str) -> list[Check]:
    import flash_attn  # type: ignore[import-not-found]
    from flash_attn import flash_attn_varlen_func  # noqa: F401  # what a run calls

    return [Check("flash-attn", OK, f"{flash_attn.__version__} imports")]


def _probe_deepspeed(_: str) -> list[Check]:
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return [Check("DeepSpeed", WARN, "not installed: engine=fsdp works without", "make venv")]
    from trainers.engines import ops

    return [Check("DeepSpeed", OK, f"{ops.import_deepspeed().__version__} imports")]


def _probe_look(op: str) -> list[Check]:
    """Tell whether an op is there, or what a build would lack; builds nothing."""
    from trainers.engines import ops

    title = f"DeepSpeed's {op}"
    if ops.is_built(op):
        return [Check(title, OK, "built")]
    missing = ops.missing_for(op)
    if missing is not None:
        return [Check(title, WARN, missing.reason, f"{missing.remedy}; {USED_BY[op]} needs it")]
    return [Check(title, NOTE, "not built yet", "python -m tools.doctor builds it, or the first run that needs it does")]


def _probe_build(op: str) -> list[Check]:
    """Build an op unless it is built; what the builder logs belongs to what was found."""
    from trainers.engines import ops

    title, said = f"DeepSpeed's {op}", _Said()
    logger = logging.getLogger("fulltune")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        ops.require_op(op)
    except ConfigError as error:
        return [Check(title, WARN, error.reason, f"{error.remedy}; {USED_BY[op]} needs it")]
    told = [line for line in said.lines if not line.startswith(("building", "waiting"))]
    return [Check(title, OK, "; ".join(told) or "built and loads")]


USED_BY = {"cpu_adam": "engine=zero3_offload", "async_io": "engine=zero3_nvme"}


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _probe_hub(_: str) -> list[Check]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return [Check("Hugging Face hub", NOTE, "offline, by HF_HUB_OFFLINE: models and data come from its cache or from disk")]
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_LIMIT_S):
            return [Check("Hugging Face hub", OK, f"{constants.ENDPOINT} answers")]
    except (OSError, ValueError) as error:
        found = f"{constants.ENDPOINT} does not answer ({getattr(error, 'reason', error)})"
        return [Check("Hugging Face hub", NOTE, found, "name models and data by local paths, and set HF_HUB_OFFLINE=1")]


PROBES: dict[str, Callable[[str], list[Check]]] = {
    "torch": _probe_torch,
    "gloo": _probe_gloo,
    "flash": _probe_flash,
    "deepspeed": _probe_deepspeed,
    "look": _probe_look,
    "build": _probe_build,
    "hub": _probe_hub,
}


if __name__ == "__main__":
    sys.exit(main())
