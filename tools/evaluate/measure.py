"""A model's losses and answers, document by document, so that neither ranks nor batches change a metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from trainers.batch import IGNORE
from trainers.config.derived import DESIRABLE
from trainers.data.loader import make_batch
from trainers.data.pack import one_each
from trainers.data.scored import LABEL
from trainers.data.table import TokenTable
from trainers.model.blueprint import positions_limit
from trainers.model.forward import forward
from trainers.scoring import score_rows

Ints = NDArray[np.int64]
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Difference of two logits below which a batch's rounding might decide: far above it, and rare."""


def one_a_row(table: TokenTable) -> TokenTable:
    """Return the same documents, each in a row of its own."""
    order, rows = one_each(len(table.offsets) - 1)
    return dataclasses.replace(table, order=order, rows=rows)


def longest_first(table: TokenTable, documents: Ints) -> Ints:
    """Return documents by falling length: what a batch pads is little, and what does not fit fails first."""
    lengths = np.diff(table.offsets)[documents]
    return documents[np.argsort(-lengths, kind="stable")]


@torch.no_grad()
def losses(model: PreTrainedModel, table: TokenTable, documents: Ints, batch: int, pad_id: int) -> Iterator[dict[str, Any]]:
    """Yield {"document", "tokens", "nats"} of each: its supervised tokens and minus their summed log-probability."""
    rows = one_a_row(table)
    for at in range(0, len(documents), batch):
        chunk = documents[at : at + batch]
        on_device = make_batch(rows, chunk, len(chunk), pad_id).to(model.device)
        logps = forward(model, on_device).logps
        nats, tokens = -logps.double().sum(1), (on_device.labels != IGNORE).sum(1)
        for document, nat, count in zip(chunk.tolist(), nats.tolist(), tokens.tolist(), strict=True):
            yield {"document": document, "tokens": count, "nats": nat}


def scores(model: PreTrainedModel, table: TokenTable, documents: Ints, batch: int) -> Iterator[dict[str, Any]]:
    """Yield {"document", "tokens", "reward"} of each: its supervised tokens, and what a reward model makes of all of it."""
    for at in range(0, len(documents), batch):
        chunk = documents[at : at + batch]
        for document, reward in zip(chunk.tolist(), score_rows(model, table, chunk, batch)[:, 0].tolist(), strict=True):
            tokens = int(table.supervised[table.offsets[document] : table.offsets[document + 1]].sum())
            yield {"document": document, "tokens": tokens, "reward": reward}


def classes(
    model: PreTrainedModel, table: TokenTable, documents: Ints, batch: int, known: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield {"document", "label", "taken", "confidence"} of each: its class, and the most probable one with its probability.

    `known` are the names of the model's outputs, `names` those of the table's numbers.
    """
    for at in range(0, len(documents), batch):
        chunk = documents[at : at + batch]
        logits = torch.from_numpy(score_rows(model, table, chunk, batch)).double()
        confidence, taken = logits.softmax(-1).max(-1)
        for document, sure, best in zip(chunk.tolist(), confidence.tolist(), taken.tolist(), strict=True):
            label = names[int(table.signals[LABEL][document])]
            yield {"document": document, "label": label, "taken": known[best], "confidence": sure}


def wanted(rows: Iterator[dict[str, Any]], table: TokenTable) -> Iterator[dict[str, Any]]:
    """Yield rows of answers with `wanted`, 1 or 0."""
    for row in rows:
        yield row | {"wanted": int(table.signals[DESIRABLE][row["document"]])}


def reference(table: TokenTable, document: int) -> Ints:
    """Return the ids of a document's first supervised stretch: the answer that it has."""
    start, end = int(table.offsets[document]), int(table.offsets[document + 1])
    marks = table.supervised[start:end].astype(bool)
    first = int(marks.argmax())
    behind = np.flatnonzero(~marks[first:])
    return np.asarray(table.tokens[start + first : start + first + int(behind[0]) if len(behind) else end], np.int64)


def with_prompt(table: TokenTable, documents: Ints) -> Ints:
    """Return those documents that have something in front of their answer."""
    firsts = [int(table.supervised[table.offsets[document] : table.offsets[document + 1]].argmax()) for document in documents]
    return documents[np.array(firsts, np.int64) > 1] if len(documents) else documents


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: TokenTable,
    documents: Ints,
    batch: int,
    max_new_tokens: int,
    stops: Sequence[int],
    pad_id: int,
) -> Iterator[dict[str, Any]]:
    """Yield {"document", "prompt", "reference", "answer", "ids", "finished"} of each: the most likely token at every place.

    The same for any batch. A prompt that leaves no room for so many tokens in the model's positions is answered alone, as far as they go.
    """
    limit = positions_limit(model.config)[0] or 1 << 60
    _generate_greedily(model, stops, pad_id)
    prompts = {int(document): np.asarray(table.prompt(int(document)), np.int64) for document in documents}
    roomy = {document: ids for document, ids in prompts.items() if len(ids) + max_new_tokens <= limit}
    cramped = [[document] for document in prompts if document not in roomy]
    for chunk in [*_chunks(model, roomy, batch, pad_id), *cramped]:
        room = min(max_new_tokens, limit - max(len(prompts[document]) for document in chunk))
        found = _continue(model, [prompts[document] for document in chunk], room, stops, pad_id) if room > 0 else [[]]
        for document, ids in zip(chunk, found, strict=True):
            finished = bool(ids) and ids[-1] in stops
            kept = ids[:-1] if finished else ids
            texts = {
                "prompt": _text(tokenizer, prompts[document], special=True),
                "reference": _text(tokenizer, reference(table, document)),
                "answer": _text(tokenizer, kept),
            }
            yield {"document": document, **texts, "ids": kept, "finished": finished}


