"""train.float8: blocks multiply what a plain model multiplies whose inputs and weights are rounded to float8, and nothing else changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, arguments, launch, stop_at_step, trace
from conftest import Ranks, blueprint_for, save_tiny
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE, Batch
from trainers.config.choices import Float8
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainers.engines import compiling, float8
from trainers.engines.build import build_engine
from trainers.objectives import NextToken
from trainers.plan.estimate import FAST, step_seconds
from trainers.plan.request import HardwareConfig, Place
from trainers.plan.simulate import ranks as fake_ranks
from trainers.plan.simulate import simulate
from trainers.rundir import metrics
from trainers.step import take_step
from trainers.world import World

LARGEST = 448.0
"""Of float8 with four bits of exponent and three of mantissa."""
SIZE = 24


def config_for(folder: Path, how: Float8, **more: Any) -> RunConfig:
    train = TrainConfig(steps=8, global_batch=4, microbatch=2, float8=how, **more)
    return RunConfig(
        model=ModelConfig(id=str(folder)), data=DataConfig(path=str(folder), seq_len=32), train=train, optim=OptimConfig(lr=1e-3)
    )


def batches(step: int, rows: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for _ in range(rows):
        ids = torch.randint(3, 33, (1, SIZE), generator=generator)
        positions = torch.arange(SIZE).remainder(12)[None]
        made.append(Batch.of(ids, ids.roll(-1, 1).where(positions != 11, IGNORE), positions))
    return made


def train(world: World, folder: Path, how: Float8, compiled: bool = False) -> dict[str, Any]:
    torch._dynamo.reset()
    compiling.BACKEND = "aot_eager"
    built = build_engine(config_for(folder, how, compile=compiled), world, blueprint_for(folder))
    found = []
    for step in range(4):
        mine = batches(step)
        targets = sum(batch.sizes().labels for batch in mine)
        result = take_step(built, NextToken(), mine[world.rank :: world.size], world, lr=1e-3, targets=targets)
        found.append((result.loss, result.grad_norm))
    said = built.report()
    built.train(False)
    with torch.no_grad():
        evaluated = world.sum([float(built.forward(batches(9)[0]).logps.sum())])[0]
    names = {name: tuple(tensor.shape) for name, tensor in built.weights()}
    state = {name: (type(tensor).__name__, tuple(tensor.shape)) for name, tensor in built.state()["model"].items()}
    built.close()
    return {"found": found, "said": said, "evaluated": evaluated, "names": names, "state": state}


def rounded(values: Tensor, dim: int | None) -> Tensor:
    """Return the float32 values that float8 has of some, with a scale for all, or a power of two for each row."""
    largest = values.abs().amax(dim, keepdim=True) if dim is not None else values.abs().amax()
    scale = LARGEST / largest.double().clamp(min=1e-12)
    scale = scale if dim is None else 2.0 ** scale.log2().floor()
    return (values.float() * scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale.float()


def plain_loss(folder: Path, how: Float8) -> float:
    """Return the first step's loss by transformers alone, in bf16 with the inputs of each linear layer rounded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        dim = None if how is Float8.tensorwise else -1
        return nn.functional.linear(rounded(inputs, dim), rounded(self.weight, dim)).to(inputs.dtype)

    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = forward.__get__(layer)
    total = labels = 0.0
    for batch in batches(0):
        wide = compiling.filled_up(batch, 32)
        with torch.no_grad():
            logits = model(input_ids=wide.input_ids, position_ids=wide.position_ids, use_cache=False).logits.float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), wide.labels.flatten(), ignore_index=IGNORE, reduction="sum"))
        labels += batch.sizes().labels
    return total / labels


@pytest.mark.parametrize("how", [Float8.rowwise, Float8.tensorwise])
def test_the_loss_is_that_of_rounded_inputs_and_weights(ranks: Any, tiny_llama: Path, how: Float8) -> None:
    group: Ranks = ranks(1)
    bf16 = group.call(train, tiny_llama, Float8.none)[0]
    ours = group.call(train, tiny_llama, how)[0]
    loss, plain = ours["found"][0][0], bf16["found"][0][0]
    assert loss != plain
    assert loss == pytest.approx(plain_loss(tiny_llama, how), rel=1e-3)
    assert [norm for _, norm in ours["found"]] == pytest.approx([norm for _, norm in bf16["found"]], rel=0.2)
    assert ours["evaluated"] == pytest.approx(bf16["evaluated"], rel=0.05)
    assert ours["names"] == bf16["names"]
    assert ours["state"] == bf16["state"]
    assert ours["said"]["float8"].startswith("21 of 22 linear layers, 9")
    assert "float8" not in bf16["said"]


