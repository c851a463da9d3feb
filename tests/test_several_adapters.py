"""Several adapters on one base are switched as docs/adapters.md shows, and each answers as it does alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command import ROOT
from transformers import AutoModelForCausalLM

PAGE = (ROOT / "docs" / "adapters.md").read_text("utf-8")
EXPORTS = {name: f"runs/skills/data.path={name}.jsonl/export" for name in ("chats", "problems")}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def test_the_pages_lines_switch_between_adapters(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(tiny_llama)
    wanted = {"base": logits(AutoModelForCausalLM.from_pretrained("owner/name"))}
    for seed, (name, export) in enumerate(EXPORTS.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        alone = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("owner/name"), config)
        alone.save_pretrained(export)
        wanted[name] = logits(alone.eval())
    assert not torch.allclose(wanted["chats"], wanted["problems"], atol=1e-3)

    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    shown: dict[str, Any] = {"logits": logits}
    exec(block.replace("...  #", "of_base = logits(model)  #"), shown)
    model = shown["model"]
    torch.testing.assert_close(shown["of_base"], wanted["base"])
    torch.testing.assert_close(logits(model), wanted["problems"])
    model.set_adapter("chats")
    torch.testing.assert_close(logits(model), wanted["chats"])


def test_the_pages_command_of_vllm_names_the_exports_of_the_sweep() -> None:
    import json
    import shlex

    from launcher.sweep import name_of

    (line,) = re.findall(r"^vllm serve .*$", PAGE, re.MULTILINE)
    words = shlex.split(line)
    modules = [json.loads(word) for word in words[words.index("--lora-modules") + 1 :]]
    assert {module["name"]: module["path"] for module in modules} == EXPORTS
    for name, export in EXPORTS.items():
        assert export == f"runs/skills/{name_of([f'data.path={name}.jsonl'])}/export"
