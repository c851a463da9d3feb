"""What our code uses of libraries without their promise: each name is on a list here, and is there in the installed version.

No library but torch is imported: their sources are read, so that a name that is gone is found in seconds.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from command import ROOT

FSDP, DTENSOR = "torch.distributed.fsdp._fully_shard", "torch.distributed.tensor"
PROCESS_GROUP, OP = "torch._C._distributed_c10d", "torch._ops.OpOverload"
PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
STAGE3, INIT = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", "deepspeed.runtime.zero.partition_parameters.Init"
TUNER = "peft.tuners.tuners_utils.BaseTuner"
ADAM = "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam"

PRIVATE = {
    # attributes, and where the library has them
    "_C": "torch._C",
    "_apply_gate": "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate",
    "_attn_implementation": "transformers.configuration_utils.PreTrainedConfig._attn_implementation",
    "_buffers": "torch.nn.modules.module.Module._buffers",
    "_can_record_outputs": f"{PRETRAINED}._can_record_outputs",
    "_can_set_attn_implementation": f"{PRETRAINED}._can_set_attn_implementation",
    "_can_set_experts_implementation": f"{PRETRAINED}._can_set_experts_implementation",
    "_cdata": "torch._C.StorageBase._cdata",
    "_cast_input_dtype": f"{TUNER}Layer._cast_input_dtype",
    "_compatible_flash_implementations": f"{PRETRAINED}._compatible_flash_implementations",
    "_convert_to_deepspeed_param": f"{INIT}._convert_to_deepspeed_param",
    "_device_types": f"{PROCESS_GROUP}.ProcessGroup._device_types",
    "_distributed_c10d": PROCESS_GROUP,
    "_dump_nccl_trace": f"{PROCESS_GROUP}._dump_nccl_trace",
    "_experts_implementation": "transformers.configuration_utils.PreTrainedConfig._experts_implementation",
    "_fingerprint": "datasets.arrow_dataset.Dataset._fingerprint",
    "_forward_hooks": "torch.nn.modules.module.Module._forward_hooks",
    "_get_backend": f"{PROCESS_GROUP}.ProcessGroup._get_backend",
    "_get_dtype_plan": f"{PRETRAINED}._get_dtype_plan",
    "_get_fsdp_state": f"{FSDP}._fully_shard.FSDPModule._get_fsdp_state",
    "_get_norm_groups": f"{STAGE3}._get_norm_groups",
    "_get_sequence_number_for_group": f"{PROCESS_GROUP}.Backend._get_sequence_number_for_group",
    "_grouped_mm": "torch.ops.aten._grouped_mm",
    "_init_sharded_param": f"{FSDP}._fsdp_param.FSDPParam._init_sharded_param",
    "_init_weights": f"{PRETRAINED}._init_weights",
    "_keys_to_ignore_on_load_unexpected": f"{PRETRAINED}._keys_to_ignore_on_load_unexpected",
    "_loaded_ops": "deepspeed.ops.op_builder.builder.OpBuilder._loaded_ops",
    "_local_scalar_dense": "torch.ops.aten._local_scalar_dense",
    "_move_adapter_to_device_of_base_layer": f"{TUNER}Layer._move_adapter_to_device_of_base_layer",
    "_mp_policy": f"{FSDP}._fsdp_state.FSDPState._mp_policy",
    "_no_split_modules": f"{PRETRAINED}._no_split_modules",
    "_opname": f"{OP}._opname",
    "_optimizer_states_and_gradient_swap_in": f"{STAGE3}._optimizer_states_and_gradient_swap_in",
    "_optimizer_states_and_gradient_swap_out": f"{STAGE3}._optimizer_states_and_gradient_swap_out",
    "_overloadpacket": f"{OP}._overloadpacket",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition": f"{STAGE3}.__param_id_to_grad_partition",
    "_parameters": "torch.nn.modules.module.Module._parameters",
    "_reassign_or_swap_out_partitioned_parameters": f"{STAGE3}._reassign_or_swap_out_partitioned_parameters",
    "_replace_module": f"{TUNER}._replace_module",
    "_scaled_mm": "torch.ops.aten._scaled_mm",
    "_scaled_dot_product_flash_attention_for_cpu": "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "_schema": f"{OP}._schema",
    "_spec": f"{DTENSOR}._api.DTensor._spec",
    "_supports_attention_backend": f"{PRETRAINED}._supports_attention_backend",
    "_supports_flash_attn": f"{PRETRAINED}._supports_flash_attn",
    "_supports_flex_attn": f"{PRETRAINED}._supports_flex_attn",
    "_supports_sdpa": f"{PRETRAINED}._supports_sdpa",
    "_swappable_optimizer_subgroup": f"{STAGE3}._swappable_optimizer_subgroup",
    "_tied_weights_keys": f"{PRETRAINED}._tied_weights_keys",
    "_world": "torch.distributed.distributed_c10d._world",
    # modules and what is imported of them
    **{
        name: name
        for name in (
            "datasets.data_files._get_data_files_patterns",
            "hydra._internal.hydra.Hydra",
            "hydra._internal.utils.create_config_search_path",
            "hydra._internal.utils.get_args_parser",
            "peft.utils.other._prepare_prompt_learning_config",
            "submitit.core._submit",
            "submitit.slurm.slurm._make_sbatch_string",
            "submitit.slurm.slurm._parse_node_list",
            "torch._C._profiler._EventType",
            "torch._dynamo.callback",
            "torch._dynamo.callback.callback_handler",
            "torch._dynamo.utils.get_compilation_metrics",
            "torch._inductor.config",
            "torch._inductor.runtime.cache_dir_utils.default_cache_dir",
            "torch.fx.experimental._config",
            "torch._subclasses.fake_tensor.FakeTensor",
            "torch._subclasses.fake_tensor.FakeTensorMode",
            "torch._subclasses.fake_tensor.unset_fake_temporarily",
            f"{DTENSOR}._dtensor_spec.DTensorSpec",
            f"{DTENSOR}._dtensor_spec.TensorMeta",
            f"{DTENSOR}._utils.compute_local_shape_and_global_offset",
            f"{FSDP}._fsdp_param",
            "torch.testing._internal.distributed.fake_pg.FakeStore",
            "torch.utils._python_dispatch.TorchDispatchMode",
            "torch.utils._pytree",
            "transformers.integrations.moe._grouped_linear",
            "torch.utils._pytree.tree_leaves",
        )
    },
}
UNDOCUMENTED = {
    # without an underscore, and still no promise: DeepSpeed's ZeRO-3 optimizer, its partitioned parameters and its optimizer on the host
    "external_loss_scale": f"{STAGE3}.override_loss_scale",
    "custom_loss_scaler": f"{STAGE3}.override_loss_scale",
    "combine_grad_norm_groups": "deepspeed.runtime.utils.combine_grad_norm_groups",
    "ds_id": f"{INIT}.ds_id",
    "ds_numel": f"{INIT}.ds_numel",
    "ds_opt_adam": f"{ADAM}.ds_opt_adam",
    "ds_shape": f"{INIT}.ds_shape",
    "ds_tensor": f"{INIT}.ds_tensor",
    "fp16_groups": f"{STAGE3}.fp16_groups",
    "fp32_partitioned_groups_flat": f"{STAGE3}.fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer": f"{STAGE3}.grad_partitions_flat_buffer",
    "invalidate_secondary_tensor": f"{STAGE3}.invalidate_secondary_tensor",
    "opt_id": f"{ADAM}.opt_id",
    "partition_numel": f"{INIT}.partition_numel",
    "persistent_parameters": f"{STAGE3}.persistent_parameters",
    # peft's names of parts, for which our own module answers
    "active_peft_config": "peft.peft_model.PeftModel.active_peft_config",
    "base_model_torch_dtype": "peft.peft_model.PeftModel.base_model_torch_dtype",
    "get_prompt": "peft.peft_model.PeftModel.get_prompt",
    "prompt_encoder": "peft.peft_model.PeftModel.prompt_encoder",
    "prompt_tokens": "peft.peft_model.PeftModel.prompt_tokens",
}
DOCUMENTED = {"_exit", "_current_frames", "_getframe"}
"""Of Python itself, with an underscore and a page of its manual."""
ASKING = {"getattr", "hasattr", "setattr", "delattr"}
LIBRARIES = "torch transformers datasets deepspeed peft accelerate safetensors hydra omegaconf submitit wandb pyarrow lm_eval".split()  # noqa: SIM905


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@lru_cache
def trees() -> list[tuple[str, ast.Module]]:
    files = [path for package in ("launcher", "trainers", "tools") for path in sorted((ROOT / package).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in files]


def own_names() -> set[str]:
    """Return what our own code defines: functions, classes, variables, fields, and attributes of self."""
    found: set[str] = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield private names of attributes, of imports, and in strings that name a module or are asked for as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if any(map(is_private, alias.name.split("."))))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, node.lineno) for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "._" in node.value:
            names = re.findall(rf"\b(?:{'|'.join(LIBRARIES)})(?:\.\w+)+", node.value)
            yield from ((name, node.lineno) for name in names if any(map(is_private, name.split("."))))


def test_each_private_name_that_is_used_is_listed() -> None:
    ours = own_names() - PRIVATE.keys()
    found = {}
    for file, tree in trees():
        for name, line in used(tree):
            if name not in ours and name not in DOCUMENTED and not name.startswith(("launcher.", "trainers.", "tools.")):
                found[name] = f"{file}:{line}"
    unlisted = {name: place for name, place in found.items() if name not in PRIVATE}
    assert not unlisted, "use what is public, or add it to PRIVATE with its place in the library"
    assert PRIVATE.keys() - found.keys() == set(), "no longer used: take it off the list"


def test_each_undocumented_name_is_still_used() -> None:
    """Those of DeepSpeed that begin with ds_ are found here; the others are listed by hand."""
    words: set[object] = set()
    for file, tree in trees():
        if "/peers/drivers/" in file:  # other trainers' own settings, such as axolotl's ds_type
            continue
        for node in ast.walk(tree):
            for kind, field in ((ast.Attribute, "attr"), (ast.Constant, "value"), (ast.keyword, "arg"), (ast.alias, "name")):
                if isinstance(node, kind):
                    words.add(getattr(node, field))
    assert UNDOCUMENTED.keys() <= words
    assert {word for word in words if isinstance(word, str) and re.fullmatch(r"ds_\w+", word)} <= UNDOCUMENTED.keys()


@pytest.mark.parametrize("place", sorted({*PRIVATE.values(), *UNDOCUMENTED.values()}))
def test_the_installed_library_has_it(place: str) -> None:
    if "_nccl_" in place and not importlib.import_module("torch.distributed").is_nccl_available():
        pytest.skip(f"torch has {place} where it was built with NCCL")
    assert is_there(place), f"{place} is gone: the version that is installed has another name for it, or none"


def is_there(place: str) -> bool:
    if place.startswith(("torch._C", "torch.ops.")):
        found: object = importlib.import_module("torch")
        for name in place.split(".")[1:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    file, rest = source_of(place.split("."))
    return file is not None and (not rest or defines(parsed(file), rest))


def source_of(parts: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file of a dotted name's module, found without importing it, and what of the name is within."""
    spec = importlib.util.find_spec(parts[0])
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    for number, name in enumerate(parts[1:], 1):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py", parts[number + 1 :]
        if not (folder / name).is_dir():
            return folder / "__init__.py", parts[number:]
        folder = folder / name
    return folder / "__init__.py", []


@lru_cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def defines(scope: ast.AST, names: list[str]) -> bool:
    """Tell whether a module has a name, or one of its classes an attribute: of the class, of self, or of an object that it prepares."""
    first, *rest = names
    if isinstance(scope, ast.ClassDef):
        nodes = list(ast.walk(scope))
        stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        named = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        return first in stored | named | methods
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return not rest or defines(node, rest)
        if isinstance(node, ast.ImportFrom) and not rest and first in {alias.asname or alias.name for alias in node.names}:
            return True
        if isinstance(node, ast.Assign | ast.AnnAssign) and not rest:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if first in map(ast.unparse, targets):
                return True
        if isinstance(node, ast.If | ast.Try) and defines(node, names):
            return True
    return False


def test_a_name_that_is_gone_is_seen() -> None:
    for place in (f"{STAGE3}._gone", "torch._C._gone", "torch.utils._pytree.gone", "hydra._gone.Hydra", "torch.distributed._gone"):
        assert not is_there(place), place
