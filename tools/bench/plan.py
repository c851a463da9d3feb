"""A plan's bytes next to those of real runs on this machine's CPU: state to the byte, and the peak of tensors."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tools.bench.arguments import at_least
from tools.bench.machine import gpu_words, versions
from tools.bench.ranks import explaining, leave, start_ranks, wait_for
from tools.markdown import put_section
from trainers.config.choices import (
    Activations,
    EngineName,
    ObjectiveName,
    OptimizerName,
    OptimizerState,
    PeftMethod,
    Precision,
    Quantisation,
)
from trainers.config.schema import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from trainers.units import in_bytes

if TYPE_CHECKING:
    from trainers.engines.base import Engine
    from trainers.model.blueprint import Blueprint
    from trainers.plan.trace import Kind, Moment, Trace
    from trainers.world import World

LIMIT_S = 900.0
COLLECTIVES = ("reduce_scatter_tensor", "reduce_scatter_single", "all_reduce")
EXCHANGE = "all_to_all_single"
TOLERANCE = 0.05
"""Of the traced peak."""
TRACED = 3
"""Times that allocations are traced: gloo's threads free what they copy when they get to it, so that only the least is the step's."""


def _llama(hidden: int, intermediate: int, blocks: int, heads: int, vocab: int) -> dict[str, int]:
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks, "vocab_size": vocab, **attention}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 176, 5, 4, 33),
    "even": _llama(64, 176, 5, 4, 36),
    "pair": _llama(64, 176, 5, 2, 33),
    "9M": _llama(256, 704, 8, 8, 8192),
    "60M": _llama(512, 1536, 14, 8, 16384),
    "300M": _llama(1024, 2816, 22, 16, 16384),
    "128k": _llama(64, 176, 2, 4, 128256),
    "1B": _llama(2048, 8192, 16, 32, 128256) | {"num_key_value_heads": 8},
    "3B": _llama(3072, 8192, 28, 24, 128256) | {"num_key_value_heads": 8},
    "8B": _llama(4096, 14336, 32, 32, 128256) | {"num_key_value_heads": 8},
    "mixture": _llama(64, 176, 5, 4, 33)
    | {"model_type": "qwen3_moe", "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 4},
}
"""Those from 1B on are Llama 3's, with heads of their own. The pair has two heads.

