"""A checkpoint becomes the directory that the run's own end would have made of it, in little memory, or nothing at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from architectures import save_architecture
from command import ROOT, arguments, launch, save_in_bf16
from conftest import WORDS, save_tiny
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, LlamaConfig

from tools import export
from trainers.config.schema import ModelConfig, RunConfig, plain
from trainers.model.blueprint import Blueprint, make_blueprint
from trainers.model.export import check_export
from trainers.model.export import export as write_export
from trainers.model.saved_form import SavedForm, saved_form
from trainers.model.weights import origin_of

MIB = 2**20
KINDS = {
    "fsdp": ("tied", ["engine=fsdp"]),
    "fsdp-bf16": ("untied-bf16", ["engine=fsdp", "train.precision=bf16"]),
    "zero3": ("tied", ["engine=zero3"]),
    "fsdp-part-of-larger": ("larger", ["engine=fsdp", "data.packing=false"]),
    "zero3-bf16-3-ranks": ("untied-bf16", ["engine=zero3", "train.precision=bf16", "launch.processes=3", "train.global_batch=6"]),
}
SAMPLED = [pytest.param(kind, marks=pytest.mark.slow if "3-ranks" in kind or "part" in kind or "bf16" in kind else []) for kind in KINDS]


@pytest.fixture(scope="module")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = AutoTokenizer.from_pretrained(base)
    untied = save_tiny(folder / "untied", tied=False, vocab_size=len(tokenizer), initializer_range=0.1)
    tokenizer.save_pretrained(untied)
    save_architecture(folder / "larger", "qwen3_5_moe")
    tokenizer.save_pretrained(folder / "larger")
    return {"tied": base, "larger": folder / "larger", "untied-bf16": save_in_bf16(untied, folder / "untied-bf16")}


@pytest.fixture(scope="module")
def run_of(bases: dict[str, Path], chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """`run_of(kind)` is a finished run of four steps with checkpoints after two and four."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            run_dir = tmp_path_factory.mktemp(kind) / "run"
            name, more = KINDS[kind]
            quick = ["train.steps=4", "checkpoint.every=2", "data.eval_fraction=0", "train.eval_every=null", "train.sample_tokens=0"]
            launch(cache, arguments(bases[name], chats, run_dir, *quick, *more))
            made[kind] = run_dir
        return made[kind]

    return run


