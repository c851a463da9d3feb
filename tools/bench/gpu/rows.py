"""What is measured on a GPU, the most valuable first. No torch: the rows are listed before a process is started."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

SECTIONS = {
    "runs": "It runs: `python -m launcher`, killed, continued, exported",
    "engines": "Engines in bf16",
    "lora": "Llama 8B, LoRA",
    "full": "Llama 8B, all parameters",
    "qlora": "Llama 8B, QLoRA, and Qwen3 8B",
    "peers": "The same work by others",
    "isolation": "Packed documents apart, in bf16",
    "optimizers": "Optimizers, 1B, all parameters",
    "experts": "Qwen3 30B-A3B with fewer layers",
    "long": "Llama 8B, LoRA, one long row",
    "meshes": "Llama 8B, all parameters, on meshes of all GPUs of this machine",
    "dealt": "Qwen3 30B-A3B with fewer layers, on meshes of all GPUs of this machine",
    "files": "Checkpoints, exports, loading, offloading",
    "tests": "Tests",
}
"""Tables by their keys, in the order of the page; the order of measuring is that of `all_rows`."""
PATHS = {"lora": "lora", "full": "full"}
GAIN = 1.01
"""Tokens a second over the best so far, from which on a setting is kept for the rows after it."""
BYTES_FULL, SPARE_BYTES = 16, 12 << 30
"""Bytes of a trained parameter (weights, gradients and two moments in float32), and what a step needs besides: our estimate."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, measured by a process of its own."""

    section: str
    name: str
    kind: str = "train"
    """What the worker does: see worker.KINDS, and `launch` and `tool` of command.py."""
    overrides: tuple[str, ...] = ()
    """As for `python -m launcher`; those of a later place win."""
    path: str = ""
    """The row tries its overrides next to the best ones so far of this path, and leaves them to the next row where they are faster."""
    tries: tuple[str, ...] = ()
    """What it tries there."""
    seconds: int = 45
    """About how long it takes on an H100: our estimate, replaced by what rows of the kind have taken."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the worker's order."""

    @property
    def id(self) -> str:
        """Return what a second call of the command knows it by."""
        return f"{self.section}: {self.name}"


@dataclass(frozen=True)
class Size:
    """How large all is: of a GPU, or of a rehearsal on a CPU."""

    memory: int
    """Bytes of the device."""
    tiny: bool = False
    gpus: int = 1
    """Of this machine: rows of meshes need two or more."""

    @property
    def seq_len(self) -> int:
        """Return the tokens of a row."""
        return 64 if self.tiny else 4096

    @property
    def steps(self) -> int:
        """Return how many steps are taken."""
        return self.warmup + (2 if self.tiny else 10)

    @property
    def warmup(self) -> int:
        """Return how many first steps do not count."""
        return 1 if self.tiny else 3

    def model(self, **sizes: Any) -> tuple[str, ...]:
        """Return the overrides of an architecture, made tiny for a rehearsal; its tokenizer is needed by a run through the launcher."""
        if self.tiny:
            small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
            small |= {"vocab_size": 512, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            sizes = {key: small.get(key, value) for key, value in sizes.items()}
        fields = (f"++model.architecture.{key}={json.dumps(value)}" for key, value in sizes.items())
        return (*fields, f"model.train_tokenizer={400 if self.tiny else 4096}")

    def llama(self, **more: Any) -> tuple[str, ...]:
        """Return Llama 3.1 8B's shape, or one of its kind."""
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
        shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **heads}
        return self.model(**(shape | more))

    def llama_1b(self) -> tuple[str, ...]:
        """Return Llama 3.2 1B's shape."""
        return self.llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True)

    def largest_llama(self) -> int:
        """Return how many of the 32 layers of Llama 8B can be trained whole: 218 million parameters each, 1,050 million around them."""
        fitting = [n for n in (32, 24, 20, 16, 12, 8, 4) if BYTES_FULL * (1.051e9 + n * 218.1e6) + SPARE_BYTES <= self.memory]
        return fitting[0] if fitting else 2

    def step(self, microbatch: int = 2, seq_len: int | None = None) -> tuple[str, ...]:
        """Return the overrides of a step: one microbatch of packed rows."""
        precision = () if not self.tiny else ("train.precision=fp32",)
        return (
            f"data.seq_len={seq_len or self.seq_len}",
            f"train.steps={self.steps}",
            f"train.microbatch={microbatch}",
            f"train.global_batch={microbatch}",
            *precision,
        )


COMMON = (
    "data=python_docs",
    "objective=cpt",
    "data.too_long=split",
    "log.wandb=disabled",
    "optim.lr=1e-4",
    "optim.schedule=constant",
    "launch.processes=1",
)
"""Overrides of every row."""


def all_rows(size: Size) -> list[Row]:
    """Return every row in the order of measuring: what is worth most first."""
    lora, full = _lora(size), _full(size)
    first = [*_runs(size), *_engines(size), *lora[:5], *full[:3], *_peers(size), *_isolation(size)]
    rest = [*lora[5:], *_qlora(size), *_long(size), *full[3:], *_experts(size), *_optimizers(size), *_files(size), _tests()]
    return [*first, *(_meshes(size) if size.gpus > 1 else []), *rest]


