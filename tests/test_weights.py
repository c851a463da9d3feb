"""Streamed loading: every block of every tensor is what plain transformers loads, from any checkpoint and under any split."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Ranks, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model, LlamaModel, PreTrainedModel

from tools.bench import load as bench_load
from trainers.config.choices import EngineName, Precision
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from trainers.data.tokenizer import load_tokenizer, tokenizer_hash
from trainers.engines.build import build_engine
from trainers.model.blueprint import Blueprint, from_architecture, make_blueprint
from trainers.model.export import export
from trainers.model.safetensors_files import Weights
from trainers.model.saved_form import SavedForm, saved_form
from trainers.model.weights import (
    Origin,
    StoredModel,
    load_parts,
    materialise,
    origin_of,
    require_tied,
    require_written,
    slices,
    tied_names,
)
from trainers.world import World

STYLES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1]},
    "hrm_text": {"head_dim": 8},
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(style: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    kind = style.split(",")[0]
    common = {key: value for key, value in TINY.items() if kind != "gpt2" or not key.startswith(("hidden", "inter", "num", "max"))}
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(common | STYLES[style] | more)))
    return model


def blueprint_of(folder: Path, **more: Any) -> Blueprint:
    config = AutoConfig.from_pretrained(folder)
    return Blueprint(**({"config": config, "folder": folder, "revision": None, "seed": 0, "trust_remote_code": False} | more))


def open_origin(blueprint: Blueprint) -> Origin:
    return origin_of(blueprint.build(), blueprint)


def form_of(blueprint: Blueprint) -> SavedForm:
    model = blueprint.build()
    return saved_form(model, origin_of(model, blueprint), blueprint.config, lambda _: blueprint.saved_dtype)


def reference(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied_names(model)}


def rows_of_ranks(shape: tuple[int, ...], size: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of each rank's part, split as fully_shard splits: rows, rounded up."""
    share = -(-shape[0] // size)
    for rank in range(size):
        start, end = min(shape[0], rank * share), min(shape[0], (rank + 1) * share)
        yield (start, *[0] * (len(shape) - 1)), (end - start, *shape[1:])


def odd_blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield blocks that no engine asks for today: the middle of every dimension, and a part of the last one."""
    yield tuple(size // 3 for size in shape), tuple(max(1, size // 2) for size in shape)
    yield (*[0] * (len(shape) - 1), shape[-1] // 2), (*shape[:-1], shape[-1] - shape[-1] // 2)


def assert_equal(origin: Origin, whole: dict[str, Tensor]) -> None:
    assert sorted(origin.names()) == sorted(whole)
    for name in origin.names():
        shape = tuple(whole[name].shape)
        parts = [part for size in (1, 2, 3) for part in rows_of_ranks(shape, size)] + list(odd_blocks(shape))
        for offset, part in parts:
            if math.prod(part):
                block = origin.read(name, offset, part)
                assert torch.equal(block.to(whole[name].dtype), whole[name][slices(offset, part)]), (name, offset, part)


@pytest.mark.parametrize("saved", TYPES)
@pytest.mark.parametrize("style", STYLES)
def test_every_block_is_what_transformers_loads(tmp_path: Path, style: str, saved: str) -> None:
    build(style).to(TYPES[saved]).save_pretrained(tmp_path / "one")
    build(style).to(TYPES[saved]).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for folder in (tmp_path / "one", tmp_path / "many"):
        whole = reference(folder)
        origin = open_origin(blueprint_of(folder))
        assert_equal(origin, whole)
        assert origin.is_exact_in(torch.float32)
        assert origin.is_exact_in(torch.bfloat16) == (saved == "bf16" and style != "hrm_text")


@pytest.mark.parametrize("style", ["llama, tied", "gpt2", "mixtral"])
def test_build_on_the_cpu_is_what_transformers_loads(tmp_path: Path, style: str) -> None:
    build(style).save_pretrained(tmp_path)
    model = blueprint_of(tmp_path).build("cpu")
    require_tied(model)
    for name, tensor in reference(tmp_path).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = torch.arange(12)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_of_a_stack_of_experts_only_the_rows_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("mixtral").save_pretrained(tmp_path)
    origin = open_origin(blueprint_of(tmp_path))
    keys: list[str] = []
    read = Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, key, *block: keys.append(key) or read(self, key, *block))
    origin.read("model.layers.1.mlp.experts.gate_up_proj", (3, 0, 0), (2, 96, 32))
    assert sorted(keys) == [f"model.layers.1.block_sparse_moe.experts.{expert}.w{part}.weight" for expert in (3, 4) for part in (1, 3)]


def test_experts_saved_under_the_models_own_names_are_read_as_they_are(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(open_origin(blueprint_of(tmp_path)), reference(tmp_path))


@pytest.mark.parametrize("saved", [GPT2Model, LlamaModel])
def test_a_base_model_saved_alone_is_enough_where_the_head_is_tied(tmp_path: Path, saved: type[PreTrainedModel]) -> None:
    model = build("gpt2" if saved is GPT2Model else "llama, tied")
    model.base_model.save_pretrained(tmp_path)
    assert not any(key.startswith(("model.", "transformer.")) for key in load_file(tmp_path / "model.safetensors"))
    assert_equal(open_origin(blueprint_of(tmp_path)), reference(tmp_path))


def test_a_field_that_only_the_model_s_code_knows_is_taken() -> None:
    """Qwen3-MoE's config declares no head_dim, and its published models have one that does not follow from the others."""

    class Tokens:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "num_experts": 2}
    config = from_architecture({"model_type": "qwen3_moe", "head_dim": 48, **sizes}, Tokens(), 33)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (2 * 48, 64)
    with pytest.raises(ConfigError, match="has no such field"):
        from_architecture({"model_type": "qwen3_moe", "head_dims": 48}, Tokens(), 33)


