"""Tokens a second and memory of what can write answers: transformers' two ways, ours and vLLM, with the same model and prompts."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench.arguments import at_least
from tools.bench.curate import Memory
from tools.bench.machine import cpu_words
from tools.bench.orders import llama_sizes
from tools.markdown import put_section
from trainers import host
from trainers.generate.request import Answer, Request, Sampling
from trainers.processes import prepare_child
from trainers.units import in_bytes

WAYS = {
    "plain": "transformers, `generate` in batches",
    "continuous": "transformers, continuous batching",
    "ours": "fulltune, as RL asks",
    "apart": "fulltune, no answer depends on its batch",
    "vllm": "vLLM",
}
"""What writes answers, each in processes of its own."""
KINDS = {"greedy": 0.0, "drawn": 1.0}
"""How tokens are chosen, and the temperature."""
PAD, END = 0, 1
SURE = 40.0
"""The logit of each answer's next token; others are near 0, so that no rounding decides."""
PROMPT = (4, 64)
"""Tokens of the shortest prompt and of the longest."""
PAGE = 32
"""Tokens that continuous batching stores in a block of its cache."""
WARM = 8
LIMIT_S = 1800.0
Asked = list[list[int]]
Write = Callable[[Asked, float], Asked]
"""Prompts' ids and a temperature to their answers' ids, each through its end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench generate`."""
    parser.add_argument("--prompts", type=at_least(2), default=64, help="answers (default 64)")
    parser.add_argument("--shortest", type=at_least(1), default=8, help="tokens of the shortest answer (default 8)")
    parser.add_argument("--longest", type=at_least(2), default=256, help="tokens of the longest answer (default 256)")
    parser.add_argument("--parameters", type=at_least(100_000), default=10_000_000, help="of the Llama (default 10e6)")
    parser.add_argument("--batch", type=at_least(1), default=64, help="answers that are written at once (default 64, as `rl.batch`)")
    parser.add_argument("--runs", type=at_least(1), default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="vLLM too, by the Python of its environment (`make test-vllm`)")
    parser.add_argument("--out", type=Path, help="Markdown file: this command's section in it is replaced, or appended")


def run(options: argparse.Namespace) -> int:
    """Print, and write to --out, speed and memory of each; raises RuntimeError where plain generate's answers are not those known."""
    names = [name for name in WAYS if name != "vllm" or options.vllm is not None]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="fulltune-generate-") as temporary, console.status("making a model") as status:
        folder = Path(temporary)
        order = {key: getattr(options, key) for key in ("prompts", "shortest", "longest", "parameters", "batch")}
        order["vllm"] = None if options.vllm is None else str(options.vllm.absolute())
        (folder / "order.json").write_text(json.dumps(order))
        made = _in_process("generate-inputs", folder)
        for number in range(options.runs):
            for name in names:
                status.update(f"run {number + 1} of {options.runs}: {WAYS[name]}")
                found[name].append(_in_process("generate-one", folder, name))
    text = section(options, made, found)
    print(text, end="")
    if options.out is not None:
        put_section(options.out, text)
    return 0


def _in_process(*words: object) -> dict[str, float]:
    """Return what a sub-command prints last, with the peak of memory of all its processes; raises RuntimeError where it fails."""
    line = [sys.executable, "-m", "tools.bench", *map(str, words)]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=said, text=True, preexec_fn=prepare_child())
        memory = Memory(child.pid)
        printed = child.communicate(timeout=LIMIT_S)[0]
        said.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(line)} failed:\n{said.read()[-3000:]}")
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found | {"memory": float(memory.peak)}


