"""A small real model that writes what the methods ask for, a server that is scripted, and a synthesis in this process."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from command import ROOT
from local_server import JsonRequests, LocalServer

from tools.synthesise.__main__ import main
from trainers.rewards.judged import CRITERIA

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n"]
WORDS = ["cat", "dog", "hill", "river", "sings", "runs", "why", "green", "seven", "lamp", "writes", "finds"]
SENTENCE = "the cat sat on the mat"
REFUSAL = "I'm sorry, but I can't help with that."
BEGINNINGS = {"1.": 4.0, "Question:": 3.0, "Input:": 1.0, "Output:": 1.0, "Class label:": 1.0, "yes": 0.5, "no": 0.5, "Quote:": 0.5}
BEGINNINGS |= {"equal": 0.3, "different": 1.0, REFUSAL: 2.0}
FOLLOWING = {
    "Question:": ["\nQuote:"],
    "\nQuote:": [],
    SENTENCE: ["\nAnswer:"],
    "Input:": ["\nOutput:"],
    "Class label:": ["\nInput:"],
    "1.": ["\n2."],
    "\n2.": ["\n3."],
}
"""What may come after the words that a token is followed by."""


def save_bigrams(folder: Path, **first: float) -> Path:
    """Save a Llama whose next token depends on the last one alone: no attention, and a head that is a table of bigrams.

    What it writes has the forms that prompts ask for, with words at random: `1. cat runs \\n2. ...`, `Question: ... \\nQuote: ...`.
    `first` weighs what it begins with.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trainers.data.template import CHATML

    tables = {place: _words(place) for place in ("free", "Question:", "Input:", "Class label:", "1.", "\n2.")}
    marks = [
        f"{SENTENCE}~",
        "\nReasoning:",
        "so it is",
        "\nQuote:",
        "\nAnswer:",
        "\nOutput:",
        "\nInput:",
        "\n2.",
        "\n3.",
        SENTENCE,
        *BEGINNINGS,
    ]
    vocabulary = {text: number for number, text in enumerate([*SPECIAL, *marks, *(word for words in tables.values() for word in words)])}
    size = 8 * (len(vocabulary) // 8 + 1)
    logits = torch.full((size, size), -30.0)

    def follow(token: str, odds: dict[str, float]) -> None:
        for other, weight in odds.items():
            logits[vocabulary[token], vocabulary[other]] = torch.tensor(weight).log()

    free, end = tables["free"], {"<|im_end|>": 4.0}
    for token in vocabulary:
        follow(token, dict.fromkeys(free, 1.0) | end)
    follow("\n", BEGINNINGS | first | dict.fromkeys(free, 0.5))
    for place in ("Question:", "Input:", "Class label:", "1.", "\n2."):
        follow(place, dict.fromkeys(free, 0.0) | dict.fromkeys(end, 0.0) | dict.fromkeys(tables[place], 1.0))
        for word in tables[place]:
            follow(word, dict.fromkeys([*free, *end], 0.0) | dict.fromkeys(tables[place], 1.0) | dict.fromkeys(FOLLOWING[place], 4.0))
    follow("\nQuote:", dict.fromkeys([*free, *end], 0.0) | {SENTENCE: 4.0, free[0]: 1.0})
    follow(SENTENCE, dict.fromkeys([*free, *end], 0.0) | {"\nAnswer:": 1.0})
    for token, other in (
        ("Quote:", f"{SENTENCE}~"),
        (f"{SENTENCE}~", "\nReasoning:"),
        ("\nReasoning:", "so it is"),
        ("so it is", "\nAnswer:"),
    ):
        follow(token, dict.fromkeys([*free, *end], 0.0) | {other: 1.0})
    for token in ("\nAnswer:", "\nOutput:", "\nInput:", "\n3.", "Output:"):
        follow(token, dict.fromkeys(end, 0.0) | dict.fromkeys(free, 1.0))
    for token in ("yes", "no", "equal", "different", REFUSAL):
        follow(token, dict.fromkeys(free, 0.0) | {"<|im_end|>": 1.0})

    sizes = {"hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 1024}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes, **ends))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits.clamp(min=-30.0).T / size**0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def _words(place: str) -> list[str]:
    """Return the words of a place: each place has tokens of its own, which decode to the same text but for a mark."""
    return [word if place == "free" else f"{word}{'~' * (1 + list(FOLLOWING).index(place))}" for word in WORDS]


class Scripted(JsonRequests):
    """Answers by what the prompt asks for; faults come first, and some requests are always refused."""

    faults: ClassVar[list[int]] = []
    """HTTP codes of the next replies; 200 is a reply that is not JSON."""
    asked: ClassVar[list[str]] = []
    refused: ClassVar[str] = "always refused"
    tokenizer: ClassVar[Any] = None
    """Of those who ask in ids."""
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.reply({"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.body())
        ids = body.get("prompt")
        text = self.tokenizer.decode(ids) if ids else "\n".join(str(turn["content"]) for turn in body["messages"])
        with self.lock:
            fault = self.faults.pop(0) if self.faults else 0
            self.asked.append(text)
        if fault == 200:
            self.reply({"choices": []})
        elif fault or self.refused in text:
            self.send_error(fault or 400)
        elif ids:  # as vLLM: ids come and go, and a text goes on where nothing stops it
            header = not text.endswith("[/INST]")
            said = f" Say {' '.join(drawn(body['seed']))} [/INST] Sure." if header else f"An answer {body['seed']}.</s>"
            found = self.tokenizer.encode(said, add_special_tokens=False)
            choice = {
                "token_ids": found,
                "logprobs": {"token_logprobs": [-0.5] * len(found)},
                "finish_reason": "length" if header else "stop",
            }
            self.reply({"choices": [choice]})
        else:
            said = self.said(text, body["seed"])
            usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(said.split())}
            reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
            self.reply(reply if "no usage" in text else reply | {"usage": usage})

    def said(self, text: str, seed: int) -> str:
        """Return what a good model might say, with words that depend on the seed."""
        line = " ".join(drawn(seed))
        if "no_hallucination" in text:
            score = 1 + seed_of_text(text) % 5
            return json.dumps(dict.fromkeys(CRITERIA, score))
        if "classification task" in text:
            return "yes" if "mood" in text else "no"
        if "Class label:" in text:
            return f"Class label: good\nInput: {line}"
        if "Input: the input" in text:
            return f"Input: none\nOutput: {line}"
        if "Reasoning: what follows" in text:
            passage = text.split("Passage:\n")[1].split("\n\nQuestion: ")[0]
            quote = passage.split(".")[0] if seed % 4 else "never in there"
            return f'Quote: "{quote}"\nReasoning: so it is {line}\nAnswer: {line}'
        if "word for word" in text:
            passage = text.split("Passage:\n")[1].split("\n\n")[0]
            good = f"Question: What {line}?\nQuote: {passage.split('.')[0]}\nAnswer: {line}"
            return f"{good}\n\n2. Question: Who {line} here?\nQuote: never in there\nAnswer: {line}\n\nQuestion: no more"
        if "numbered list" in text or "번호" in text:
            count = int((re.search(r"\d+(?= (?:new|diff|short))|\d+(?=개|명)", text) or "3")[0])
            return "Here they are:\n" + "\n".join(f"{at}. {' '.join(drawn(seed * 100 + at))}" for at in range(1, count + 1))
        if "must not be met" in text:
            return REFUSAL
        if "ask for the same" in text:
            return "equal" if seed % 5 == 0 else "Different."
        if "Translate" in text or "Say the following in other words" in text:
            return f"{' '.join(re.findall(r'[0-9]+', text))} {line}" if seed % 7 else text.split("\n\n")[1]
        return f"An answer, {line}."


def seed_of_text(text: str) -> int:
    return sum(map(ord, text))


def drawn(seed: int) -> list[str]:
    """Six words that no other seed has."""
    draw = random.Random(seed)
    return ["word" + "".join(draw.choices("abcdefghij", k=6)) for _ in range(6)]


class ScriptedServer(LocalServer):
    requests = Scripted
    request_queue_size = 64


@contextmanager
def scripted() -> Iterator[str]:
    """Serve; yields the URL up to the version."""
    Scripted.faults, Scripted.asked = [], []
    server = ScriptedServer()
    with server.serving():
        yield f"{server.url}/v1"


def synthesise(preset: str, out: Path, *words: object, expect: int = 0) -> list[dict[str, Any]]:
    """Run a shipped config in this process; return the rows."""
    code = main([str(ROOT / "conf" / "synthesise" / f"{preset}.yaml"), *map(str, words), "--out", str(out)])
    assert code == expect, (preset, code)
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{out}.json").read_text("utf-8"))
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def lcs(first: list[str], second: list[str]) -> int:
    """The longest common subsequence by the textbook's table."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for at, other in enumerate(second):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        above = row
    return above[-1]


def reference_rouge_l(first: str, second: str) -> float:
    """ROUGE-L's F1 of words in lower case (Lin 2004, equations 2 to 4 with beta 1)."""
    one, other = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (first, second))
    common = lcs(one, other)
    if not common:
        return 0.0
    recall, precision = common / len(one), common / len(other)
    return 2 * recall * precision / (recall + precision)


def kinds(rows: list[dict[str, Any]], name: str) -> Counter[str]:
    return Counter(row["from"][name] for row in rows)
