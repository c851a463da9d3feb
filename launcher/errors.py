"""Bad input in one clear message: the field, its value, where it was set, and the nearest valid name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from launcher.config import LaunchConfig, world_size
from launcher.fields import all_fields, choices, expected, names_at
from launcher.origin import UNSET, shown, where_set
from trainers.config.deepspeed_keys import check_overrides
from trainers.config.derived import rows_words
from trainers.config.errors import ConfigError, alike
from trainers.config.mesh import mesh_of

# Ours, and what transformers, TRL, axolotl, LLaMA-Factory and accelerate call it: too far apart for a comparison of letters to find.
THEIR_NAMES = {
    "run_dir": "output_dir logging_dir",
    "name": "run_name wandb_name",
    "seed": "data_seed",
    "model.id": "model_name_or_path model_name base_model pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config",
    "model.add_tokens": "new_special_tokens special_tokens add_special_tokens",
    "model.grow_vocabulary": "resize_vocab resize_token_embeddings",
    "model.attention": "attn_implementation flash_attn flash_attention",
    "data.path": "dataset datasets dataset_name dataset_name_or_path dataset_dir train_file data_path",
    "data.split": "dataset_train_split train_split",
    "data.config": "dataset_config dataset_config_name subset data_config_name",
    "data.revision": "dataset_revision",
    "data.mix": "dataset_mixer dataset_mix mixture interleave_probs data_mix",
    "data.mix_exhausted": "mix_strategy stopping_strategy",
    "data.max_rows": "max_samples max_train_samples",
    "data.streaming": "streaming dataset_streaming use_streaming",
    "data.window_shards": "shuffle_buffer_size buffer_size streaming_buffer_size",
    "objective.label_smoothing": "label_smoothing_factor",
    "data.eval_path": "eval_dataset test_datasets validation_file",
    "data.eval_split": "dataset_test_split",
    "data.eval_fraction": "val_set_size val_size test_size eval_split_ratio",
    "data.layout": "dataset_text_field dataset_format formatting",
    "data.template": "chat_template template chat_template_path",
    "data.supervise": "train_on_inputs train_on_input train_on_prompt mask_history assistant_only_loss completion_only_loss roles_to_train",
    "data.seq_len": "max_seq_length max_length max_seq_len sequence_len cutoff_len model_max_length block_size context_length",
    "data.packing": "sample_packing neat_packing pack_sequences",
    "data.too_long": "excess_length_strategy",
    "data.processes": "dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers num_proc",
    "data.prepared_dir": "dataset_prepared_path tokenized_path cache_dir",
    "objective": "stage loss_type",
    "peft=lora": "use_peft use_lora lora",
    "peft=dora": "use_dora peft_use_dora lora_use_dora",
    "peft=qlora": "load_in_4bit load_in_8bit quantize quantization quantization_bit bnb_4bit_quant_type use_qlora qlora",
    "peft=pissa": "pissa_init",
    "peft.rank": "lora_r lora_rank r",
    "peft.alpha": "lora_alpha",
    "peft.dropout": "lora_dropout",
    "peft.targets": "target_modules lora_target_modules lora_target lora_target_linear",
    "peft.modules_to_save": "additional_target lora_modules_to_save",
    "peft.rank_stabilised": "use_rslora peft_use_rslora rslora",
    "peft.init": "init_lora_weights peft_init_lora_weights",
    "peft.adapter": "adapter_name_or_path lora_model_dir",
    "peft.lr_ratio": "loraplus_lr_ratio",
    "peft.virtual_tokens": "num_virtual_tokens",
    "peft.last_blocks": "freeze_trainable_layers num_layer_trainable",
    "peft.freeze": "unfrozen_parameters freeze_modules",
    "peft": "finetuning_type adapter peft_config",
    "engine": "deepspeed fsdp fsdp_config zero_stage distributed_type",
    "optim.name": "optimizer optimizer_type",
    "optim.lr": "lr learning_rate base_lr peak_lr",
    "optim.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "optim.warmup_fraction": "warmup_ratio",
    "optim.warmup_steps": "warmup_ratio num_warmup_steps",
    "optim.min_lr_fraction": "min_lr cosine_min_lr_ratio min_lr_ratio",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon",
    "optim.clip": "max_grad_norm gradient_clipping clip_grad_norm",
    "train.steps": "max_steps num_steps",
    "train.epochs": "num_train_epochs num_epochs",
    "train.global_batch": "batch_size train_batch_size global_batch_size",
    "train.microbatch": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu",
    "train.eval_microbatch": "per_device_eval_batch_size eval_batch_size",
    "train.loss_scale": "initial_scale_power init_scale initial_loss_scale grad_scaler",
    "train.loss_scale_steps": "loss_scale_window scale_window growth_interval",
    "train.precision": "bf16 fp16 tf32 torch_dtype dtype mixed_precision",
    "train.activations": "gradient_checkpointing use_gradient_checkpointing activation_offloading",
    "train.eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch",
    "train.patience": "early_stopping_patience",
    "train.deterministic": "full_determinism",
    "train.step_timeout_s": "ddp_timeout nccl_timeout",
    "checkpoint.every": "save_steps save_strategy saves_per_epoch save_every",
    "checkpoint.keep_last": "save_total_limit",
    "train.export": "load_best_model_at_end",
    "launch.processes": "nproc_per_node num_processes",
    "launch.nodes": "nnodes num_machines num_nodes",
    "launch.rdzv_endpoint": "main_process_ip main_process_port master_addr master_port",
    "log.wandb": "report_to use_wandb wandb_mode",
    "log.project": "wandb_project",
    "log.entity": "wandb_entity",
}
OURS: dict[str, list[str]] = {}
for _setting, _names in THEIR_NAMES.items():
    for _name in _names.split():
        OURS.setdefault(_name, []).append(_setting)
ANSWERS = {
    "resume_from_checkpoint": "the same command again continues from the newest checkpoint",
    "overwrite_output_dir": "a new run takes a new run_dir",
    "logging_steps": "metrics.jsonl has every step",
}
"""Names for which there is no setting, and why none is needed."""
ACCUMULATION = ("gradient_accumulation_steps", "accumulation_steps", "grad_accum", "grad_accumulation_steps")
BAD_INPUT = (HydraException, OmegaConfBaseException, ConfigError, yaml.YAMLError, ValueError)


def explain(error: Exception, overrides: list[str]) -> str:
    """Return the message for an error of composing, typing or validating; needs Hydra initialised."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, ConfigError):
        return _report(error.path, error.value, error.reason, overrides, error.remedy and f"try     {error.remedy}")
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"error: {shown(Path(error.problem_mark.name))}:{error.problem_mark.line + 1}: is not valid YAML: {error.problem}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_preset(error.missing_cfg_file, overrides)
    if isinstance(cause, (ConfigKeyError, AttributeError)) and isinstance(cause, OmegaConfBaseException):
        return unknown(_attempted(str(cause.full_key), error, overrides), overrides)
    if isinstance(cause, ValidationError):
        return _wrong_type(str(cause.full_key), _first_line(cause), overrides)
    if isinstance(cause, OmegaConfBaseException):
        return _report(str(cause.full_key), UNSET, _first_line(cause), overrides)
    return _from_text(str(error), overrides)


