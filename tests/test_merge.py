"""A merged directory is the model that base and adapter are together, for every method, in little memory, or nothing at all."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ROOT, TINY, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from tools.merge import __main__ as merge
from tools.merge import probe

REL = 1e-5
Q = "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."
lora = partial(peft.LoraConfig, task_type="CAUSAL_LM", r=4, lora_alpha=8)
WAVES = {"rank_pattern": {r"layers\.1\..*q_proj": 2}, "alpha_pattern": {"v_proj": 32}}
CASES: dict[str, tuple[str, Any]] = {
    "lora": ("tied", lora(target_modules="all-linear")),
    "rslora": ("tied", lora(target_modules=["q_proj", "v_proj"], use_rslora=True, **WAVES)),
    "dora": ("tied", lora(target_modules=["q_proj", "down_proj"], use_dora=True)),
    "pissa": ("tied", lora(target_modules=["q_proj"], init_lora_weights="pissa")),
    "olora": ("tied", lora(target_modules=["q_proj"], init_lora_weights="olora")),
    "biases": ("untied", lora(target_modules=["q_proj"], bias="all")),
    "lora_only": ("untied", lora(target_modules=["q_proj", "up_proj"], bias="lora_only", lora_bias=False)),
    "lora_bias": ("untied", lora(target_modules=["q_proj"], lora_bias=True)),
    "saved": ("untied", lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "layers.0.mlp"])),
    "ends": ("untied", lora(target_modules=["embed_tokens", "lm_head"])),
    "tied_embedding": ("tied", lora(target_modules=["embed_tokens", "q_proj"])),
    "tied_head": ("tied", lora(target_modules=["lm_head"])),
    "tied_head_saved": ("tied", lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "kept_tied": ("tied", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "lora_kept_tied": ("tied", lora(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "tokens": ("tied", lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]})),
    "tokens_alone": ("untied", peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 7], target_modules=["embed_tokens"])),
    "conv1d": ("gpt2", lora(target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)),
    "conv1d_dora": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "conv1d_ia3": ("gpt2", peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)),
    "experts": ("mixtral", lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "adalora": ("tied", peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, target_r=3, total_step=9, target_modules=["q_proj"])),
    "ia3": ("untied", peft.IA3Config(task_type="CAUSAL_LM")),
    "loha": ("tied", peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])),
    "lokr": ("tied", peft.LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])),
    "oft": ("tied", peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, target_modules=["q_proj"])),
    "hra": ("tied", peft.HRAConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])),
    "norms": ("tied", peft.LNTuningConfig(task_type="CAUSAL_LM")),
}
UNTIED = {"tied_embedding", "tied_head", "tied_head_saved", "conv1d"}
"""Where an adapter changes one of two tied tensors: plain peft's merge changes both, and is wrong."""
TWICE = {"lora_kept_tied"}
"""Where plain peft's merge adds the change of two tied tensors twice."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {
        "tied": save_tiny(folder / "tied", tied=True),
        "untied": save_tiny(folder / "untied", tied=False, attention_bias=True, mlp_bias=True),
        "gpt2": folder / "gpt2",
        "mixtral": folder / "mixtral",
    }
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 33, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(made["gpt2"])
    MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3, initializer_range=0.2)).save_pretrained(made["mixtral"])
    return made


def adapter_on(base: Path, config: Any, folder: Path, seed: int = 0) -> Path:
    """What plain peft saves of an adapter after some training, which random numbers stand for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        if config.peft_type == "ADALORA":
            names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
            model.peft_config["default"].rank_pattern = {name: [True, False, True, True, False, bool(i)] for i, name in enumerate(names)}
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and "ranknum" not in name:
                    p += 0.1 * torch.randn_like(p)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`adapter(case)` is the directory that plain peft saved of a case."""
    made: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in made:
            base, config = CASES[case]
            made[case] = adapter_on(bases[base], config, tmp_path_factory.mktemp(case) / "adapter")
        return made[case]

    return of


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The tool in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*line: object, expect: int = 0) -> str:
        capsys.readouterr()
        code = merge.main([*map(str, line)])
        said = capsys.readouterr()
        assert code == expect, said.out + said.err
        return said.out + said.err

    yield run
    signal.signal(signal.SIGTERM, before)


def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 33).view(2, 15)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def beside(base: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(opened(base), str(folder))


def require_near(got: Tensor, expected: Tensor, rel: float = REL) -> None:
    assert (got - expected).abs().max() <= rel * expected.abs().max()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def delta(folder: Path, layer: str = Q, scale: float = 2.0) -> Tensor:
    """B A of a layer, times alpha / rank."""
    file = load_file(folder / "adapter_model.safetensors")
    return scale * (file[f"{PREFIX}{layer}.lora_B.weight"].double() @ file[f"{PREFIX}{layer}.lora_A.weight"].double()).float()


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_base_and_adapter(
    bases: dict[str, Path], adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path, case: str
) -> None:
    base = bases[CASES[case][0]]
    tool(adapter(case), tmp_path / "out", "--no-probe")
    merged = logits(opened(tmp_path / "out"))
    together = beside(base, adapter(case))
    expected = logits(together)
    require_near(merged, expected)
    assert (logits(opened(base)) - expected).abs().max() > 1e-2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    was = json.loads((base / "config.json").read_text())
    if case in UNTIED:
        assert not config.pop("tie_word_embeddings")
        was.pop("tie_word_embeddings", None)
    elif case not in TWICE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require_near(merged, logits(together.merge_and_unload()))
    assert config == was


def test_pissa_as_a_run_exports_it(bases: dict[str, Path], tool: Callable[..., str], tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(opened(bases["tied"]), config)
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    tool(tmp_path / "adapter", tmp_path / "out", "--no-probe")
    require_near(logits(opened(tmp_path / "out")), expected)


def test_an_adapter_of_single_experts_goes_into_their_stack(bases: dict[str, Path], tool: Callable[..., str], tmp_path: Path) -> None:
    """Mixtral's experts were modules of their own once, each with an adapter of its own."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for layer, expert in itertools.product(range(3), range(3)):
        for name, (rows, columns) in {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items():
            path = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            state |= {f"{path}.lora_A.weight": torch.randn(4, columns), f"{path}.lora_B.weight": torch.randn(rows, 4)}
    mine = tmp_path / "mine"
    lora(target_modules=["w1", "w2", "w3"], base_model_name_or_path=str(bases["mixtral"])).save_pretrained(mine)
    save_file(state, mine / "adapter_model.safetensors", {"format": "pt"})
    tool(mine, tmp_path / "out", "--no-probe")
    require_near(logits(opened(tmp_path / "out")), logits(beside(bases["mixtral"], mine)))
    stack, before = (opened(folder).model.layers[1].mlp.experts.down_proj[2] for folder in (tmp_path / "out", bases["mixtral"]))
    torch.testing.assert_close(stack, before + delta(mine, "model.layers.1.block_sparse_moe.experts.2.w2"), rtol=REL, atol=1e-5)


def in_bf16(base: Path, folder: Path, **options: Any) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder, **options)
    return folder


