"""Reasoning is trained as written, in the row without loss, or left out, as set; and what measures an answer looks after it.

GOLDEN=write makes tests/golden/reasoning.txt anew.
"""

import dataclasses
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from chat_tokenizers import GOLDEN, TOKENS, tokenizer_of
from preparing import TOKENIZER, marked, prepared, settings, trained, write

from tools.evaluate.measure import answers, reasoning_tokens, reference
from tools.evaluate.scores import is_refusal, score
from tools.evaluate.sets import answered, held_out
from tools.evaluate.worker import reported
from trainers.config.choices import DocumentOf, Layout, Metric, PairsOf, Reasoning
from trainers.config.errors import ConfigError
from trainers.data import reasoning
from trainers.data.formats import BadRow, to_messages
from trainers.data.masks import fill, render, template_of
from trainers.data.prepare import data_key
from trainers.data.reasoning import answer_of, answer_starts, opened, stripped
from trainers.data.turns import Conversation
from trainers.generate.decode import Decoded
from trainers.generate.request import LENGTH, Answer
from trainers.rewards.mathematics import Mathematics
from trainers.rewards.shapes import code_of, exact, schema
from trainers.rl.sampler import Sampler
from trainers.rl.turns import Conversation as Talk

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASKED = {"role": "user", "content": "a?"}
ROWS = {
    "field": [
        *(ASKED, {"role": "assistant", "content": "b", "reasoning_content": "first"}),
        *({"role": "user", "content": "c?"}, {"role": "assistant", "content": "d", "reasoning_content": "second"}),
    ],
    "tags": [ASKED, {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nb"}],
    "call": [
        *(ASKED, {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "first"}),
        *({"role": "tool", "content": "1", "name": "add"}, {"role": "assistant", "content": "b", "reasoning_content": "second"}),
    ],
}
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('content and thinking next to a call') }}{% endif %}"
    "{% if m.thinking and (loop.last or m.tool_calls) %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""In the spirit of gpt-oss: it calls reasoning `thinking`, and takes no text next to reasoning and a tool call."""


def template_named(name):
    tokenizer = tokenizer_of("chatml" if name == "harmony" else name)
    if name == "harmony":
        tokenizer.add_tokens(["<|end|>", "<|call|>", "<|return|>"], special_tokens=True)
        tokenizer.chat_template = HARMONY
    return template_of(tokenizer, name)


def turns(row):
    return to_messages({"messages": row}, Layout.messages)


def rendering(template, row, how):
    try:
        messages = stripped(turns(row)) if how is Reasoning.strip else turns(row)
        found = render(template, messages, answers_only=how is Reasoning.mask)
    except BadRow as error:
        return f"BadRow: {error}"
    out, at = [], 0
    for start, end in found.spans:
        out += [found.text[at:start], "⟦", found.text[start:end], "⟧"]
        at = end
    return "".join([*out, found.text[at:]])


def test_masks_of_reasoning_equal_their_golden_file():
    parts = [
        f"##### {name}, {key}, {how}\n{rendering(template_named(name), row, how)}\n"
        for name in ("chatml", "think", "deepseek", "llama3", "marked", "harmony")
        for key, row in ROWS.items()
        for how in Reasoning
    ]
    file = GOLDEN / "reasoning.txt"
    if os.environ.get("GOLDEN") == "write":
        file.write_text("".join(parts))
    assert "".join(parts) == file.read_text()


@pytest.mark.parametrize("name", [*TOKENS, "harmony"])
def test_masked_rows_are_those_that_are_kept_and_train_what_is_after_the_reasoning(name):
    """The text is the same; of each turn what is trained is an end of what was; and no word of the reasoning is in it."""
    template = template_named(name)
    for row in ROWS.values():
        try:
            whole = render(template, turns(row))
        except BadRow:
            continue
        masked = render(template, turns(row), answers_only=True)
        assert masked.text == whole.text
        for (start, end), (first, last) in zip(masked.spans, whole.spans, strict=True):
            assert (end, first <= start) == (last, True)
            assert not any(word in masked.text[start:end] for word in ("first", "second", "think"))


