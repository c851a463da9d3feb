"""What all trainers are given: a model of random weights, its tokenizer, and rows of a prompt and its completion."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.data import python_docs

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig

WORDS = r"\w+|[^\w]"
"""A token: a word or another character. None crosses the end of a prompt, so that trainers that tokenise both apart agree."""
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
SHAPES: dict[str, dict[str, int]] = {
    "9m": {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
"""Llamas by their size: that of `tools.bench train`, Llama 3.2 1B and Llama 3.1 8B."""
HEADS: dict[str, tuple[int, int]] = {"9m": (8, 4), "1b": (32, 8), "8b": (32, 8)}
"""Attention heads, and those of keys and values."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was made, in a folder with `model` and rows.jsonl."""

    parameters: int
    documents: int
    tokens: int
    """Of a pass over all rows, which is a step."""
    labels: int
    """Tokens of them that are trained: the completions, each with its end."""
    packed_rows: int
    """Rows that ours packs them into."""

    @classmethod
    def read(cls, folder: Path) -> Inputs:
        """Return what `make` has left in a folder."""
        return cls(**json.loads((folder / "inputs.json").read_text()))


def whole_microbatches(sizes: list[int], seq_len: int, multiple: int) -> tuple[int, int]:
    """Return how many of the first documents a step can have, and their packed rows: both are multiples of `multiple`, as ours asks.

    Raises ValueError where there are none.
    """
    import numpy as np

    from trainers.data.pack import pack

    for count in range(len(sizes) - len(sizes) % multiple, 0, -multiple):
        packed = len(pack(np.array(sizes[:count], np.int64), seq_len)[1]) - 1
        if packed % multiple == 0:
            return count, packed
    raise ValueError(f"no first documents of {len(sizes)} make whole microbatches of {multiple} rows")


def make(folder: Path, shape: str, seq_len: int, rows: int, multiple: int) -> None:
    """Make a model, a tokenizer and documents of about so many packed rows, the same for the same arguments."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    pairs = _pairs()
    sizes = [sum(len(re.findall(WORDS, text)) for text in pair) + 1 for pair in pairs]
    fitting = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if size <= seq_len]
    taken: list[tuple[tuple[str, str], int]] = []
    total = 0
    for pair, size in fitting * (1 + rows * seq_len // sum(size for _, size in fitting)):
        if total + size > rows * seq_len:
            break
        taken, total = [*taken, (pair, size)], total + size
    count, packed_rows = whole_microbatches([size for _, size in taken], seq_len, multiple)
    taken = taken[:count]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": prompt, "completion": completion}) + "\n" for (prompt, completion), _ in taken)
    _save_tokenizer(folder / "model", pairs, SHAPES[shape]["vocab_size"])
    heads, key_heads = HEADS[shape]
    sizes_of: dict[str, Any] = {**SHAPES[shape], "num_attention_heads": heads, "num_key_value_heads": key_heads}
    sizes_of |= {"max_position_embeddings": max(2048, seq_len), "tie_word_embeddings": shape != "8b"}
    config = LlamaConfig(**sizes_of, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    made = Inputs(
        parameters=model.num_parameters(),
        documents=len(taken),
        tokens=sum(size for _, size in taken),
        labels=sum(len(re.findall(WORDS, completion)) + 1 for (_, completion), _ in taken),
        packed_rows=packed_rows,
    )
    (folder / "inputs.json").write_text(json.dumps(vars(made)))


TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token if turn.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Of conversations, in words that the tokenizer has."""


def make_pairs(folder: Path, shape: str, config: RunConfig, rows: int, multiple: int) -> dict[str, float]:
    """Make a model, a tokenizer with a template, and pairs that fill about so many packed rows of a run, a multiple of `multiple`.

    The other answer has the preferred one's words in another order. Returns how much there is.
    """
    import numpy as np
    from transformers import AutoTokenizer

    from trainers.data.pack import pack_units
    from trainers.data.prepare import prepare

    seq_len = config.data.seq_len
    make(folder, shape, seq_len // 2 - 16, rows, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    single = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    pairs = [_pair(row["prompt"].strip(), row["completion"].split()) for row in single if len(set(row["completion"].split())) > 1]
    _write(folder / "pairs.jsonl", pairs)
    table = prepare(config).train
    lengths, units = np.diff(table.offsets), np.arange(len(table.offsets) - 1) // 2
    count = next(
        count
        for count in range(len(lengths) // 2, 0, -1)
        if (len(pack_units(lengths[: 2 * count], units[: 2 * count], seq_len)[1]) - 1) % multiple == 0
    )
    _write(folder / "pairs.jsonl", pairs[:count])
    table = prepare(config).train
    made = {"pairs": float(count), "rows": float(len(table)), "tokens": float(table.row_lengths().sum())}
    return made | {"parameters": float(Inputs.read(folder).parameters)}


def _pair(prompt: str, words: list[str]) -> dict[str, Any]:
    """Return a row of a question and its answer's words, in their order and in another."""
    other = random.Random(prompt).sample(words, len(words))
    other = other if other != words else words[::-1]
    turns = {name: [{"role": "assistant", "content": " ".join(answer)}] for name, answer in (("chosen", words), ("rejected", other))}
    return {"prompt": [{"role": "user", "content": prompt}], **turns}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pairs() -> list[tuple[str, str]]:
    """Return questions about this Python and their answers, of every module alike."""
    found = []
    for row in islice(python_docs.conversations(), 0, None, 7):
        question, answer = (message["content"] for message in row["messages"])
        found.append((question + "\n", answer))
    return found


def _save_tokenizer(folder: Path, pairs: list[tuple[str, str]], vocabulary: int) -> None:
    """Save a tokenizer of whole words, as many as the model has embeddings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    counted = Counter(word for pair in pairs for text in pair for word in re.findall(WORDS, text))
    words = [PAD, END, UNKNOWN, *(word for word, _ in counted.most_common(vocabulary - 3))]
    words += [f"<{number}>" for number in range(vocabulary - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN).save_pretrained(folder)
