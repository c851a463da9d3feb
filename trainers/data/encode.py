"""Rows to token ids with a mask of what is trained: rendering, tokenising, cutting to length."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainers.config.choices import DocumentOf, Layout, ObjectiveName, Reasoning, Supervise, TooLong
from trainers.config.derived import SCORED, compares, rows_as
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, RunConfig
from trainers.data import formats, masks
from trainers.data.ends import chat_remedy, may_grow, require_ends, require_ids, require_not_rendered, written_tokens
from trainers.data.formats import BadRow
from trainers.data.glance import WIDTH, Glance, Keys, digest, marks_of, opening_of, sketches
from trainers.data.masks import Rendered, Span, Template
from trainers.data.parts import LeftOut, left_out, parts_of, search
from trainers.data.reasoning import answer_at, stripped
from trainers.data.sources import Row, parse
from trainers.data.words import WordCache, word_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]
COUNTS = ("rows", "bad", "truncated", "dropped", "split", "equal", "supervised_before", "supervised_lost")
BATCH = 256


@dataclass
class Documents:
    """Documents of a chunk of rows: flat tokens and mask, and what became of the rows."""

    tokens: NDArray[np.int32]
    supervised: NDArray[np.uint8]
    lengths: Ints
    groups: NDArray[np.uint64]
    """Hash of the first prompt of each document."""
    counts: dict[str, int]
    texts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which of the texts each document is of, counted from 0 in what was tokenised together."""
    units: Ints | None = None
    """The unit of each document, counted from 0: those of a pair share one. None where each document is its own."""
    bad: list[str] = field(default_factory=list)
    """File, line and reason of each bad row."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What the chat template leaves out of rows."""
    signals: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """What each document carries besides its tokens, by name, (documents,)."""
    weights: NDArray[np.float32] | None = None
    """What each token weighs where it is trained; None where each weighs 1."""
    unread: set[str] = field(default_factory=set)
    """Fields that rows have and nobody reads."""
    marks: Keys = field(default_factory=lambda: np.zeros((0, WIDTH), np.uint64))
    """What each document is recognised by, (documents, WIDTH)."""
    glance: Glance = field(default_factory=Glance)
    """What the rows look like."""
    error: tuple[str, object, str, str] | None = None
    """A ConfigError's parts, which survive the way back from another process where the exception does not."""