@pytest.mark.parametrize("name", ["chatml", "think", "llama3"])
def test_answers_found_in_one_rendering_are_those_of_a_rendering_each(name):
    template = template_named(name)
    for row in ROWS.values():
        messages = turns(row)
        conversation = Conversation(template, messages, None, fill(template, messages, None))
        numbers = [number for number, message in enumerate(messages) if reasoning.has_thought(message)]
        marks = reasoning.unused_characters(conversation.text, len(numbers))
        each = {number: reasoning._start_of(conversation, number, mark) for number, mark in zip(numbers, marks, strict=True)}
        assert answer_starts(conversation, numbers) == each


def test_a_prepared_row_trains_what_is_set(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": ROWS["field"]}])
    thought = "<think>\n{}\n</think>\n\n".format
    assert trained(file) == [f"{thought('first')}b<|im_end|>|{thought('second')}d<|im_end|>"]
    assert trained(file, reasoning=Reasoning.mask) == ["b<|im_end|>|d<|im_end|>"]
    assert trained(file, reasoning=Reasoning.mask, document=DocumentOf.turn) == ["b<|im_end|>", "d<|im_end|>"]
    assert trained(file, reasoning=Reasoning.strip) == ["b<|im_end|>|d<|im_end|>"]
    assert "first" not in TOKENIZER.decode(prepared(file, reasoning=Reasoning.strip).train.tokens)
    assert "first" in TOKENIZER.decode(prepared(file, reasoning=Reasoning.mask).train.tokens)


def test_a_plain_completion_and_both_answers_of_a_pair_are_of_one_kind_with_turns(tmp_path):
    said = "<think>so</think> 4"
    file = write(tmp_path / "rows.jsonl", [{"prompt": "2+2? ", "completion": said}])
    assert trained(file, template=False) == [f"{said}<|im_end|>"]
    assert trained(file, template=False, reasoning=Reasoning.mask) == ["4<|im_end|>"]
    assert trained(file, template=False, reasoning=Reasoning.strip) == ["4<|im_end|>"]
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "2+2?", "chosen": said, "rejected": "<think>no</think>5"}])
    assert trained(pairs, "dpo", reasoning=Reasoning.strip) == ["4<|im_end|>", "5<|im_end|>"]


@pytest.mark.parametrize("how", [Reasoning.mask, Reasoning.strip])
def test_a_row_of_reasoning_alone_is_a_bad_row_and_texts_are_refused(how, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "2+2?", "completion": "<think>so"}, {"prompt": "2+2?", "completion": "4"}])
    with pytest.raises(ConfigError, match="nothing but reasoning"):
        prepared(file, template=False, reasoning=how)
    with pytest.raises(ConfigError, match="layout text") as caught:
        prepared(write(tmp_path / "texts.jsonl", [{"text": "4"}]), reasoning=how)
    assert caught.value.remedy == "data.reasoning=keep"
    turn = write(tmp_path / "turns.jsonl", [{"messages": [ASKED, {"role": "assistant", "content": "", "reasoning_content": "so"}]}])
    with pytest.raises(ConfigError, match="turn 2 has nothing but reasoning"):
        prepared(turn, reasoning=how)


def test_only_turns_of_the_assistant_have_reasoning(tmp_path):
    """Words about the tags, in system, user and tool turns, stay."""
    system = {"role": "system", "content": "Reason between <think> and </think>, then put the answer into a box."}
    user = {"role": "user", "content": "What does `x.split('</think>')[-1]` do?"}
    tool = {"role": "tool", "content": "<think>a page about tags", "name": "add"}
    said = {"role": "assistant", "content": "<think>so</think>4"}
    call = {"role": "assistant", "tool_calls": [CALL]}
    assert stripped(turns([system, user, call, tool, said]))[:4] == turns([system, user, call, tool])
    rows = write(tmp_path / "rows.jsonl", [{"messages": [system, user, said]}])
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": [system, user], "chosen": "<think>so</think>4", "rejected": "5"}])
    for file, objective in ((rows, "sft"), (pairs, "dpo")):
        text = TOKENIZER.decode(prepared(file, objective, reasoning=Reasoning.strip).train.tokens)
        assert system["content"] in text
        assert user["content"] in text
        assert "so</think>" not in text
    assert trained(rows, reasoning=Reasoning.mask) == ["4<|im_end|>"]


