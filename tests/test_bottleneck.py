"""Bottleneck adapters are a method of plain peft by one file: equal to a reference written by hand, and loaded without this project."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command import ROOT, arguments, launch, stop_at_step, trace
from conftest import save_tiny
from peft_cases import CASES, rows_of_steps, settings, with_bottlenecks
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE
from trainers.peft import bottleneck_adapter
from trainers.peft.bottleneck_adapter import BottleneckConfig

SMALL = ["peft.bottleneck=8", "train.steps=12", "checkpoint.every=3", "train.eval_every=6"]


def config_of(case: str, **more: Any) -> BottleneckConfig:
    fields = {name: value for name, value in CASES[case].items() if name in ("activation", "scale", "parallel")}
    size, names = CASES[case]["bottleneck"], CASES[case]["targets"]
    same = {"task_type": "CAUSAL_LM", "bottleneck_size": size, "target_modules": names, "hidden_size": 32}
    return BottleneckConfig(**same | fields | more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", tied=False, num_hidden_layers=2)


def opened(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def test_the_base_of_these_tests_is_as_wide_as_their_adapters(tiny: Path) -> None:
    assert opened(tiny).config.hidden_size == config_of("parallel").hidden_size


@pytest.mark.parametrize("case", ["houlsby", "parallel"])
def test_five_steps_equal_a_reference_written_by_hand(tiny: Path, case: str) -> None:
    torch.manual_seed(3)
    ours = peft.get_peft_model(opened(tiny), config_of(case))
    values = {name.removeprefix("base_model.model."): p.detach().clone() for name, p in ours.named_parameters()}
    theirs = with_bottlenecks(opened(tiny), settings(case), values.__getitem__)
    ids, labels = next(rows_of_steps())
    torch.testing.assert_close(ours(input_ids=ids).logits, opened(tiny)(input_ids=ids).logits, rtol=0, atol=0)
    losses: list[list[float]] = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        losses.append([])
        for ids, labels in [*rows_of_steps()][:5]:
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] != losses[0][-1]
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in theirs.parameters()) == (16 if case == "houlsby" else 8)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            path, kind = name.rpartition(".")[::2]
            torch.testing.assert_close(p, trained[f"base_model.model.{path}.default.{kind}"], rtol=1e-5, atol=1e-6)


def test_adapters_are_switched_and_not_merged(tiny: Path, tmp_path: Path) -> None:
    ids = next(rows_of_steps())[0]
    wanted = {"base": opened(tiny)(input_ids=ids).logits}
    for case in ("houlsby", "parallel"):
        torch.manual_seed(4)
        alone = peft.get_peft_model(opened(tiny), config_of(case))
        for name, p in alone.named_parameters():
            if "bottleneck_up" in name:
                torch.nn.init.normal_(p)
        alone.save_pretrained(tmp_path / case)
        assert (tmp_path / case / "bottleneck_adapter.py").read_bytes() == Path(bottleneck_adapter.__file__).read_bytes()
        wanted[case] = alone(input_ids=ids).logits
        assert not torch.allclose(wanted[case], wanted["base"], atol=1e-2)
    model = peft.PeftModel.from_pretrained(opened(tiny), tmp_path / "houlsby", adapter_name="houlsby")
    model.load_adapter(tmp_path / "parallel", adapter_name="parallel")
    for name in ("houlsby", "parallel", "houlsby"):
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted[name])
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted["base"], rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="an activation between two matrices"):
        model.merge_and_unload()


def test_an_activation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="it may be relu, gelu, silu, tanh"):
        config_of("houlsby", activation="mish")


BARE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
shown = open(sys.argv[1]).read().replace("RUN_DIR", sys.argv[2]).replace("owner/name", sys.argv[3])
exec(shown)
assert not any(name.split(".")[0] in ("trainers", "launcher", "tools") for name in sys.modules)
model.eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.arange(3, 9)[None]).logits[0, -1].tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.soak)])
def test_a_run_is_continued_exactly_and_its_export_is_loaded_by_peft_alone(
    base: Path, chats: Path, cache: Path, tmp_path: Path, engine: str
) -> None:
    """The lines of docs/adapters.md, in an isolated process elsewhere that has torch, transformers and peft and not this project."""
    from trainers.peft.saved import reopen_adapter

    preset = "peft=parallel" if engine == "fsdp" else "peft=houlsby"
    run, parts = tmp_path / "run", tmp_path / "parts"
    said = launch(cache, arguments(base, chats, run, preset, *SMALL, f"engine={engine}"))
    assert "export reopened with plain peft" in said
    line = arguments(base, chats, parts, preset, *SMALL, f"engine={engine}")
    stop_at_step(cache, line, parts, 5)
    assert "continuing from" in launch(cache, line)
    assert trace(parts) == trace(run)
    assert (parts / "export" / "adapter_model.safetensors").read_bytes() == (run / "export" / "adapter_model.safetensors").read_bytes()
    (lines,) = re.findall(r"```\n(import sys\n.*?)```", (ROOT / "docs" / "adapters.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "lines.py").write_text(lines)
    words = [sys.executable, "-I", "-c", BARE, str(tmp_path / "lines.py"), str(run), str(base)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        wanted = reopen_adapter(run / "export", opened(base))(input_ids=torch.arange(3, 9)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), wanted, rtol=1e-5, atol=1e-5)
