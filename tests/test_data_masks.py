"""What is trained of a conversation, for chat formats of many kinds: equal to golden files that were read by eye.

The templates in tests/golden/*.jinja are written here in the spirit of the formats; GOLDEN=write makes the files anew.
"""

import json
import os
from pathlib import Path
from random import Random

import pytest
from chat_tokenizers import GOLDEN, TOKENS, tokenizer_of
from conftest import SHARED, needs_shared
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from trainers.config.choices import Layout, Supervise
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, RunConfig
from trainers.data import masks
from trainers.data import template as chat_template
from trainers.data.at_once import all_at_once
from trainers.data.encode import encoder_of
from trainers.data.ends import stop_ids
from trainers.data.formats import BadRow, to_messages
from trainers.data.masks import CHATML, Rendered, fill, plain_pair, render, template_of
from trainers.data.sources import Row
from trainers.data.turns import shared_length
from trainers.data.words import word_cache

CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "two"}'}}
CONVERSATIONS = {
    "multi_turn": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello! "},
        {"role": "user", "content": "And 2+2?"},
        {"role": "assistant", "content": "4"},
    ],
    "same_words": [
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "ok"},
    ],
    "ends_with_user": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"}],
    "tools": [
        {"role": "user", "content": "1 + two?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "call00001", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ],
    "reasoning": [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b", "reasoning_content": "first thought"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "<think>\nsecond thought\n</think>\n\nd"},
    ],
}


def marked(rendered: Rendered) -> str:
    out, at = [], 0
    for start, end in rendered.spans:
        out += [rendered.text[at:start], "⟦", rendered.text[start:end], "⟧"]
        at = end
    return "".join([*out, rendered.text[at:]])


def rendering(template, conversation, supervise=Supervise.assistant):
    try:
        return marked(render(template, to_messages({"messages": conversation}, Layout.messages), None, supervise))
    except BadRow as error:
        return f"BadRow: {error}"


def golden(name, text):
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", TOKENS)
def test_masks_of_each_format_equal_its_golden_file(name):
    template = template_of(tokenizer_of(name), name)
    parts = [f"##### {key}\n{rendering(template, conversation)}\n" for key, conversation in CONVERSATIONS.items()]
    golden(name, "".join(parts))


@pytest.mark.parametrize("name", TOKENS)
def test_every_supervised_turn_trains_its_end_token(name):
    tokenizer = tokenizer_of(name)
    rendered = render(template_of(tokenizer, name), CONVERSATIONS["multi_turn"])
    assert len(rendered.spans) == 2
    for start, end in rendered.spans:
        last = tokenizer(rendered.text[start:end], add_special_tokens=False)["input_ids"][-1]
        assert last in stop_ids(tokenizer)


@pytest.mark.parametrize("name", TOKENS)
def test_supervise_last_is_the_last_span_and_all_is_everything(name):
    template = template_of(tokenizer_of(name), name)
    turns = render(template, CONVERSATIONS["multi_turn"])
    assert render(template, CONVERSATIONS["multi_turn"], None, Supervise.last).spans == turns.spans[-1:]
    assert render(template, CONVERSATIONS["multi_turn"], None, Supervise.all).spans == [(0, len(turns.text))]


def encoded(tokenizer, row, **options):
    config = RunConfig(model=ModelConfig(id="x"), data=DataConfig(path="x", **options))
    documents = encoder_of(config, tokenizer, Layout.messages).encode([Row(row, "x", 1)])
    assert (documents.bad, documents.error) == ([], None)
    return documents


def test_token_masks_are_the_spans_and_pad_equal_to_eos_is_trained():
    tokenizer = tokenizer_of("chatml", pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    documents = encoded(tokenizer, {"messages": CONVERSATIONS["multi_turn"]})
    trained = documents.tokens[documents.supervised == 1]
    assert tokenizer.decode(trained) == " Hello! <|im_end|>4<|im_end|>"


def test_token_masks_hold_for_characters_of_many_bytes():
    tokenizer = tokenizer_of("chatml")
    turns = [{"role": "user", "content": "안녕 👋 é"}, {"role": "assistant", "content": "여보세요 👍🏽 ü"}]
    documents = encoded(tokenizer, {"messages": turns})
    assert tokenizer.decode(documents.tokens[documents.supervised == 1]) == "여보세요 👍🏽 ü<|im_end|>"


def test_byte_sums_and_offsets_give_the_same_mask():
    tokenizer = tokenizer_of("llama3")
    config = RunConfig(model=ModelConfig(id="x"), data=DataConfig(path="x"))
    encoder = encoder_of(config, tokenizer, Layout.messages)
    rows = [Row({"messages": conversation}, "x", 1) for conversation in CONVERSATIONS.values()]
    assert encoder.byte_lengths is not None
    by_bytes = encoder.encode(rows)
    encoder.byte_lengths = None
    by_offsets = encoder.encode(rows)
    assert (by_bytes.supervised == by_offsets.supervised).all()
    assert by_bytes.supervised.sum() > 0


LIKE_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained_bpe(pattern):
    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = None if pattern is None else pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = bytes_only if split is None else pre_tokenizers.Sequence([split, bytes_only])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|a|>", "<|a|>b"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer


@pytest.mark.parametrize("pattern", [None, LIKE_LLAMA3], ids=["gpt2", "llama3"])
def test_looked_up_words_are_the_tokenizers_own_ids(pattern):
    tokenizer = trained_bpe(pattern)
    cache = word_cache(tokenizer)
    assert cache is not None
    random = Random(0)
    pieces = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "<|a|>",
        "<|a|>b",
        "'S",
        "'re",
        "word",
        "X",
        "12",
        "3",
        "_",
        "...",
        "\x1c",
        "\x00",
        "é",
        "한",
        "\xa0",
    ]
    texts = ["".join(random.choices(pieces, k=random.randint(0, 30))) for _ in range(3000)]
    assert cache.encode_batch(texts) == [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_tokenizers_that_cut_otherwise_have_no_word_cache():
    tokenizer = trained_bpe(None)
    tokenizer.normalizer = normalizers.Lowercase()
    assert word_cache(tokenizer) is None


def test_no_end_of_turn_is_an_error_that_names_the_remedy():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(ConfigError, match="eos_token"):
        render(template_of(tokenizer, "bare"), CONVERSATIONS["multi_turn"])


def test_the_next_turns_opening_is_no_end_of_turn():
    tokenizer = tokenizer_of("phi3")
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ eos_token }}"
    text = rendering(template_of(tokenizer, "bare"), CONVERSATIONS["same_words"])
    assert text == "<|user|>ok<|assistant|>⟦ok⟧<|user|>ok<|assistant|>⟦ok<|endoftext|>⟧"


