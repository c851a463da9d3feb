"""Every parameter-efficient method gives the run of plain peft in one process, under every engine at any world size.

Losses, gradient norms and the exported adapter agree within 1e-5; the base stays as it was bit for bit; gradients and optimizer
state are of what is trained, to the byte; and plain peft loads each export in a process of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY, Ranks, blueprint_for, save_tiny
from peft.optimizers import create_loraplus_optimizer
from peft_cases import (
    ATTENTION,
    CASES,
    LENGTH,
    LR,
    REL,
    ROWS,
    STEPS,
    NoTokenizer,
    batch_of,
    config_for,
    config_for_method,
    locals_of,
    rows_of_steps,
    settings,
    with_bottlenecks,
)
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE
from trainers.config.checks import validate
from trainers.config.choices import AdapterInit, Offload, PeftMethod, Precision, Quantisation
from trainers.config.errors import ConfigError
from trainers.engines.build import build_engine
from trainers.engines.fsdp import state as sharded_state
from trainers.model.export import export
from trainers.model.weights import origin_of
from trainers.objectives import NextToken
from trainers.optim.sharded import local
from trainers.peft.adapt import adapt
from trainers.peft.base import Adaptation, read_whole
from trainers.peft.nf4 import packed_shape, round_trip
from trainers.peft.saved import export_adapter
from trainers.world import World

LOOK = 12
"""The step after which AdaLoRA's running means are compared."""
UNTIED = ("lora_more", "adalora", "qlora", "lora_bias", "lora_ends", "freeze", "freeze_pattern")


def adaptation_of(folder: Path, case: str) -> Adaptation:
    blueprint = blueprint_for(folder)
    model = blueprint.build()
    return adapt(model, origin_of(model, blueprint), config_for(folder, case), blueprint, torch.float32)