def unknown(path: str, overrides: list[str]) -> str:
    """Return the message for a dotted path that names no setting."""
    name = path.rpartition(".")[2]
    if path == "method":
        return _method(overrides)
    if name == "activation_checkpointing":
        return _report(
            path, UNSET, "is now `train.activations`, where true is block and false keep", overrides, "try     train.activations=block"
        )
    if name in ACCUMULATION:
        return _accumulation(path, overrides)
    if name in ANSWERS:
        return _report(path, UNSET, f"there is no such setting: {ANSWERS[name]}", overrides)
    owner = next((above for above in _above(path) if above in all_fields()), None)
    if owner == "engine.overrides":
        return _of_deepspeed(path, overrides)
    if owner is not None and expected(all_fields()[owner].type).startswith("a mapping"):
        return _report(path, UNSET, f"`{owner}` takes any key, and a new one needs a +", overrides, f"try     +{path}=VALUE")
    if owner is not None:
        kind = expected(all_fields()[owner].type)
        return _report(path, UNSET, f"`{owner}` holds no fields: it is {kind}", overrides, f"try     {owner}=VALUE")
    parent = path.rpartition(".")[0]
    level = parent if names_at(parent) else ""
    known = f"`{level or 'top level'}` has: {', '.join(names_at(level))}"
    near = nearest(path)
    return _report(path, UNSET, "there is no such setting", overrides, f"nearest {', '.join(near)}" if near else known)