def call(*line: object, expect: int = 0, timeout_s: float = 100) -> str:
    """Run the tool as a user does."""
    command = [sys.executable, "-m", "tools.export", *map(str, line)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The tool in this process: quick, for what ends before it begins."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*line: object, expect: int = 0) -> str:
        capsys.readouterr()
        code = export.main([*map(str, line)])
        said = capsys.readouterr()
        assert code == expect, said.out + said.err
        return said.out + said.err

    yield run
    signal.signal(signal.SIGTERM, before)


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def in_checkpoint(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds of the model, read whole by torch itself: whole tensors, or flat ones."""
    sizes = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in sizes.items() if name.startswith("model.")}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def require_same_files(one: Path, other: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_last_checkpoint_gives_the_run_s_own_export_byte_for_byte(
    run_of: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    run_dir = run_of(kind)
    said = (call if kind == "fsdp" else tool)(checkpoint_of(run_dir, 4), tmp_path / "out")
    assert str(tmp_path / "out") in said
    assert "from_pretrained" in said
    require_same_files(run_dir / "export", tmp_path / "out")


@pytest.mark.parametrize("kind", SAMPLED)
def test_an_earlier_checkpoint_opens_with_plain_transformers(
    run_of: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    run_dir = run_of(kind)
    tool(checkpoint_of(run_dir, 2), tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = in_checkpoint(checkpoint_of(run_dir, 2))
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected[name].view(tensor.shape).to(tensor.dtype)), name
    with torch.no_grad():
        assert model(**tokenizer(" ".join(WORDS), return_tensors="pt")).logits.isfinite().all()
    last = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert not torch.equal(model.model.norm.weight.float(), last.model.norm.weight.float()) or not torch.equal(
        model.get_input_embeddings().weight, last.get_input_embeddings().weight
    )


@pytest.mark.slow
def test_an_export_of_a_part_has_all_of_its_base(bases: dict[str, Path], run_of: Callable[[str], Path]) -> None:
    folder = run_of("fsdp-part-of-larger") / "export"
    base, made = load_file(bases["larger"] / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in made.items()} == {name: tensor.shape for name, tensor in base.items()}
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed
    assert not any("visual" in name for name in changed)
    assert json.loads((folder / "config.json").read_text()) == json.loads((bases["larger"] / "config.json").read_text())


def test_a_run_directory_means_its_newest_complete_checkpoint(
    run_of: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(run_of("fsdp"), tmp_path / "run")
    shutil.copytree(checkpoint_of(run_dir, 4), checkpoint_of(run_dir, 10))
    (checkpoint_of(run_dir, 10) / "manifest.json").unlink()
    assert "step-000004" in tool(run_dir, tmp_path / "out")
    require_same_files(run_dir / "export", tmp_path / "out")


def test_files_are_those_that_safetensors_itself_writes(run_of: Callable[[str], Path]) -> None:
    for kind in ("fsdp", "fsdp-bf16"):
        path = run_of(kind) / "export" / "model.safetensors"
        assert path.read_bytes() == save(load_file(path), {"format": "pt"})


def test_small_shards_hold_the_same_tensors(run_of: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path) -> None:
    run_dir, most = run_of("zero3"), 12_000
    tool(run_dir, tmp_path / "out", "--shard-gib", most / 2**30)
    whole, shards = load_file(run_dir / "export" / "model.safetensors"), sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    parts: dict[str, Tensor] = {}
    for number, path in enumerate(shards, 1):
        assert path.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = load_file(path)
        assert path.read_bytes() == save(tensors, {"format": "pt"})
        assert sum(tensor.nbytes for tensor in tensors.values()) <= most
        parts |= tensors
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in reopened.named_parameters())


def test_another_type_is_the_saved_one_rounded(run_of: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path) -> None:
    run_dir = run_of("fsdp-bf16")
    tool(run_dir, tmp_path / "out", "--dtype", "float32")
    master = in_checkpoint(checkpoint_of(run_dir, 4))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, master[name]) for name, tensor in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    tool(run_dir, tmp_path / "half", "--dtype", "float16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(tensor, master[name].half()) for name, tensor in half.items())


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_the_optimizer_s_state_is_never_read(run_of: Callable[[str], Path], tool: Callable[..., str], tmp_path: Path, kind: str) -> None:
    run_dir = shutil.copytree(run_of(kind), tmp_path / "run")
    folder = checkpoint_of(run_dir, 4)
    places = dcp.FileSystemReader(folder).read_metadata().storage_data
    others = [place for index, place in places.items() if not index.fqn.startswith("model.")]
    assert others
    for place in others:
        overwrite(folder / place.relative_path, place.offset, bytes(place.length))
    tool(folder, tmp_path / "out")
    require_same_files(run_dir / "export", tmp_path / "out")


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def make_run(run_dir: Path, base: Path, state: dict[str, Tensor], **model: Any) -> Path:
    """A run directory with one checkpoint of the given weights, as one rank would save it."""
    folder = checkpoint_of(run_dir, 1)
    dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"progress": {"step": 1}, "sizes": sizes}))
    config = RunConfig(run_dir=str(run_dir))
    config.model.id = str(base)
    config.data.path = "/gone/with/the/data.jsonl"
    for name, value in model.items():
        setattr(config.model, name, value)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    return folder


def random_state(base: Path) -> dict[str, Tensor]:
    """Random parameters for the model that a directory's config.json describes; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return {name: torch.randn(tensor.shape) for name, tensor in model.named_parameters()}


def form_of(blueprint: Blueprint) -> SavedForm:
    model = blueprint.build()
    return saved_form(model, origin_of(model, blueprint), blueprint.config, lambda _: blueprint.saved_dtype)


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Path:
    """A complete checkpoint of the tied model, one rank's; its base may be moved away."""
    own = shutil.copytree(base, tmp_path / "base")
    return make_run(tmp_path / "run", own, random_state(own))


def test_added_tokens_and_grown_vocabularies_are_exported(base: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    state = random_state(base)
    grown = state | {"model.embed_tokens.weight": torch.randn(len(AutoTokenizer.from_pretrained(base)) + 2, 32)}
    folder = make_run(tmp_path / "run", base, grown, add_tokens=["<|tool|>", "<|call|>"])
    tool(folder, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_output_embeddings().weight, grown["model.embed_tokens.weight"])
    assert model.config.vocab_size == len(tokenizer) == tokenizer.convert_tokens_to_ids("<|call|>") + 1


def test_persistent_buffers_that_zero3_does_not_save_come_from_the_base(base: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    config = Glm4MoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(base)), first_k_dense_replace=1, n_group=1, topk_group=1, **sizes, **heads
    )
    model = AutoModelForCausalLM.from_config(config)
    (name,) = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    model.get_buffer(name).copy_(torch.arange(4.0))
    model.save_pretrained(tmp_path / "glm")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "glm")
    state = {name: torch.randn(tensor.numel()) for name, tensor in model.named_parameters()}
    tool(make_run(tmp_path / "run", tmp_path / "glm", state), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(tmp_path / "glm" / "model.safetensors").keys()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(found[name], torch.arange(4.0))
    assert found.keys() == state.keys() | {name}
    assert all(torch.equal(found[name].flatten(), tensor) for name, tensor in state.items())


def test_the_end_of_a_run_holds_one_tensor_at_a_time_and_refuses_what_is_not_whole(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    blueprint = make_blueprint(ModelConfig(id=str(base)), 0, tokenizer)
    shapes = {name: tensor.shape for name, tensor in random_state(base).items()}
    form = form_of(blueprint)
    held: list[weakref.ref[Tensor]] = []

    def weights(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            assert sum(tensor() is not None for tensor in held) <= 1
            tensor = torch.randn(shapes[name])
            held.append(weakref.ref(tensor))
            yield name, tensor

    write_export(weights(list(shapes)), form, blueprint, tokenizer, [], tmp_path / "out", write=True)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == shapes.keys()
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight did not come whole"):
        write_export(weights([name for name in shapes if name != NORM]), form, blueprint, tokenizer, [], tmp_path / "half", write=True)
    with pytest.raises(RuntimeError, match="does not fit the model"):
        write_export(iter([(NORM, torch.ones(64))]), form, blueprint, tokenizer, [], tmp_path / "half", write=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_is_read_again_must_be_what_was_written(base: Path, tmp_path: Path) -> None:
    tokenizer, state = AutoTokenizer.from_pretrained(base), random_state(base)
    blueprint = make_blueprint(ModelConfig(id=str(base)), 0, tokenizer)
    form, folder = form_of(blueprint), tmp_path / "out"
    contents = form.contents
    sums = write_export(iter(state.items()), form, blueprint, tokenizer, [], folder, write=True)
    check_export(folder, contents.items(), sums, read=True)
    file = folder / "model.safetensors"
    written, values = file.read_bytes(), load_file(file)
    for wrong, said in (
        (written[:-1] + bytes([written[-1] ^ 1]), "is wrong at .*: another value"),
        (
            save(values | {"model.layers.0.mlp.up_proj.weight": values["model.layers.0.mlp.gate_proj.weight"].clone()}),
            "up_proj.*: another value",
        ),
        (save(values | {NORM: values[NORM].view(2, -1)}), f"{NORM}: another value"),
        (save({name: value for name, value in values.items() if name != NORM}), f"{NORM}: missing"),
        (save(values | {"new": values[NORM].clone()}), "holds new, which the model does not"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(RuntimeError, match=said):
            check_export(folder, contents.items(), sums, read=True)
    check_export(folder, contents.items(), {}, read=False)  # as the ranks that do not write


MEASURED = """
import re, sys
from pathlib import Path
from tools.export import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def large(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank with 300 MB of weights, its largest tensor 67 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    LlamaConfig(vocab_size=16384, tie_word_embeddings=False, dtype="float32", **sizes).save_pretrained(folder / "base")
    return make_run(folder / "run", folder / "base", random_state(folder / "base"))


@pytest.mark.for_real
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux' /proc")
@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--shard-gib", "0.1"], marks=pytest.mark.slow),
        pytest.param(["--dtype", "bfloat16", "--shard-gib", "0.1"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
@pytest.mark.slow
def test_the_peak_of_memory_stays_under_a_shard_and_a_third(large: Path, tmp_path: Path, options: list[str]) -> None:
    line = [sys.executable, "-c", MEASURED, str(large), str(tmp_path / "out"), *options]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True).stdout
    peak = int(said.splitlines()[-1]) * 1024
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sum(sizes) > 1.4e8
    assert peak < 1.3 * max(sizes) + 300e6, (peak, max(sizes))
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_export_that_is_stopped_leaves_nothing_that_counts(large: Path, tmp_path: Path, how: signal.Signals) -> None:
    out, staging = tmp_path / "out", tmp_path / "out.tmp"
    line = [sys.executable, "-m", "tools.export", str(large), str(out)]
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
    assert process.returncode == (-9 if how is signal.SIGKILL else 130), said
    assert not out.exists()
    assert "Traceback" not in said
    if how is signal.SIGKILL:
        call(large, out)
    assert not staging.exists()


def change(path: Path, make: Callable[[bytes], bytes]) -> None:
    path.write_bytes(make(path.read_bytes()))


def resave(folder: Path, make: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save a checkpoint again with other tensors; it stays complete."""
    state = make(in_checkpoint(folder))
    run_dir = folder.parent.parent
    config = (run_dir / "config.yaml").read_bytes()
    shutil.rmtree(folder)
    make_run(run_dir, run_dir, state)
    (run_dir / "config.yaml").write_bytes(config)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def remember_tokenizer(folder: Path) -> None:
    (folder.parent.parent / "manifest.json").write_text(json.dumps({"data": {"tokenizer_hash": "another", "template_hash": None}}))


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no checkpoint": (shutil.rmtree, ["no such checkpoint"]),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), ["not a complete checkpoint", "no manifest.json"]),
    "bad manifest": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        ["not a complete checkpoint", "manifest.json cannot be read"],
    ),
    "truncated": (lambda folder: change(folder / "__0_0.distcp", lambda data: data[:-9]), ["not a complete checkpoint", "__0_0.distcp"]),
    "no config": (lambda folder: (folder.parent.parent / "config.yaml").unlink(), ["config.yaml is missing"]),
    "bad config": (lambda folder: (folder.parent.parent / "config.yaml").write_text("nme: x\n"), ["config.yaml cannot be read", "nme"]),
    "no base": (lambda folder: shutil.rmtree(folder.parents[2] / "base"), ["base is missing", "--model DIR"]),
    "lost tensor": (lambda folder: resave(folder, without(NORM)), ["is not of the model", f"lacks {NORM}"]),
    "foreign tensor": (
        lambda folder: resave(folder, lambda state: state | {"new": torch.ones(2)}),
        ["is not of the model", "has also new"],
    ),
    "wrong shape": (lambda folder: resave(folder, lambda state: state | {NORM: torch.ones(7)}), [f"{NORM} [7] where the model has [32]"]),
    "other tokenizer": (remember_tokenizer, ["the tokenizer is not the one"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_message(made: Path, tool: Callable[..., str], tmp_path: Path, case: str) -> None:
    damage, words = REFUSED[case]
    damage(made)
    said = tool(made, tmp_path / "out", expect=2)
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_an_occupied_directory_is_refused_and_an_empty_one_filled(made: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("kept")
    assert "exists and is not empty" in tool(made, out, expect=2)
    assert (out / "kept").read_text() == "kept"
    assert "exists and is not empty" in tool(made, out / "kept", expect=2)
    (out / "kept").unlink()
    tool(made, out)
    assert (out / "model.safetensors").is_file()


def test_a_run_without_a_complete_checkpoint_is_refused(made: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    (made / "manifest.json").unlink()
    assert "has no complete checkpoint" in tool(tmp_path / "run", tmp_path / "out", expect=2)
    shutil.rmtree(made.parent)
    assert "has no complete checkpoint" in tool(tmp_path / "run", tmp_path / "out", expect=2)


def test_a_base_that_has_moved_is_named_with_model(made: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    tool(made, tmp_path / "out", "--model", tmp_path / "moved")
    assert all(torch.equal(tensor, in_checkpoint(made)[name]) for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items())
    assert "no such directory" in tool(made, tmp_path / "other", "--model", tmp_path / "nowhere", expect=2)


def test_a_full_disk_is_refused_before_anything_is_written(
    made: Path, tool: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = tool(made, tmp_path / "deep" / "out", expect=2)
    assert "1,000 free" in said
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "saved"), (math.inf, "saved"), (1e30, "float16")])
def test_values_that_are_not_finite_are_named(made: Path, tool: Callable[..., str], tmp_path: Path, value: float, dtype: str) -> None:
    def spoil(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        return state

    resave(made, spoil)
    said = tool(made, tmp_path / "out", "--dtype", dtype, expect=1)
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zeros": ("__0_0.distcp", lambda data: bytes(len(data))),
    "random": ("__0_0.distcp", lambda data: os.urandom(len(data))),
    "metadata": (".metadata", lambda data: bytes(len(data))),
    "half the metadata": (".metadata", lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_of_the_right_size_is_named(made: Path, tool: Callable[..., str], tmp_path: Path, case: str) -> None:
    name, damage = DAMAGES[case]
    change(made / name, damage)
    said = tool(made, tmp_path / "out", expect=1)
    assert f"{made / name} is damaged" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_one_wrong_bit_of_a_weight_is_damage(made: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    (place,) = [place for index, place in dcp.FileSystemReader(made).read_metadata().storage_data.items() if index.fqn == f"model.{name}"]
    path = made / place.relative_path
    middle = path.read_bytes()[place.offset + place.length // 2]
    overwrite(path, place.offset + place.length // 2, bytes([middle ^ 1]))
    assert f"{path} is damaged" in tool(made, tmp_path / "out", expect=1)
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_bad_arguments_end_with_2(tmp_path: Path) -> None:
    assert "python -m tools.export runs/run exported" in call("--help")
    assert "greater than 0" in call(tmp_path, tmp_path / "out", "--shard-gib", 0, expect=2)