def state_bytes(engine: Any) -> tuple[int, int]:
    """This rank's bytes of gradients and of optimizer state, on live tensors, before a step."""
    if engine.config.engine.offload_optimizer is not Offload.none:
        return 0, 0
    if hasattr(engine.optimizer, "grad_partitions_flat_buffer"):
        moments = [state[kind] for state in engine.optimizer.optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
        return engine.optimizer.grad_partitions_flat_buffer.nbytes, sum(moment.nbytes for moment in moments)
    gradients = [local(p.grad) for p in engine.model.parameters() if p.grad is not None]
    moments = [local(state[kind]) for state in engine.optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    return sum(tensor.nbytes for tensor in gradients), sum(moment.nbytes for moment in moments)


def stored_bytes(shape: tuple[int, ...], packed: bool) -> tuple[int, int]:
    """Elements of a frozen tensor, and the bytes of one: float32, or rows of NF4."""
    return (math.prod(packed_shape(math.prod(shape))), 1) if packed else (math.prod(shape), 4)


def unmoved(engine: Any, trained: set[str]) -> list[str]:
    """Names of trained parameters whose gradient is missing or zero; collective."""
    from deepspeed.utils import safe_get_full_grad

    found = []
    for name, p in engine.model.named_parameters():
        if name not in trained:
            assert p.grad is None, name
            continue
        grad = safe_get_full_grad(p) if hasattr(p, "ds_id") else None if p.grad is None else sharded_state.whole(p.grad)
        if grad is None or not grad.any():
            found.append(name)
    return found


def train_case(world: World, folder: Path, case: str, engine_name: str, out: Path | None, **train: Any) -> dict[str, Any]:
    """Train in microbatches of two rows, checking on the way what holds of every method."""
    steps = train.pop("steps", STEPS)
    config = config_for(folder, case, engine_name, **train)
    engine: Any = build_engine(config, world, blueprint_for(folder))
    trained = engine.adaptation.trained
    frozen = {name: local.clone() for name, (_, local) in locals_of(engine).items() if name not in trained}
    losses, norms, still, importance = [], [], [], {}
    for step, (ids, labels) in zip(range(steps), rows_of_steps(), strict=False):
        targets = int((labels != IGNORE).sum())
        mine = slice(world.rank, None, world.size)
        chunks = list(zip(ids[mine].split(2), labels[mine].split(2), strict=True))
        local = 0.0
        for number, chunk in enumerate(chunks, 1):
            batch = batch_of(*chunk)
            loss = NextToken()(engine.forward(batch), batch).total
            engine.backward(loss / targets, last=number == len(chunks))
            local += loss.item()
        if step == 1:
            still = unmoved(engine, trained)
        if step == steps - 1:
            bytes_now = state_bytes(engine)
        if engine.adaptation.update is not None:
            engine.adaptation.update.at(step, STEPS)
        norms.append(engine.step(LR))
        losses.append(world.sum([local])[0] / targets)
        if engine.adaptation.update is not None and step == LOOK:
            importance = {
                name: world.sum([float(mean.double().sum()) for mean in means.values()])
                for name, means in engine.adaptation.update.elements.items()
            }
    for name, (p, local_part) in locals_of(engine).items():
        assert name in trained or torch.equal(local_part, frozen[name]), f"{name} of the base has changed"
        assert name in trained or p.grad is None
    weights = {name: tensor.numpy() for name, tensor in engine.weights()}
    probe = batch_of(*(column[:1] for column in next(rows_of_steps())))
    engine.train(False)
    with torch.no_grad():
        logps = engine.forward(probe).logps.numpy()
    if out is not None and engine.adaptation.library_config is not None:
        export_adapter(engine.weights(), engine.adaptation, NoTokenizer(), out, write=world.rank == 0)
    elif out is not None:
        export(engine.weights(), engine.adaptation.form, engine.blueprint, NoTokenizer(), [], out, write=world.rank == 0)
    shapes = engine.shapes()
    sizes = {name: torch.Size(shapes[name]).numel() for name in trained}
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "still": still,
        "importance": importance,
        "logps": logps,
        "bytes": bytes_now,
        "sizes": sizes,
        "report": engine.report(),
        "state": engine.state_bytes(),
        "stored": {name: stored_bytes(shape, name in engine.adaptation.packed) for name, shape in shapes.items() if name not in trained},
    }


def train_cases(world: World, folders: dict[str, Path], cases: list[str], engine: str, out: Path | None) -> dict[str, Any]:
    return {case: train_case(world, folders[case], case, engine, out and out / f"{engine}-{case}") for case in cases}


def plain_base(folder: Path, case: str) -> Any:
    """The base in plain transformers, its linear layers rounded where the case is of 4 bits (as torchao does: test_nf4.py)."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in base.named_modules() if "quantise" in CASES[case] else ():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = round_trip(module.weight.data)
    return base


def plain_model(folder: Path, case: str) -> Any:
    """What a user of plain peft builds, started at our initial values."""
    base, adaptation = plain_base(folder, case), adaptation_of(folder, case)
    if adaptation.update is not None:
        adaptation.update.at(0, STEPS)
    if adaptation.library_config is None:
        for name, p in base.named_parameters():
            p.requires_grad_(name in adaptation.trained)
        return base
    library_config = adaptation.library_config
    if "bottleneck" in CASES[case]:
        return with_bottlenecks(base, settings(case), partial(read_whole, adaptation.origin))
    library_config.inference_mode = False
    if case == "pissa":
        library_config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights="pissa")
    model = peft.get_peft_model(base, library_config)
    assert {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad} == adaptation.trained
    parameters = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name in adaptation.trained if case != "pissa" else ():
            parameters[name].copy_(read_whole(adaptation.origin, name))
    return model


def train_plainly(folder: Path, case: str) -> dict[str, Any]:
    """The reference: one process, all rows at once."""
    model = plain_model(folder, case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    if case == "loraplus":
        ratio = CASES[case]["lr_ratio"]
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1, betas=(0.9, 0.95)
        )
    losses, norms, importance = [], [], {}
    model.train()
    for step, (ids, labels) in enumerate(rows_of_steps()):
        theirs = {"labels": torch.cat([torch.full((ROWS, 1), IGNORE), labels[:, :-1]], dim=1)} if case == "adalora" else {}
        output = model(input_ids=ids, **theirs)
        loss = torch.nn.functional.cross_entropy(output.logits[:, -LENGTH:].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        (output.loss if theirs else loss).backward()  # which holds AdaLoRA's regulariser
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item())
        optimizer.step()
        if theirs:
            model.base_model.update_and_allocate(step)
            if step == LOOK:
                seen = model.base_model.rankallocator
                importance = {
                    name: [float(mean[name].double().sum()) for mean in (seen.exp_avg_ipt, seen.exp_avg_unc)] for name in seen.exp_avg_ipt
                }
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {f"base_model.model.{name}" if "bottleneck" in CASES[case] else name: tensor for name, tensor in model.state_dict().items()}
    if case != "pissa" and isinstance(model, peft.PeftModel):
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {"losses": losses, "norms": norms, "weights": state, "importance": importance}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied base, and an untied one with biases for the cases that train head or biases."""
    made = tmp_path_factory.mktemp("bases")
    tied = save_tiny(made / "tied", tied=True, num_hidden_layers=2)
    untied = save_tiny(made / "untied", tied=False, num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    return {case: untied if case in UNTIED else tied for case in CASES}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    return cache(lambda case: train_plainly(folders[case], case))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


def even_share(numel: int, size: int) -> int:
    return -(-numel // size)


def cases_for(size: int, engine: str) -> list[str]:
    """All for two ranks, one a method for one and three, and of flat partitions of three a few: they do not know methods."""
    if (size, engine) == (3, "zero3"):
        return ["lora_more", "qlora", "adalora", "houlsby"]
    return list(CASES) if size == 2 else [case for case in CASES if case not in ("lora", "lora_bias", "lora_ends", "freeze_pattern")]


SUITES = {
    (2, "fsdp"): pytest.mark.slow,
    (1, "fsdp"): pytest.mark.slow,
    (3, "fsdp"): pytest.mark.slow,
    (2, "zero3"): pytest.mark.slow,
    (1, "zero3"): pytest.mark.soak,
    (3, "zero3"): pytest.mark.slow,
}


@pytest.fixture(scope="module")
def trained(ranks: Callable[[int], Ranks], folders: dict[str, Path], exports: Path) -> Callable[[int, str], list[dict[str, Any]]]:
    """What each rank tells of its runs; those of two ranks leave exports, with what they gave. Each is made once, for whichever test."""

    @cache
    def results(size: int, engine: str) -> list[dict[str, Any]]:
        out = exports / engine if size == 2 else None
        found = ranks(size).call(train_cases, folders, cases_for(size, engine), engine, out, timeout_s=280)
        for folder in out.iterdir() if out is not None else ():
            torch.save(torch.from_numpy(found[0][folder.name.partition("-")[2]]["logps"]), folder / "logps.pt")
        return found

    return results


@pytest.mark.parametrize(("size", "engine"), [pytest.param(*case, marks=marks) for case, marks in SUITES.items()])
def test_a_run_equals_plain_peft(trained: Any, references: Any, size: int, engine: str) -> None:
    results = trained(size, engine)
    for case in cases_for(size, engine):
        reference, got = references(case), [result[case] for result in results]
        for one in got:
            assert one["losses"] == pytest.approx(reference["losses"], rel=REL), case
            assert one["norms"] == pytest.approx(reference["norms"], rel=REL), case
            assert one["still"] == [], case
            assert one["importance"].keys() == reference["importance"].keys()
            for name, sums in reference["importance"].items():
                assert one["importance"][name] == pytest.approx(sums, rel=10 * REL), name
            for name, value in one["weights"].items() if case != "pissa" else ():
                torch.testing.assert_close(torch.from_numpy(value), reference["weights"][name], rtol=REL, atol=REL, msg=f"{case} {name}")
        if case == "adalora":  # 14 layers, from rank 6 to 3 on average
            assert sum(len(tensor) for name, tensor in reference["weights"].items() if "lora_E" in name) == 14 * 3
        total = sum(got[0]["sizes"].values())
        parts = size if engine == "zero3" else 1
        frozen = sum(even_share(numel, parts) * parts * itemsize for numel, itemsize in got[0]["stored"].values())
        trained = sum(even_share(numel, parts) * parts for numel in got[0]["sizes"].values())
        copies = 2 if engine == "zero3" else 1  # on a CPU, DeepSpeed has masters beside what it computes with in float32, too
        counted = {"frozen": frozen, "trainable": 4 * copies * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
        assert {name: sum(one["state"][name] for one in got) for name in counted} == counted, case
        if engine == "fsdp":
            assert sum(one["bytes"][0] for one in got) == 4 * total, case
            assert sum(one["bytes"][1] for one in got) == 8 * total, case
        else:
            share = sum(even_share(numel, size) for numel in got[0]["sizes"].values())
            assert {one["bytes"] for one in got} == {(4 * share, 8 * share)}, case


LOAD = """
import sys, warnings, torch, peft
from pathlib import Path
from transformers import AutoModelForCausalLM
from trainers.batch import IGNORE
warnings.simplefilter("error", UserWarning)  # peft's words on missing and unexpected keys are such
warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a layer that AdaLoRA has pruned whole
ids, labels, out, bases = torch.load(sys.argv[1], weights_only=True)
for folder in sorted(Path(out).iterdir()):
    case = folder.name.partition("-")[2]
    if (folder / "adapter_config.json").exists():
        if (folder / "bottleneck_adapter.py").exists():
            sys.path.insert(0, str(folder))
            import bottleneck_adapter
        base = AutoModelForCausalLM.from_pretrained(bases[case], dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder)
        again = model  # an adapter finds its base by itself, which for those of 4 bits is not the one that they were trained on
        if "q" not in case:
            again = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for opened in (model, again):
        opened.eval()
        with torch.no_grad():
            logps = opened(input_ids=ids).logits[:, -ids.shape[1]:].log_softmax(-1)
        kept = labels != IGNORE
        theirs = logps.gather(-1, labels.where(kept, 0)[..., None])[..., 0].where(kept, 0.0)
        print(case, float((theirs - torch.load(folder / "logps.pt")).abs().max()))
"""


@pytest.mark.parametrize("engine", [pytest.param(engine, marks=SUITES[2, engine]) for engine in ("fsdp", "zero3")])
def test_plain_peft_loads_every_export(trained: Any, folders: Any, exports: Path, tmp_path: Path, engine: str) -> None:
    """A clean process, every warning an error: no missing or unexpected key, equal logits."""
    trained(2, engine)
    ids, labels = (column[:1] for column in next(rows_of_steps()))
    bases = {case: str(folder) for case, folder in folders.items()}
    for case in ("qlora", "loftq"):
        bases[case] = str(tmp_path / case)
        plain_base(folders[case], case).save_pretrained(bases[case])
    torch.save((ids, labels, str(exports / engine), bases), tmp_path / "probe.pt")
    line = [sys.executable, "-c", LOAD, str(tmp_path / "probe.pt")]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = [line.split() for line in done.stdout.splitlines()]
    assert {case for case, _ in differences} == set(CASES)
    assert len(differences) == 2 * len(CASES)
    assert max(float(difference) for _, difference in differences) < REL, differences


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_in_bf16_only_what_is_trained_is_float32(ranks: Callable[[int], Ranks], folders: Any, references: Any, engine: str) -> None:
    for case in ("lora", "dora", "freeze", "ptuning", "adalora"):
        result = ranks(2).call(partial(train_case, steps=6, precision=Precision.bf16), folders[case], case, engine, None)[0]
        assert result["losses"] == pytest.approx(references(case)["losses"][:6], rel=1e-2)
        table = result["report"]
        assert table["frozen weights"].startswith("bfloat16")
        assert [table[row][:7] for row in ("storage", "gradient reduction", "optimizer state")] == ["float32"] * 3
        assert result["still"] == []


def save_and_load(world: World, folder: Path, case: str, engine_name: str, checkpoint: Path, saves: bool) -> dict[str, Any]:
    """Take a step and save, or load; then take one more."""
    engine: Any = build_engine(config_for(folder, case, engine_name), world, blueprint_for(folder))
    for number, (ids, labels) in zip(range(2), rows_of_steps(), strict=False):
        if number == 1:
            dcp.save(engine.state(), checkpoint_id=checkpoint) if saves else engine.load(checkpoint)
        elif not saves:
            continue
        mine = slice(world.rank, None, world.size)
        batch = batch_of(ids[mine], labels[mine])
        engine.backward(-engine.forward(batch).logps.sum() / 100, last=True)
        if engine.adaptation.update is not None:
            engine.adaptation.update.at(number, STEPS)
        engine.step(LR)
    return {name: tensor.numpy() for name, tensor in engine.weights()}


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
@pytest.mark.parametrize("case", ["lora_more", "freeze", "pissa", "ptuning", "parallel"])
def test_a_checkpoint_holds_what_is_trained_and_continues_exactly(
    ranks: Callable[[int], Ranks], folders: Any, tmp_path: Path, case: str, engine: str
) -> None:
    step = tmp_path / "step"
    saved = ranks(2).call(save_and_load, folders[case], case, engine, step, True)[0]
    again = ranks(2).call(save_and_load, folders[case], case, engine, step, False)[0]
    other = ranks(3).call(save_and_load, folders[case], case, engine, step, False)[0]
    for name, tensor in saved.items():
        assert (again[name] == tensor).all(), name
        torch.testing.assert_close(torch.from_numpy(other[name]), torch.from_numpy(tensor), rtol=1e-5, atol=1e-6)
    entries = FileSystemReader(step).read_metadata().state_dict_metadata
    stored = {name.removeprefix("model.") for name in entries if name.startswith("model.")}
    assert stored == adaptation_of(folders[case], case).trained


def test_values_are_those_of_peft_itself(folders: Any) -> None:
    """Adapters begin with the distribution that peft gives them, as a function of seed and name alone."""
    from peft import LoraConfig

    adaptation = adaptation_of(folders["lora"], "lora")
    origin = adaptation.origin
    first = {name: read_whole(origin, name) for name in sorted(adaptation.trained)}
    assert all(torch.equal(read_whole(origin, name), first[name]) for name in sorted(adaptation.trained, reverse=True))
    plain = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders["lora"]), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs = {name.removeprefix("base_model.model."): p.detach() for name, p in plain.named_parameters() if p.requires_grad}
    for name, value in first.items():
        if "lora_B" in name:
            assert not value.any()
        else:  # uniform within the same bounds, 1 / sqrt(inputs)
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.2)
            assert theirs[name].std() == pytest.approx(float(value.std()), rel=0.3)
    assert len({value.sum().item() for name, value in first.items() if "lora_A" in name}) == len(first) // 2


def test_dora_and_pissa_begin_where_the_base_is(folders: Any) -> None:
    dora = adaptation_of(folders["dora"], "dora")
    for name in dora.trained:
        if "magnitude" in name:
            base = name.replace("lora_magnitude_vector.default.weight", "base_layer.weight")
            torch.testing.assert_close(read_whole(dora.origin, name), read_whole(dora.origin, base).norm(dim=1))
    pissa = adaptation_of(folders["pissa"], "pissa")
    base = AutoModelForCausalLM.from_pretrained(folders["pissa"], dtype=torch.float32).state_dict()
    for name in pissa.trained:
        if "lora_A" in name:
            path = name.partition(".lora_A")[0]
            a, b = read_whole(pissa.origin, name), read_whole(pissa.origin, name.replace("lora_A", "lora_B"))
            whole = read_whole(pissa.origin, f"{path}.base_layer.weight") + 16 / 4 * b @ a
            torch.testing.assert_close(whole, base[f"{path}.weight"], rtol=1e-4, atol=1e-5)


BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("lora", {"targets": ["q_prj"]}, ["`peft.targets` = 'q_prj'", "did you mean q_proj"]),
    ("lora", {"targets": ["zzz"]}, ["`peft.targets` = 'zzz'", "it has embed_tokens, q_proj"]),
    ("lora", {"targets": ["norm"]}, ["`peft.targets` = 'norm'"]),
    ("lora", {"targets": ["lm_head"]}, ["`peft.targets` = 'lm_head'", "ties lm_head.weight and model.embed_tokens.weight"]),
    ("lora", {"modules_to_save": ["embed_tokens"]}, ["'model.embed_tokens'", "ties"]),
    ("lora", {"modules_to_save": ["lm_haed"]}, ["`peft.modules_to_save` = 'lm_haed'", "did you mean lm_head"]),
    ("lora", {"rank": 17}, ["`peft.rank` = 17", "is 16 x 32", "peft.rank=16 or less"]),
    ("houlsby", {"targets": ["mlp"]}, ["`peft.targets` = 'mlp'", "no layer of this name"]),
    ("houlsby", {"targets": ["embed_tokens"]}, ["no bottleneck adapter is put on Embedding"]),
    ("parallel", {"targets": ["self_attn"]}, ["LlamaAttention takes or returns", "peft.targets=[mlp]"]),
    ("parallel", {"targets": ["mpl"]}, ["`peft.targets` = 'mpl'", "did you mean mlp"]),
    ("freeze", {"last_blocks": 3}, ["`peft.last_blocks` = 3", "has 2 blocks"]),
    ("freeze", {"last_blocks": None, "freeze": ["*mpl*"]}, ["`peft.freeze` = '*mpl*'", "matches no parameter"]),
    ("freeze", {"last_blocks": None, "freeze": ["*"]}, ["freezes every parameter"]),
]


@pytest.mark.parametrize(("case", "more", "words"), BAD, ids=str)
def test_what_the_model_does_not_have_is_refused_before_a_value_is_read(
    folders: Any, monkeypatch: pytest.MonkeyPatch, case: str, more: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr("trainers.model.safetensors_files.Weights.read", None)
    monkeypatch.setitem(CASES, case, CASES[case] | more)
    with pytest.raises(ConfigError) as refused:
        adaptation_of(folders["lora"], case)
    for word in words:
        assert word in str(refused.value)


FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("none", {"rank": 4}, "it is for lora, dora"),
    ("ia3", {"dropout": 0.1}, "`peft.dropout` = 0.1"),
    ("lora", {"virtual_tokens": 3}, "it is for prompt, prefix, ptuning"),
    ("lora", {"dropout": 1.0}, "`peft.dropout` = 1.0"),
    ("lora", {"targets": ["all-linear", "q_proj"]}, "must be the only target"),
    ("lora", {"init": AdapterInit.vocabulary}, "is not a valid start"),
    ("lora", {"adapter": "/nowhere"}, "no adapter_config.json"),
    ("freeze", {}, "peft.last_blocks=4"),
    ("freeze", {"freeze": ["a"], "last_blocks": 1}, "peft.last_blocks"),
    ("prompt", {}, "data.packing=false"),
    ("lora", {"bottleneck": 8}, "it is for bottleneck"),
    ("bottleneck", {"rank": 4}, "peft.method=bottleneck has no such setting"),
    ("bottleneck", {"quantise": Quantisation.nf4}, "it is for lora"),
    ("bottleneck", {"scale": -1.0}, "`peft.scale` = -1.0"),
    ("lora", {"target_rank": 2}, "it is for adalora"),
    ("adalora", {"adapter": "/nowhere"}, "`peft.adapter`"),
    ("adalora", {"target_rank": 8}, "peft.rank = 8, which adalora begins with, must be larger"),
    ("adalora", {"beta2": 1.0}, "`peft.beta2` = 1.0"),
    ("adalora", {"tfinal": 0}, "`peft.tfinal` = 0"),
]


@pytest.mark.parametrize(("method", "more", "words"), FOREIGN, ids=str)
def test_settings_of_another_method_are_refused(method: str, more: dict[str, Any], words: str) -> None:
    config = config_for_method(PeftMethod(method))
    for name, value in more.items():
        setattr(config.peft, name, value)
    with pytest.raises(ConfigError) as refused:
        validate(config)
    assert words in str(refused.value)


KNOBS: list[Any] = [
    ("fsdp_offload", {}),
    ("fsdp", {"engine.offload_optimizer": Offload.cpu}),
    ("fsdp", {"engine.replicate": 2}),
    pytest.param("zero3_offload", {}, marks=pytest.mark.cpu_adam),
    pytest.param("zero3", {"engine.param_persistence_threshold": 0, "engine.sub_group_size": 1000}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "more"), KNOBS, ids=str)
def test_knobs_of_an_engine_change_no_figure(
    ranks: Callable[[int], Ranks], folders: Any, references: Any, engine: str, more: dict[str, Any]
) -> None:
    """Offloaded, replicated, and with no parameter kept whole, so that those of ParameterDicts and of neighbours are gathered in time."""
    for case in ("dora", "ia3", "prefix", "adalora"):
        result = ranks(2).call(partial(train_case, steps=6, **more), folders[case], case, engine, None)[0]
        assert result["losses"] == pytest.approx(references(case)["losses"][:6], rel=REL)
        assert result["norms"] == pytest.approx(references(case)["norms"][:6], rel=REL)


def test_experts_are_left_to_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    monkeypatch.setitem(CASES, "lora_attention", {"method": "lora", "rank": 4, "targets": ATTENTION})
    sizes = TINY | {"num_hidden_layers": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(tmp_path / "moe")
    assert "none on experts.gate_up_proj (39.0%)" in adaptation_of(tmp_path / "moe", "lora").notes["adapters"]
    with pytest.raises(ConfigError, match="no choice of its own for Qwen3MoeForCausalLM"):
        adaptation_of(tmp_path / "moe", "ia3")
    assert adaptation_of(tmp_path / "moe", "lora_attention").trained
