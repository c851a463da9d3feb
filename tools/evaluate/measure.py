"""A model's losses and answers, document by document, so that neither ranks nor batches change a metric."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.batch import IGNORE
from trainers.config.derived import DESIRABLE, chunk_of
from trainers.data.loader import make_batch
from trainers.data.pack import one_each
from trainers.data.reasoning import answer_at, opened
from trainers.data.scored import LABEL
from trainers.data.table import TokenTable
from trainers.generate.decode import decode
from trainers.generate.request import STOP, Sampling
from trainers.model.forward import forward
from trainers.model.head import Head, why_not
from trainers.scoring import score_rows

Ints = NDArray[np.int64]


def one_a_row(table: TokenTable) -> TokenTable:
    """Return the same documents, each in a row of its own."""
    order, rows = one_each(len(table.offsets) - 1)
    return dataclasses.replace(table, order=order, rows=rows)


def longest_first(table: TokenTable, documents: Ints) -> Ints:
    """Return documents by falling length: what a batch pads is little, and what does not fit fails first."""
    lengths = np.diff(table.offsets)[documents]
    return documents[np.argsort(-lengths, kind="stable")]


def head_of(model: PreTrainedModel, tokens: int) -> Head | None:
    """Return what reads a model's output layer a few tokens at a time, as training does; None where so many tokens' logits are small.

    Also None where the layer is not understood, and where a model is spread over several GPUs, whose hooks move what it is given.
    """
    size = chunk_of(tokens, model.config.get_text_config().vocab_size, model.dtype.itemsize)
    if not size or len({p.device for p in model.parameters()}) > 1 or why_not(model) is not None:
        return None
    return Head(model, size)


@torch.no_grad()
def losses(
    model: PreTrainedModel, table: TokenTable, documents: Ints, batch: int, pad_id: int, head: Head | None = None
) -> Iterator[dict[str, Any]]:
    """Yield {"document", "tokens", "nats"} of each: its supervised tokens and minus their summed log-probability.

    With a `head` no more than its tokens' logits exist at once.
    """
    rows = one_a_row(table)
    for at in range(0, len(documents), batch):
        chunk = documents[at : at + batch]
        on_device = make_batch(rows, chunk, len(chunk), pad_id).to(model.device)
        logps = forward(model, on_device, head=head).logps
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
    """Yield {"document", "prompt", "reference", "answer", "ids", "finished", "reasoning"} of each: the most likely token at every place.

    `reasoning` is how many tokens come before the answer. An answer that never ends the reasoning which its prompt has begun is
    given with the `<think>` of the prompt.

    The same for any batch. A prompt that leaves no room for so many tokens in the model's positions is answered alone, as far as they go.
    """
    prompts = {int(document): np.asarray(table.prompt(int(document)), np.int64).tolist() for document in documents}
    likeliest = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    for document, found in decode(model, prompts, batch, likeliest, stops, pad_id):
        finished = found.finish == STOP
        kept = found.ids[:-1] if finished else found.ids
        prompt, said = _text(tokenizer, prompts[document], special=True), _text(tokenizer, kept)
        answer = opened(prompt, said, _text(tokenizer, kept, special=True))
        texts = {"prompt": prompt, "reference": _text(tokenizer, reference(table, document)), "answer": answer}
        reasoning = reasoning_tokens(tokenizer, kept) if answer == said else len(kept)
        yield {"document": document, **texts, "ids": kept, "finished": finished, "reasoning": reasoning}


def reasoning_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """Return how many of these ids are reasoning, its end included: all where it never ends."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    end = len(text[: answer_at(text)].rstrip())
    return bisect_left(range(len(ids)), end, key=lambda count: len(str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True))))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Any, special: bool = False) -> str:
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=not special)).strip()