def test_types_and_shards(bases: dict[str, Path], adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path) -> None:
    base = in_bf16(bases["tied"], tmp_path / "base", max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    said = tool(adapter("lora"), tmp_path / "out", "--model", base)
    assert "rounded to bfloat16" in said
    before, after = tensors(base), tensors(tmp_path / "out")
    exact = before[f"{Q}.weight"].float() + delta(adapter("lora"))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert "_proj" in name or torch.equal(tensor, before[name]), name
    assert torch.equal(after[f"{Q}.weight"], exact.bfloat16())
    for name in ("float32", "float16"):
        tool(adapter("lora"), tmp_path / name, "--model", base, "--dtype", name, "--no-probe", "--shard-gib", 20_000 / 2**30)
        files = tensors(tmp_path / name)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        torch.testing.assert_close(files[f"{Q}.weight"].float(), exact, rtol=1e-3 if name == "float16" else 1e-6, atol=1e-6)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["dtype"], opened(tmp_path / name).config.model_type) == (name, "llama")


def test_a_tensor_keeps_the_type_that_it_has_in_the_base(
    bases: dict[str, Path], adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path
) -> None:
    base = shutil.copytree(bases["tied"], tmp_path / "base")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors(base).items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    tool(adapter("lora"), tmp_path / "out", "--model", base, "--no-probe")
    assert {name: tensor.dtype for name, tensor in tensors(tmp_path / "out").items()} == {n: t.dtype for n, t in mixed.items()}