@pytest.mark.parametrize("how", [Reasoning.mask, Reasoning.strip])
@pytest.mark.parametrize(
    "turn", [{"content": "<think>2+2, so"}, {"content": "<think>so</think>\n"}, {"content": "", "reasoning_content": "so"}]
)
@pytest.mark.parametrize("name", ["chatml", "think"])
def test_a_turn_of_nothing_but_reasoning_is_a_bad_row_unless_it_calls_a_tool(name, turn, how):
    said = {"role": "assistant"} | turn
    assert rendering(template_named(name), [ASKED, said], how).startswith("BadRow: turn 2 has nothing but reasoning")
    called = rendering(template_named(name), [ASKED, said | {"tool_calls": [CALL]}], how)
    assert "BadRow" not in called
    assert "so" not in "".join(part.split("⟧")[0] for part in called.split("⟦")[1:])


def test_reasoning_in_a_field_of_its_own_leaves_the_content_whole(tmp_path):
    """Unless it begins with `<think>` all the same."""
    said = {"role": "assistant", "content": "Write `</think>` at the end.", "reasoning_content": "so"}
    again = {"role": "assistant", "content": "<think>more</think>4", "reasoning_content": "so"}
    assert [turn["content"] for turn in stripped(turns([said, again]))] == [said["content"], "4"]
    file = write(tmp_path / "rows.jsonl", [{"messages": [ASKED, said]}])
    for how in (Reasoning.mask, Reasoning.strip):
        assert trained(file, reasoning=how) == [f"{said['content']}<|im_end|>"]
    assert answer_of("2+2, so\n</think>\n\n4") == "4"


def test_answers_that_differ_in_their_reasoning_alone_are_not_compared(tmp_path):
    """A pair is a bad row, also for the objective that takes its answers one by one; of a list such pairs are left out and counted."""
    pair = {"prompt": "2+2?", "chosen": "<think>so</think>4", "rejected": "<think>no</think>4"}
    pairs = write(tmp_path / "pairs.jsonl", [pair])
    assert trained(pairs, "dpo") == ["<think>so</think>4<|im_end|>", "<think>no</think>4<|im_end|>"]
    for objective in ("dpo", "kto"):
        with pytest.raises(ConfigError, match="has two equal answers once their reasoning is left out"):
            prepared(pairs, objective, reasoning=Reasoning.strip)
    said = ["<think>so</think>4", "<think>no</think>4", "5"]
    lists = write(tmp_path / "lists.jsonl", [{"prompt": "2+2?", "responses": said, "scores": [3, 2, 1]}])
    found = prepared(lists, "dpo", reasoning=Reasoning.strip, pairs=PairsOf.all)
    assert [text.split("⟦")[1].strip() for text in marked(found.train)] == ["4<|im_end|>⟧", "5<|im_end|>⟧"] * 2
    assert len(trained(lists, "dpo", pairs=PairsOf.all)) == 6


def test_data_that_were_prepared_before_keep_their_key(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": ROWS["field"]}])
    keys = {how: data_key(settings(file, reasoning=how), TOKENIZER) for how in Reasoning}
    assert len(set(keys.values())) == 3
    assert keys[Reasoning.keep] == data_key(settings(file), TOKENIZER)


def test_a_model_that_is_trained_without_loss_on_reasoning_is_not_asked_with_the_rows_reasoning(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, ROWS["field"][1]]} for n in range(20)]
    config = settings(write(tmp_path / "rows.jsonl", rows), eval_fraction=0.2, reasoning=Reasoning.mask)
    held = held_out(config, TOKENIZER)
    asked = answered(config, TOKENIZER, held)
    for number in asked.documents:
        assert "first" not in TOKENIZER.decode(np.asarray(asked.table.prompt(int(number))))
        assert "first" in TOKENIZER.decode(np.asarray(held.table.prompt(int(number))))
    kept = dataclasses.replace(config, data=dataclasses.replace(config.data, reasoning=Reasoning.strip))
    assert answered(kept, TOKENIZER, held) is held


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4", "4"),
        ("<think>2+2 is 5?</think>\n\n4", "4"),
        ("2+2 is 5?\n</think>\n4", "4"),
        ("<think>2+2 is 5? 4", ""),
        ("analysis2+2 is 5?assistantfinal4", "4"),
        ("I think <think> is a tag.", "I think <think> is a tag."),
    ],
)
def test_an_answer_is_what_comes_after_the_reasoning(text, answer):
    assert answer_of(text) == answer