@pytest.mark.parametrize(("size", "compiled"), [(2, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_ranks_and_a_compiler_change_it_by_rounding(ranks: Any, tiny_llama: Path, size: int, compiled: bool) -> None:
    one = ranks(1).call(train, tiny_llama, Float8.rowwise)[0]
    other = ranks(size).call(train, tiny_llama, Float8.rowwise, compiled)[0]
    assert [loss for loss, _ in other["found"]] == pytest.approx([loss for loss, _ in one["found"]], rel=1e-2)
    assert [norm for _, norm in other["found"]] == pytest.approx([norm for _, norm in one["found"]], rel=5e-2)


def test_evaluation_is_in_bf16_and_documents_do_not_meet(tiny_llama: Path, ranks: Any) -> None:
    """With one scale a matrix, a document's log-probabilities would depend on its neighbours."""
    assert ranks(1).call(_evaluated, tiny_llama)[0] == 0.0


def _evaluated(world: World, folder: Path) -> float:
    found = []
    for how in (Float8.none, Float8.tensorwise):
        built = build_engine(config_for(folder, how), world, blueprint_for(folder))
        built.train(False)
        with torch.no_grad():
            found.append(built.forward(compiling.filled_up(batches(0)[0], 32)).logps)
        built.close()
    return float((found[0] - found[1]).abs().max())


def test_layers_that_sixteen_does_not_divide_and_routers_are_left_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tied=False, intermediate_size=40)
    model = blueprint_for(folder).build()
    words = float8.convert(model, list(model.model.layers), Float8.rowwise, "cpu")
    assert words.startswith("12 of 22 linear layers")
    assert not float8._fits(nn.Linear(32, 128), "mlp.gate")
    assert float8._fits(nn.Linear(32, 128), "mlp.gate_proj")
    with pytest.raises(ConfigError, match="16 divides"):
        float8.convert(nn.Linear(8, 8), [], Float8.rowwise, "cpu")


def test_a_machine_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"A100 multiplies no float8: it is of SM 8\.0"):
        float8.require_float8(Float8.rowwise)
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao is not installed") as caught:
        float8.require_float8(Float8.rowwise)
    assert "pip install 'fulltune[speed]'" in caught.value.remedy


def test_mfu_is_of_the_peak_of_float8(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert metrics.peak_tflops(config_for(tiny_llama, Float8.none)) == 989
    assert metrics.peak_tflops(config_for(tiny_llama, Float8.rowwise)) == 1979


def test_the_plan_counts_products_in_float8(tiny_llama: Path) -> None:
    """As a GPU multiplies them, and faster than those in bf16; what is trained and kept is the same."""
    device = HardwareConfig(
        name="fast", memory_gib=80, tflops=1e-3, tflops_fp8=2e-3, tflops_fp32=1e-3, memory_gb_s=1e9, link_gb_s=1e9, network_gb_s=1e9,
        host_link_gb_s=1e9,
    )  # fmt: skip
    place, seconds, state = Place(nodes=1, ranks_per_node=2, gpus=True, save_s=0), [], []
    for how in (Float8.none, Float8.tensorwise):
        config = config_for(tiny_llama, how)
        with fake_ranks(2, 2) as world:
            made = simulate(config, blueprint_for(tiny_llama), world, 32, gpus=True)
        eighths, all_flops = (sum(getattr(moment, name) for moment in made.moments) for name in ("flops_float8", "flops"))
        assert (0.5 < eighths / all_flops < 1) is (how is Float8.tensorwise)
        seconds.append(step_seconds(config, place, device, made.moments, 1, FAST, 1.0))
        state.append(made.state_bytes)
    assert seconds[1] < 0.8 * seconds[0]
    assert state[0] == state[1]


def test_importing_the_trainer_prints_nothing_of_torchao() -> None:
    """Transformers imports torchao where it is installed, and peft bitsandbytes; both log what they lack."""
    line = [sys.executable, "-c", "import trainers.__main__, peft, torchao"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.slow
def test_a_run_continues_exactly_and_exports_what_one_in_bf16_does(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    plain, straight, stopped = (tmp_path / name for name in ("plain", "straight", "stopped"))
    more = ("checkpoint.every=2", "train.sample_tokens=0", "train.precision=bf16")
    launch(cache, arguments(base, chats, plain, *more))
    said = launch(cache, arguments(base, chats, straight, *more, "train.float8=tensorwise"))
    assert "│ float8 " in said
    line = arguments(base, chats, stopped, *more, "train.float8=tensorwise")
    stop_at_step(cache, line, stopped, 3)
    launch(cache, line)
    assert trace(stopped) == trace(straight)
    assert exported(straight) == exported(plain)


def exported(run_dir: Path) -> dict[str, Any]:
    with safe_open(run_dir / "export" / "model.safetensors", "pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
