"""What a sequence-classification model says of rows, as transformers opens it: the export of a run with objective=reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from tools.curate.rows import Item
from trainers.config.choices import Layout
from trainers.config.errors import ConfigError
from trainers.data.formats import to_messages, to_text
from trainers.data.preferences import to_preference
from trainers.scoring import reopen_scores

AT_ONCE = 8
"""Rows that are scored together; longest first, so that they need little padding."""


@torch.no_grad()
def scores_of(folder: Path, items: list[Item]) -> npt.NDArray[np.float64]:
    """Return a number a row, of a pair for its chosen answer. Rows that are longer than the model is wide lose their beginning."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = reopen_scores(folder, False).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    text = model.config.get_text_config()
    ids = [tokens_of(tokenizer, item)[-text.max_position_embeddings :] for item in items]
    found = np.zeros(len(items))
    order = sorted(range(len(items)), key=lambda row: (-len(ids[row]), row))
    for start in range(0, len(order), AT_ONCE):
        rows = order[start : start + AT_ONCE]
        tokens = [torch.tensor(ids[row]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=text.pad_token_id or 0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        logits = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device)).logits
        found[rows] = logits[:, 0].double().cpu().numpy()
    return found


def tokens_of(tokenizer: Any, item: Item) -> list[int]:
    """Return a row's tokens by the model's own chat template."""
    if item.layout is Layout.text:
        return list(tokenizer(to_text(item.row))["input_ids"])
    if item.layout is Layout.preference:
        pair = to_preference(item.row)
        messages = [*pair.prompt, *pair.chosen]
    else:
        messages = to_messages(item.row, item.layout)
    if tokenizer.chat_template is None:
        raise ConfigError(
            "quality.model", tokenizer.name_or_path, "its tokenizer has no chat template", "one in chat_template.jinja of the model"
        )
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
