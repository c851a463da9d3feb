"""Fields of a row that say what is trained or meant: honoured, refused by name, or listed."""

from __future__ import annotations

import re

import pytest
from preparing import marked, prepared, trained, write

from trainers.batch import WEIGHT
from trainers.config.choices import Layout, Supervise
from trainers.config.errors import ConfigError
from trainers.data.fields import FLAGS, READ

HI, BYE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def rows(tmp_path, *found):
    return write(tmp_path / "rows.jsonl", list(found))


@pytest.mark.parametrize(("flag", "no", "yes"), [*((name, 0, 1) for name in FLAGS), ("train", False, True), ("masked", True, False)])
def test_a_turns_flag_says_whether_it_is_trained(tmp_path, flag, no, yes):
    turns = [HI, says("wrong", **{flag: no}), BYE, says("right", **{flag: yes})]
    assert trained(rows(tmp_path, {"messages": turns})) == ["right<|im_end|>"]
    assert trained(rows(tmp_path, {"messages": turns}), ignore=[flag]) == ["wrong<|im_end|>|right<|im_end|>"]


def test_flags_hold_in_every_layout_of_turns_and_with_a_system_text_elsewhere(tmp_path):
    turns = [HI, says("wrong", weight=0), BYE, says("right")]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "wrong", "train": False}, {"from": "gpt", "value": "right"}]
    for row in (
        {"system": "Be brief.", "messages": turns},
        {"system_prompt": "Be brief.", "conversations": sharegpt},
        {"system": "Be brief.", "prompt": turns[:3], "completion": turns[3:]},
        {"prompt": [HI], "completion": [says("wrong", loss=False), BYE, says("right", loss=True)]},
    ):
        assert trained(rows(tmp_path, row)) == ["right<|im_end|>"], row
    assert marked(prepared(rows(tmp_path, {"system_prompt": "Be brief.", "messages": turns})).train)[0].count("Be brief.") == 1


def test_flags_alone_leave_no_weights_behind(tmp_path):
    turns = [{**HI, "weight": 0}, says("wrong", train=False), BYE, says("right")]
    assert WEIGHT not in prepared(rows(tmp_path, {"messages": turns})).train.signals


def test_a_null_flag_says_nothing(tmp_path):
    assert trained(rows(tmp_path, {"messages": [HI, says("right", weight=None, train=None)]})) == ["right<|im_end|>"]


def test_turns_of_a_prompt_are_not_trained_whatever_their_role(tmp_path):
    row = {"prompt": [HI, says("an example"), BYE], "completion": "right"}
    assert trained(rows(tmp_path, row)) == ["right<|im_end|>"]
    assert "an example" in trained(rows(tmp_path, row), supervise=Supervise.all)[0]


def test_the_last_turn_with_weight_0_leaves_nothing_to_train(tmp_path):
    file = rows(tmp_path, {"messages": [HI, says("kept"), BYE, says("wrong", weight=0)]}, {"messages": [HI, says("right")]})
    assert trained(file, supervise=Supervise.last) == ["right<|im_end|>"]


def test_rows_of_which_no_turn_is_trained_are_dropped_and_counted(tmp_path):
    report = prepared(rows(tmp_path, {"messages": [HI, says("wrong", weight=0)]}, {"messages": [HI, says("right")]})).report
    assert (report["dropped"], report["splits"]["train"]["documents"]) == (1, 1)


TURNS = {
    "half a flag": ({"train": 0.5}, "`train` = 0.5, which is neither 0 nor 1"),
    "not a number": ({"weight": float("nan")}, "nan"),
    "text": ({"train": "yes"}, "`train` = 'yes'"),
    "contradiction": ({"weight": 1, "masked": True}, "contradict"),
    "image": ({"images": ["a.png"]}, "`images`, and only text is trained"),
    "mask": ({"mask": 1}, "`mask`"),
    "stretches": ({"train_detail": [{"begin_offset": 0}]}, "`train_detail`"),
    "refusal": ({"refusal": "no"}, "`refusal`"),
    "tools": ({"tools": [{"name": "f"}]}, "`tools`"),
}


@pytest.mark.parametrize("name", TURNS)
def test_what_a_turn_asks_for_and_cannot_have_is_refused_by_name(tmp_path, name):
    more, reason = TURNS[name]
    with pytest.raises(ConfigError) as caught:
        prepared(rows(tmp_path, {"messages": [HI, says("right")]}, {"messages": [HI, says("right", **more)]}))
    assert reason in str(caught.value)
    assert "rows.jsonl:2: " in str(caught.value)


ROWS = {
    "images": {"images": ["a.png"]},
    "audio": {"audio": {"bytes": "x"}},
    "videos": {"videos": [1]},
    "input_ids": {"input_ids": [1, 2]},
    "history": {"history": [["a", "b"]]},
    "rejected": {"rejected": "worse"},
    "weight": {"weight": -0.3},
    "sample_weight": {"sample_weight": "2"},
    "train": {"train": False},
    "loss_mask": {"loss_mask": [0, 1]},
    "add_generation_prompt": {"add_generation_prompt": True},
    "label": {"label": False},
    "mask": {"mask": "Assistant"},
    "weights": {"weights": [0, 1]},
}


