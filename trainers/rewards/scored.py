"""What a sequence-classification model says of conversations, as transformers opens it: the export of a run with objective=reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from trainers.config.errors import ConfigError
from trainers.health.activity import watch
from trainers.scoring import reopen_scores

AT_ONCE = 8
"""Rows that are scored together; longest first, so that they need little padding."""


class Scorer:
    """A model of scores, opened once: on a GPU where there is one."""

    def __init__(self, folder: Path) -> None:
        """Open the model and its tokenizer."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = reopen_scores(folder, False).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return a conversation's tokens by the model's own chat template; raises ConfigError where it has none."""
        self.require_template()
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    def require_template(self, field: str = "model") -> None:
        """Raise ConfigError, with the name of the setting that gives the model, where its tokenizer has no chat template."""
        if self.tokenizer.chat_template is None:
            remedy = "one in chat_template.jinja of the model"
            raise ConfigError(field, self.tokenizer.name_or_path, "the reward model's tokenizer has no chat template", remedy)

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]], look: Callable[[], None] = lambda: None) -> NDArray[np.float64]:
        """Return the first score of each row of tokens, (N,). Rows that are longer than the model is wide lose their beginning.

        `look` is called before each batch, which is a beat.
        """
        text = self.model.config.get_text_config()
        ids = [row[-text.max_position_embeddings :] for row in rows]
        found = np.zeros(len(ids))
        order = sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row))
        for start in watch.each(range(0, len(order), AT_ONCE)):
            look()
            chunk = order[start : start + AT_ONCE]
            tokens = [torch.tensor(ids[row]) for row in chunk]
            padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=text.pad_token_id or 0)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
            logits = self.model(input_ids=padded.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
            found[chunk] = logits[:, 0].double().cpu().numpy()
        return found


def rewards_of(
    scorer: Scorer, rows: Sequence[Mapping[str, Any]], look: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.float64], list[str]]:
    """Return the score of each answer after its prompt, NaN where it is not a finite number, and why there is none.

    An empty answer is a turn like any other. Without a reward it would not be trained on, and other answers that are worth little would
    be made less likely in its favour.
    """
    turns = ([*row["prompt"], {"role": "assistant", "content": str(row["answer"])}] for row in rows)
    found = scorer.scores([scorer.tokens(messages) for messages in turns], look)
    is_finite = np.isfinite(found)
    return np.where(is_finite, found, np.nan), ["" if is_one else "is not a finite number" for is_one in is_finite]