@dataclass(kw_only=True)
class Encoder:
    """Everything that turns rows into documents."""

    backend: Any
    """The fast tokenizer's `tokenizers.Tokenizer`."""
    special: NDArray[np.bool_]
    """Whether an id is an added token, such as a mark of a turn, (vocabulary,)."""
    byte_lengths: NDArray[np.int64] | None
    """Bytes of text of each token id of a byte-level tokenizer, else None."""
    words: WordCache | None
    """Looks words up where the tokenizer allows it."""
    template: Template | None
    bos: str
    eos: str
    layout: Layout
    objective: ObjectiveName
    supervise: Supervise
    seq_len: int
    seed: int
    data: DataConfig
    """What becomes of rows: reasoning, styles, pairs of a list, documents, fields that nobody reads, rows that are too long."""
    chat_remedy: str = "data.template=chatml"
    """Overrides that give the tokenizer a chat template."""
    opening: Collection[str] = ()
    """Tokens that the chat template writes of its own accord."""
    labels: Sequence[str] = ()
    """Names of the classes of rows that are classified."""
    encoder_decoder: bool = False
    """Rows are sources and targets, as trainers.data.seq2seq renders them."""

    def encode(self, rows: Sequence[Row]) -> Documents:
        """Return the documents of rows; bad rows are named in the result, and so is a ConfigError."""
        rendered, groups, prompts, bad, equal = [], [], [], [], 0
        unread: set[str] = set()
        lost = LeftOut()
        try:
            for row in rows:
                try:
                    data = parse(row, self.data.ignore)
                    texts, prompt = self.render(data)
                    if self.objective in SCORED and self.layout is not Layout.ranked:
                        from trainers.data.scored import signal_of

                        signals = signal_of(data, self.objective, self.layout, self.labels)
                        texts = [replace(text, signals=signals) for text in texts]
                    unread |= self._unread(data)
                    if self.layout is not Layout.text or data.keys() != {"text"}:
                        texts = self._weighed(texts, data)
                    for item in texts:
                        formats.require_characters(item.text)
                    rendered.extend(texts)
                    groups.extend([self._group(prompt)] * len(texts))
                    prompts.extend([0 if self.layout is Layout.text else digest(prompt)] * len(texts))
                    lost.add(_kinds(texts), f"{row.file}:{row.line}")
                    if self.layout is Layout.ranked:
                        from trainers.data.ranked import num_pairs

                        equal += num_pairs(data, self.data.pairs) - len(texts) // 2
                except BadRow as error:
                    bad.append(f"{row.file}:{row.line}: {error}")
        except ConfigError as error:
            return Documents(*_NOTHING, counts={}, error=(error.path, error.value, error.reason, error.remedy))
        parts = [slice(at, at + BATCH) for at in range(0, len(rendered), BATCH)]
        documents = [self._documents(rendered[part], groups[part], prompts[part]) for part in parts]
        whole = join(documents)
        whole.counts.update(rows=len(rows), bad=len(bad), equal=equal)
        whole.bad, whole.unread, whole.left_out = bad, unread, lost
        return whole

    def _unread(self, row: Any) -> set[str]:
        """Return the fields of a row that nobody reads; raises BadRow for those that matter and are not honoured."""
        if self.layout is Layout.text and row.keys() == {"text"}:
            return set()
        from trainers.data import fields

        if self.objective in SCORED or self.layout is Layout.styles:
            read = ("label", "score", "margin") if self.objective in SCORED else self.data.styles
            row = {name: value for name, value in row.items() if name not in read}
        fields.check(row, self.layout)
        return fields.unread(row, self.layout)

    def _weighed(self, texts: list[Rendered], row: Any) -> list[Rendered]:
        """Return the documents of a row with its weight."""
        from trainers.data import weights

        weight = weights.row_weight(row)
        return [weights.weighed(text, weight) for text in texts]

    def render(self, row: Any) -> tuple[list[Rendered], str]:
        """Return a row's documents as text with their trained spans, and its first prompt.

        Raises BadRow, or ConfigError without a needed template.
        """
        if self.layout is Layout.text:
            text = formats.to_text(row)
            return [masks.plain_text(text, self.bos, self.eos)], text
        if self.layout in (Layout.preference, Layout.ranked, Layout.unpaired):
            return self._render_answers(row)
        if self.layout is Layout.styles:
            return self._render_styles(row)
        plain = self.template is None or self.objective is ObjectiveName.cpt
        if plain and isinstance(row, dict) and (self.encoder_decoder or not formats.is_conversation(row, self.layout)):
            pair, prompt = self._render_pair(row)
            return [pair], prompt
        from trainers.data import fields

        messages = formats.to_messages(row, self.layout, answered=self.objective is not ObjectiveName.classify)
        if self.data.reasoning is Reasoning.strip:
            messages = stripped(messages)
        prompt, weights = formats.first_prompt(messages), fields.turn_weights(row, self.layout, messages)
        if self.objective not in SCORED:
            self._require_supervision(row)
        if self.objective is ObjectiveName.cpt:
            return [self._render_conversation_text(messages, formats.to_tools(row))], prompt
        if self.template is None:
            raise ConfigError(
                "data.template",
                None,
                f"the tokenizer has no chat template, and rows of layout `{self.layout}` need one",
                f"{self.chat_remedy} or data.template=FILE, a Jinja file",
            )
        template = _with_variables(self.template, fields.template_variables(row))
        tools = formats.to_tools(row)
        if self.objective in SCORED:
            rendered = [masks.render(template, messages, tools, Supervise.all)]
        elif self.data.document is DocumentOf.turn:
            rendered = _each_turn(template, messages, tools, weights, self.data.reasoning is Reasoning.mask)
        else:
            untrained = frozenset(number for number, weight in weights.items() if not weight)
            masked = self.data.reasoning is Reasoning.mask
            rendered = [masks.render(template, messages, tools, self.supervise, untrained, weights, masked)]
        require_not_rendered(messages, rendered[0].text if rendered else "", self.bos, self.opening)
        return rendered, prompt

    def _render_styles(self, row: Any) -> tuple[list[Rendered], str]:
        """Return the rows that a row of texts in several styles becomes."""
        from trainers.data.styles import meaning, to_rows

        rows = to_rows(row, self.data.styles, self.data.style_rows, self.data.style_instruction)
        each = replace(self, layout=Layout.alpaca)
        return [text for one in rows for text in each.render(one)[0]], meaning(row, self.data.styles)

    def _render_answers(self, row: Any) -> tuple[list[Rendered], str]:
        """Return the prompt with each of its answers, those of a pair one after the other; answers are trained, no turn of the prompt."""
        from trainers.data import fields
        from trainers.data.answers import answers_of, without_reasoning

        found = answers_of(row, self.layout, self.objective, self.data.pairs)
        if self.data.reasoning is Reasoning.strip:
            found = without_reasoning(found, self.layout)
        if self.template is None:
            raise ConfigError("data.template", None, "the tokenizer has no chat template, and answers need one", self.chat_remedy)
        template, tools = _with_variables(self.template, fields.template_variables(row)), formats.to_tools(row)
        of_prompt = frozenset(range(len(found.prompt)))
        rendered = [masks.render(template, found.prompt + answer, tools, Supervise.assistant, of_prompt) for answer in found.answers]
        if rendered:
            require_not_rendered(found.prompt + found.answers[0], rendered[0].text, self.bos, self.opening)
        prompts = {item.text[: item.spans[0][0]] for item in rendered}
        if len(prompts) > 1:
            raise BadRow("has a prompt that the chat template writes differently before each of its answers")
        rendered = [replace(item, signals=signals) for item, signals in zip(rendered, found.signals, strict=True)]
        return rendered, formats.first_prompt(found.prompt)

    def _require_supervision(self, row: formats.Row) -> None:
        """Raise ConfigError where turns say that they are not trained, or have weights, and everything is trained."""
        from trainers.data import fields

        if (self.objective is ObjectiveName.cpt or self.supervise is Supervise.all) and fields.has_flags(row, self.layout):
            path, remedy = (
                ("objective.name", "objective=sft")
                if self.objective is ObjectiveName.cpt
                else ("data.supervise", "data.supervise=assistant")
            )
            value = str(self.objective if self.objective is ObjectiveName.cpt else self.supervise)
            raise ConfigError(path, value, "trains every token, and rows have turns that are not trained or have weights", remedy)

    def _render_pair(self, row: Any) -> tuple[Rendered, str]:
        if self.encoder_decoder:
            from trainers.data import seq2seq

            return seq2seq.render_pair(row, self.layout, self.bos, self.eos)
        prompt, completion = formats.to_pair(row, self.layout)
        answer = 0 if self.data.reasoning is Reasoning.keep else answer_at(completion)
        if answer == len(completion):
            raise BadRow(f"has nothing but reasoning, and data.reasoning={self.data.reasoning} does not train it")
        if self.data.reasoning is Reasoning.strip:
            completion, answer = completion[answer:], 0
        if formats.system_of(row) or formats.to_tools(row):
            reason = "rows have a system text or tools, which have no place without a chat template"
            raise ConfigError("data.template", None, reason, f"{self.chat_remedy} or data.ignore=[system,system_prompt,tools]")
        between = "" if self.layout is Layout.prompt_completion else "\n"
        if self.objective in (ObjectiveName.cpt, *SCORED) or self.supervise is Supervise.all:
            return masks.plain_text(f"{prompt}{between}{completion}", self.bos, self.eos), prompt
        pair = masks.plain_pair(prompt + between, completion, self.bos, self.eos)
        return replace(pair, spans=[(start + answer, end) for start, end in pair.spans]), prompt

    def _render_conversation_text(self, messages: list[formats.Message], tools: list[Any] | None) -> Rendered:
        if self.template is None:
            text = "\n".join(str(message["content"]) for message in messages if message.get("content"))
            parts = parts_of(messages, tools, None, range(len(messages)))
            return replace(masks.plain_text(text, self.bos, self.eos), left_out=left_out(parts, search(parts, text)))
        return masks.render(self.template, messages, tools, Supervise.all)

    def _group(self, prompt: str) -> int:
        digest = hashlib.blake2b(prompt.strip().encode("utf-8", "replace"), digest_size=8, key=str(self.seed).encode())
        return int.from_bytes(digest.digest(), "little")

    def _documents(self, rendered: list[Rendered], groups: list[int], prompts: list[int]) -> Documents:
        tokens, ends, offsets = self._tokenise([item.text for item in rendered])
        supervised = np.zeros(len(tokens), dtype=np.uint8)
        weights = np.ones(len(tokens), np.float32) if any(item.weights for item in rendered) else None
        self._mark(rendered, ends, offsets, supervised, weights)
        documents = self._fit(tokens, supervised, offsets, groups, weights)
        for name in rendered[0].signals:
            documents.signals[name] = np.array([item.signals[name] for item in rendered], np.float32)[documents.texts]
        sketched = sketches(documents.tokens, documents.lengths, self.special)
        documents.marks = marks_of([item.text for item in rendered], prompts, documents.texts, sketched)
        documents.glance = self._glance(rendered, offsets)
        return documents

    def _glance(self, rendered: list[Rendered], offsets: Ints) -> Glance:
        """Return what texts look like: an answer is the first trained span of one that is not trained from its start."""
        answers = [item.text[slice(*item.spans[0])] for item in rendered if item.spans and item.spans[0][0] > len(self.bos)]
        openings = Counter(map(opening_of, answers))
        return Glance(len(rendered), int((np.diff(offsets) > self.seq_len).sum()), len(answers), openings)

    def _tokenise(self, texts: list[str]) -> tuple[NDArray[np.int32], Ints, Ints]:
        """Return flat ids, where each token ends in its text (in bytes or characters), and document offsets.

        For a byte-level tokenizer the ends are sums of the tokens' byte lengths, which spares asking for offsets; where
        the sums are not the texts' lengths (a normalizer changed something), offsets it is.
        """
        if self.byte_lengths is not None:
            ids, offsets = _flat(self._ids(texts))
            ends = np.concatenate([[0], np.cumsum(self.byte_lengths[ids])])
            if np.array_equal(np.diff(ends[offsets]), _sizes(texts)):
                return ids, ends[1:] - np.repeat(ends[offsets[:-1]], np.diff(offsets)), offsets
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        ids, offsets = _flat([encoding.ids for encoding in encodings])
        pairs = np.fromiter(chain.from_iterable(chain.from_iterable(item.offsets for item in encodings)), dtype=np.int64).reshape(-1, 2)
        characters = pairs[:, 1]
        for first, last in pairwise(offsets):
            np.maximum.accumulate(characters[first:last], out=characters[first:last])
        if self.byte_lengths is not None:
            return ids, _to_bytes(texts, characters, offsets), offsets
        return ids, characters, offsets

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self.words is not None:
            return self.words.encode_batch(texts)
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _mark(
        self, rendered: list[Rendered], ends: Ints, offsets: Ints, supervised: NDArray[np.uint8], weights: NDArray[np.float32] | None
    ) -> None:
        """Set 1 for each token that shares a character with a trained span, 0 at the first token of each document, and the weights."""
        for number, item in enumerate(rendered):
            first, last = offsets[number], offsets[number + 1]
            spans = item.spans if self.byte_lengths is None else _byte_spans(item)
            for place, (start, end) in enumerate(spans):
                begins = np.searchsorted(ends[first:last], start, side="right")
                up_to = max(np.searchsorted(ends[first:last], end, side="right"), np.searchsorted(ends[first:last], end) + 1)
                span = slice(first + begins, min(first + up_to, last))
                supervised[span] = 1
                if weights is not None and item.weights:
                    weights[span] = item.weights[place]
        supervised[offsets[:-1][np.diff(offsets) > 0]] = 0

    def _fit(
        self,
        tokens: NDArray[np.int32],
        supervised: NDArray[np.uint8],
        offsets: Ints,
        groups: list[int],
        weights: NDArray[np.float32] | None = None,
    ) -> Documents:
        """Cut or drop documents over `seq_len`, and drop those with nothing to train; both of a pair or none."""
        counts = dict.fromkeys(COUNTS, 0)
        counts["supervised_before"] = int(supervised.sum())
        if self.layout in (Layout.preference, Layout.ranked) and compares(self.objective):
            kept = self._fit_pairs(supervised, offsets, groups, counts)
            documents = _documents_of(kept, tokens, supervised, offsets, counts, weights)
            documents.units = np.arange(len(kept), dtype=np.int64) // 2
            return documents
        pieces: list[tuple[int, int, int]] = []
        for group, first, last in zip(groups, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            pieces.extend((group, start, end) for start, end in self._cut(first, last, counts))
        running = np.concatenate([[0], np.cumsum(supervised, dtype=np.int64)])
        kept = [piece for piece in pieces if running[piece[2]] - running[min(piece[1] + 1, piece[2])] > 0]
        counts["dropped"] += len(pieces) - len(kept)
        return _documents_of(kept, tokens, supervised, offsets, counts, weights)

    def _fit_pairs(
        self, supervised: NDArray[np.uint8], offsets: Ints, groups: list[int], counts: dict[str, int]
    ) -> list[tuple[int, int, int]]:
        """Return pieces (group, start, end): both documents of a pair cut at one length, none of one that is dropped or keeps no token.

        Packed, the two fit into a row of `seq_len` together; otherwise each has a row of its own.
        """
        kept: list[tuple[int, int, int]] = []
        room = self.seq_len if self.data.packing else 2 * self.seq_len
        for number in range(0, len(groups), 2):
            spans = [(int(offsets[at]), int(offsets[at + 1])) for at in (number, number + 1)]
            shorter = min(end - start for start, end in spans)
            longest = min(self.seq_len, max(room - shorter, room // 2))
            cut = [(start, min(end, start + longest)) for start, end in spans]
            is_cut = cut != spans
            if (is_cut and self.data.too_long is TooLong.drop) or not all(supervised[start + 1 : end].any() for start, end in cut):
                counts["dropped"] += 1
                continue
            counts["truncated"] += is_cut
            kept += [(groups[number], start, end) for start, end in cut]
        return kept

    def _cut(self, first: int, last: int, counts: dict[str, int]) -> list[Span]:
        if last - first <= self.seq_len:
            return [(first, last)]
        if self.data.too_long is TooLong.drop:
            counts["dropped"] += 1
            return []
        if self.data.too_long is TooLong.truncate:
            counts["truncated"] += 1
            return [(first, first + self.seq_len)]
        counts["split"] += 1
        return [(start, min(start + self.seq_len, last)) for start in range(first, last, self.seq_len)]


def _documents_of(
    kept: Sequence[tuple[int, int, int]],
    tokens: NDArray[np.int32],
    supervised: NDArray[np.uint8],
    offsets: Ints,
    counts: dict[str, int],
    weights: NDArray[np.float32] | None,
) -> Documents:
    """Return the documents of pieces (group, start, end), and count the trained tokens that are in none."""
    index = _ranges([piece[1:] for piece in kept])
    documents = Documents(
        tokens=tokens[index],
        supervised=supervised[index],
        lengths=np.array([end - start for _, start, end in kept], dtype=np.int64),
        groups=np.array([group for group, _, _ in kept], dtype=np.uint64),
        texts=np.searchsorted(offsets, np.array([start for _, start, _ in kept], dtype=np.int64), side="right") - 1,
        counts=counts,
        weights=None if weights is None else weights[index],
    )
    documents.supervised[np.cumsum(documents.lengths) - documents.lengths] = 0
    counts["supervised_lost"] = counts["supervised_before"] - int(documents.supervised.sum())
    return documents


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.uint64))


def encoder_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase, layout: Layout, labels: Sequence[str] = ()) -> Encoder:
    """Return the encoder of a run; raises ConfigError where the tokenizer is slow, or has no end token that plain rows need."""
    name = config.data.template or config.model.tokenizer or config.model.id or "chatml"
    template = masks.template_of(tokenizer, name)
    eos = str(tokenizer.eos_token or "")
    can_grow = may_grow(config)
    remedy = chat_remedy(tokenizer, can_grow)
    plain = layout in (Layout.question_answer, Layout.alpaca, Layout.prompt_completion, Layout.styles) and template is None
    if config.model.encoder_decoder or (plain and not eos and rows_as(config.objective.name) is ObjectiveName.sft):
        from trainers.data.seq2seq import require_plain

        require_plain(config, layout, name, eos, remedy)
    if template is not None and layout is not Layout.text and config.objective.name is not ObjectiveName.cpt:
        require_ends(tokenizer, template, can_grow)
    require_ids(tokenizer, name)
    backend = fast_backend(tokenizer, name)
    return Encoder(
        backend=backend,
        special=special_tokens(tokenizer),
        byte_lengths=byte_lengths(tokenizer),
        words=word_cache(backend),
        template=template,
        bos=first_token(tokenizer),
        eos=eos,
        layout=layout,
        objective=rows_as(config.objective.name),
        supervise=config.data.supervise,
        seq_len=config.data.seq_len,
        seed=config.seed,
        data=config.data,
        chat_remedy=remedy,
        opening=written_tokens(template) if template is not None else (),
        labels=labels,
        encoder_decoder=config.model.encoder_decoder,
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Return whether an id is an added token, such as the marks of turns, (the largest id + 1,): ids may have gaps."""
    found = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
    found[list(tokenizer.get_added_vocab().values())] = True
    return found


def fast_backend(tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    """Return the `tokenizers.Tokenizer` of a fast tokenizer, with truncation and padding off; raises ConfigError for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "model.tokenizer", name, "is a slow tokenizer, which cannot say where its tokens lie in the text", "a tokenizer.json"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend


def first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what opens a plain text: the BOS token where the tokenizer adds it itself or has one that is not its EOS, else ''."""
    bos = tokenizer.bos_token
    if not bos:
        return ""
    adds_it = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(bos) if adds_it or bos != tokenizer.eos_token else ""


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64] | None:
    """Return the bytes of text of each id of a byte-level tokenizer, (vocabulary,); None for other tokenizers."""
    description = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "backend_tokenizer", None) else {}
    if (description.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # one character of a byte-level token is one byte
    for token, number in tokenizer.get_added_vocab().items():
        lengths[number] = len(token.encode())
    return lengths


def join(documents: list[Documents]) -> Documents:
    """Return the documents of several chunks as one, counts added up; the first error is kept."""
    units = [item.units for item in documents if item.units is not None]
    firsts = np.cumsum([0, *(len(item) // 2 for item in units)])
    return Documents(
        units=np.concatenate([item + first for item, first in zip(units, firsts, strict=False)]) if units else None,
        tokens=np.concatenate([_NOTHING[0], *(item.tokens for item in documents)]),
        supervised=np.concatenate([_NOTHING[1], *(item.supervised for item in documents)]),
        lengths=np.concatenate([_NOTHING[2], *(item.lengths for item in documents)]),
        groups=np.concatenate([_NOTHING[3], *(item.groups for item in documents)]),
        counts={name: sum(item.counts.get(name, 0) for item in documents) for name in COUNTS},
        bad=[line for item in documents for line in item.bad],
        signals={name: np.concatenate([item.signals[name] for item in documents]) for name in (documents[0].signals if documents else ())},
        weights=_weights_of(documents),
        unread=set().union(*(item.unread for item in documents)),
        marks=np.concatenate([np.zeros((0, WIDTH), np.uint64), *(item.marks for item in documents)]),
        glance=_glances(documents),
        error=next((item.error for item in documents if item.error), None),
    )


def _glances(documents: list[Documents]) -> Glance:
    whole = Glance()
    for item in documents:
        whole.update(item.glance)
    return whole


def _weights_of(documents: list[Documents]) -> NDArray[np.float32] | None:
    if all(item.weights is None for item in documents):
        return None
    from trainers.data.weights import joined

    return joined((item.weights, len(item.tokens)) for item in documents)


def _each_turn(
    template: Template, messages: list[formats.Message], tools: list[Any] | None, weights: Mapping[int, float], masked: bool
) -> list[Rendered]:
    """Return a document for each trained assistant turn: the row up to it, in which it alone is trained."""
    last = [number for number, message in enumerate(messages) if message["role"] == "assistant" and weights.get(number) != 0]
    return [masks.render(template, messages[: number + 1], tools, Supervise.last, weights=weights, answers_only=masked) for number in last]


def _kinds(texts: list[Rendered]) -> dict[str, bool]:
    """Return the kinds of parts that a row has, each with whether one of its documents lacks such a part."""
    found: dict[str, bool] = {}
    for text in texts:
        found |= {kind: is_missing or found.get(kind, False) for kind, is_missing in text.left_out.items()}
    return found


def _with_variables(template: Template, variables: dict[str, Any]) -> Template:
    return replace(template, variables=template.variables | variables) if variables else template


def _flat(ids: list[list[int]]) -> tuple[NDArray[np.int32], Ints]:
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in ids], dtype=np.int64)])
    return np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(offsets[-1])), offsets


def _sizes(texts: list[str]) -> Ints:
    return np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], dtype=np.int64)


def _byte_spans(item: Rendered) -> list[Span]:
    if item.text.isascii():
        return item.spans
    return [(len(item.text[:start].encode()), len(item.text[:end].encode())) for start, end in item.spans]


def _to_bytes(texts: list[str], characters: Ints, offsets: Ints) -> Ints:
    """Return token ends in bytes for ends in characters."""
    ends = characters.copy()
    for number, text in enumerate(texts):
        if not text.isascii():
            widths = np.cumsum([0, *(len(character.encode()) for character in text)])
            ends[offsets[number] : offsets[number + 1]] = widths[characters[offsets[number] : offsets[number + 1]]]
    return ends


def _ranges(spans: Sequence[tuple[int, ...]]) -> Ints:
    """Return the indices of all spans, one after the other."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(start, end) for start, end in spans)])
