"""What a chat template leaves out of a row is counted, shown and refused, each remedy works, and each turn may be a document."""

import dataclasses
import json
import re

import pytest
import yaml
from chat_tokenizers import GOLDEN, tokenizer_of

from trainers.config.choices import DocumentOf, Reasoning, Supervise
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, RunConfig
from trainers.data.masks import CHATML, render, template_of
from trainers.data.prepare import prepare
from trainers.data.report import summary
from trainers.data.tokenizer import load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks it up.", "parameters": {"type": "object"}}}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"where": "page 7"}}}
SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "4?"}
ANSWER, THOUGHT = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "4", "reasoning_content": "4"}
ROWS = {
    "tools": ([USER, ANSWER], TOOLS),
    "calls": ([USER, {"role": "assistant", "tool_calls": [CALL], "content": ""}, {"role": "tool", "content": "four"}, ANSWER], None),
    "said": ([USER, {"role": "assistant", "tool_calls": [CALL], "content": "Let me see."}, {"role": "tool", "content": "3"}, ANSWER], None),
    "results": ([USER, {"role": "assistant", "tool_calls": [CALL], "content": ""}, {"role": "tool", "content": "0"}, ANSWER], None),
    "reasoning": ([USER, THOUGHT], None),
    "earlier": ([USER, THOUGHT, USER, ANSWER], None),
    "system": ([SYSTEM, USER, ANSWER], None),
    "names": ([USER | {"name": "Ann"}, ANSWER], None),
    "asked": ([USER, ANSWER, {"role": "user", "content": "9"}, ANSWER], None),
}
ALL = {
    "system": "{{ m.content }}",
    "user": "{{ m.name or '' }}{{ m.content }}",
    "tool": "{{ m.content | tojson }}",
    "assistant": "{% if m.reasoning_content %}<{{ m.reasoning_content | trim }}>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
}
LACKING = {
    "tools": {"tools": ""},
    "calls": {"assistant": "{{ m.content or 'call' }}"},
    "said": {"assistant": "{{ m.tool_calls[0].function | tojson if m.tool_calls else m.content }}"},
    "results": {"tool": "done"},
    "reasoning": {"assistant": "{{ m.content }}"},
    "earlier": {"assistant": "{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}{% endif %}{{ m.content }}"},
    "system": {"system": "You are helpful."},
    "names": {"user": "{{ m.content }}"},
    "asked": {"user": "{{ m.content if loop.first else 'more' }}"},
}


def template(**changed):
    """A template that writes every part, but for what is changed."""
    parts = {"tools": "{{ tools | tojson if tools else '' }}"} | ALL | changed
    turns = "".join(f"{{% if m.role == '{role}' %}}{parts[role]}{{% endif %}}" for role in ALL)
    return parts["tools"] + "{% for m in messages %}<|im_start|>{{ m.role }}\n" + turns + "<|im_end|>{% endfor %}"


def rendered(jinja, messages, tools=None, supervise=Supervise.assistant):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = jinja
    return render(template_of(tokenizer, "x"), messages, tools, supervise)


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_part_is_found_and_missed(kind):
    """Parts of one character too, which the text has elsewhere; nothing else of the row is said to be missing."""
    messages, tools = ROWS[kind]
    assert not any(rendered(template(), messages, tools).left_out.values())
    found = rendered(template(**LACKING[kind]), messages, tools).left_out
    assert [name for name, is_missing in found.items() if is_missing] == [kind]


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "names"])
def test_our_own_template_leaves_nothing_out(kind):
    messages, tools = ROWS[kind]
    assert not any(rendered(CHATML, messages, tools).left_out.values())


def test_blanks_and_escapes_are_not_losses():
    texts = ['  said "so"\n', "\n\u00e9 \\ x"]
    messages = [{"role": "user", "content": text} for text in texts] + [THOUGHT | {"reasoning_content": f"\n{texts[1]}  "}]
    for user in ("{{ m.content | trim }}", "{{ m.content | tojson }}", "{{ m.content.split() | join(' ') }}"):
        assert not any(rendered(template(user=user), messages).left_out.values())


def test_a_template_that_looks_at_the_words_is_searched_for_them():
    """It writes a turn that is exactly `4?`, and any other as a dot: with a mark in it the rendering is another."""
    jinja = template(user="{{ m.content if m.content == '4?' else '.' }}")
    assert rendered(jinja, [USER, THOUGHT]).left_out == {"asked": False, "reasoning": False}
    assert rendered(jinja, [{"role": "user", "content": "5?"}, THOUGHT]).left_out == {"asked": True, "reasoning": False}


def test_a_long_row_misses_what_a_short_one_does():
    jinja = template(**LACKING["earlier"])
    messages = [USER, THOUGHT] * 5
    assert rendered(jinja, messages).left_out == {"asked": False, "earlier": True, "reasoning": False}
    assert rendered(jinja, messages, None, Supervise.last).left_out == {"asked": False, "reasoning": False}
    assert rendered(jinja, messages, None, Supervise.all).left_out["earlier"]


