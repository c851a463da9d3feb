"""Shared fixtures: tiny models made in code, real process groups started once per world size, a finished run."""

from __future__ import annotations

import gc
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forking
import pytest
from cluster import Cluster
from command import ROOT, arguments, launch
from filelock import FileLock

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

gc.disable()  # until all is imported

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background, and we send it

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real models and data is not here")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(forking.SWITCH) != "0" and sys.platform == "linux" and not config.option.collectonly:
        forking.begin()  # imports while we collect


EACH = 3
"""Of a test with more slow cases than this, the slow suite takes the first and each third one after it; the others are soak."""
ENDS = "FULLTUNE_TESTS_END"
"""Seconds since 1970 after which no further test begins: .ci/run ends in time on a machine that is half as fast, too."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep compilers out of the quick suite, where DeepSpeed's CPU optimizer takes a minute, and sample what has many slow cases."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "async_io" in getattr(item, "fixturenames", ()):  # its compilation takes four minutes
            item.add_marker(pytest.mark.soak)
        elif item.get_closest_marker("cpu_adam") or "built" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and not item.get_closest_marker("soak"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_test in cases.values():
        for number, item in enumerate(of_test if len(of_test) > EACH else []):
            if number % EACH:
                item.add_marker(pytest.mark.soak)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if time.time() > float(os.environ.get(ENDS, "inf")):
        pytest.skip("the time for all tests is over: make test-slow has no limit")


HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)


def state_of_torch() -> list[tuple[Callable[[Any], Any], Any]]:
    """Return what torch has one of in a process, each with what sets it; nothing where it is not imported yet."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "compile"):  # or is just being imported
        return []
    return [
        (torch.set_num_threads, torch.get_num_threads()),
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
    ]


