"""A teacher that is opened here with plain transformers."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tools.evaluate.measure import longest_first, one_a_row
from tools.logprobs.shards import Found, Ints
from trainers.batch import IGNORE
from trainers.cache import content_key
from trainers.config.local import looks_local, require_model_directory
from trainers.data.loader import make_batch
from trainers.data.table import TokenTable
from trainers.generate.identity import digest_of
from trainers.model import hub
from trainers.model.attention import documents_of
from trainers.model.blueprint import open_config
from trainers.model.rotary import by_document

LOGITS_BYTES = 1 << 30
"""Of logits at once, unless one document alone has more."""
FLOATS = 1 << 24


class Local:
    """A model in memory; each document is a row of its own, so that no number depends on its batch."""

    may_change = False

    def __init__(self, options: argparse.Namespace, num_ids: int, padding: int) -> None:
        """Find the model; it is loaded when it is asked first. Raises ConfigError where it does not exist."""
        self.options, self.num_ids, self.padding = options, num_ids, padding
        if looks_local(options.model):
            require_model_directory("--model", options.model)
        self.folder, commit = hub.fetch("--model", options.model, options.revision, hub.WEIGHTS)
        self.name = options.model if commit is None else f"{options.model}@{commit[:12]}"
        self.key = content_key("local", digest_of(self.folder), options.dtype, num_ids)
        self.model: PreTrainedModel | None = None

    def ask(self, table: TokenTable, documents: Ints) -> Found:
        """Return what it says at the labels of these documents, in their order."""
        if self.model is None:
            self.model = self._open()
        rows, found = one_a_row(table), dict[int, Found]()
        itemsize, width = self.model.dtype.itemsize, self.model.config.get_text_config().vocab_size
        left = longest_first(table, documents)
        while len(left):
            longest = int(table.offsets[left[0] + 1] - table.offsets[left[0]])
            count = max(1, min(self.options.batch, LOGITS_BYTES // (longest * width * itemsize)))
            chunk, left = left[:count], left[count:]
            found |= self._ask(rows, chunk)
        ids, logps = (np.concatenate(parts) for parts in zip(*(found[int(document)] for document in documents), strict=True))
        return ids, logps

    @torch.no_grad()
    def _ask(self, rows: TokenTable, documents: Ints) -> dict[int, Found]:
        assert self.model is not None
        batch = make_batch(rows, documents, len(documents), self.padding).to(self.model.device)
        with documents_of(batch):
            logits = self.model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.columns).logits
        kept = batch.labels[:, batch.columns] != IGNORE
        ids, logps = likeliest(logits[kept], self.options.top_k, self.num_ids)
        counts = kept.sum(1).tolist()
        parts = zip(ids.cpu().split(counts), logps.cpu().split(counts), strict=True)
        return {int(document): (part.numpy(), values.numpy()) for document, (part, values) in zip(documents, parts, strict=True)}

    def _open(self) -> PreTrainedModel:
        gpu = self.options.device == "auto" and torch.cuda.is_available()
        config, trust = open_config(self.folder, self.options.trust_remote_code), self.options.trust_remote_code
        dtype, where = getattr(torch, self.options.dtype), "auto" if gpu else None
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.folder, config=config, dtype=dtype, device_map=where, trust_remote_code=trust
        )
        by_document(model)
        model.eval()
        return model


def likeliest(logits: Tensor, k: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """Return the k likeliest of the first `num_ids` tokens, (N, V) -> (N, k) int32, and log-probabilities, (N, k + 1) float32.

    The last is of all other tokens together: summing their logits loses nothing where their share is small.
    """
    ids, logps = [], []
    for chunk in logits.split(max(1, FLOATS // logits.shape[-1])):
        values = chunk.float()
        top = values[:, :num_ids].topk(k, -1)
        rest = values.scatter(-1, top.indices, float("-inf")).logsumexp(-1, keepdim=True)
        ids.append(top.indices.int())
        logps.append(torch.cat([top.values, rest], 1) - values.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logps)