def _above(path: str) -> list[str]:
    """Return the dotted paths that a path is below, the longest first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _method(overrides: list[str]) -> str:
    """Return the message for the group `method`, which there was: presets of peft have their learning rates."""
    given = next((text for text in reversed(overrides) if text.lstrip("+").startswith("method=")), "method=NAME")
    names = ",".join("none" if name == "full" else name for name in given.partition("=")[2].split(","))
    return (
        f"error: `method` is now `peft`, whose presets have their learning rates\n  set by  command line: {given}\n  try     peft={names}"
    )


def _accumulation(path: str, overrides: list[str]) -> str:
    """Return the message for gradient accumulation, which follows from other settings: with what it is, and the batch that was meant."""
    reason = "there is no such setting: it follows from train.global_batch, train.microbatch and the ranks"
    others = [text for text in overrides if text.lstrip("+").partition("=")[0] != path]
    try:
        composed = GlobalHydra.instance().config_loader().load_configuration("config", others, RunMode.RUN)
        train, launch = composed.train, OmegaConf.to_object(composed.launch)
        assert isinstance(launch, LaunchConfig)
        mesh = mesh_of(composed.engine, world_size(launch))
        now, share = f"now     {rows_words(train, mesh)}", mesh.data_size * train.microbatch
    except (HydraException, OmegaConfBaseException, ArithmeticError, ConfigError):  # what else is wrong is said once this is right
        return _report(path, UNSET, reason, overrides, "try     train.global_batch=ROWS, which all ranks take together in a step")
    wanted = where_set(path, overrides)[1]
    rows = share * wanted if isinstance(wanted, int) else "ROWS"
    return _report(path, UNSET, reason, overrides, now, f"try     train.global_batch={rows}")


def _of_deepspeed(path: str, overrides: list[str]) -> str:
    """Return the message for a key below engine.overrides that was set without a +: DeepSpeed may not have it at all."""
    nested: Any = where_set(path, overrides)[1]
    for key in reversed(path.split(".")[2:]):
        nested = {key: nested}
    try:
        check_overrides(nested)
    except ConfigError as error:
        return explain(error, overrides)
    return _report(path, UNSET, "`engine.overrides` takes DeepSpeed's keys, and a new one needs a +", overrides, f"try     +{path}=VALUE")


def nearest(path: str) -> list[str]:
    """Return up to three valid names close to a wrong one, as dotted paths or GROUP=PRESET: at its own level first, then anywhere."""
    parent, _, name = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    level = [prefix + match for match in alike(name, names_at(parent), 2, 0.55)]
    whole = alike(path, all_fields(), 2, 0.78)
    same_name = [known for known in all_fields() if alike(name, [known.rpartition(".")[2]], 1, 0.85)]
    found = OURS[name] + same_name if name in OURS else level + whole + same_name
    return list(dict.fromkeys(found))[:3]


def _report(path: str, value: Any, reason: str, overrides: list[str], *advice: str) -> str:
    """Lay out one error; `advice` is whole lines such as `try     optim.lr=1e-5`, empty ones left out."""
    where, raw = where_set(path, overrides)
    value = raw if value is UNSET else value
    lines = [f"error: `{path}`" + ("" if value is UNSET else f" = {_show(value)}") + f": {reason}"]
    lines += [f"  set by  {where}"] if where else []
    lines += [f"  {line}" for line in advice if line]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value!r}" if isinstance(value, str) else str(value)


def _first_line(error: Exception) -> str:
    return str(getattr(error, "msg", None) or error).splitlines()[0]


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        near = [name if "=" in name else f"{name}=VALUE" for name in nearest(override.lstrip("+~"))]
        return f"error: {override!r} sets nothing: write FIELD=VALUE" + (f"\n  try     {near[0]}" if near else "")
    quoted = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    fixed = shlex.quote(f'{key}="{quoted}"')
    return f"error: {override!r} cannot be read: the value has characters that need quotes\n  try     {fixed}"


def _no_preset(file: str, overrides: list[str]) -> str:
    group, _, name = file.rpartition("/")
    if group == "method":
        return f"error: conf/method/{name}.yaml: `method` is now `peft`, whose presets have their learning rates\n  try     /peft: {name}"
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    near = alike(name, known, 3, 0.4)
    setter = next((text for text in overrides if text.lstrip("+").startswith(f"{group}=")), "")
    lines = [f"error: `{group}` = {name!r}: there is no conf/{group}/{name}.yaml"]
    lines += [f"  set by  command line: {setter}" if setter else "  set by  the defaults list of a file in conf/"]
    sign = "+" if group == "exp" else ""
    lines += [f"  nearest {', '.join(f'{sign}{group}={item}' for item in near)}"] if near else []
    return "\n".join([*lines, f"  there are: {', '.join(known)}"])


def _attempted(full_key: str, error: Exception, overrides: list[str]) -> str:
    """Return the whole path that was tried: OmegaConf stops at the first name that it does not know."""
    match = re.search(r"Could not override '([^']+)'", str(error))
    tried = match[1] if match else full_key
    return tried if tried.startswith(full_key) else full_key


def _wrong_type(full_key: str, reason: str, overrides: list[str]) -> str:
    path = re.sub(r"\[\d+\]$", "", full_key)
    below = next((text for text in overrides if text.lstrip("+~").startswith(f"{path}.")), None)
    if below is not None and path in all_fields():
        return unknown(below.lstrip("+~").partition("=")[0], overrides)
    field = all_fields().get(path)
    if field is None and names_at(path):
        return _report(path, UNSET, "is a group of fields, not a value", overrides, f"try     {path}.{names_at(path)[0]}=VALUE")
    if field is None:
        return _report(path, UNSET, reason, overrides)
    value = where_set(path, overrides)[1]
    near = alike(str(value), choices(field.type), 1, 0.4)
    return _report(path, UNSET, f"must be {expected(field.type)}", overrides, f"nearest {path}={near[0]}" if near else "")


def _from_text(text: str, overrides: list[str]) -> str:
    """Turn the Hydra errors that carry nothing but their text into ours."""
    if match := re.search(r"^In '.+': (\w+) raised while composing config:\n(.*)\n\s+full_key: (\S+)", text):
        return unknown(match[3], overrides) if "Key" in match[1] or "Attribute" in match[1] else _wrong_type(match[3], match[2], overrides)
    if match := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        return f"error: `{match[1]}` is not set: there is nothing to take away\n  set by  command line: ~{match[1]}"
    if match := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        setter = next((item for item in overrides if item.startswith(f"{match[1]}=")), f"{match[1]}=NAME")
        return f"error: `{match[1]}` is not chosen yet, so choosing it needs a +\n  set by  command line: {setter}\n  try     +{setter}"
    if match := re.search(r"^(?:Multiple values for )?(\S+?)(?: appears more than once|\. To override a value)", text):
        setter = next((item for item in overrides if item.startswith(f"+{match[1]}=")), "")
        return f"error: `{match[1]}` is already chosen: leave out the +\n  set by  command line: {setter}\n  try     {setter[1:]}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        key, _, value = match[1].partition("=")
        return f"error: {match[1]!r}: one value is expected\n  try     '{key}=[{value}]' for a list, '{key}=\"{value}\"' for text"
    if "Config group override must be a string" in text:
        return _no_name(overrides)
    return "error: " + text.strip().splitlines()[0] if text.strip() else "error: the settings cannot be composed"


def _no_name(overrides: list[str]) -> str:
    """Return the message for a group that was given something else than the name of a preset."""
    loader = GlobalHydra.instance().config_loader()
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        group = override.key_or_group
        if group in loader.list_groups("") and not isinstance(override.value(), str):
            return f"error: {text!r}: a group takes the name of a preset\n  there are: {', '.join(loader.get_group_options(group))}"
    return "error: an override has no name before its =: write FIELD=VALUE"