The mixture sends each token to all experts: a plan counts them as even."""


@dataclass(frozen=True)
class Case:
    """One run: a model of one of SIZES, `more` of it changed."""

    ranks: int
    size: str
    engine: EngineName = EngineName.fsdp
    method: PeftMethod = PeftMethod.none
    quantise: Quantisation = Quantisation.none
    precision: Precision = Precision.bf16
    activations: Activations = Activations.keep
    microbatches: int = 1
    replicate: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    keep_gathered: bool = False
    """Parameters stay gathered from microbatch to microbatch."""
    seq_len: int = 128
    microbatch: int = 2
    optimizer: OptimizerName = OptimizerName.adamw
    logits_chunk: int | None = None
    state: OptimizerState = OptimizerState.fp32
    objective: ObjectiveName = ObjectiveName.sft

    @property
    def name(self) -> str:
        """Say what it is."""
        words = [
            self.size,
            "qlora" if self.quantise is Quantisation.nf4 else "full" if self.method is PeftMethod.none else str(self.method),
        ]
        words += [str(self.engine), str(self.precision)]
        words += [str(self.activations)] if self.activations is not Activations.keep else []
        words += [f"{self.microbatches} microbatches"] if self.microbatches > 1 else []
        words += [f"{self.replicate} copies"] if self.replicate > 1 else []
        words += [f"{self.context} ranks share each row"] if self.context > 1 else []
        words += [f"{self.tensor} ranks split each layer"] if self.tensor > 1 else []
        words += [f"experts dealt over {self.expert} ranks"] if self.expert > 1 else []
        words += ["kept gathered"] if self.keep_gathered else []
        words += [str(self.optimizer)] if self.optimizer is not OptimizerName.adamw else []
        words += [f"logits of {self.logits_chunk or 'all'} tokens"] if self.logits_chunk is not None else []
        words += ["bf16 moments"] if self.state is OptimizerState.bf16 else []
        words += [str(self.objective)] if self.objective is not ObjectiveName.sft else []
        words += [f"{self.microbatch} x {self.seq_len}"] if self.seq_len > 128 else []
        return " ".join(words)

    def _mesh(self) -> dict[str, Any]:
        sizes = {"replicate": self.replicate, "context": self.context, "tensor": self.tensor, "expert": self.expert}
        return {name: size for name, size in sizes.items() if size > 1}

    def config(self, run_dir: str) -> RunConfig:
        """Return its settings."""
        engine = EngineConfig(name=self.engine, reshard_after_backward=not self.keep_gathered)
        return RunConfig(
            run_dir=run_dir,
            model=ModelConfig(architecture={"model_type": "llama"} | SIZES[self.size]),
            data=DataConfig(seq_len=self.seq_len),
            peft=PeftConfig(method=self.method, quantise=self.quantise, targets=["down_proj"] if self.method is BOTTLENECK else []),
            objective=ObjectiveConfig(name=self.objective),
            engine=replace(engine, **self._mesh()) if self._mesh() else engine,
            optim=OptimConfig(name=self.optimizer, state=self.state, lr=1e-5),
            train=TrainConfig(
                steps=1,
                global_batch=self.microbatch * self.ranks // self.context // self.tensor * self.microbatches,
                microbatch=self.microbatch,
                precision=self.precision,
                activations=self.activations,
                logits_chunk=self.logits_chunk,
            ),
        )


FP32, ZERO3, LORA, NF4 = Precision.fp32, EngineName.zero3, PeftMethod.lora, Quantisation.nf4
BOTTLENECK = PeftMethod.bottleneck
SELECTIVE, BLOCK, OFFLOAD = Activations.selective, Activations.block, Activations.offload
CASES = [
    Case(1, "tiny"),
    Case(1, "9M", precision=FP32, activations=BLOCK),
    Case(1, "60M", method=LORA, quantise=NF4),
    Case(1, "9M", engine=ZERO3),
    Case(1, "128k", precision=FP32, seq_len=1024, microbatch=8, logits_chunk=0),
    Case(1, "128k", precision=FP32, seq_len=1024, microbatch=8),
    Case(2, "tiny", precision=FP32),
    Case(2, "9M", activations=BLOCK, microbatches=2),
    Case(2, "9M", method=LORA),
    Case(2, "60M", method=LORA, quantise=NF4, activations=BLOCK),
    Case(2, "9M", engine=ZERO3, activations=BLOCK),
    Case(2, "9M", engine=ZERO3, method=LORA),
    Case(2, "tiny", engine=ZERO3, method=LORA, quantise=NF4, precision=FP32),
    Case(2, "tiny", method=BOTTLENECK),
    Case(2, "300M", activations=BLOCK),
    Case(2, "300M", engine=ZERO3, activations=BLOCK),
    Case(2, "9M", activations=SELECTIVE),
    Case(2, "9M", activations=OFFLOAD, microbatches=2),
    Case(2, "9M", method=LORA, activations=SELECTIVE),
    Case(2, "9M", engine=ZERO3, activations=SELECTIVE),
    Case(2, "9M", engine=ZERO3, activations=OFFLOAD),
    Case(2, "9M", microbatches=3, keep_gathered=True),
    Case(3, "tiny", activations=SELECTIVE, microbatches=2, keep_gathered=True),
    Case(3, "tiny", engine=ZERO3, activations=OFFLOAD),
    Case(3, "tiny"),
    Case(2, "tiny", precision=Precision.fp16),
    Case(3, "tiny", engine=ZERO3, precision=Precision.fp16),
    Case(3, "tiny", engine=ZERO3, microbatches=2),
    Case(4, "9M"),
    Case(4, "9M", replicate=2),
    Case(2, "tiny", precision=FP32, seq_len=1024, context=2),
    Case(4, "tiny", precision=FP32, seq_len=1024, context=4, activations=BLOCK),
    Case(4, "tiny", replicate=2, context=2),
    Case(4, "pair", precision=FP32, seq_len=1024, context=4, activations=BLOCK),
    Case(4, "pair", seq_len=1024, context=4),
    Case(2, "even", tensor=2),
    Case(2, "even", precision=FP32, activations=BLOCK, logits_chunk=50, microbatches=2, tensor=2),
    Case(2, "9M", method=LORA, activations=SELECTIVE, tensor=2),
    Case(4, "9M", microbatches=2, tensor=2),
    Case(4, "9M", activations=BLOCK, replicate=2, tensor=2),
    Case(4, "even", seq_len=1024, context=2, tensor=2),
    Case(2, "mixture", expert=2),
    Case(4, "mixture", precision=FP32, activations=BLOCK, expert=2),
    Case(4, "mixture", microbatches=2, replicate=2, expert=2),
    Case(4, "60M", engine=ZERO3, precision=FP32, activations=BLOCK),
    *(Case(2, "9M", optimizer=name) for name in OptimizerName if name is not OptimizerName.adamw),
    Case(2, "9M", engine=ZERO3, optimizer=OptimizerName.adamw_8bit),
    Case(2, "9M", engine=ZERO3, optimizer=OptimizerName.schedule_free_adamw),
    Case(2, "9M", state=OptimizerState.bf16),
    Case(2, "tiny", objective=ObjectiveName.distil),
    Case(2, "9M", objective=ObjectiveName.distil),
    Case(2, "9M", engine=ZERO3, objective=ObjectiveName.distil),
    Case(2, "tiny", objective=ObjectiveName.dpo),
]
GPU_CASES = [
    Case(1, "1B", seq_len=2048),
    Case(1, "1B", seq_len=8192, microbatch=1, activations=BLOCK),
    Case(1, "1B", seq_len=1024, precision=FP32, microbatches=2),
    Case(1, "3B", seq_len=4096, microbatch=1, activations=BLOCK),
    Case(1, "3B", seq_len=2048, method=LORA),
    Case(1, "3B", seq_len=4096, method=LORA, quantise=NF4, activations=BLOCK),
    Case(1, "8B", seq_len=4096, method=LORA, activations=BLOCK),
    Case(1, "8B", seq_len=2048, microbatch=1, method=LORA),
    Case(1, "8B", seq_len=4096, method=LORA, quantise=NF4, activations=BLOCK),
    Case(1, "8B", seq_len=2048, microbatch=1, activations=BLOCK, optimizer=OptimizerName.sgd),
]
"""One GPU each, with 139 GiB."""
CONTEXT_CASES = [
    Case(4, "9M", precision=FP32, seq_len=length, context=context, microbatch=1, activations=BLOCK)
    for length in (2048, 4096)
    for context in (1, 2, 4)
]
"""Those of `tools.bench context`."""
MESHES = (
    *((2, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2), (4, 1, 1, 1), (4, 2, 1, 1)),
    *((4, 1, 2, 1), (4, 1, 4, 1), (4, 1, 1, 2), (4, 2, 2, 1), (4, 2, 1, 2), (4, 1, 2, 2)),
)
"""Of a model without experts: ranks, copies, and the ranks that share rows and that split layers."""
DEALT_MESHES = ((2, 1, 1, 2), (4, 1, 1, 2), (4, 2, 1, 2), (4, 1, 2, 2), (4, 1, 1, 4))
"""Of a mixture: ranks, copies, and the ranks that share rows and that deal out experts."""
_DENSE, _MIXTURE = (Case(1, size, precision=FP32, activations=BLOCK, seq_len=256) for size in ("even", "mixture"))
MESH_CASES = [
    *(replace(_DENSE, ranks=size, replicate=copies, context=context, tensor=tensor) for size, copies, context, tensor in MESHES),
    *(replace(_MIXTURE, ranks=size, replicate=copies, context=context, expert=expert) for size, copies, context, expert in DEALT_MESHES),
]
"""Those of `tools.bench meshes`."""
KNOWN = [*CASES, *GPU_CASES, *CONTEXT_CASES, *MESH_CASES]


def run_gpu(options: argparse.Namespace) -> None:
    """Print, and write to `--out`, predicted peaks and torch.cuda.max_memory_allocated; raises RuntimeError where one is further off."""
    import torch

    if not torch.cuda.is_available():
        options.error("--gpu needs a GPU: this machine has none that torch can use")
    head = "| run | parameters | predicted, GiB | torch.cuda.max_memory_allocated, GiB | ratio | reserved, GiB |"
    lines, wrong = [head, "|---|---|---|---|---|---|"], []
    for case in GPU_CASES:
        if case.size in options.sizes:
            [found], predicted = measure(1, [case]), predict(case)
            ratio = predicted["peak"] / found["peak"]
            peaks = f"{predicted['peak'] / 2**30:.2f} | {found['peak'] / 2**30:.2f} | {ratio:.3f} | {found['reserved'] / 2**30:.2f}"
            lines.append(f"| {case.name} | {predicted['parameters']:,} | {peaks} |")
            print(lines[-1], flush=True)
            if abs(ratio - 1) > TOLERANCE or predicted["state"] != found["state"]:
                wrong.append(lines[-1])
    if options.out is not None:
        machine = f"{gpu_words(torch.cuda.get_device_name())}, {versions('torch', 'transformers', 'peft')}, {date.today().isoformat()}"
        put_section(options.out, "\n".join(["## A plan next to real runs", "", f"`{options.line}` ({machine})", "", *lines]))
    if wrong:
        raise RuntimeError("\n".join(wrong))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m tools.bench plan`."""
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2, 3, 4], help="numbers of ranks (default 1 2 3 4)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of models (default all of these)")
    parser.add_argument("--gpu", action="store_true", help="models of 1B to 8B on one GPU with 139 GiB, against torch.cuda's peak")
    parser.add_argument("--out", type=Path, help="with --gpu: Markdown file in which this command's section is replaced, or appended")