@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_asks_for_and_cannot_have_is_refused_with_a_remedy_that_works(tmp_path, name):
    file = rows(tmp_path, {"prompt": "Hi", "completion": "right", **ROWS[name]})
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:1: has `{name}`(.|\n)*data\.ignore=\[{name}\]"):
        prepared(file)
    assert trained(file, ignore=[name]) == ["right<|im_end|>"]


def test_what_says_the_usual_is_no_reason_to_refuse(tmp_path):
    usual = {
        "mask": "User",
        "weight": 1.0,
        "images": [],
        "audio": None,
        "label": True,
        "add_generation_prompt": False,
        "loss": 1.7,
        "train": True,
    }
    assert trained(rows(tmp_path, {"prompt": "Hi", "completion": "right", **usual})) == ["right<|im_end|>"]


def test_a_part_that_is_no_text_is_refused_and_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "What "}, {"type": "input_text", "text": "is this?"}]
    assert "What is this?" in marked(prepared(rows(tmp_path, {"messages": [{"role": "user", "content": parts}, says("right")]})).train)[0]
    for kind in ("image", "image_url", "input_audio", "video"):
        file = rows(tmp_path, {"messages": [{"role": "user", "content": [*parts, {"type": kind, "text": None}]}, says("right")]})
        with pytest.raises(ConfigError, match=f"turn 1 has a part of type '{kind}'"):
            prepared(file)


def test_a_turn_of_somebody_else_cannot_be_trained_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"turn 1 is to be trained and is not the assistant's; data\.supervise=all"):
        prepared(rows(tmp_path, {"messages": [HI | {"train": True}, says("right")]}))


@pytest.mark.parametrize(("objective", "supervise", "field"), [("cpt", "assistant", "objective.name"), ("sft", "all", "data.supervise")])
def test_flags_contradict_what_trains_every_token(tmp_path, objective, supervise, field):
    file = rows(tmp_path, {"messages": [HI, says("wrong", weight=0), BYE, says("right", weight=1)]})
    with pytest.raises(ConfigError, match=f"{re.escape(field)}(.|\n)*not trained"):
        prepared(file, objective, supervise=Supervise(supervise))
    assert "wrong" in trained(file, objective, supervise=Supervise(supervise), ignore=["weight"])[0]


def test_two_conversations_in_a_row_are_refused(tmp_path):
    other = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    file = rows(tmp_path, {"messages": [HI, says("right")], "conversations": other})
    with pytest.raises(ConfigError, match="two conversations, in `messages` and `conversations`"):
        prepared(file)
    assert trained(file, ignore=["conversations"]) == ["right<|im_end|>"]


def test_calls_and_functions_in_openais_earlier_form_are_read(tmp_path):
    call = {"name": "add", "arguments": '{"a": 1}'}
    row = {
        "functions": [{"name": "add", "parameters": {}}],
        "messages": [HI, {"role": "assistant", "content": None, "function_call": call}],
    }
    text = marked(prepared(rows(tmp_path, row)).train)[0]
    assert '⟦<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>⟧' in text.replace("\n", "")
    assert text.count('"name": "add"') == 2


def test_what_a_row_gives_its_template_reaches_it(tmp_path):
    import preparing

    from trainers.data.prepare import prepare

    tokenizer = preparing.tokenizer_of("chatml")
    tokenizer.chat_template = "{{ '[thinks]' if enable_thinking else '[does not]' }}" + tokenizer.chat_template
    row = {"messages": [HI, says("right")]}
    file = rows(tmp_path, row, row | {"chat_template_kwargs": {"enable_thinking": True}})
    first, second = marked(prepare(preparing.settings(file), tokenizer=tokenizer).train)
    assert first.startswith("[does not]")
    assert second.startswith("[thinks]")
    with pytest.raises(ConfigError, match=r"chat_template_kwargs(.|\n)*add_generation_prompt"):
        prepared(rows(tmp_path, row | {"chat_template_kwargs": {"add_generation_prompt": True}}))


def test_a_system_text_without_a_template_is_refused_and_not_dropped(tmp_path):
    file = rows(tmp_path, {"system": "Be brief.", "prompt": "Hi", "completion": "right"})
    with pytest.raises(ConfigError, match=r"data\.template(.|\n)*system text"):
        prepared(file, template=False)
    assert trained(file, template=False, ignore=["system"]) == ["right<|im_end|>"]
    assert trained(file) == ["right<|im_end|>"]


def test_fields_that_nobody_reads_are_listed_once(tmp_path):
    from trainers.data.report import summary

    row = {"id": 7, "score": 0.5, "empty": None, "messages": [HI | {"timestamp": 1}, says("right")]}
    report = prepared(rows(tmp_path, *[row] * 5)).report
    assert report["unread"] == ["id", "score", "turn.timestamp"]
    assert summary(report).count("id, score, turn.timestamp") == 1
    assert "unread" not in summary(prepared(rows(tmp_path, {"messages": [HI, says("right")]})).report)


def test_each_layout_says_which_fields_it_reads():
    assert READ.keys() == {layout for layout in Layout if layout is not Layout.auto}