def test_a_turn_that_the_template_leaves_out_is_a_bad_row():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ eos_token }}"
    assert "leaves out" in rendering(template_of(tokenizer, "bare"), CONVERSATIONS["multi_turn"])


def test_chatml_on_a_tokenizer_without_its_tokens_trains_the_end_as_text():
    tokenizer = tokenizer_of("zephyr")
    tokenizer.chat_template = CHATML
    assert "⟦4<|im_end|>⟧\n" in rendering(template_of(tokenizer, "chatml"), CONVERSATIONS["multi_turn"])


def test_generation_marks_that_stop_short_are_made_longer():
    tokenizer = tokenizer_of("marked")
    tokenizer.chat_template = (
        (GOLDEN / "marked.jinja").read_text().replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
    )
    assert "endgeneration %}<|im_end|>" in tokenizer.chat_template
    assert rendering(template_of(tokenizer, "short"), CONVERSATIONS["same_words"]).count("⟦ok<|im_end|>⟧") == 2


def test_a_broken_template_is_an_error_on_the_template():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(ConfigError, match="not valid Jinja"):
        render(template_of(tokenizer, "x"), CONVERSATIONS["same_words"])


def test_plain_pair_trains_completion_and_end():
    assert marked(plain_pair("Q\n", "A", "<s>", "</s>")) == "<s>Q\n⟦A</s>⟧"