def run(options: argparse.Namespace) -> None:
    """Print predicted and measured bytes of each case; raises RuntimeError where state differs or a peak is further off than promised."""
    if options.gpu:
        run_gpu(options)
        return
    cases = [case for case in CASES if case.ranks in options.ranks and case.size in options.sizes]
    table = Table("ranks", "run", "parameters", "state bytes", title="a plan next to real runs")
    for column in ("peak: predicted", "traced", "ratio", "torch's allocator, with gloo's copies", "ratio"):
        table.add_column(column, justify="right")
    wrong = []
    for ranks in sorted({case.ranks for case in cases}):
        chosen = [case for case in cases if case.ranks == ranks]
        for case, found, predicted in zip(chosen, measure(ranks, chosen), map(predict, chosen), strict=True):
            ratio = predicted["peak"] / found["peak"]
            same = predicted["state"] == found["state"]
            if not same or abs(ratio - 1) > TOLERANCE:
                wrong.append(f"{ranks} ranks, {case.name}: predicted {predicted}, found {found}")
            allocated = found.get("allocated")
            beside = ("", "") if allocated is None else (in_bytes(allocated, 2), f"{predicted['peak'] / allocated:.3f}")
            figures = (
                f"{predicted['parameters']:,}",
                "equal" if same else "differ",
                in_bytes(predicted["peak"], 2),
                in_bytes(found["peak"], 2),
                f"{ratio:.4f}",
            )
            table.add_row(str(ranks), case.name, *figures, *beside)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if wrong:
        raise RuntimeError("\n".join(wrong))


