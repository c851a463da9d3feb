"""The tokenizer of a run: the model's own, another, or one trained on the data; and its chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.cache import build_once, cache_root, content_key
from trainers.config.choices import Layout
from trainers.config.derived import sources_of
from trainers.config.errors import ConfigError, did_you_mean
from trainers.config.local import looks_local
from trainers.config.schema import RunConfig
from trainers.data import formats, masks, sources
from trainers.data.formats import BadRow
from trainers.data.masks import BUILT_IN
from trainers.processes import raise_exhausted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
TRAINING_ROWS = 200_000
VERSION = 1


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast:
    """Return the run's fast tokenizer with `model.add_tokens`, and `data.template` as its chat template, so that an export carries both.

    Raises ConfigError where it could not be loaded, or is slow. A tokenizer to train is trained once per content of the data.
    """
    tokenizer: PreTrainedTokenizerFast = (
        _open(config, str(_trained(config))) if config.model.train_tokenizer else _open(config, _name(config))
    )
    tokenizer.add_tokens(list(config.model.add_tokens), special_tokens=True)
    if config.data.template is not None or config.model.encoder_decoder:
        named = config.data.template
        tokenizer.chat_template = None if named is None else _template(named, tokenizer.chat_template)
    return tokenizer


def with_template(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a run's tokenizer with the template of one source of its mixture, the same object where it is the run's."""
    if config.data.template is None:
        return tokenizer
    template = _template(config.data.template, tokenizer.chat_template)
    if template == tokenizer.chat_template:
        return tokenizer
    own = copy(tokenizer)
    own.chat_template = template
    return own


def _template(name: str, own: Any) -> str:
    """Return a chat template that is built in, a file, or one of several that the tokenizer names; raises ConfigError."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if Path(name).is_file():
        return Path(name).read_text("utf-8")
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if name not in named:
        reason = f"no such file, and the tokenizer has {'templates named ' + ', '.join(sorted(named)) if named else 'no named templates'}"
        remedy = did_you_mean(name, [*named, *BUILT_IN]) or "a Jinja file, or data.template=chatml"
        raise ConfigError("data.template", name, reason, remedy)
    return named[name]


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of what decides the token ids: vocabulary, merges, normalizers and special tokens."""
    parts = (tokenizer.backend_tokenizer.to_str(), sorted(tokenizer.special_tokens_map.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def template_hash(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return a hash of the chat template, or None."""
    return content_key(tokenizer.chat_template) if tokenizer.chat_template else None


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that fills rows up: the pad token's, else the end token's, else 0; what it is never changes a loss."""
    return next((int(number) for number in (tokenizer.pad_token_id, tokenizer.eos_token_id) if number is not None), 0)


def _name(config: RunConfig) -> str:
    name = config.model.tokenizer or config.model.id
    if name is None:
        raise ConfigError("model.tokenizer", None, "no tokenizer is named", "model.tokenizer=DIR or model.train_tokenizer=4096")
    return name


def _open(config: RunConfig, name: str) -> Any:
    from transformers import AutoTokenizer

    field = "model.tokenizer" if config.model.tokenizer else "model.id"
    revision, commit, trusted = config.model.revision if name == config.model.id else None, None, config.model.trust_remote_code
    folder = Path(name)
    if trusted or not looks_local(name):
        from trainers.model import hub

        folder, commit = hub.fetch(field, name, revision, hub.TOKENIZER)
        if trusted:
            hub.say_whose_code(name, folder, commit)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # whatever transformers or the hub client raises
        raise_exhausted(error)
        from importlib.util import find_spec

        files = [file for file in ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model") if (folder / file).is_file()]
        if files and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
            reason = f"has a sentencepiece tokenizer alone ({files[0]}), and the package that reads it is not installed"
            raise ConfigError(field, name, reason, "pip install sentencepiece protobuf") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(field, name, f"the tokenizer cannot be loaded: {reason}", "model.tokenizer=DIR with a tokenizer.json") from error
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ConfigError(
            field, name, "is a slow tokenizer, which cannot say where its tokens lie in the text", "a tokenizer with a tokenizer.json"
        )
    return tokenizer


def _trained(config: RunConfig) -> Path:
    folder = _trained_folder(config)
    return build_once(folder.parent, folder.name, lambda folder: _train(config, folder), "the tokenizer")[0]


def is_trained(config: RunConfig) -> bool:
    """Tell whether the tokenizer that the run trains is there already."""
    return _trained_folder(config).is_dir()


def _trained_folder(config: RunConfig) -> Path:
    data = [one.data for one in _each(config)]
    marks = [mark for each in data for mark in sources.fingerprint(sources_of(each)[0], config.objective.name, each.streaming)]
    more = [[each.layout, each.ignore, each.max_rows] for each in data] if config.data.mix or config.data.max_rows is not None else []
    key = content_key(VERSION, config.model.train_tokenizer, config.data.layout, config.data.ignore, *marks, *more)
    return cache_root(config.data.prepared_dir) / f"tokenizer-{key}"


def _train(config: RunConfig, folder: Path) -> None:
    """Train a byte-level BPE tokenizer with ChatML's tokens and template, and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.model.train_tokenizer,
        special_tokens=[END, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(config), trainer)
    make: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast = make(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False)
    fast.chat_template = masks.CHATML
    fast.save_pretrained(folder)


def _each(config: RunConfig) -> list[RunConfig]:
    """Return the run of each source of a mixture, or the run itself."""
    if not config.data.mix:
        return [config]
    from trainers.config.mix import sources_of_mix

    return list(sources_of_mix(config).values())


def _texts(config: RunConfig) -> Iterator[str]:
    each = _each(config)
    for one in each:
        rows = islice(sources.rows(sources_of(one.data)[0], config.objective.name), one.data.max_rows)
        for row in islice(rows, TRAINING_ROWS // len(each)):
            try:
                yield from _strings(sources.parse(row, one.data.ignore), one.data.layout)
            except BadRow:
                continue  # preparation names it


def _strings(data: Any, layout: Layout) -> Iterator[str]:
    layout = formats.recognise(data) if layout is Layout.auto else layout
    found = (
        [formats.to_text(data)]
        if layout is Layout.text
        else [message["content"] for message in formats.to_messages(data, layout) if message.get("content")]
    )
    for text in found:
        formats.require_characters(text)
        yield text