def test_shared_length_counts_characters():
    for one, other in [("", ""), ("abc", "abd"), ("abc", "abc"), ("abc", "x"), ("ab", "abc"), ("aXbX", "aXcX")]:
        expected = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))
        assert shared_length(one, other) == expected


WORDS = [
    *("ok", "Hello there", "  spaced ", "1", "a\nb\n", "<|im_end|>", "x <|im_start|>user\nhi", "</s>", "[INST] hi [/INST]", "user"),
    *("\ud55c\uae00 \U0001f44b", "<tool_response>r</tool_response>", '{"a": 1}', "assistant\n", "\n\nq", 'line\\n "q"', "</result>", " "),
]


def random_turns(random):
    """A conversation of up to some twenty turns, whose texts repeat and look like a template's own."""
    turns = [{"role": "system", "content": "Be brief."}] if random.random() < 0.4 else []
    has_calls = random.random() < 0.6
    for _ in range(random.randint(1, 6)):
        turns += [{"role": "user", "content": random.choice(WORDS)} for _ in range(random.choice([1] * 12 + [2]))]
        for _ in range(random.choice([0, 0, 1, 2] if has_calls else [0])):
            function = {"name": random.choice(["add", "sub"]), "arguments": {"a": 1, "b": random.choice(WORDS)}}
            call = {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}
            call |= {"content": random.choice(["", "", random.choice(WORDS)])}
            call |= {"reasoning_content": random.choice(WORDS)} if random.random() < 0.3 else {}
            turns += [call, {"role": "tool", "content": random.choice(WORDS), "tool_call_id": "call00001", "name": function["name"]}]
        answer = {"role": "assistant", "content": random.choice(WORDS) + "."}
        kind = random.random()
        if kind < 0.4:
            answer |= {"reasoning_content": "so"} if kind < 0.2 else {"content": f"<think>\n{random.choice(WORDS)}\n</think>\n\nyes"}
        turns += [answer] * random.choice([1] * 12 + [2])
    return turns + [{"role": "user", "content": "bye"}] * (random.random() < 0.2)


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}]


def rendered_or_refused(template, turns, tools):
    try:
        return render(template, turns, tools)
    except (BadRow, ConfigError) as error:
        return str(error)


def require_equal_ways(template, monkeypatch, rows):
    """All turns from one rendering are those that a rendering each finds, and so are refusals; returns how many came that way."""
    found = []

    def spied(*arguments):
        found.append(all_at_once(*arguments))
        return found[-1]

    monkeypatch.setattr(masks, "all_at_once", spied)
    for number in range(rows):
        random = Random(number)
        turns, tools = random_turns(random), random.choice([None, TOOLS])
        monkeypatch.setattr(masks, "MANY", 3)
        at_once = rendered_or_refused(template, turns, tools)
        monkeypatch.setattr(masks, "MANY", 10**9)
        assert rendered_or_refused(template, turns, tools) == at_once, turns
    return sum(map(len, found))


@pytest.mark.parametrize("name", TOKENS)
def test_turns_found_in_one_rendering_are_those_of_a_rendering_each(name, monkeypatch):
    template = template_of(tokenizer_of(name), name)
    assert require_equal_ways(template, monkeypatch, 50) > 20