def prompts_of(order: dict[str, Any]) -> Asked:
    """Return prompts whose answers are known: each ends with a number, from which the model counts down to END.

    The answer to a prompt that ends with k is k - 1, ..., END, so it has k - 1 tokens. Lengths are spread evenly, in random order.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(order["shortest"], order["longest"], order["prompts"]).round().astype(int)).tolist()
    sizes = rng.integers(PROMPT[0], PROMPT[1] + 1, order["prompts"]).tolist()
    others = order["longest"] + 2, order["longest"] + 2 + PROMPT[1]
    return [[*rng.integers(*others, size - 1).tolist(), length + 1] for size, length in zip(sizes, lengths, strict=True)]


def known(prompt: Sequence[int]) -> list[int]:
    """Return the answer to a prompt."""
    return list(range(prompt[-1] - 1, END - 1, -1))


def make_inputs(options: argparse.Namespace) -> None:
    """Write the Llama that counts down, with a tokenizer of numbers; prints its parameters.

    Its blocks have random weights of transformers' size, too small to outvote the embedding: the head of k - 1 is that of k.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(options.folder)
    order = json.loads((folder / "order.json").read_text())
    sizes: dict[str, Any] = {**llama_sizes(order["parameters"], order["longest"] + PROMPT[1])}
    sizes["vocab_size"] = max(sizes["vocab_size"], order["longest"] + 2 + PROMPT[1])
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, bos_token_id=END, eos_token_id=END, pad_token_id=PAD, tie_word_embeddings=False)
    model: Any = LlamaForCausalLM(config)
    numbers = torch.randn(sizes["vocab_size"], sizes["hidden_size"])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(numbers)
        model.lm_head.weight.copy_(numbers.roll(-1, 0) * (SURE / sizes["hidden_size"]))
    model.save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({str(number): number for number in range(sizes["vocab_size"])}, unk_token=str(PAD)))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(END), unk_token=str(PAD))
    tokenizer.save_pretrained(folder / "model")
    print(json.dumps({"parameters": float(model.num_parameters())}))


def run_one(options: argparse.Namespace) -> None:
    """Have one way write all answers, after some that are not timed; prints tokens a second and the share of known answers of each kind."""
    folder = Path(options.folder)
    order = json.loads((folder / "order.json").read_text())
    prompts, found = prompts_of(order), dict[str, float]()
    with OPENED[options.way](folder / "model", order) as write:
        for temperature in KINDS.values():
            write(prompts[:WARM], temperature)
        for kind, temperature in KINDS.items():
            began = time.perf_counter()
            answers = write(prompts, temperature)
            found[kind] = sum(map(len, answers)) / (time.perf_counter() - began)
            found[f"{kind} known"] = sum(answer == known(prompt) for answer, prompt in zip(answers, prompts, strict=True))
    print(json.dumps(found))


def _open(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(host.cores())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _settings(order: dict[str, Any], temperature: float) -> Any:
    from transformers import GenerationConfig

    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    return GenerationConfig(eos_token_id=END, pad_token_id=PAD, max_new_tokens=order["longest"], **how)


@contextmanager
def _plain(folder: Path, order: dict[str, Any]) -> Iterator[Write]:
    import torch

    model = _open(folder)

    def write(prompts: Asked, temperature: float) -> Asked:
        answers: Asked = []
        for at in range(0, len(prompts), order["batch"]):
            some = prompts[at : at + order["batch"]]
            longest = max(map(len, some))
            ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in some])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
            with torch.no_grad():
                output = model.generate(ids, attention_mask=mask, generation_config=_settings(order, temperature))
            answers += [_through_end(row) for row in output[:, longest:].tolist()]
        return answers

    yield write


def _through_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END) + 1] if END in ids else ids


@contextmanager
def _continuous(folder: Path, order: dict[str, Any]) -> Iterator[Write]:
    """Its cache holds what `batch` answers can take: by default it is most of the machine's memory, which on a CPU takes a minute."""
    from transformers import ContinuousBatchingConfig

    model = _open(folder)
    blocks = order["batch"] * -(-(PROMPT[1] + order["longest"]) // PAGE)
    bounds: dict[str, Any] = {"page_size": PAGE, "num_blocks": blocks, "max_batch_tokens": 512, "max_requests_per_batch": order["batch"]}

    def write(prompts: Asked, temperature: float) -> Asked:
        found = model.generate_batch(
            prompts,
            generation_config=_settings(order, temperature),
            continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True, **bounds),
            progress_bar=False,
        )
        if len(found) < len(prompts):
            raise RuntimeError(f"continuous batching gave {len(found)} of {len(prompts)} answers")
        return [_through_end(list(answer.generated_tokens)) for answer in found.values()]

    yield write


