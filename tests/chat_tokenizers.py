"""Byte tokenizers with the special tokens and the template of each chat format."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trainers.data.masks import CHATML

GOLDEN = Path(__file__).parent / "golden"
TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<|eom|>"],
    "inst": ["<s>", "</s>"],
    "gemma": ["<bos>", "<turn>", "</turn>", "\n\n"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": ["</s>"],
    "think": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "vicuna": ["<s>", "</s>"],
    "marked": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    "deepseek": ["<|begin|>", "<|User|>", "<|Assistant|>", "<|eos|>", "<think>", "</think>"],
}
EOS = {"llama3": "<|eot|>", "inst": "</s>", "zephyr": "</s>", "vicuna": "</s>", "deepseek": "<|eos|>", "chatml": "<|im_end|>"}
BOS = {"llama3": "<|begin|>", "inst": "<s>", "gemma": "<bos>", "vicuna": "<s>", "deepseek": "<|begin|>"}


def tokenizer_of(name, eos=None, pad=None):
    """A byte tokenizer with the special tokens of a format and its template."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(token, special=bool(token.strip()), normalized=False) for token in ["<|endoftext|>", *TOKENS.get(name, [])]]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos or EOS.get(name, "<|endoftext|>"), bos_token=BOS.get(name), pad_token=pad
    )
    fast.chat_template = CHATML if name == "chatml" else (GOLDEN / f"{name}.jinja").read_text()
    return fast