def long_row(kind, turns=200):
    """A conversation of so many answers, the user's words repeating; with tool calls twice as many assistant turns."""
    row = []
    for number in range(turns):
        thought = {"reasoning_content": f"thought {number}"} if "thoughts" in kind else {}
        row.append({"role": "user", "content": "go on with the work"})
        if "calls" in kind:
            function = {"name": "look", "arguments": {"where": f"page {number}"}}
            call = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}
            row += [call | thought, {"role": "tool", "content": "found " * 5, "tool_call_id": "call00001", "name": "look"}]
        row.append({"role": "assistant", "content": f"I have done step {number}.", **thought})
    return row


CALLERS = ["chatml", "llama3", "inst", "think", "deepseek"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in TOKENS for kind in ("answers", "thoughts")]
    + [(name, kind) for name in CALLERS for kind in ("calls", "calls and thoughts")],
)
def test_a_row_of_many_turns_takes_the_text_of_three_renderings(name, kind, monkeypatch):
    """And not one for each turn: what is rendered is counted, in lengths of the row."""
    lengths = []
    plain = chat_template._render

    def counted(*arguments, **options):
        found = plain(*arguments, **options)
        lengths.append(len(found[0]))
        return found

    monkeypatch.setattr(chat_template, "_render", counted)
    rendered = render(template_of(tokenizer_of(name), name), long_row(kind))
    assert len(rendered.spans) == (400 if "calls" in kind else 200)
    assert sum(lengths) < 3 * len(rendered.text)


REAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
]


@needs_shared
@pytest.mark.parametrize("name", ["chatml", "gemma3", "llama3_1", "mistral_v2v3", "phi3", "phi_4", "qwen2_5", "qwen3"])
@pytest.mark.parametrize("special", [True, False], ids=["own tokens", "gpt2 text"])
def test_real_templates(name, special):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / ("mistral_v1" if special else "gpt2"))
    if special:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in REAL_TOKENS])
    tokenizer.chat_template = (SHARED / "templates" / f"{name}.jinja").read_text()
    template = template_of(tokenizer, name)
    for key in ("multi_turn", "same_words"):
        rendered = render(template, CONVERSATIONS[key])
        ends = {"gemma3": "<end_of_turn>", "llama3_1": "<|eot_id|>", "mistral_v2v3": tokenizer.eos_token, "phi3": "<|end|>"}
        wanted = [
            message["content"].strip() + ends.get(name, "<|im_end|>") for message in CONVERSATIONS[key] if message["role"] == "assistant"
        ]
        found = [rendered.text[start:end] for start, end in rendered.spans]
        assert [text.lstrip().replace(" <", "<") for text in found] == wanted
        assert (
            rendered.text == fill(template, CONVERSATIONS[key], None) == tokenizer.apply_chat_template(CONVERSATIONS[key], tokenize=False)
        )


@needs_shared
@pytest.mark.parametrize("name", ["chatml", "gemma3", "llama3_1", "mistral_v2v3", "phi3", "phi_4", "qwen2_5", "qwen3"])
def test_real_turns_found_in_one_rendering_are_those_of_a_rendering_each(name, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "mistral_v1")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in REAL_TOKENS])
    tokenizer.chat_template = (SHARED / "templates" / f"{name}.jinja").read_text()
    assert require_equal_ways(template_of(tokenizer, name), monkeypatch, 40) > 20


@needs_shared
def test_real_golden_masks():
    """The renderings of all conversations through qwen3, llama 3.1 and mistral, as digests of what was read by eye."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "mistral_v1")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in REAL_TOKENS])
    found = {}
    for name in ("qwen3", "llama3_1", "mistral_v2v3", "qwen2_5"):
        tokenizer.chat_template = (SHARED / "templates" / f"{name}.jinja").read_text()
        template = template_of(tokenizer, name)
        for key in ("tools", "reasoning"):
            turns = rendering(template, CONVERSATIONS[key])
            found[f"{name} {key}"] = [part.split("⟧")[0] for part in turns.split("⟦")[1:]]
    golden("real_tools_and_reasoning", json.dumps(found, indent=1) + "\n")
