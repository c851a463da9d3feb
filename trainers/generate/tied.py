"""A tied head under its own name next to a model's weights, for servers that read weights again without tying them (vLLM 0.32)."""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path

from safetensors.torch import save_file

from trainers.config.errors import ConfigError
from trainers.model.safetensors_files import INDEX, Weights

HEAD, FILE, EMBEDDINGS = "lm_head.weight", "head.safetensors", "embed_tokens.weight"


def add_head(folder: Path) -> None:
    """Write the head of a model whose embeddings are tied as they are now: a file of its own, and its line in the index.

    Nothing is written for other models. Raises ConfigError for embeddings that it cannot find.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    text = config.get("text_config") or config
    stored = Weights(folder).stored
    if not text.get("tie_word_embeddings", config.get("tie_word_embeddings")) or (HEAD in stored and stored[HEAD].path.name != FILE):
        return
    names = [name for name in stored if name.endswith(EMBEDDINGS)]
    if len(names) != 1:
        reason = f"has tied embeddings, and {len(names)} tensors are named {EMBEDDINGS}"
        raise ConfigError("vllm", str(folder), reason, "a model whose head is not tied")
    staging = folder / f"{FILE}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"  # each machine of a run writes the same
    save_file({HEAD: Weights(folder).read_whole(names[0])}, staging, metadata={"format": "pt"})
    staging.rename(folder / FILE)
    index = folder / INDEX
    if index.is_file():
        content = json.loads(index.read_text("utf-8"))
        content["weight_map"][HEAD] = FILE
        staging.write_text(json.dumps(content, indent=2), "utf-8")
        staging.rename(index)
