"""What the end of a run needs is tried before its first step; a nicety never ends a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_architecture
from command import arguments, launch
from conftest import Ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher.report import print_summary
from trainers.config.checks import load
from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig
from trainers.data.prepare import prepare
from trainers.data.tokenizer import load_tokenizer
from trainers.finish import _try_sample
from trainers.model.blueprint import Blueprint, make_blueprint, open_config
from trainers.model.export import generation_config, rehearse_export, reopen, sample_answer, write_configs
from trainers.model.saved_form import SavedForm, saved_form
from trainers.model.weights import origin_of
from trainers.peft.base import FullTraining
from trainers.run import rehearse
from trainers.rundir.attempt import Attempt
from trainers.world import World

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def described(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    return folder


@pytest.fixture
def mine(base: Path, tmp_path: Path) -> Path:
    """A base of one's own, to be changed."""
    return shutil.copytree(base, tmp_path / "mine")


def blueprint_in(folder: Path, **more: Any) -> tuple[Blueprint, SavedForm, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blueprint = make_blueprint(ModelConfig(id=str(folder), **more), 0, tokenizer)
    model = blueprint.build()
    return blueprint, saved_form(model, origin_of(model, blueprint), blueprint.config, lambda _: blueprint.saved_dtype), tokenizer


GENERATION: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    # what the base's file says, what the export keeps of it, what it leaves out
    "beams": ({"num_beams": 1, "early_stopping": True, "length_penalty": 0.7}, {"num_beams": 1}, ["early_stopping", "length_penalty"]),
    "with beams": ({"early_stopping": True, "num_beams": 3}, {"early_stopping": True, "num_beams": 3}, []),
    "contrastive": ({"penalty_alpha": 0.5, "do_sample": True, "top_k": 6}, {"penalty_alpha": 0.5, "top_k": 6}, []),
    "sampling": ({"temperature": 0.6, "min_p": 0.1}, {"do_sample": True, "temperature": 0.6, "min_p": 0.1}, []),
    "greedy by name": ({"do_sample": False, "top_p": 0.8}, {"do_sample": False}, ["top_p"]),
    "another cache": ({"cache_implementation": "of tomorrow", "top_k": 9, "do_sample": True}, {"top_k": 9}, ["cache_implementation"]),
    "scores": ({"output_scores": True}, {}, ["output_scores"]),
    "scores as a dict": ({"output_scores": True, "return_dict_in_generate": True}, {"output_scores": True}, []),
    "no tokens": ({"max_new_tokens": 0, "num_beams": 2}, {"num_beams": 2}, ["max_new_tokens"]),
    "watermarks": ({"watermarking_config": {"greenlist_ratio": 7.0}}, {}, ["watermarking_config"]),
    "several answers": ({"num_return_sequences": 3}, {}, ["num_return_sequences"]),
    "not JSON": ("{", {}, []),
    "a list": ("[1]", {}, []),
}


@pytest.mark.parametrize("case", GENERATION)
def test_of_a_generation_config_is_kept_what_transformers_saves(mine: Path, tmp_path: Path, case: str) -> None:
    says, kept, refused = GENERATION[case]
    (mine / "generation_config.json").write_text(says if isinstance(says, str) else json.dumps(says | {"eos_token_id": 2}))
    blueprint, _, tokenizer = blueprint_in(mine)
    generation, left = generation_config(blueprint, tokenizer, [5])
    assert left == refused
    generation.save_pretrained(tmp_path / "out")
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(again, name) for name in kept} == kept
    assert all(getattr(again, name) is None for name in refused)
    assert 5 in again.eos_token_id
    assert 2 in again.eos_token_id or isinstance(says, str)


