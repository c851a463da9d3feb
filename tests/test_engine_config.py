"""Engine presets compose, knobs of another engine and unknown DeepSpeed keys are refused on the login node with the right name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.compose import compose
from launcher.presets import CONF
from trainers.config import deepspeed_keys
from trainers.config.deepspeed_keys import check_overrides
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.config.sharding import check_world

SCRATCH = ["model=scratch", "data=python_docs", "train.precision=fp32"]
PRESETS = sorted(file.stem for file in (CONF / "engine").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_engine_composes(name: str) -> None:
    more = ["engine.nvme_path=/mnt/nvme"] if name == "zero3_nvme" else []
    engine = compose([*SCRATCH, f"engine={name}", *more]).engine
    written = yaml.safe_load((CONF / "engine" / f"{name}.yaml").read_text())
    assert {key: str(getattr(engine, key)) for key in written} == written


BAD = [
    (["engine=fsdp", "engine.overlap_comm=false"], ["`engine.overlap_comm` = false", "engine.name=fsdp", "engine=zero3"]),
    (["engine=zero3", "engine.replicate=2"], ["`engine.replicate` = 2", "engine.name=zero3", "engine=fsdp"]),
    (["engine=zero3", "engine.prefetch=2"], ["`engine.prefetch` = 2"]),
    (["engine=fsdp", "engine.offload_param=nvme"], ["`engine.offload_param` = 'nvme'", "engine=zero3_nvme"]),
    (["engine=fsdp", "engine.offload_param=cpu"], ["`engine.offload_optimizer` = 'none'", "engine.offload_optimizer=cpu"]),
    (["engine=zero3_nvme"], ["`engine.nvme_path`", "engine.nvme_path=/"]),
    (["engine=zero3", "engine.nvme_path=/x"], ["`engine.nvme_path` = '/x'", "nothing is offloaded to nvme"]),
    (["engine=zero3_nvme", "engine.nvme_path=''"], ["`engine.nvme_path`", "is empty"]),
    (["engine.replicate=2"], ["`engine.replicate` = 2", "1 rank"]),
    (["launch.processes=4", "engine.replicate=2", "engine.shard=4"], ["`engine.shard` = 4", "engine.shard=2"]),
    (["launch.processes=4", "engine.replicate=3"], ["`engine.replicate` = 3", "engine.replicate=1 or 2 or 4"]),
    (["engine=zero3", "+engine.overrides.zero_optimizaton.x=1"], ["zero_optimizaton", "did you mean engine.overrides.zero_optimization?"]),
    (["engine=zero3", "+engine.overrides.optimizer.type=Adam"], ["`engine.overrides.optimizer`", "set optim.name"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(overrides) for overrides, _ in BAD])
def test_bad_engine_settings(overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compose([*SCRATCH, "launch.gpus_per_node=0", "launch.processes=1", *overrides])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"max_live_parameters": 1}}, "did you mean engine.overrides.zero_optimization.stage3_max_live_parameters?"),
    ({"stage3_max_reuse_distance": 1}, "did you mean engine.overrides.zero_optimization.stage3_max_reuse_distance?"),
    (
        {"zero_optimization": {"offload_param": {"buffer_sise": 1}}},
        "did you mean engine.overrides.zero_optimization.offload_param.buffer_size?",
    ),
    ({"aio": {"blocksize": 1}}, "did you mean engine.overrides.aio.block_size?"),
    ({"zero_optimization": {"reduce_bucket_sise": 1}}, "did you mean engine.reduce_bucket_size?"),
    ({"zero_optimization": {"round_robin_gradients": True}}, "stages 1 and 2 only"),
    ({"zero_optimization": 3}, "must be a mapping"),
    ({"gradient_clipping": 1.0}, "set optim.clip"),
    ({"banana": 1}, "engine.overrides has: zero_optimization, aio"),
]


@pytest.mark.parametrize(("overrides", "words"), KEYS, ids=[str(overrides) for overrides, _ in KEYS])
def test_a_bad_override_names_the_nearest_key(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.overrides") as refused:
        check_overrides(overrides)
    assert words in str(refused.value)


def test_good_overrides_pass() -> None:
    check_overrides(
        {"zero_optimization": {"stage3_max_live_parameters": 1e8, "offload_param": {"buffer_count": 6}}, "aio": {"queue_depth": 16}}
    )


def test_a_mesh_must_be_the_ranks() -> None:
    config = RunConfig()
    config.engine.replicate = 2
    check_world(config, 4)
    with pytest.raises(ConfigError, match="replicate"):
        check_world(config, 1)


def test_known_keys_are_the_installed_deepspeeds() -> None:
    """Every key that DeepSpeed's own models have stands in one of our lists, and the other way round."""
    program = """
import os; os.environ["DS_ACCELERATOR"] = "cpu"
import json, sys
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as zero
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as optimizer, DeepSpeedZeroOffloadParamConfig as param
names = lambda model: sorted(field.alias or name for name, field in model.model_fields.items() if not field.json_schema_extra)
open(sys.argv[1], "w").write(json.dumps([names(zero), names(param), names(optimizer)]))
"""
    zero, param, optimizer = _keys_of(program)
    sections = {"zero_optimization": zero, "zero_optimization.offload_param": param, "zero_optimization.offload_optimizer": optimizer}
    unsupported = {
        "elastic_checkpoint", "load_from_fp32_weights", "zenflow", "legacy_stage1", "ignore_unused_parameters", "parameter_alignment",
        "zero_quantized_nontrainable_weights", "pipeline_loading_checkpoint", "override_module_apply", "compute_grad_norm",
        "save_muon_momentum_buffer_in_memory", "fast_init", "super_offload", "stage3_gather_fp16_weights_on_model_save",
    }  # fmt: skip
    for section, theirs in sections.items():
        ours = set(deepspeed_keys.KNOWN[section])
        named = {path.rpartition(".")[2] for path in (*deepspeed_keys.OURS, *deepspeed_keys.INERT) if path.rpartition(".")[0] == section}
        assert ours | named <= set(theirs), section
        assert set(theirs) <= ours | named | unsupported, section


def _keys_of(program: str) -> Any:
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        subprocess.run([sys.executable, "-c", program, file.name], check=True, timeout=120, env=os.environ, capture_output=True)
        return json.loads(Path(file.name).read_text())