def blueprint_of_case(case: Case) -> Blueprint:
    """Return its model, with random values."""
    from transformers import AutoConfig

    from trainers.model.blueprint import Blueprint

    sizes: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False} | SIZES[case.size]
    config = AutoConfig.for_model(**sizes)
    config._attn_implementation = "sdpa"
    return Blueprint(config=config, folder=None, revision=None, seed=0, trust_remote_code=False)


def predict(case: Case) -> dict[str, Any]:
    """Return `state` bytes by class, `peak` bytes, those of `logits` and `activations`, `flops` and `parameters`, as a plan has them."""
    from trainers.plan.simulate import ranks, simulate
    from trainers.plan.trace import Kind

    with ranks(case.ranks, case.ranks) as world:
        found = simulate(case.config("."), blueprint_of_case(case), world, case.seq_len)
    flops = sum(moment.flops for moment in found.moments)
    return {
        "state": found.state_bytes | {"inputs on the host": found.inputs_on_host},
        "peak": found.peak.total,
        "logits": highest(found.moments, Kind.logits),
        "activations": highest(found.moments, Kind.activations),
        "flops": flops,
        "parameters": found.parameters,
    }


def highest(moments: Iterable[Moment], kind: Kind) -> float:
    """Return the bytes of a kind at the peaks of a step's moments, where they are highest."""
    return max(moment.peak[kind] for moment in moments)