def _generate_greedily(model: PreTrainedModel, stops: Sequence[int], pad_id: int) -> None:
    for module in model.modules():  # peft reads it from one of the models that it is made of, by method
        if hasattr(module, "generation_config"):
            module.generation_config = GenerationConfig(eos_token_id=list(stops), pad_token_id=pad_id, do_sample=False)  # type: ignore[assignment]


def _chunks(model: PreTrainedModel, prompts: dict[int, Ints], batch: int, pad_id: int) -> list[list[int]]:
    """Return documents to answer at once: any, or where padding in front of a prompt changes its answer, those of one length."""
    by_length: dict[int, list[int]] = {}
    for document, ids in prompts.items():
        by_length.setdefault(len(ids), []).append(document)
    groups = list(by_length.values())
    if batch > 1 and len(groups) > 1:
        ends = [prompts[by_length[length][0]] for length in (min(by_length), max(by_length))]
        groups = [list(prompts)] if _ignores_padding(model, ends, pad_id) else groups
    return [group[at : at + batch] for group in groups for at in range(0, len(group), batch)]


def _ignores_padding(model: PreTrainedModel, prompts: list[Ints], pad_id: int) -> bool:
    """Tell whether a short prompt's next token is as likely next to a long one as alone: not so with peft's prompt tuning, which counts
    positions from the padding's front, and with models that have no attention mask to obey.
    """
    together, alone = (_padded(model, some, pad_id) for some in (prompts, prompts[:1]))
    first, other = (_next_logits(model, *inputs)[0] for inputs in (together, alone))
    return bool((first - other).abs().max() < CLOSE[model.dtype])


def _next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    output: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    logits: Tensor = output.logits[0].float()
    return logits


def _padded(model: PreTrainedModel, prompts: list[Ints], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts as one tensor, filled up in front, and its attention mask; both (B, S)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt.tolist() for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    return ids, mask


def _text(tokenizer: PreTrainedTokenizerBase, ids: Any, special: bool = False) -> str:
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=not special)).strip()


def _continue(model: PreTrainedModel, prompts: list[Ints], room: int, stops: Sequence[int], pad_id: int) -> list[list[int]]:
    """Return what the model writes after each prompt, through its first stop."""
    longest = max(map(len, prompts))
    ids, mask = _padded(model, prompts, pad_id)
    alone = LogitsProcessorList([Alone(model, [longest - len(prompt) for prompt in prompts], longest, stops)])
    output: Any = model.generate(ids, attention_mask=mask, max_new_tokens=room, logits_processor=alone)  # type: ignore[operator]
    return [_through_stop(row, stops) for row in output[:, longest:].tolist()]


def _through_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((at for at, number in enumerate(ids) if number in stops), len(ids) - 1)
    return ids[: end + 1]


class Alone(LogitsProcessor):  # type: ignore[misc]
    """Where two tokens are nearly as likely, let the row alone decide: in a batch, rounding would, and batches differ."""

    def __init__(self, model: PreTrainedModel, begins: list[int], prompt_length: int, stops: Sequence[int]) -> None:
        """Take the column in which each row's prompt begins, and the one after all prompts."""
        self.model, self.begins, self.prompt_length, self.stops = model, begins, prompt_length, set(stops)
        self.close = CLOSE[model.dtype]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V), those of rows in doubt computed anew from their ids (1, S), without a cache."""
        best = scores.topk(2).values
        for row in ((best[:, 0] - best[:, 1]) < self.close).nonzero().flatten().tolist():
            ids = input_ids[row, self.begins[row] :]
            if self.stops.isdisjoint(ids[self.prompt_length - self.begins[row] :].tolist()):
                scores[row] = self._logits(ids)
        return scores

    def _logits(self, ids: Tensor) -> Tensor:
        positions = torch.arange(len(ids), device=ids.device)[None]
        last = torch.tensor([len(ids) - 1], device=ids.device)
        output = self.model(input_ids=ids[None], position_ids=positions, use_cache=False, logits_to_keep=last)
        logits: Tensor = output.logits[0, -1].float()
        return logits