def _runs(size: Size) -> list[Row]:
    few = (f"train.steps={8 if not size.tiny else 6}", "train.sample_tokens=0")
    base = (*size.llama_1b(), *size.step(2, 64 if size.tiny else 2048), *few)
    kinds = [
        ("full, fsdp", ("engine=fsdp",), True),
        ("LoRA, zero3", ("engine=zero3", "peft=lora"), True),
        ("LoRA, fsdp", ("engine=fsdp", "peft=lora"), False),
        ("full, zero3", ("engine=zero3",), False),
    ]
    return [
        Row(section="runs", name=name, kind="launch", overrides=(*base, *more), seconds=150 if kill else 70, more={"kill": kill})
        for name, more, kill in kinds
    ]


def _engines(size: Size) -> list[Row]:
    base = (*size.llama_1b(), *size.step(2))
    rows = [("fsdp", ("engine=fsdp",)), ("zero3", ("engine=zero3",)), ("fsdp, fp32", ("engine=fsdp", "train.precision=fp32"))]
    return [Row(section="engines", name=name, overrides=(*base, *more), seconds=40) for name, more in rows]


def _path(path: str, base: tuple[str, ...], tries: list[tuple[str, ...]], seconds: int = 45) -> list[Row]:
    """Return a path's rows: the base, and what is tried next to the best so far, each."""
    first = Row(section=path, name="the first", overrides=base, path=path, seconds=seconds, more={"plan": True})
    rest = [
        Row(section=path, name=" ".join(words), overrides=base, path=path, tries=words, seconds=seconds, more={"plan": True})
        for words in tries
    ]
    return [first, *rest]


def _lora(size: Size) -> list[Row]:
    base = (*size.llama(), *size.step(2), "peft=lora", "peft.targets=[all-linear]", "model.attention=sdpa")
    tries = [
        "model.attention=varlen",
        "train.compile=true",
        "train.activations=block",
        "train.float8=rowwise",
        "model.attention=flex",
        "model.attention=flash_attention_2",
        "model.attention=flash_attention_3",
        "train.logits_chunk=0",
        "train.activations=selective",
        "train.activations=offload",
        "train.float8=tensorwise",
    ]
    wider = ("train.microbatch=4", "train.global_batch=4")
    return _path("lora", base, [*((word,) for word in tries), wider])


def _full(size: Size) -> list[Row]:
    layers = size.largest_llama()
    name = f"++model.architecture.num_hidden_layers={2 if size.tiny else layers}"
    base = (*size.llama(), name, *size.step(1), "train.activations=block", "model.attention=sdpa")
    whole = "++model.architecture.num_hidden_layers=32"
    tries: list[tuple[str, ...]] = [
        ("model.attention=varlen",),
        ("train.compile=true",),
        ("train.float8=rowwise",),
        ("train.float8=tensorwise",),
        ("train.activations=selective",),
        ("optim.state=bf16",),
        *([("optim.name=adamw_8bit", whole), ("optim.name=sgd", whole)] if layers < 32 and not size.tiny else [("optim.name=adamw_8bit",)]),
    ]
    return _path("full", base, tries, 60)


def _qlora(size: Size) -> list[Row]:
    qwen = size.model(
        model_type="qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    base = size.step(2)
    llama = (*size.llama(), *base, "peft=qlora", "peft.dropout=0", *(("peft.rank=8",) if size.tiny else ()))
    rows = {
        "QLoRA": llama,
        "QLoRA train.activations=block": (*llama, "train.activations=block"),
        "Qwen3 8B, LoRA": (*qwen, *base, "peft=lora", "peft.targets=[all-linear]"),
    }
    return [Row(section="qlora", name=name, overrides=words, seconds=55, more={"plan": True}) for name, words in rows.items()]


def _peers(size: Size) -> list[Row]:
    lora = (*size.llama(), *size.step(2), "peft=lora", "peft.targets=[all-linear]", "model.attention=sdpa")
    layers = f"++model.architecture.num_hidden_layers={2 if size.tiny else size.largest_llama()}"
    full = (*size.llama(), layers, *size.step(1), "model.attention=sdpa")
    return [
        Row(section="peers", name="bare transformers and peft, LoRA", kind="bare", overrides=lora, seconds=50),
        Row(section="peers", name="TRL, LoRA", kind="trl", overrides=lora, seconds=60),
        Row(section="peers", name="bare transformers, all parameters", kind="bare", overrides=full, seconds=60),
        Row(section="peers", name="TRL, all parameters", kind="trl", overrides=full, seconds=60),
    ]


HEADS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"model_type": "llama", "num_hidden_layers": 2, **HEADS},
    "Qwen3": {"model_type": "qwen3", "num_hidden_layers": 2, **HEADS},
    "Gemma 2": {"model_type": "gemma2", "num_hidden_layers": 2, "sliding_window": 8, **HEADS},
    "Gemma 3": {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 8, **HEADS},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **HEADS,
    },
    "Qwen3.5": {"model_type": "qwen3_5_text", "num_hidden_layers": 4, **HEADS},
}
"""Small models by name, each with what sets its attention apart."""
KERNELS = ("sdpa", "varlen", "flex", "flash_attention_2", "flash_attention_3", "eager")