def measure(ranks: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Return the same of real runs with so many ranks, and `allocated` where torch's profiler sees every allocation."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [str(KNOWN.index(case)) for case in cases]
        with start_ranks(["plan-rank", folder, *chosen], ranks, Path(folder)) as children:
            wait_for(children, Path(folder), "done", lambda: None, LIMIT_S)
        found: list[dict[str, Any]] = json.loads((Path(folder) / "0.done").read_text())
        return found


def run_rank(options: argparse.Namespace) -> None:
    """Be one rank of `measure`."""
    import torch

    from trainers.world import World

    folder = Path(options.folder)
    torch.set_num_threads(1)
    with explaining(folder):
        world = World.from_environment()
        world.connect()
        found = []
        for number in options.cases:
            case = KNOWN[number]
            figures = _on_gpu(case, world, folder) if case in GPU_CASES else _traced(case, world, folder)
            if case in CASES and case.engine is EngineName.fsdp:  # DeepSpeed frees where the profiler does not look
                figures["allocated"] = min(_allocated(case, world, folder) for _ in range(TRACED))
            found.append(figures)
        world.barrier()
        leave(folder, "done", json.dumps(found))
        world.disconnect()


def _traced(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Take real steps, with every operator's allocations noted."""
    from trainers.plan.trace import Kind, Trace

    trace = Trace(SIZES[case.size]["vocab_size"])
    with trace, _without_copies_of_gloo(trace):
        _, state = _take_steps(case, world, folder, trace)
    moments = trace.moments()
    kinds = {"logits": highest(moments, Kind.logits), "activations": highest(moments, Kind.activations)}
    return {"state": state, "peak": max(moment.total for moment in moments), **kinds}


def _on_gpu(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Take the same steps on the GPU, and ask torch for its peak."""
    import torch

    from trainers.plan.trace import Trace

    _, state = _take_steps(case, world, folder, Trace(0), built=torch.cuda.reset_peak_memory_stats)
    return {"state": state, "peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def _take_steps(
    case: Case, world: World, folder: Path, trace: Trace, built: Callable[[], None] = lambda: None
) -> tuple[Engine, dict[str, int]]:
    """Take two steps; returns the engine, and its bytes of state with those of inputs that waited on the host."""
    from trainers.engines.build import build_engine
    from trainers.objectives import make_objective
    from trainers.plan.simulate import LR, Marked, most_of
    from trainers.step import take_step

    config = case.config(str(folder))
    engine = build_engine(config, world, blueprint_of_case(case))
    objective = make_objective(config.objective, None, config.train.balance_loss)
    built()
    for _ in range(2):
        trace.restart()
        vocab_size = SIZES[case.size]["vocab_size"]
        batches = [most_of(config, case.microbatch, case.seq_len, vocab_size) for _ in range(case.microbatches)]
        marked: Any = Marked(engine, trace)
        take_step(marked, objective, [batch.to(world.device) for batch in batches], world, lr=LR, targets=1)
    return engine, engine.state_bytes() | {"inputs on the host": marked.inputs_on_host}


@contextmanager
def _without_copies_of_gloo(trace: Trace) -> Iterator[None]:
    """Leave out what gloo allocates to reduce, and what its threads keep of an exchange that is done: NCCL, and a rank alone, do not."""
    import torch
    import torch.distributed as dist

    plain = {name: getattr(dist, name) for name in (*COLLECTIVES, EXCHANGE) if hasattr(dist, name)}

    def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with trace.paused():
                return function(*args, **kwargs)

        return call

    def exchange(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with trace.paused():  # gloo gets copies: the thread that has sent frees its tensors when it gets to it
            received = torch.empty_like(output)
            done = plain[EXCHANGE](received, given.clone(), *args, **kwargs)
            output.copy_(received)
        return done

    for name, function in plain.items():
        setattr(dist, name, exchange if name == EXCHANGE else quietly(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def _allocated(case: Case, world: World, folder: Path) -> int:
    """Return the peak of what torch's CPU allocator hands out in the same steps, from its own reports to torch's profiler."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    from trainers.plan.trace import Trace

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _take_steps(case, world, folder, Trace(0))
    events: list[tuple[int, int, int]] = []

    def collect(nodes: Any) -> None:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
            collect(node.children)

    assert profiler.profiler is not None
    collect(profiler.profiler.kineto_results.experimental_event_tree())
    live: dict[int, int] = {}
    now = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        now += size - live.pop(address, 0) if size > 0 else -live.pop(address, 0)
        if size > 0:
            live[address] = size
        peak = max(peak, now)
    return peak