def test_a_tied_tensor_is_read_under_either_name(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(open_origin(blueprint_of(tmp_path)), reference(tmp_path))


def test_a_tied_tensor_that_is_there_twice_must_be_the_same_twice(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(open_origin(blueprint_of(tmp_path)), reference(tmp_path))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"ties model.embed_tokens.weight and lm_head.weight, and the checkpoint holds different values"):
        blueprint_of(tmp_path).build("cpu")


def sharded(folder: Path) -> list[Path]:
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("*.safetensors"))


def test_truncated_and_missing_files_are_named_together(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:-4])
    files[1].write_bytes(files[1].read_bytes()[:5])
    files[2].unlink()
    with pytest.raises(ConfigError) as raised:
        open_origin(blueprint_of(tmp_path))
    assert raised.value.path == "model.id"
    for file, state in zip(files, ("is damaged or truncated", "is damaged or truncated", "is missing"), strict=False):
        assert f"{file.name} {state}" in str(raised.value)
    assert files[3].name not in str(raised.value)


def test_an_index_that_promises_what_its_file_lacks_is_refused(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    tensors = load_file(files[1])
    lost = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, files[1], {"format": "pt"})
    with pytest.raises(ConfigError, match=f"promises {lost}, which {files[1].name} does not hold"):
        open_origin(blueprint_of(tmp_path))


def test_weights_in_another_format_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model.safetensors is missing\n.*model.convert=true reads its pytorch_model.bin"):
        open_origin(blueprint_of(tmp_path))


