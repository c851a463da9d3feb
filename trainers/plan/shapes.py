"""Architectures of some hub models, as their config.json gives them: a plan needs neither a token nor a network for these."""

from typing import Any

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "dtype": "bfloat16"}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}

_LLAMA2_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
_LLAMA2_7B |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "dtype": "float16"}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
_QWEN3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "dtype": "bfloat16"}
_QWEN3_MOE = {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
_QWEN3_MOE |= {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
_QWEN3_MOE |= {"num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960, "dtype": "bfloat16"}
_QWEN3_235B = {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94}
_QWEN3_235B |= {"num_attention_heads": 64}
_GPT_OSS = {"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36}
_GPT_OSS |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4}
_GPT_OSS |= {"sliding_window": 128, "max_position_embeddings": 131072, "dtype": "bfloat16"}

SHAPES: dict[str, dict[str, Any]] = {
    f"meta-llama/{name}{kind}": _LLAMA3 | sizes
    for name, sizes in {"Llama-3.1-8B": _8B, "Llama-3.1-70B": _70B, "Llama-3.1-405B": _405B}.items()
    for kind in ("", "-Instruct")
} | {
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "Qwen/Qwen3-8B": _QWEN3,
    "Qwen/Qwen3-8B-Base": _QWEN3 | {"max_position_embeddings": 32768},
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen/Qwen3-30B-A3B-Base": _QWEN3_MOE | {"max_position_embeddings": 32768},
    "Qwen/Qwen3-235B-A22B": _QWEN3_MOE | _QWEN3_235B,
    "unsloth/gpt-oss-120b-BF16": _GPT_OSS,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": _LLAMA3 | _8B | {"vocab_size": 128264},
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA3 | _70B,
}