@pytest.mark.parametrize("settings", [BNB, FP8, {"quant_method": "gptq", "bits": 4}], ids=lambda settings: settings["quant_method"])
def test_a_quantization_config_without_quantised_weights_is_left_out_and_said(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    blueprint, form, tokenizer = blueprint_in(described(mine, quantization_config=settings))
    assert f"asks for quantised weights ({settings['quant_method']})" in caplog.text
    rehearse_export(form, blueprint, tokenizer, [], tmp_path / "export")
    assert not hasattr(blueprint.config, "quantization_config")
    assert "quantization_config" not in form.config.to_dict()
    reopen(mine, trust_remote_code=False, config=blueprint.config)


def test_that_of_a_part_is_left_out_too(tmp_path: Path) -> None:
    save_architecture(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    described(tmp_path, text_config=config["text_config"] | {"quantization_config": FP8})
    assert not hasattr(open_config(tmp_path, trust_remote_code=False).get_text_config(), "quantization_config")


def test_weights_that_are_quantised_are_refused_with_the_method(mine: Path) -> None:
    described(mine, quantization_config={"quant_method": "gptq", "bits": 4})
    tensors = load_file(mine / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    save_file(tensors | {f"{name}.qweight": torch.zeros(4, 8, dtype=torch.int32)}, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"holds weights as I32: quantised \(gptq\).*\n.*name the checkpoint in bf16 or fp32"):
        blueprint_in(mine)


def test_a_rehearsal_leaves_nothing(base: Path, tmp_path: Path) -> None:
    rehearse_export(*blueprint_in(base)[1::-1], AutoTokenizer.from_pretrained(base), [1], tmp_path / "export")
    assert not list(tmp_path.iterdir())


class Forgetful:
    """A tokenizer that has had other tokens than it saves."""

    def __init__(self, folder: Path) -> None:
        self.whole = AutoTokenizer.from_pretrained(folder)

    def __len__(self) -> int:
        return 7

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def test_what_would_fail_at_the_end_is_refused_at_the_start(mine: Path, tmp_path: Path) -> None:
    blueprint, form, tokenizer = blueprint_in(mine)
    run = tmp_path / "run"
    run.mkdir()

    def refusal(form: SavedForm, tokenizer: Any, folder: Path) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            rehearse_export(form, blueprint, tokenizer, [], folder)
        assert not list(folder.parent.glob("*.tmp")) or folder.parent == Path("/proc")
        return caught.value

    large = dataclasses.replace(form, contents={"w": torch.empty(1 << 30, 1 << 20, device="meta")})
    error = refusal(large, tokenizer, run / "export")
    assert (error.path, error.value) == ("run_dir", str(run))
    assert "the export needs 4,194,304.0 GiB, and " in error.reason
    error = refusal(form, Forgetful(mine), run / "export")
    assert error.path == "model.id"
    assert "the tokenizer had 7 tokens" in error.reason
    assert refusal(form, tokenizer, Path("/proc/export")).path == "run_dir"
    (run / "export").write_text("")
    error = refusal(form, tokenizer, run / "export")
    assert f"{run / 'export'} is not a directory" in error.reason
    assert error.remedy == f"mv {run / 'export'} {run / 'export'}.old"


def rehearsed(world: World, base: Path, run_dir: Path) -> str:
    blueprint, form, tokenizer = blueprint_in(base)
    adaptation = FullTraining(origin=None, trained=set(), form=form, live=(), dtype=torch.float32)  # type: ignore[arg-type]
    try:
        rehearse(world, Attempt(run_dir), blueprint, tokenizer, adaptation)
    except ConfigError as error:
        return error.reason
    return "nothing"


def test_every_rank_ends_with_what_the_first_finds(base: Path, ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    assert ranks(2).call(rehearsed, base, tmp_path) == ["nothing"] * 2
    (tmp_path / "export").write_text("")
    first, second = ranks(2).call(rehearsed, base, tmp_path)
    assert first == second
    assert "is not a directory" in first


ODD = {"penalty_alpha": 0.6, "top_k": 4, "num_beams": 1, "length_penalty": 0.8, "eos_token_id": 2}


@pytest.mark.parametrize("method", ["none", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_on_what_is_left_of_quantisation_and_an_odd_generation_config_is_done(
    mine: Path, chats: Path, cache: Path, tmp_path: Path, method: str
) -> None:
    described(mine, quantization_config=BNB)
    (mine / "generation_config.json").write_text(json.dumps(ODD))
    more = ["train.steps=2", "train.eval_every=null", "data.eval_fraction=0"]
    said = launch(cache, [*arguments(mine, chats, tmp_path / "run", *more), *(["peft=lora", "peft.rank=2"] if method == "lora" else [])])
    assert "asks for quantised weights (bitsandbytes)" in said
    assert "sample answer" in said
    if method == "none":
        assert "leaves out of generation_config.json what transformers does not save: length_penalty" in said
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")


def test_code_of_a_base_comes_with_the_export(mine: Path, tmp_path: Path) -> None:
    (mine / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (mine / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    described(mine, model_type="own", architectures=["OwnModel"], auto_map=code)
    blueprint, form, tokenizer = blueprint_in(mine, trust_remote_code=True)
    rehearse_export(form, blueprint, tokenizer, [], tmp_path / "export")
    assert form.config.architectures == ["OwnModel"]
    write_configs(form.config, blueprint, tokenizer, [], tmp_path)
    assert {"configuration_own.py", "modeling_own.py"} <= {path.name for path in tmp_path.iterdir()}


def test_processors_of_a_larger_base_come_with_the_export(mine: Path, tmp_path: Path) -> None:
    (mine / "preprocessor_config.json").write_text('{"size": 28}')
    blueprint, form, tokenizer = blueprint_in(mine)
    write_configs(form.config, blueprint, tokenizer, [], tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == '{"size": 28}'


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"cache_implementation": "quantized"}, {"num_beams": 3}, {}])
def test_the_sample_answer_is_greedy_whatever_the_generation_config_asks_for(base: Path, settings: dict[str, Any]) -> None:
    model, tokenizer = reopen(base, trust_remote_code=False), AutoTokenizer.from_pretrained(base)
    plain = sample_answer(model, tokenizer, [4, 11, 12], 5)
    model.generation_config = GenerationConfig(**settings, eos_token_id=2, pad_token_id=0)
    assert sample_answer(model, tokenizer, [4, 11, 12], 5) == plain


class Mute:
    config = None

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("generate needs a package that is not here")


def test_a_model_that_does_not_answer_is_warned_of(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(finished / "config.yaml")
    tokenizer = load_tokenizer(config)
    assert _try_sample(config, Mute(), tokenizer, prepare(config, tokenizer=tokenizer)) is None  # type: ignore[arg-type]
    assert "no sample answer: " in caplog.text


@pytest.mark.parametrize("damage", [{"steps": "many"}, {"sample": {"prompt": 3, "answer": None}}, {"device_bytes_peak": "much"}])
def test_a_summary_that_cannot_be_shown_is_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, Any]
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | damage))
    print_summary(tmp_path)
    assert f"{tmp_path}: done, but its summary cannot be shown" in capsys.readouterr().out


@pytest.mark.slow
def test_a_base_that_transformers_will_not_open_at_the_end_is_refused_for_an_adapter(
    mine: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    (mine / "generation_config.json").write_text('{"max_new_tokens": 0}')
    said = launch(cache, [*arguments(mine, chats, tmp_path / "run"), "peft=lora", "peft.rank=2"], expect=2)
    assert "cannot be saved and opened again" in said
    assert "`max_new_tokens` must be greater than 0" in said
    assert "step 1/" not in said