def test_missing_and_misshapen_tensors_are_named_together(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = r"lacks model.layers.2.mlp.up_proj.weight; model.norm.weight is \[31\] on disk, \[32\] by config.json"
    with pytest.raises(ConfigError, match=message):
        open_origin(blueprint_of(tmp_path))


def test_a_missing_expert_is_named_before_anything_is_read(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    short = {key: tensor for key, tensor in tensors.items() if ".0.block_sparse_moe.experts.4." not in key}
    save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts.gate_up_proj is \[4, 96, 32\] on disk, \[5, 96, 32\] by config.json"):
        open_origin(blueprint_of(tmp_path))
    del short["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.gate_up_proj cannot be made of .*experts.0.w1.weight"):
        open_origin(blueprint_of(tmp_path))


def test_what_the_model_has_no_place_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {"model.layers.9.mlp.up_proj.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING, "fulltune"):
        open_origin(blueprint_of(tmp_path))
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["model.layers.9"]


def test_values_that_are_not_finite_or_quantised_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.down_proj.weight holds values that are not finite"):
        blueprint_of(tmp_path).build("cpu")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 48, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="holds weights as F8_E4M3: quantised"):
        open_origin(blueprint_of(tmp_path))


def test_what_stays_unwritten_is_named() -> None:
    model = random_blueprint("llama, tied").build()
    materialise(model, torch.device("cpu"))
    require_tied(model)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    parts = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    with torch.no_grad():
        for tensor in parts.values():
            tensor.zero_()
    require_written(parts, parts)
    parts["model.norm.weight"][1] = math.nan
    with pytest.raises(RuntimeError, match=r"model.embed_tokens.weight, model.norm.weight stayed unwritten"):
        require_written(parts, set(parts) - {"model.embed_tokens.weight"})
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(33, 32))
    with pytest.raises(RuntimeError, match=r"lm_head.weight and model.embed_tokens.weight must be one tensor"):
        require_tied(model)


RANDOM = {
    "llama": {"initializer_range": 0.3},
    "llama, tied": {},
    "gpt2": {},
    "mixtral": {},
    "gemma2": {},
    "qwen3_moe": {},
}


def random_blueprint(style: str, seed: int = 0) -> Blueprint:
    config = build(style, **RANDOM[style]).config
    return Blueprint(config=config, folder=None, revision=None, seed=seed, trust_remote_code=False)


@pytest.mark.parametrize("style", RANDOM)
def test_random_weights_are_the_same_under_any_split_and_order(style: str) -> None:
    blueprint = random_blueprint(style)
    whole = dict(blueprint.build("cpu").state_dict())
    model = blueprint.build()
    for alias in tied_names(model):
        del whole[alias]
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    assert_equal(origin_of(model, blueprint), whole)
    assert torch.equal(torch.rand(3), expected), "the process's own random state has moved"
    origin = origin_of(model, blueprint)
    for name in reversed(origin.names()):
        assert torch.equal(origin.read(name, (0,) * whole[name].ndim, whole[name].shape), whole[name]), name
    other = random_blueprint(style, seed=1).build("cpu").state_dict()
    assert not any(torch.equal(other[name], tensor) for name, tensor in whole.items() if tensor.std() > 0)


@pytest.mark.parametrize("style", RANDOM)
def test_random_weights_follow_the_architectures_own_rules(style: str) -> None:
    """Transformers' initialisation of a whole model has the same mean and spread, and no two matrices are alike."""
    blueprint, plain = random_blueprint(style), build(style, seed=7, **RANDOM[style]).state_dict()
    ours = blueprint.build("cpu").state_dict()
    assert ours.keys() == plain.keys()
    for name, tensor in ours.items():
        count = math.sqrt(tensor.numel())
        if plain[name].float().std() == 0:
            assert torch.equal(tensor, plain[name]), name
        else:
            assert float(tensor.std()) == pytest.approx(float(plain[name].std()), rel=6 / count), name
            assert abs(float(tensor.mean())) < 6 * float(tensor.std()) / count, name
    up = [tensor for name, tensor in ours.items() if name.endswith(("q_proj.weight", "c_attn.weight"))]
    assert not torch.equal(up[0], up[1])


def test_gpt2s_residual_projections_shrink_with_depth() -> None:
    state = random_blueprint("gpt2").build("cpu").state_dict()
    assert float(state["transformer.h.2.mlp.c_proj.weight"].std()) == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
    assert float(state["transformer.h.2.mlp.c_fc.weight"].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("style", ["llama", "llama, tied", "gpt2", "mixtral"])
def test_growth_adds_the_mean_of_the_old_rows(tmp_path: Path, style: str) -> None:
    build(style).to(torch.bfloat16).save_pretrained(tmp_path)
    old = reference(tmp_path)
    blueprint = blueprint_of(tmp_path, vocab_on_disk=33)
    blueprint.config.vocab_size = 40
    origin = open_origin(blueprint)
    whole = dict(blueprint.build("cpu").state_dict())
    grown = [name for name, tensor in old.items() if tensor.shape[0] == 33]
    assert len(grown) == (1 if style in ("llama, tied", "gpt2") else 2)
    for name in grown:
        mean = old[name].double().mean(0).float()
        assert torch.equal(whole[name][:33], old[name])
        assert all(torch.equal(row, mean) for row in whole[name][33:])
    assert_equal(origin, {name: whole[name] for name in old})
    assert not origin.is_exact_in(torch.bfloat16)


def test_growth_covers_the_heads_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **TINY)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    blueprint = blueprint_of(tmp_path, vocab_on_disk=33)
    blueprint.config.vocab_size = 35
    bias = blueprint.build("cpu").lm_head.bias
    assert torch.equal(bias[:33], model.lm_head.bias)
    assert torch.equal(bias[33:], model.lm_head.bias.double().mean().float().expand(2))


def read_new_rows(origin: Origin, monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Return how many blocks each rank reads for its part of a grown embedding."""
    counts = []
    read = Weights.read
    for offset, shape in rows_of_ranks((40, 32), size):
        keys: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(Weights, "read", lambda self, key, *block, keys=keys: keys.append(key) or read(self, key, *block))
            origin.read("model.embed_tokens.weight", offset, shape)
        counts.append(len(keys))
    return counts


def test_only_ranks_with_a_new_row_read_for_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, tied=True)
    blueprint = blueprint_of(tmp_path, vocab_on_disk=33)
    blueprint.config.vocab_size = 40
    origin = open_origin(blueprint)
    assert read_new_rows(origin, monkeypatch, 2) == [1, 2]
    assert read_new_rows(origin, monkeypatch, 3) == [1, 1, 2]


def load_on_rank(world: World, blueprint: Blueprint, engine: str, run_dir: Path) -> dict[str, Any]:
    config = RunConfig(run_dir=str(run_dir), data=DataConfig(path="unused"), train=TrainConfig(precision=Precision.fp32))
    config.engine.name = EngineName(engine)
    return {name: tensor.numpy() for name, tensor in build_engine(config, world, blueprint).weights()}


@pytest.mark.parametrize("style", ["mixtral", "mixtral, random", "llama, tied, grown"])
@pytest.mark.parametrize(("size", "engine"), [(2, "fsdp"), (3, "fsdp"), (2, "zero3"), (3, "zero3")])
def test_ranks_together_hold_what_one_process_builds(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, engine: str, style: str
) -> None:
    kind = style.removesuffix(", random").removesuffix(", grown")
    build(kind).save_pretrained(tmp_path)
    blueprint = blueprint_of(tmp_path)
    if style.endswith("random"):
        blueprint.folder = None
    if style.endswith("grown"):
        blueprint.config.vocab_size, blueprint.vocab_on_disk = 40, 33
    whole = blueprint.build("cpu").state_dict()
    for loaded in ranks(size).call(load_on_rank, blueprint, engine, tmp_path):
        assert all(torch.equal(torch.from_numpy(tensor), whole[name]) for name, tensor in loaded.items())


@pytest.mark.slow
def test_loading_never_holds_much_more_than_the_weights(tmp_path: Path) -> None:
    total = 4 * bench_load.write_checkpoint(tmp_path / "model", 0.6)
    peak, _ = bench_load.measure_loading(tmp_path, "fsdp", 4)
    assert 0.5 * total < peak < 1.3 * total, f"{peak / total:.3f}"  # on a busy machine the last sample may be taken before the last block


def tokenizer_in(folder: Path, num_tokens: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def test_the_model_grows_to_its_tokenizer_only_if_told_to(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    tokenizer_in(tmp_path, 36)
    config = RunConfig(model=ModelConfig(id=str(tmp_path)))
    tokenizer = load_tokenizer(config)
    with pytest.raises(ConfigError, match=r"has 36 tokens, the model only 33\n.*model.grow_vocabulary=true"):
        make_blueprint(config.model, 0, tokenizer)
    config.model.grow_vocabulary = True
    blueprint = make_blueprint(config.model, 0, tokenizer)
    assert (blueprint.config.vocab_size, blueprint.vocab_on_disk) == (36, 33)
    assert blueprint.build().get_input_embeddings().weight.shape == (36, 32)


def test_a_model_with_more_rows_than_tokens_stays_as_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path, tied=True)
    tokenizer_in(tmp_path, 20)
    model = ModelConfig(id=str(tmp_path), add_tokens=["<tool>", "w5"], grow_vocabulary=True)
    tokenizer = load_tokenizer(RunConfig(model=model))
    blueprint = make_blueprint(model, 0, tokenizer)
    assert (len(tokenizer), blueprint.config.vocab_size, blueprint.vocab_on_disk) == (21, 33, None)


def test_added_tokens_are_special_and_carried_by_the_export(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", tied=True)
    tokenizer_in(base, 33)
    plain = load_tokenizer(RunConfig(model=ModelConfig(id=str(base))))
    model = ModelConfig(id=str(base), add_tokens=["<tool>", "<call>"])
    tokenizer = load_tokenizer(RunConfig(model=model))
    assert tokenizer("w4<tool>w5<call>")["input_ids"] == [4, 33, 5, 34]
    assert tokenizer.decode([4, 33, 5], skip_special_tokens=True) == "w4 w5"
    assert tokenizer_hash(tokenizer) != tokenizer_hash(plain)
    blueprint = make_blueprint(model, 0, tokenizer)
    live = blueprint.build("cpu").state_dict()
    export(
        ((name, tensor) for name, tensor in live.items() if name != "lm_head.weight"),
        form_of(blueprint),
        blueprint,
        tokenizer,
        [],
        tmp_path / "out",
        True,
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == 35
    assert torch.equal(again.get_input_embeddings().weight[34], live["model.embed_tokens.weight"][:33].double().mean(0).float())
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert {"<tool>", "<call>"} <= {token["content"] for token in saved["added_tokens"]}
    assert load_tokenizer(RunConfig(model=ModelConfig(id=str(tmp_path / "out"))))("w4<tool>")["input_ids"] == [4, 33]


def test_a_random_model_cannot_be_smaller_than_its_tokenizer(tmp_path: Path) -> None:
    tokenizer_in(tmp_path, 36)
    model = ModelConfig(architecture={"model_type": "llama", "vocab_size": 20}, tokenizer=str(tmp_path), grow_vocabulary=True)
    with pytest.raises(ConfigError, match=r"model.architecture.vocab_size"):
        make_blueprint(model, 0, load_tokenizer(RunConfig(model=model)))


def test_a_part_that_the_origin_does_not_know_is_named(tmp_path: Path) -> None:
    origin = open_origin(blueprint_of(save_tiny(tmp_path, tied=True)))
    assert isinstance(origin, StoredModel)
    parts = {name: (torch.zeros(shape), (0,) * len(shape)) for name, shape in origin.shapes.items()}
    load_parts(origin, parts)
    with pytest.raises(RuntimeError, match="another stayed unwritten"):
        load_parts(origin, parts | {"another": (torch.zeros(2), (0,))})
