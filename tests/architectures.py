"""Tiny models of many architectures, as transformers' own save_pretrained writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

DENSE = """apertus arcee bitnet bloom cohere cohere2 cwm diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode
    gpt_neox gptj granite helium hunyuan_v1_dense jais2 llama minicpm3 ministral mistral modernbert-decoder mpt nanochat nemotron olmo olmo2
    olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma xglm""".split()  # noqa: SIM905
EXPERTS = """afmoe aria_text deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe hunyuan_v1_moe jetmoe
    llama4_text minimax minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open""".split()  # noqa: SIM905
HYBRID = """bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 mamba nemotron_h olmo_hybrid qwen3_next recurrent_gemma
    rwkv""".split()  # noqa: SIM905
LARGER = ["fuyu", "gemma3", "got_ocr2", "llama4", "mllama", "phi4_multimodal", "qwen3_5", "qwen3_5_moe"]
"""With a part for pictures: opened whole as a causal language model, or the text part of it."""
QUICK = [*DENSE[::2], *EXPERTS[::3], *HYBRID[1::3], "gemma3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "gpt2", "qwen3_moe"]

TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16,
    "vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "n_embd": 64, "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "n_positions": 64, "d_model": 64, "ffn_dim": 96,
    "num_layers": 2, "num_heads": 4, "attention_heads": 4, "word_embed_proj_dim": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_layers": [1],
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_d_ssm": 128, "n_groups": 1, "ssm_state_size": 16, "state_size": 16,
}  # fmt: skip
PICTURE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28, "patch_size": 14,
    "depth": 2, "num_heads": 2, "embed_dim": 32, "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip


def tiny_config(kind: type[PreTrainedConfig], text: bool = True) -> PreTrainedConfig:
    """Return a config whose known sizes are small, with a layer of each of its types, and its parts alike."""
    known = kind()
    fields = {name: value for name, value in (TEXT if text else PICTURE).items() if hasattr(known, name)}
    if known.model_type == "deepseek_v3":
        fields["head_dim"] = fields["qk_rope_head_dim"]  # which are one there
    if known.model_type == "deepseek_v3":
        fields["head_dim"] = fields["qk_rope_head_dim"]  # which are one there
    if types := known.to_dict().get("layer_types"):
        fields["layer_types"] = (list(dict.fromkeys(types)) * 2)[: max(2, len(set(types)))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    for name in known.to_dict():
        part = getattr(known, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = tiny_config(type(part), text="vision" not in name and "audio" not in name).to_dict()
    return kind(**fields)


def save_architecture(folder: Path, kind: str) -> PreTrainedModel:
    """Save a tiny random model of an architecture, the larger one where there is one, by its own save_pretrained."""
    config = tiny_config(CONFIG_MAPPING[kind])
    larger = type(config) in AutoModelForMultimodalLM._model_mapping
    torch.manual_seed(0)
    model: PreTrainedModel = (AutoModelForMultimodalLM if larger else AutoModelForCausalLM).from_config(copy.deepcopy(config))
    model.save_pretrained(folder)
    return model