def test_rows_with_tools_take_the_template_for_tools():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = {"default": "plain " + template(tools=""), "tool_use": "tools " + template(), "rag": "rag " + template()}
    chosen = template_of(tokenizer, "x")
    for tools in (None, TOOLS):
        wanted = tokenizer.apply_chat_template([USER, ANSWER], tools=tools, tokenize=False)
        assert render(chosen, [USER, ANSWER], tools).text == wanted
    assert not any(render(chosen, [USER, ANSWER], TOOLS).left_out.values())


@pytest.fixture
def config(tmp_path):
    def make(jinja, rows, tokens="chatml", **options):
        tokenizer = tokenizer_of(tokens)
        tokenizer.chat_template = jinja
        tokenizer.save_pretrained(tmp_path / "model")
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"messages": messages, "tools": tools}) + "\n" for messages, tools in rows))
        data = DataConfig(path=str(file), prepared_dir=str(tmp_path / "prepared"), processes=1, **options)
        return RunConfig(model=ModelConfig(id=str(tmp_path / "model")), data=data)

    return make


def overrides_in(remedy):
    """The ways that a remedy names, each as its overrides."""
    for way in remedy.split(" or "):
        found = re.findall(r'"?\b((?:data|model)\.\w+)=(\[[^\]]*\]|[^\s,;"]+)', way)
        assert found, way
        yield found


def corrected(config, overrides):
    for key, value in overrides:
        part, name = key.split(".")
        kinds = {"document": DocumentOf, "reasoning": Reasoning}
        value = kinds[name](value) if name in kinds else yaml.safe_load(value)
        changed = dataclasses.replace(getattr(config, part), **{name: value})
        config = dataclasses.replace(config, **{part: changed})
    return config


@pytest.mark.parametrize("tokens", ["chatml", "zephyr"])
@pytest.mark.parametrize("kind", ROWS)
def test_what_is_left_out_is_refused_and_every_remedy_works(kind, tokens, config):
    jinja = template(**LACKING[kind])
    jinja = jinja if tokens == "chatml" else jinja.replace("<|im_end|>", "{{ eos_token }}")
    settings = config(jinja, [ROWS[kind], ([USER, ANSWER], None)] * 2, tokens)
    with pytest.raises(ConfigError, match=r"2 of the (2|4) rows that have some; the first is .*rows.jsonl:1") as caught:
        prepare(settings)
    ways = list(overrides_in(caught.value.remedy))
    assert len(ways) >= 2
    for way in ways:
        shown = summary(prepare(corrected(settings, way)).report)
        assert ("left out by the chat template" in shown) is ("data.max_left_out_fraction" in dict(way))


def test_a_share_below_the_limit_is_shown_and_trained(config):
    rows = [ROWS["earlier"]] + [([USER, THOUGHT], None)] * 9
    settings = config(template(**LACKING["earlier"]), rows, max_left_out_fraction=1.0)
    report = prepare(settings).report
    assert report["template_leaves_out"] == {"earlier": {"rows": 1, "missing": 1}}
    assert "reasoning of earlier turns in 1 of 1 rows" in summary(report)


def test_each_turn_is_a_document_as_the_model_sees_it_when_it_answers(config):
    """Its own thought is trained and those before it are gone, as the template has it; all documents of a row are on one side."""
    turns = [m for n in range(3) for m in ({"role": "user", "content": f"q{n}"}, THOUGHT | {"reasoning_content": f"t{n}"})]
    other = [{"role": "user", "content": "another"}, THOUGHT]
    jinja = (GOLDEN / "think.jinja").read_text()
    settings = config(jinja, [(turns, None), (other, None)], "think", document=DocumentOf.turn, eval_fraction=0.3, packing=False)
    prepared, tokenizer = prepare(settings), load_tokenizer(settings)
    texts = []
    for table in (prepared.train, prepared.eval):
        for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
            tokens, trained = table.tokens[start:end], table.supervised[start:end] == 1
            texts.append((tokenizer.decode(tokens), tokenizer.decode(tokens[trained])))
    assert sorted(len(table.offsets) - 1 for table in (prepared.train, prepared.eval)) == [1, 3]
    for number in range(3):
        whole, trained = next(text for text in texts if text[0].count("q") == number + 1 and "another" not in text[0])
        assert trained == f"<think>\nt{number}\n</think>\n\n4<|im_end|>"
        assert re.findall(r"t\d", whole) == [f"t{number}"]
        assert whole == tokenizer.apply_chat_template(turns[: 2 * number + 2], tokenize=False).rstrip("\n") + "\n"


def test_a_template_is_named_among_those_of_the_tokenizer(config):
    named = {"default": "plain " + template(), "rag": "rag " + template()}
    settings = config(named, [([USER, ANSWER], None)], template="rag")
    assert load_tokenizer(settings).chat_template == named["rag"]
    settings.data.template = "rags"
    with pytest.raises(ConfigError, match=r"templates named default, rag(.|\n)*did you mean rag"):
        load_tokenizer(settings)