@pytest.fixture(scope="module")
def three(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRA adapters of one rank: all layers, attention, attention again."""
    folder = tmp_path_factory.mktemp("three")
    targets: list[Any] = ["all-linear", ["q_proj", "v_proj"], ["q_proj", "v_proj"]]
    return [adapter_on(bases["untied"], lora(target_modules=aim), folder / f"{i}", seed=i) for i, aim in enumerate(targets)]


def test_weights_are_of_what_each_adapter_changes(
    bases: dict[str, Path], three: list[Path], adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path
) -> None:
    said = tool(f"{three[0]}=0.7", f"{three[1]}=-0.4", tmp_path / "out")
    assert float(re.search(r"to base and adapter: (\S+),", said)[1]) < 1e-4  # type: ignore[index]
    before, after = tensors(bases["untied"]), tensors(tmp_path / "out")
    for name in before:
        layer = name.removesuffix(".weight")
        expected = before[name]
        if "_proj.weight" in name:
            expected = expected + 0.7 * delta(three[0], layer)
        if re.search(r"[qv]_proj\.weight", name):
            expected = expected - 0.4 * delta(three[1], layer)
        torch.testing.assert_close(after[name], expected, rtol=REL, atol=1e-6)
    tool(f"{three[0]}=0.5", tmp_path / "alone", "--no-probe")
    expected = before[f"{Q}.weight"] + 0.5 * delta(three[0])
    torch.testing.assert_close(tensors(tmp_path / "alone")[f"{Q}.weight"], expected, rtol=REL, atol=1e-6)
    tool(f"{adapter('saved')}=0.25", three[2], tmp_path / "saved", "--no-probe")
    own = load_file(adapter("saved") / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    mixed = before["lm_head.weight"] + 0.25 * (own - before["lm_head.weight"])
    torch.testing.assert_close(tensors(tmp_path / "saved")["lm_head.weight"], mixed, rtol=REL, atol=1e-6)


def ties(deltas: list[Tensor], density: float) -> Tensor:
    """Yadav et al. 2023, "TIES-Merging": trim, elect a sign by total mass, mean of those that agree; in loops."""
    trimmed = []
    for one in deltas:
        kept = one.abs().flatten().sort(descending=True).values[int(density * one.numel()) - 1]
        trimmed.append(torch.where(one.abs() >= kept, one, 0.0))
    elected = torch.where(sum(trimmed) >= 0, 1.0, -1.0)  # type: ignore[arg-type]
    agree = [torch.where(one.sign() == elected, one, 0.0) for one in trimmed]
    count = sum((one != 0).float() for one in agree)
    return sum(agree) / count.clamp(min=1.0)  # type: ignore[no-any-return, union-attr]


def test_ties_and_dare_work_on_whole_changes(bases: dict[str, Path], three: list[Path], tool: Callable[..., str], tmp_path: Path) -> None:
    before = tensors(bases["untied"])[f"{Q}.weight"]
    deltas = [delta(three[1]), delta(three[2])]
    for method, density in (("ties", 0.3), ("magnitude_prune", 1), ("dare_linear", 1), ("dare_ties", 1)):
        tool(*three[1:], tmp_path / method, "--method", method, "--density", density, "--no-probe")
        expected = ties(deltas, density) if "ties" in method else sum(deltas)
        torch.testing.assert_close(tensors(tmp_path / method)[f"{Q}.weight"], before + expected, rtol=1e-5, atol=1e-5)
    dare = ["--method", "dare_linear", "--density", 0.5]
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert "not compared: peft cannot run" in tool(*three[1:], tmp_path / name, *dare, "--seed", seed)
    found = [tensors(tmp_path / name)[f"{Q}.weight"] for name in ("one", "same", "other")]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    kept = (found[0] - before) / 2
    share = [((kept - value).abs() < 1e-5).float().mean() for value in (0.0, deltas[0], deltas[1], deltas[0] + deltas[1])]
    assert sum(share) == pytest.approx(1, abs=0.01)
    assert all(part == pytest.approx(0.25, abs=0.06) for part in share)


@pytest.mark.parametrize("method", ["linear", "svd", "cat", "ties", "ties_svd", "magnitude_prune"])
def test_a_method_of_peft_is_peft_s_own(
    bases: dict[str, Path], three: list[Path], tool: Callable[..., str], tmp_path: Path, method: str
) -> None:
    options = {"density": 0.5} if "ties" in method or "prune" in method else {}
    line = ["--method", f"peft:{method}", *(["--density", 0.5] if options else [])]
    said = tool(f"{three[1]}=0.7", f"{three[2]}=0.6", tmp_path / "out", *line)
    assert float(re.search(r"to base and adapter: (\S+),", said)[1]) < 1e-4  # type: ignore[index]
    model = peft.PeftModel.from_pretrained(opened(bases["untied"]), str(three[1]), "a")
    model.load_adapter(str(three[2]), "b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.6], "c", combination_type=method, **options)
    model.set_adapter("c")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_grown_vocabulary_comes_with_the_adapter(bases: dict[str, Path], tool: Callable[..., str], tmp_path: Path) -> None:
    model = opened(bases["untied"])
    model.resize_token_embeddings(36)
    together = peft.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for p in together.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    together.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(bases["untied"])}))
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    said = tool(tmp_path / "adapter", tmp_path / "out")
    assert float(re.search(r"to base and adapter: (\S+),", said)[1]) < 1e-4  # type: ignore[index]
    merged = opened(tmp_path / "out")
    assert merged.config.vocab_size == 36
    require_near(logits(merged), logits(together))
    assert "the adapter" in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_what_stands_beside_the_weights_comes_along(
    bases: dict[str, Path], adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path
) -> None:
    base, mine = shutil.copytree(bases["tied"], tmp_path / "base"), shutil.copytree(adapter("lora"), tmp_path / "mine")
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "modeling_own.py"):
        (base / name).write_text(f'"base {name}"')
    tool(mine, tmp_path / "one", "--model", base, "--no-probe")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in base.iterdir()}
    for name in names - {"model.safetensors", "config.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (base / name).read_bytes()
    (mine / "tokenizer_config.json").write_text('"adapter"')
    tool(mine, tmp_path / "two", "--model", base, "--no-probe")
    assert (tmp_path / "two" / "tokenizer_config.json").read_text() == '"adapter"'
    assert not (tmp_path / "two" / "chat_template.jinja").exists()
    assert (tmp_path / "two" / "modeling_own.py").is_file()


def test_the_end_says_how_far_the_models_are(
    adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tool(adapter("lora"), tmp_path / "one")
    assert float(re.search(r"largest difference of a logit to base and adapter: (\S+),", said)[1]) < 1e-4  # type: ignore[index]
    assert "64 of 64 positions" in said
    assert f'from_pretrained("{tmp_path / "one"}")' in said
    off = probe.Difference(largest=0.5, scale=3.0, same=60, positions=64)
    monkeypatch.setattr(probe, "compare", lambda folder, merge: off)
    assert "is not the same model" in tool(adapter("lora"), tmp_path / "two", expect=1)
    assert (tmp_path / "two" / "model.safetensors").is_file()
    monkeypatch.setattr("trainers.host.memory_available", lambda: 1000)
    assert re.search(r"not compared: .* needs [\d,]+ bytes of memory, and 1,000 are free", tool(adapter("lora"), tmp_path / "three"))


def changed(folder: Path, make: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(make(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors", {"format": "pt"})


def configured(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def quantisation_left(base: Path, more: dict[str, Tensor] | None = None) -> None:
    save_file(load_file(base / "model.safetensors") | (more or {}), base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))


def cut(path: Path, count: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-count])


KEY = f"{PREFIX}{Q}.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "no directory": (lambda a, b: shutil.rmtree(a), ["is not a directory"]),
    "no adapter": (lambda a, b: (a / "adapter_config.json").unlink(), ["is not an adapter", "adapter_config.json"]),
    "bad config": (lambda a, b: (a / "adapter_config.json").write_text("{"), ["adapter_config.json cannot be read"]),
    "unknown method": (lambda a, b: configured(a, peft_type="NEW"), ["cannot be read", "NEW"]),
    "no weights": (lambda a, b: (a / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors is missing"]),
    "truncated": (lambda a, b: cut(a / "adapter_model.safetensors"), ["adapter_model.safetensors is damaged or truncated"]),
    "lost key": (lambda a, b: changed(a, lambda t: {k: v for k, v in t.items() if k != KEY}), [f"it lacks {Q}.lora_A.weight"]),
    "foreign key": (
        lambda a, b: changed(a, lambda t: t | {KEY.replace("s.1", "s.9"): t[KEY].clone()}),
        ["the base has no place for", "model.layers.9.self_attn.q_proj.lora_A.weight"],
    ),
    "another base": (
        lambda a, b: changed(a, lambda t: t | {KEY: torch.ones(4, 64)}),
        [f"{Q}.lora_A.weight is [4, 64] in the adapter and would be [4, 32] on this base"],
    ),
    "other layers": (lambda a, b: configured(a, target_modules=["c_attn"]), ["does not fit the base", "c_attn"]),
    "integers": (lambda a, b: changed(a, lambda t: t | {KEY: t[KEY].to(torch.int8)}), ["holds I8"]),
    "virtual tokens": (
        lambda a, b: (a / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"})),
        ["PREFIX_TUNING puts virtual tokens in front"],
    ),
    "bottlenecks": (
        lambda a, b: (a / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK", "task_type": "CAUSAL_LM"})),
        ["bottleneck adapters have an activation between two matrices"],
    ),
    "another task": (lambda a, b: configured(a, task_type="SEQ_CLS"), ["its task is SEQ_CLS"]),
    "changed base": (lambda a, b: configured(a, init_lora_weights="pissa_niter_4"), ["init_lora_weights=pissa_niter_4", "plain LoRA"]),
    "no base named": (lambda a, b: configured(a, base_model_name_or_path=None), ["names no base", "--model DIR"]),
    "base moved": (lambda a, b: b.rename(b.with_name("moved")), ["names, is not there", "--model DIR"]),
    "base without weights": (lambda a, b: (b / "model.safetensors").unlink(), ["the base", "model.safetensors is missing"]),
    "truncated base": (lambda a, b: cut(b / "model.safetensors"), ["the base", "truncated"]),
    "quantised base": (
        lambda a, b: quantisation_left(b, {"model.norm.codes": torch.zeros(2, 2, dtype=torch.uint8)}),
        ["quantised (bitsandbytes)", "--model DIR"],
    ),
}


def test_what_is_left_of_quantisation_in_the_base_s_config_is_left_out(
    bases: dict[str, Path], adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path
) -> None:
    base, mine = shutil.copytree(bases["tied"], tmp_path / "base"), shutil.copytree(adapter("lora"), tmp_path / "mine")
    configured(mine, base_model_name_or_path=str(base))
    quantisation_left(base)
    said = tool(mine, tmp_path / "out")
    assert "largest difference" in said
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.fixture
def pair(bases: dict[str, Path], adapter: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """An adapter and its base, to be damaged."""
    base, mine = shutil.copytree(bases["tied"], tmp_path / "base"), shutil.copytree(adapter("lora"), tmp_path / "mine")
    configured(mine, base_model_name_or_path=str(base))
    return mine, base


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_message(
    pair: tuple[Path, Path], tool: Callable[..., str], tmp_path: Path, case: str
) -> None:
    damage, words = REFUSED[case]
    damage(*pair)
    said = tool(pair[0], tmp_path / "out", expect=2)
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words), said
    assert not {"out", "out.tmp"} & {path.name for path in tmp_path.iterdir()}


def test_bad_places_and_options_are_refused(
    pair: tuple[Path, Path], bases: dict[str, Path], three: list[Path], tool: Callable[..., str], tmp_path: Path, monkeypatch: Any
) -> None:
    mine, base = pair
    for out in (mine, base):
        assert "exists and is not empty" in tool(mine, out, expect=2)
    staged = shutil.copytree(mine, tmp_path / "new.tmp")
    assert "would be written over" in tool(staged, tmp_path / "new", expect=2)
    assert (staged / "adapter_config.json").is_file()
    shutil.copytree(mine, tmp_path / "run" / "export")
    assert f"{tmp_path / 'run' / 'export'} has one" in tool(tmp_path / "run", tmp_path / "out", expect=2)
    assert "name different bases" in tool(mine, three[0], tmp_path / "out", expect=2)
    assert "does not fit the base" in tool(mine, tmp_path / "out", "--model", bases["gpt2"], expect=2)
    options: dict[str, list[object]] = {
        "needs --density": ["--method", "ties"],
        "--density 2": ["--method", "ties", "--density", 2],
        "--density 0.5: a number": ["--density", 0.5],
        "--svd-rank 3": ["--svd-rank", 3],
        "--method sum: one of linear": ["--method", "sum"],
    }
    for words, line in options.items():
        assert words in tool(mine, tmp_path / "out", *line, expect=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1,000 free" in tool(mine, tmp_path / "deep" / "out", expect=2)
    assert not {"out", "out.tmp", "deep"} & {path.name for path in tmp_path.iterdir()}


def test_only_plain_lora_is_combined_by_peft(adapter: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path) -> None:
    said = tool(adapter("saved"), adapter("biases"), tmp_path / "out", "--method", "peft:cat", expect=2)
    assert "of plain LoRA alone" in said
    assert "has more at" in said


@pytest.mark.parametrize(
    ("what", "value", "dtype"), [("adapter", torch.nan, "saved"), ("base", torch.inf, "saved"), ("adapter", 1e30, "float16")]
)
def test_values_that_are_not_finite_are_named(
    pair: tuple[Path, Path], tool: Callable[..., str], tmp_path: Path, what: str, value: float, dtype: str
) -> None:
    def spoil(state: dict[str, Tensor]) -> dict[str, Tensor]:
        next(tensor for name, tensor in state.items() if Q in name)[1, 2] = value
        return state

    mine, base = pair
    if what == "adapter":
        changed(mine, spoil)
    else:
        save_file(spoil(load_file(base / "model.safetensors")), base / "model.safetensors", {"format": "pt"})
    said = tool(mine, tmp_path / "out", "--dtype", dtype, expect=1)
    assert "holds values that are not finite" in said
    assert Q in said
    assert not {"out", "out.tmp"} & {path.name for path in tmp_path.iterdir()}


MEASURED = """
import re, sys
from pathlib import Path
from tools.merge.__main__ import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16384}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LoRA on a base of 690 MB in float32, its largest tensor 67 MB."""
    folder = tmp_path_factory.mktemp("large")
    base = save_tiny(folder / "base", tied=False, num_hidden_layers=6, **WIDE)
    mine = adapter_on(save_tiny(folder / "small", tied=False, num_hidden_layers=1, **WIDE), lora(target_modules=LINEAR), folder / "a")
    changed(mine, lambda one: {k.replace("s.0.", f"s.{i}."): v.clone() for k, v in one.items() for i in range(6)})
    configured(mine, base_model_name_or_path=str(base))
    return mine, base


@pytest.mark.for_real
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux' /proc")
def test_the_peak_of_memory_does_not_grow_with_the_model(large: tuple[Path, Path], adapter: Callable[[str], Path], tmp_path: Path) -> None:
    def peak(*line: object) -> int:
        command = [sys.executable, "-c", MEASURED, *map(str, line), "--no-probe"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True).stdout
        return int(said.splitlines()[-1]) * 1024

    least = peak(adapter("lora"), tmp_path / "tiny")
    once = peak(large[0], tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size > 5e8
    assert once - least < 4 * 67.2e6, (once, least)
    assert peak(f"{large[0]}=0.5", large[0], tmp_path / "two", "--dtype", "bfloat16") - least < 6 * 67.2e6
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_a_merge_that_is_stopped_leaves_nothing(large: tuple[Path, Path], tmp_path: Path, how: signal.Signals) -> None:
    out, staging = tmp_path / "out", tmp_path / "out.tmp"
    line = [sys.executable, "-m", "tools.merge", str(large[0]), str(out)]
    process = subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while not (staging / "model.safetensors").is_file():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(how)
        said = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "was not written" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_help_has_examples_and_bad_arguments_end_with_2(tmp_path: Path) -> None:
    for line, words, code in (
        (["--help"], "python -m tools.merge maths=0.7 chat=0.3 merged", 0),
        ([tmp_path / "a", tmp_path / "out", "--shard-gib", 0], "greater than 0", 2),
        ([f"{tmp_path}/a=much", tmp_path / "out"], "is not a weight", 2),
        ([tmp_path / "a"], "OUT", 2),
    ):
        command = [sys.executable, "-m", "tools.merge", *map(str, line)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
