"""An export has the names, shapes and config of its base, for dense, MoE, hybrid and vision-language architectures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from architectures import DENSE, EXPERTS, HYBRID, LARGER, QUICK, save_architecture, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tools.merge import __main__ as merge
from trainers.batch import IGNORE, Batch
from trainers.model.blueprint import Blueprint
from trainers.model.export import check_export, export
from trainers.model.forward import forward
from trainers.model.saved_form import SavedForm, saved_form, types_of
from trainers.model.weights import Origin, origin_of

KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in (*DENSE, *EXPERTS, *HYBRID, *LARGER)]


class NoTokenizer:
    pad_token_id = None

    def save_pretrained(self, folder: Path) -> None:
        """Leave nothing."""

    def get_vocab(self) -> dict[str, int]:
        return {}


def opened(folder: Path) -> tuple[Blueprint, Origin, SavedForm]:
    config = AutoConfig.from_pretrained(folder)
    blueprint = Blueprint(config=config, folder=folder, revision=None, seed=0, trust_remote_code=False)
    model = blueprint.build()
    origin = origin_of(model, blueprint)
    return blueprint, origin, saved_form(model, origin, config, lambda _: torch.float32)


def live(origin: Origin, form: SavedForm, pieces: int = 1) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as an engine gives them, or in so many pieces as tools.export does."""
    for name in form.live:
        shape = origin.shape(name)
        whole = origin.read(name, (0,) * len(shape), shape)
        yield from ((name, piece) for piece in ([whole] if pieces == 1 else whole.flatten().chunk(pieces)))


def test_there_are_enough_of_each_kind() -> None:
    assert len(set(QUICK)) >= 40
    assert len(KINDS) >= 80


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_names_shapes_values_and_config_of_its_base(tmp_path: Path, kind: str) -> None:
    model = save_architecture(tmp_path / "base", kind)
    blueprint, origin, form = opened(tmp_path / "base")
    export(live(origin, form), form, blueprint, NoTokenizer(), [], tmp_path / "out", write=True)  # type: ignore[arg-type]
    base, made = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in made.items()} == {name: tensor.shape for name, tensor in base.items()}
    assert all(torch.equal(made[name], base[name]) for name in base)
    configs = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("base", "out")]
    assert configs[0] == configs[1]
    _, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "falcon_h1", "qwen3_5_moe"])
def test_pieces_make_what_whole_tensors_make_and_of_a_stack_one_row_is_held(tmp_path: Path, kind: str) -> None:
    save_architecture(tmp_path, kind)
    _, origin, form = opened(tmp_path)
    whole = dict(form.written(live(origin, form)))
    joined: dict[str, list[Tensor]] = {}
    most = 0
    for name, piece in form.written(live(origin, form, pieces=7)):
        joined.setdefault(name, []).append(piece.flatten())
        most = max(most, *(block.numel() for way in form.ways.values() for block, _ in way.held.values()), 0)
    assert joined.keys() == whole.keys() == form.contents.keys()
    assert all(torch.equal(torch.cat(joined[name]), whole[name].flatten()) for name in whole)
    assert most <= max((tensor[0].numel() for way in form.ways.values() for tensor in way.sources.values()), default=0)


def as_experts_in_a_stack(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def as_the_body_alone(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(folder)


def as_named_long_ago(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for name in tensors}
    assert old != tensors.keys()
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "change"), [("mixtral", as_experts_in_a_stack), ("gpt2", as_the_body_alone), ("roberta", as_named_long_ago)]
)
def test_whatever_names_a_base_has_the_export_has_those_that_transformers_saves_it_under(
    tmp_path: Path, kind: str, change: Callable[[Path], None]
) -> None:
    save_architecture(tmp_path / "base", kind)
    change(tmp_path / "base")
    _, _, form = opened(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in form.contents.items()} == {name: tensor.shape for name, tensor in plain.items()}


def test_parts_that_the_model_does_not_have_are_copied_and_leftovers_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_architecture(tmp_path, "deepseek_v3")
    tensors, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    more = {
        "model.layers.2.eh_proj.weight": torch.full((4, 8), -torch.inf),
        "mtp.count": torch.tensor(3),
        "head.weight": torch.ones(2).bfloat16(),
    }
    leftovers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias", "lm_head.weight_scale")
    save_file(tensors | more | {name: torch.ones(2) for name in leftovers}, file, {"format": "pt"})
    blueprint, origin, form = opened(tmp_path)
    assert (
        "3 tensors of the base are of parts that this model does not have, and stay as they are: head, model.layers.2, mtp" in caplog.text
    )
    assert "no place for 2 tensors" in caplog.text
    sums = export(live(origin, form), form, blueprint, NoTokenizer(), [], tmp_path / "out", write=True)  # type: ignore[arg-type]
    check_export(tmp_path / "out", form.contents.items(), sums, read=True)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == (tensors | more).keys()
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in more.items())


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "mixtral", "llama4"])
def test_a_merge_has_all_of_its_base_and_changes_what_the_adapter_does(tmp_path: Path, kind: str) -> None:
    save_architecture(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge.main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    base, made = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in made.items()} == {name: tensor.shape for name, tensor in base.items()}
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed
    assert all("q_proj" in name and "vision" not in name for name in changed)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((tmp_path / "base" / "config.json").read_text())


def test_a_part_without_the_rest_is_a_text_model_by_its_config(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_5")
    blueprint = Blueprint(config=tiny_config(type(config)), folder=None, revision=None, seed=0, trust_remote_code=False)
    model = blueprint.build()
    form = saved_form(model, origin_of(model, blueprint), blueprint.config, lambda _: torch.float32)
    export(live(origin_of(model, blueprint), form), form, blueprint, NoTokenizer(), [], tmp_path, write=True)  # type: ignore[arg-type]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3_5_text"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    save_architecture(tmp_path, "mixtral")
    _, origin, form = opened(tmp_path)
    tensors = dict(live(origin, form))
    name = next(iter(form.ways))
    for wrong in (tensors[name].bfloat16(), torch.cat([tensors[name], tensors[name][:1]])):
        with pytest.raises(RuntimeError, match="does not fit the model"):
            list(form.written([(name, wrong)]))
    with pytest.raises(RuntimeError, match="not finite in float32"):
        list(form.written([(name, tensors[name] / 0)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DENSE, *EXPERTS, *HYBRID, *LARGER])
def test_the_loss_before_the_first_step_is_that_of_plain_transformers(tmp_path: Path, kind: str) -> None:
    save_architecture(tmp_path, kind)
    model = opened(tmp_path)[0].build("cpu").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE)], 1)
    batch = Batch.of(ids, labels, torch.arange(16).expand(ids.shape))
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        found = -forward(model, batch).logps[labels != IGNORE].mean()
    assert abs(float(found - wanted)) <= 1e-6


@pytest.mark.parametrize("kind", ["deepseek_v3", "ernie4_5_moe", "nemotron_h", "qwen3"])
def test_types_are_those_that_transformers_saves_a_model_of_16_bits_in(tmp_path: Path, kind: str) -> None:
    save_architecture(tmp_path / "base", kind).bfloat16().save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "plain")
    blueprint, origin, _ = opened(tmp_path / "base")
    model = blueprint.build()
    form = saved_form(model, origin, blueprint.config, types_of(model, torch.bfloat16))
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in form.contents.items()} == {name: tensor.dtype for name, tensor in plain.items()}
    assert (torch.float32 in {tensor.dtype for tensor in plain.values()}) == (kind != "qwen3")