def _isolation(size: Size) -> list[Row]:
    words = (*size.model(**MODELS["Llama"]), *size.step(2, 64))
    more = {"models": MODELS if not size.tiny else {"Llama": MODELS["Llama"]}}
    return [
        Row(section="isolation", name=kernel, kind="isolation", overrides=(*words, f"model.attention={kernel}"), seconds=35, more=more)
        for kernel in KERNELS
    ]


def _long(size: Size) -> list[Row]:
    """Return rows of one document each, 16k to 128k tokens: what a rank has with `engine.context=1`, next to the plan."""
    lengths = [64, 128] if size.tiny else [1 << 14, 1 << 15, 1 << 16, 1 << 17]
    base = (*size.llama(max_position_embeddings=lengths[-1]), "peft=lora", "peft.targets=[all-linear]", "model.attention=varlen")
    rows = [(str(length), (*size.step(1, length), "train.activations=block")) for length in lengths]
    rows.append((f"{lengths[-1]} train.activations=offload", (*size.step(1, lengths[-1]), "train.activations=offload")))
    more = {"plan": True, "whole_rows": True}
    return [Row(section="long", name=f"data.seq_len={name}", overrides=(*base, *words), seconds=90, more=more) for name, words in rows]


def _meshes(size: Size) -> list[Row]:
    """Return runs of the launcher on all GPUs, each on another mesh, whose losses must be those of sharding alone."""
    ranks = size.gpus
    words = (f"train.steps={size.steps}", f"train.global_batch={2 * ranks}", f"launch.processes={ranks}", "train.sample_tokens=0")
    layers = 2 if size.tiny else replace(size, memory=ranks * size.memory).largest_llama()
    base = (*size.llama(num_hidden_layers=layers), *size.step(1), "train.activations=block", *words)
    mixture = (*_mixture(size, 16), *size.step(1), "train.activations=block", *words)
    several = {2, ranks} if ranks % 2 == 0 else {ranks}
    dense = [f"engine.{name}={number}" for number in sorted(several) for name in ("context", "tensor")]
    dealt = [f"engine.expert={number}" for number in sorted(several)]
    if ranks > 2 and ranks % 2 == 0:
        dense.append("engine.replicate=2")
    kinds = [("meshes", base, dense), ("dealt", mixture, dealt)]
    return [
        Row(
            section=section,
            name=name,
            kind="launch",
            overrides=(*of, *more),
            seconds=120,
            more={"kill": False, "plan": True, "warmup": size.warmup},
        )
        for section, of, meshes in kinds
        for name, more in [("engine.shard alone", ()), *((mesh, (mesh,)) for mesh in meshes)]
    ]


def _mixture(size: Size, layers: int) -> tuple[str, ...]:
    """Return Qwen3 30B-A3B's shape with so many of its 48 layers."""
    shape = {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    return size.model(**shape, **heads, **experts)


def _experts(size: Size) -> list[Row]:
    base = (*_mixture(size, 4), *size.step(2))
    rows = {f"full, model.experts={name}": (*base, f"model.experts={name}") for name in ("grouped_mm", "batched_mm", "eager")}
    rows["LoRA, model.experts=grouped_mm"] = (*base, "model.experts=grouped_mm", "peft=lora", "peft.targets=[all-linear]")
    return [Row(section="experts", name=name, overrides=words, seconds=50, more={"plan": True}) for name, words in rows.items()]


def _optimizers(size: Size) -> list[Row]:
    names = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "muon", "lion", "adafactor", "schedule_free_adamw", "sgd"]
    base = (*size.llama_1b(), *size.step(2))
    return [
        Row(section="optimizers", name=name, overrides=(*base, f"optim.name={name}"), seconds=35, more={"plan": True}) for name in names
    ]


def _files(size: Size) -> list[Row]:
    few = ["--parameters", "5e5" if size.tiny else "1e9", "--saves", "1" if size.tiny else "2", "--every", "2" if size.tiny else "4"]
    words = ["checkpoint", "--engine", "fsdp", *few, "--precision", "fp32" if size.tiny else "bf16", "--ranks", "1"]
    base = (*size.llama_1b(), *size.step(2))
    return [
        Row(section="files", name="checkpoints, 1B", kind="tool", seconds=90, more={"line": words}),
        Row(section="files", name="export, reopen, load, 1B", kind="export", overrides=base, seconds=60),
        Row(section="files", name="1B, engine=fsdp_offload", overrides=(*base, "engine=fsdp_offload"), seconds=60),
        Row(section="files", name="1B, engine=zero3_offload", overrides=(*base, "engine=zero3_offload"), seconds=150),
    ]


def _tests() -> Row:
    return Row(section="tests", name="pytest -m gpu", kind="tests", seconds=150)