@contextmanager
def _ours(folder: Path, order: dict[str, Any], apart: bool = False) -> Iterator[Write]:
    from trainers.generate.local import Local
    from trainers.generate.models import named

    with Local(named(str(folder)).config, None, batch=order["batch"], setting="--batch", dtype="float32", device="cpu") as local:
        yield _asking(order, lambda requests, sampling, took: local.ask(requests, sampling, took, apart=apart))


@contextmanager
def _apart(folder: Path, order: dict[str, Any]) -> Iterator[Write]:
    with _ours(folder, order, apart=True) as write:
        yield write


@contextmanager
def _vllm(folder: Path, order: dict[str, Any]) -> Iterator[Write]:
    from trainers.generate.vllm import Vllm

    with Vllm(folder, python=order["vllm"], device="cpu", at_once=order["batch"]) as vllm:
        yield _asking(order, vllm.ask)


OPENED: dict[str, Callable[[Path, dict[str, Any]], AbstractContextManager[Write]]] = {
    "plain": _plain,
    "continuous": _continuous,
    "ours": _ours,
    "apart": _apart,
    "vllm": _vllm,
}
"""By name: a context in which a way's model is open."""


def _asking(order: dict[str, Any], ask: Callable[[list[Request], Sampling, Callable[[Answer], None]], None]) -> Write:
    def write(prompts: Asked, temperature: float) -> Asked:
        found: dict[int, list[int]] = {}
        requests = [Request(key=number, seed=number, ids=ids) for number, ids in enumerate(prompts)]
        sampling = Sampling(max_new_tokens=order["longest"], temperature=temperature)
        ask(requests, sampling, lambda answer: found.__setitem__(answer.key, answer.ids or []))
        return [found[number] for number in range(len(prompts))]

    return write


def section(options: argparse.Namespace, made: dict[str, float], found: dict[str, list[dict[str, float]]]) -> str:
    """Return the Markdown: command, machine and table; raises RuntimeError where plain generate's greedy answers are not the known ones."""
    if any(run["greedy known"] < options.prompts for run in found["plain"]):
        raise RuntimeError(f"plain generate has {found['plain'][0]['greedy known']:.0f} of {options.prompts} answers right")
    middle = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    about = (
        f"{cpu_words('torch', 'transformers')}. A Llama of {made['parameters']:,.0f} parameters in fp32, {options.prompts} prompts of "
        f"{PROMPT[0]} to {PROMPT[1]} tokens, answers of {options.shortest} to {options.longest} tokens, {options.batch} at once. "
        f"Median of {options.runs} runs each, in turn, without opening the model. Memory is the peak of all processes."
    )
    ours = middle["ours"]
    lines = ["| written by | greedy tokens/s | ours : this | drawn tokens/s | ours : this | memory | ours : this | greedy answers right |"]
    lines.append("|---|" + "---:|" * 7)
    for name, one in middle.items():
        cells = [cell for kind in KINDS for cell in (f"{one[kind]:,.0f}", f"{ours[kind] / one[kind]:.2f}")]
        cells += [in_bytes(one["memory"]), f"{ours['memory'] / one['memory']:.2f}", f"{one['greedy known']:.0f} of {options.prompts}"]
        lines.append(f"| {' | '.join([WAYS[name], *cells])} |")
    words = (
        "The model counts down from the last number of its prompt, so each answer is known and ends by itself. Drawn answers have "
        f"temperature {KINDS['drawn']:g}. vLLM sets 1 GiB aside for keys and values."
    )
    return "\n\n".join([f"## `{options.line}`", about, "\n".join(lines), words]) + "\n"
