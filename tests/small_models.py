"""Small models of many architectures, from random weights, as their configs; with parts that text does not reach where they have any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainers.model.blueprint import Blueprint

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
TOKENS = {"vocab_size": 33, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = WIDTH | TOKENS | {"max_position_embeddings": 128, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

DENSE: dict[str, dict[str, Any]] = {
    "gpt_neox": TEXT,
    "qwen3": TEXT,
    "bloom": TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bart": TOKENS
    | {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
        "dropout": 0.0,
        "max_position_embeddings": 16,
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": TEXT | EXPERTS,
    "qwen3_moe": TEXT | EXPERTS,
    "olmoe": TEXT | EXPERTS,
    "deepseek_v3": WIDTH
    | TOKENS
    | LATENT
    | {"num_key_value_heads": 4}
    | {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "jamba": TEXT | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "qwen3_next": TEXT | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": TEXT | MAMBA | {"mamba_d_ssm": 64},
    "mamba": TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
LARGER: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 16, "intermediate_size": 192, "model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 3,
        "eoi_token_index": 4,
    },
    "got_ocr2": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2},
        "image_token_index": 5,
    },
    "fuyu": {"text_config": TEXT | {"model_type": "persimmon"}, "patch_size": 2, "hidden_size": 32, "vocab_size": 33},
    "mllama": {
        "text_config": TEXT
        | {"num_hidden_layers": 3, "cross_attention_layers": [1], "model_type": "mllama_text_model"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "vision_config": VISION | {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]},
    },
}
ALL = DENSE | MIXTURES | HYBRIDS | LARGER
WINDOW = TEXT | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "rwkv": TOKENS | {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "llama": TEXT,
    "gemma2": WINDOW | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "gemma3_text": WINDOW,
    "gpt_oss": WINDOW | EXPERTS,
    "afmoe": WINDOW | EXPERTS | {"num_dense_layers": 1},
    "qwen3_5_text": TEXT | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": TEXT
    | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
}
"""What attention can have beyond the plain kind: windows, softcapping, sinks, gates, recurrent layers between; or how it is called."""


def small(kind: str, attention: str | None = None) -> Blueprint:
    """Return a blueprint without a folder, whose weights are functions of a seed."""
    config = AutoConfig.for_model(kind, **(ALL | ATTENTIONS)[kind])
    config._attn_implementation = attention
    return Blueprint(config=config, folder=None, revision=None, seed=0, trust_remote_code=False)


def save_mixture(base: Path, folder: Path) -> Path:
    """A tiny random mixture of experts with the tokenizer of `base`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model("qwen3_moe", **MIXTURES["qwen3_moe"] | {"vocab_size": len(tokenizer), "initializer_range": 0.1})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