def test_reasoning_that_the_prompt_has_begun_and_that_never_ends_is_no_answer():
    """In measurements, with the number of its tokens, and for rewards, also in a conversation's last turn."""
    prompt = "<|im_start|>assistant\n<think>\n"
    assert answer_of(opened(prompt, "so 4", "so 4")) == ""
    for said in ("so\n</think>\n4", "<think>so 4"):
        assert opened(prompt, said, said) == said
    assert opened(prompt, "so 4", "so</think> 4<|im_end|>") == "so 4"
    assert opened("<think>a</think>", "so 4", "so 4") == "so 4"
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_tokens(["<think>", "</think>"])
    ids = tokenizer.encode(prompt)
    sampler = SimpleNamespace(tokenizer=tokenizer)
    for said, answer in (("so 4", ""), ("so</think>4", "4")):
        own = tokenizer.encode(said)
        talk = Talk(key=0, ids=[*own, *own], last_ids=own, document=[*own, *ids, *own], text=said)
        for one in (Answer(key=0, ids=own), Answer(key=0, text=said), talk):
            assert answer_of(Sampler._text(sampler, one, [] if one is talk else ids)) == answer
        found = Decoded(ids=own, logps=[], finish=LENGTH)
        with mock.patch("tools.evaluate.measure.decode", lambda *_, found=found: iter([(0, found)])):
            marks, tokens = np.array([0] * len(ids) + [1]), np.array([*ids, own[0]])
            table = SimpleNamespace(prompt=lambda _: ids, offsets=[0, len(tokens)], supervised=marks, tokens=tokens)
            (row,) = answers(None, tokenizer, table, [0], 1, 9, [], 0)
        assert answer_of(row["answer"]) == answer
        assert row["reasoning"] == (len(own) if not answer else reasoning_tokens(tokenizer, own))


def test_rows_of_a_run_with_masked_reasoning_that_have_changed_are_refused_and_of_pairs_the_preferred_are_asked(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, ROWS["field"][1]]} for n in range(20)]
    file = write(tmp_path / "rows.jsonl", rows)
    config = settings(file, eval_fraction=0.2, reasoning=Reasoning.mask)
    held = held_out(config, TOKENIZER)
    write(file, rows[5:])
    with pytest.raises(ConfigError, match="the data has changed since"):
        answered(config, TOKENIZER, held)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "<think>so</think>4", "rejected": "5"} for n in range(3)])
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, path=str(pairs)))
    asked = answered(config, TOKENIZER, held_out(config, TOKENIZER))
    assert ["4" in TOKENIZER.decode(reference(asked.table, number)) for number in reported(asked)] == [True] * 3


def test_rewards_and_metrics_look_after_the_reasoning():
    said = '<think>I\'m sorry, is it 5? ```python\nwrong\n``` {"a": 2} \\boxed{5}</think>\n\n'
    row = {"answer": said + "4", "reference": "<think>easy</think>4", "row": {}}
    assert exact("whole")(row) == 1.0
    assert exact("number")(row | {"answer": "4 </think> 5"}) == 0.0
    assert schema({"type": "object"})(row | {"answer": said + '{"a": 1}'}) == 1.0
    assert code_of(said + "```python\nright\n```") == "right\n"
    assert code_of(said + "right") == "right"
    for metric, answer in ((Metric.exact_match, "4"), (Metric.rouge_l, "4"), (Metric.json, '{"a": 1}')):
        assert score(metric, said + answer, row["reference"], "whole") == 1.0
    assert is_refusal("<think>Let me see.</think>I'm sorry, I can't.")
    assert not is_refusal(said + "4")


@pytest.mark.slow
def test_mathematics_is_compared_after_the_reasoning():
    pytest.importorskip("math_verify")
    mathematics = Mathematics(30.0)
    try:
        row = {"answer": "<think>$\\boxed{5}$</think> $\\frac{8}{2}$", "reference": "<think>$5$</think>$4$"}
        assert mathematics(row) == 1.0
        assert mathematics(row | {"answer": "<think>$4$</think> $5$"}) == 0.0
    finally:
        mathematics.close()


@pytest.mark.parametrize(
    ("before", "after"), [("<think>two and two</think>", "\n\n4"), ("<think>two", ""), ("", "4"), ("two </think>", " 4")]
)
def test_tokens_of_reasoning_are_counted_by_any_tokenizer(before, after):
    for added in ([], ["<think>", "</think>"]):
        tokenizer = tokenizer_of("chatml")
        tokenizer.add_tokens(added)
        ids = tokenizer.encode(before + after, add_special_tokens=False)
        assert reasoning_tokens(tokenizer, ids) == len(tokenizer.encode(before, add_special_tokens=False))
