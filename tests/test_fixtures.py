"""No test depends on those that ran before it in the same process."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface


@pytest.mark.parametrize("time", ["first", "again"])
def test_the_next_test_finds_the_process_as_this_one_did(time: str, tmp_path: Path) -> None:
    """Each leaves behind what the other looks for."""
    assert "FULLTUNE_LEFT" not in os.environ
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not Path.cwd().is_relative_to(tmp_path.parent)
    assert not isinstance(AttentionInterface()["sdpa"], partial)
    os.environ["FULLTUNE_LEFT"] = time
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    os.chdir(tmp_path)
    AttentionInterface.register("sdpa", partial(AttentionInterface()["sdpa"]))
