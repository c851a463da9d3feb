"""The one shape of data between loader, model and objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
NO_DOCUMENT, NO_TOKEN = -1, -1
SOURCE = "source"
"""The signal of a mixture: the number of each document's source, (D,)."""
WEIGHT = "weight"
"""The signal of rows that have weights: of each label, (B, S, 1), or of each document where an objective judges whole ones, (D,)."""
VOCABULARY = "vocabulary"
"""`Needs.gathered` where the mean log-probability of all tokens is asked for; no signal has this name."""
PADDING_PIECE = 64
"""Tokens of padding that may attend to each other: kernels compute padding as if it were documents, which short ones make cheap."""
MULTIPLE = 16
"""Of tokens that are computed in one row: what matrix products in 8 bits take."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is in some rows; sums of them are sizes of all."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    """Padding is not counted."""
    labels: int = 0
    """Tokens that are predicted."""
    units: int = 0
    """Groups of documents that belong together, such as pairs; 0 where the table has none."""
    weight: float = 0.0
    """Sum of the weights, of labels or of documents, each above 0; 0 where nothing has one and each counts as 1."""

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@dataclass(kw_only=True)
class Batch:
    """A microbatch of rows of one length S.

    input_ids (B, S) int64; labels (B, S) int64, already shifted: labels[:, t] is the token after input_ids[:, t],
    or IGNORE where nothing is trained; position_ids (B, S) int64, restarting at 0 with every document of a packed
    row, padding included, so that attention never crosses them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    documents: Tensor
    """(B, S) int64: the token's document, 0 to D - 1 in this microbatch; NO_DOCUMENT where it is padding."""
    signals: dict[str, Tensor] = field(default_factory=dict)
    """What else an objective reads, by name: (D,) or (B, S) float32, or (B, S, k) float32 or int32 where each label has k."""
    num_rows: int
    """Rows that count; the others of the B are padding rows that keep the ranks in step."""
    num_tokens: int
    """Tokens that are not padding."""
    num_documents: int
    """D."""
    scored: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(B, S) int64: which of `num_scores` scores is the token's, below 0 for none; (0,) where each document's last token has its score."""
    num_scores: int = 0
    """How many tokens have scores; 0 where each document has one."""
    columns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(K,) int64, K >= 1: the columns in which some row has a label. Found on the CPU, so that a GPU need not wait."""
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(N,) int64: of the rows one after the other, the tokens that `in_one_row` has: those of documents, and padding up to MULTIPLE."""
    labelled: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(L,) int64, L >= 1: which of `kept` have labels."""

    source: Tensor | None = None
    """(B, R) int64: what the encoder of an encoder-decoder reads, NO_TOKEN where it is padding. The rest is then of the decoder alone."""
    segments: tuple[int, ...] = ()
    """Lengths of what follows one another in the rows, put one after the other: documents, and below 0 padding. Numbers on the CPU."""
    starts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """(M + 1,) int32: where each segment of `kept` begins, padding in pieces of PADDING_PIECE, and N: cumulative lengths for kernels."""

    def __post_init__(self) -> None:
        """Find the labels and the segments; a batch without labels keeps a column, so that its graph and gradient (0) exist."""
        if not self.segments:
            self.segments = _segments(self.documents)
        if not len(self.kept):
            self.kept = _kept(self.documents)
        if not len(self.starts):
            pieces = [size for length in self.segments_kept for size in ([length] if length > 0 else _pieces(-length))]
            self.starts = torch.tensor([0, *pieces]).cumsum(0).to(self.documents.device, torch.int32)
        if not len(self.columns):
            self.columns = _places((self.labels != IGNORE).any(0))
        if not len(self.labelled):
            self.labelled = _places(self.labels.flatten()[self.kept] != IGNORE)

    @property
    def segments_kept(self) -> tuple[int, ...]:
        """Return the lengths of what follows one another in `kept`: its padding comes last."""
        if len(self.kept) == self.labels.numel():
            return self.segments
        documents = tuple(length for length in self.segments if length > 0)
        return (*documents, *([sum(documents) - len(self.kept)] if sum(documents) < len(self.kept) else []))

    @property
    def longest(self) -> int:
        """Return the tokens of the longest segment in `starts`."""
        return max(length if length > 0 else min(-length, PADDING_PIECE) for length in self.segments_kept)

    @classmethod
    def of(cls, input_ids: Tensor, labels: Tensor, position_ids: Tensor, source: Tensor | None = None) -> Batch:
        """Return rows without padding: a document begins wherever a position is 0."""
        documents = (position_ids == 0).flatten().cumsum(0).view(position_ids.shape) - 1
        how_many: dict[str, Any] = {"num_rows": len(input_ids), "num_tokens": input_ids.numel(), "num_documents": int(documents.max()) + 1}
        return cls(input_ids=input_ids, labels=labels, position_ids=position_ids, documents=documents, source=source, **how_many)

    def sizes(self) -> Sizes:
        """Return how much counts in it; not of units, which a batch does not know."""
        labels = int((self.labels != IGNORE).sum())
        weight = float(self.signals[WEIGHT].double().sum()) if WEIGHT in self.signals else 0.0
        return Sizes(rows=self.num_rows, documents=self.num_documents, tokens=self.num_tokens, labels=labels, weight=weight)

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `f` of each tensor."""
        tensors: dict[str, Any] = {item.name: f(value) for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)}
        return replace(self, **tensors, signals={name: f(signal) for name, signal in self.signals.items()})

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def in_one_row(self) -> Batch:
        """Return the tokens of `kept`, one row after the other, in a single row (1, N); positions restart where a row began.

        Padding costs as much as documents do. And transformers finds packed documents for flash attention in a single row only: in
        several, documents would see each other.
        """
        shape, every = self.labels.shape, len(self.kept) == self.labels.numel()

        def joined(tensor: Tensor) -> Tensor:
            row = tensor.reshape(1, -1, *tensor.shape[2:]) if tensor.shape[:2] == shape else tensor
            return row if every or row is tensor else row[:, self.kept]

        kept = torch.arange(len(self.kept), device=self.labels.device)
        return replace(self.map(joined), segments=self.segments_kept, columns=self.labelled, kept=kept)

    def out_of_one_row(self, values: Tensor) -> Tensor:
        """Return what was computed of `in_one_row` (1, N) in its places, 0.0 where nothing was, (B, S); or (1, N, k) -> (B, S, k)."""
        shape, more = self.labels.shape, values.shape[2:]
        if len(self.kept) == shape.numel():
            return values.view(*shape, *more)
        return values.new_zeros(shape.numel(), *more).index_copy(0, self.kept, values[0]).view(*shape, *more)


def _segments(documents: Tensor) -> tuple[int, ...]:
    """Return the lengths of the runs of one document in each row, below 0 where it is padding; (B, S)."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    at = begins.flatten().nonzero().flatten()
    lengths = torch.diff(at, append=at.new_tensor([documents.numel()]))
    return tuple(torch.where(documents.flatten()[at] == NO_DOCUMENT, -lengths, lengths).tolist())