def attention_functions() -> dict[str, Any]:
    """Return transformers' functions by name; engine.context puts others around them."""
    interface = sys.modules.get("transformers.modeling_utils")
    return dict(interface.ALL_ATTENTION_FUNCTIONS) if interface is not None else {}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Give the next test the process that this one found: environment, folder, signals, torch and functions of attention."""
    environment, folder, torch, functions = dict(os.environ), os.getcwd(), state_of_torch(), attention_functions()
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for name in {*os.environ} - {*environment, "PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"})
    os.chdir(folder)
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    for put, value in torch:
        put(value)
    for name, function in attention_functions().items():
        if functions.get(name, function) is not function:
            sys.modules["transformers"].AttentionInterface.register(name, functions[name])
    left = sys.modules.get("torch.distributed")
    assert left is None or not left.is_initialized(), "a process group is left"


@pytest.fixture(autouse=True)
def as_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("for_real") is not None:
        monkeypatch.delenv(forking.SWITCH, raising=False)
    if request.node.get_closest_marker("cpu_adam") is not None:
        request.getfixturevalue("cpu_adam")


def pytest_collection_finish() -> None:
    keep_what_is_there()
    gc.enable()


def keep_what_is_there() -> None:
    """Let later collections pass over modules and caches: looking through them takes a fifth of the time of small steps."""
    gc.collect()
    gc.freeze()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from trainers.world import World

    world = World.from_environment()
    world.connect(timeout_s=150)
    gc.enable()
    while (order := pipe.recv()) is not None:
        function, args = order
        try:
            pipe.send((True, function(world, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        keep_what_is_there()
    world.disconnect()


class Ranks:
    """Processes of one gloo group; `call` runs a function with their World on each and returns every rank's result."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer in {timeout_s} s")
            ok, value = pipe.recv()
            results.append(value if ok else RuntimeError(value))
        failed = [value for value in results if isinstance(value, RuntimeError)]
        if failed:  # a rank that waited in vain for another comes last; what they have sent each other no longer fits together
            self.close()
            raise min(failed, key=lambda error: "Timed out" in str(error))
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2)` is a process group of two ranks, kept for the whole session."""
    groups: dict[int, Ranks] = {}

    def group(size: int) -> Ranks:
        if size not in groups or not all(process.is_alive() for process in groups[size].processes):
            groups[size] = Ranks(size)
        return groups[size]

    yield group
    for kept in groups.values():
        kept.close()


REQUIRE = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
from trainers.config.errors import ConfigError
from trainers.engines import ops
ops.import_deepspeed()
start = time.monotonic()
try:
    ops.require_op(sys.argv[1], limit_s=float(sys.argv[2]))
except ConfigError as error:
    sys.exit(f"error: {error}")
print("loaded in", time.monotonic() - start)
"""


def start_require(folder: Path, op: str = "cpu_adam", limit_s: float = 100, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "MAX_JOBS": "2"} | environment
    line = [sys.executable, "-c", REQUIRE, op, str(limit_s)]
    return subprocess.Popen(line, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The one real build of the suite, asked for by two processes at once where a killed build of torch has left its lock."""
    skip_without("cpu_adam")
    folder = tmp_path_factory.mktemp("extensions")
    lock = folder / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    both = [start_require(folder, limit_s=900) for _ in range(2)]
    try:
        said = [process.communicate(timeout=900)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    return folder, said


def skip_without(op: str) -> None:
    """Skip where this machine cannot compile one of DeepSpeed's parts, with what it lacks."""
    from trainers.engines import ops

    missing = ops.missing_for(op)
    if missing is not None:
        pytest.skip(f"{missing.reason}: {missing.remedy}")


@pytest.fixture(scope="session")
def cpu_adam(request: pytest.FixtureRequest) -> None:
    """DeepSpeed's CPU optimizer where rank processes look for it: compiled once on a machine, about a minute."""
    from trainers.engines import ops

    ours = ops.folder_of("cpu_adam")
    ours.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(ours.with_suffix(".tests")):  # another part of the suite may run
        if not ops.is_built("cpu_adam"):
            skip_without("cpu_adam")
            shutil.copytree(request.getfixturevalue("built")[0] / ours.name, ours, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def async_io() -> None:
    """DeepSpeed's file I/O where rank processes look for it: compiled once on a machine, minutes. For slow tests."""
    skip_without("async_io")
    line = [sys.executable, "-c", REQUIRE, "async_io", "1900"]
    subprocess.run(line, check=True, timeout=2000, cwd=ROOT, env=os.environ | {"MAX_JOBS": "2"})


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 33,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of vocabulary 33 with tied embeddings, saved in Hugging Face form."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", tied=True)


def save_tiny(folder: Path, tied: bool, seed: int = 0, **more: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | {"initializer_range": 0.2} | more), tie_word_embeddings=tied))
    model.save_pretrained(folder)
    return folder


def blueprint_for(folder: Path) -> Any:
    from transformers import AutoConfig

    from trainers.model.blueprint import Blueprint

    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = None  # what the architecture has: sdpa, or eager for Gemma 2
    return Blueprint(config=config, folder=folder, revision=None, seed=0, trust_remote_code=False)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "far", "over", "green", "hills", "home", "again"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a word tokenizer of odd size and a ChatML template, in Hugging Face form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n"]
    vocabulary = {word: number for number, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    folder = save_tiny(tmp_path_factory.mktemp("base") / "model", tied=True, vocab_size=len(fast), initializer_range=0.1)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short chats of ragged lengths."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"

    def say(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    rows = [
        {"messages": [{"role": "user", "content": say(9)}, {"role": "assistant", "content": say(14)}] * rng.randint(1, 2)}
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(forking.SWITCH, raising=False)  # one run of the session is as a user's, process by process
        said = launch(cache, arguments(base, chats, run_dir, "log.wandb=offline", "checkpoint.every=4"))
    assert "held-out loss" in said
    assert "Warning" not in said
    return run_dir


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A virtual cluster of three nodes, kept for the whole session."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The session's virtual cluster, idle and whole; for tests marked `slurm`."""
    yield slurm
    slurm.reset()