def _kept(documents: Tensor) -> Tensor:
    """Return the places of documents' tokens, then of the first padding that fills them up to MULTIPLE; (B, S) -> (N,), N >= 1."""
    is_padding = documents.flatten() == NO_DOCUMENT
    count = documents.numel() - int(is_padding.sum())
    more = -count % MULTIPLE if count else MULTIPLE
    if len(is_padding) - count <= more:
        return torch.arange(len(is_padding), device=documents.device)
    return torch.cat([(~is_padding).nonzero().flatten(), is_padding.nonzero().flatten()[:more]])


def _places(has_label: Tensor) -> Tensor:
    """Return where there are labels, the first place where there are none."""
    found = has_label.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def _pieces(length: int) -> list[int]:
    return [min(PADDING_PIECE, length - begin) for begin in range(0, length, PADDING_PIECE)]


def by_document(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of each document's values over its labels, (B, S) -> (D,)."""
    labelled = values.where(batch.labels != IGNORE, 0.0).flatten()
    sums = values.new_zeros(batch.num_documents + 1)
    return sums.index_add(0, batch.documents.flatten() + 1, labelled)[1:]


def label_weights(batch: Batch) -> Tensor | None:
    """Return the weight of each label, (B, S) with 0 where there is none; None where each counts as 1."""
    weights = batch.signals.get(WEIGHT)
    return None if weights is None else weights.squeeze(-1)


def document_weights(batch: Batch) -> Tensor:
    """Return the weight of each document, (D,): 1 where rows have none."""
    weights = batch.signals.get(WEIGHT)
    return torch.ones(batch.num_documents, device=batch.labels.device) if weights is None else weights


def last_tokens(batch: Batch) -> Tensor:
    """Return where each document's last token is among the rows, one after the other: (D,) int64, below B x S.

    Of a batch of `each_token`, where each of its tokens is; at 0 those that these rows have left out, which were padding.
    """
    each = batch.num_scores > 0
    numbers, count = (batch.scored, batch.num_scores) if each else (batch.documents, batch.num_documents)
    places = torch.arange(numbers.numel(), device=numbers.device)
    return places.new_zeros(count + 1).scatter_reduce(0, numbers.flatten() + 1, places, "amax")[1:]


def each_token(batch: Batch) -> Batch:
    """Return the batch with a score for each of its B x S tokens, in the order of the rows; its documents, which masks know, stay."""
    places = torch.arange(batch.documents.numel(), device=batch.documents.device)
    return replace(batch, scored=places.view_as(batch.documents), num_scores=places.numel())


def by_pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what belongs to the first and to the second document of each pair, (D,) -> (P,), (P,): the members are neighbours."""
    first, second = values.view(-1, 2).unbind(1)
    return first, second


@dataclass(frozen=True)
class Needs:
    """What a forward returns besides log-probabilities."""

    entropy: bool = False
    scores: bool = False
    """Scores of documents, of a model whose head makes them; there are no log-probabilities then."""
    gathered: str | None = None
    """Name of a signal of token ids, (B, S, k) int32: their log-probabilities are returned, and that of all others together.

    Or VOCABULARY: the mean log-probability of all tokens is returned, (B, S, 1).
    """


@dataclass(kw_only=True)
class Output:
    """What a forward returns, float32; each (B, S) is 0.0 where the label is IGNORE."""

    logps: Tensor
    """Log-probability of each label in nats, with a graph while training."""
    entropy: Tensor | None = None
    """Entropy in nats of the distribution that the label is drawn from; without a graph."""
    scores: Tensor | None = None
    """(D, C): what the head of scores makes of each document's last hidden state, with a graph while training."""
    gathered: Tensor | None = None
    """(B, S, k + 1): log-probability in nats of each of the k tokens asked for and, last, of all others together; with a graph.

    Where VOCABULARY was asked for, (B, S, 1): the mean of all tokens.
    """
    balance: Tensor | None = None
    """Scalar: how unevenly routers treat each document, summed over labels; only where `train.balance_loss` asks for it."""

    def map_tokens(self, f: Callable[[Tensor], Tensor]) -> Output:
        """Return the output with `f` of what each token has, (B, S) or (B, S, k)."""
        found = {name: getattr(self, name) for name in ("logps", "entropy", "gathered")}
        return replace(self, **{name: f(values) for name, values in found.items() if values is not None})
