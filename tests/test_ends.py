"""Text and tokens of the ends meet: nothing twice, each end one token that the export stops at, ids that are the files' own."""

import dataclasses
import json
import re

import pytest
import yaml
from chat_tokenizers import tokenizer_of
from transformers import AutoTokenizer, LlamaConfig

from tools.merge.write import add_stops
from trainers.config.choices import Layout, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, PeftConfig, RunConfig
from trainers.data.encode import encoder_of
from trainers.data.ends import chat_remedy, require_ids, stop_ids
from trainers.data.masks import BUILT_IN, CHATML, plain_pair, plain_text, render, template_of
from trainers.data.sources import Row
from trainers.data.tokenizer import load_tokenizer
from trainers.model.blueprint import Blueprint, blueprint_of, num_ids
from trainers.model.export import write_configs

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LATIN = "{% for m in messages %}USER: {{ m.content }}\n###\n{% endfor %}"


@pytest.mark.parametrize("text", ["ab", "<s>ab", "ab</s>", " <s>ab</s>\n", "<s> a</s> b</s>"])
def test_ends_that_a_text_has_already_are_not_added(text):
    found = plain_text(text, "<s>", "</s>").text
    assert found.count("<s>") == max(1, text.count("<s>"))
    assert re.sub(r"\s", "", found).endswith("b</s>")
    assert not re.search(r"<s>\s*<s>|</s>\s*</s>", found)


def test_ends_that_a_prompt_and_its_completion_have_already_are_not_added():
    pair = plain_pair("<s>Q\n", "A</s>", "<s>", "</s>")
    assert (pair.text, pair.spans) == ("<s>Q\nA</s>", [(5, 10)])
    assert plain_pair("Q\n", "A", "", "").text == "Q\nA"


def encoded(tokenizer, row, layout=Layout.messages, method=PeftMethod.none, **data):
    config = RunConfig(model=ModelConfig(id="x"), data=DataConfig(path="x", **data), peft=PeftConfig(method=method))
    documents = encoder_of(config, tokenizer, layout).encode([Row(row, "rows", 1)])
    assert documents.error is None, documents.error
    return documents


@pytest.mark.parametrize("jinja", [CHATML, LATIN])
@pytest.mark.parametrize("method", [PeftMethod.none, PeftMethod.lora])
def test_an_end_of_several_tokens_is_refused_and_every_remedy_makes_it_a_stop(jinja, method, tmp_path):
    """Adapters are loaded onto a base that has not grown, so they are told of no new tokens."""
    tokenizer = tokenizer_of("zephyr")
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"ordinary tokens? of this tokenizer: generation would not stop") as caught:
        encoded(tokenizer, {"messages": CHAT}, method=method)
    ways = caught.value.remedy.split(" or ")
    assert ways == (
        ['"model.add_tokens=[' + ways[0].partition("[")[2], "data.template=plain"] if method is PeftMethod.none else ["data.template=plain"]
    )
    for way in ways:
        part, name, value = re.fullmatch(r'"?(\w+)\.(\w+)=(.*?)"?', way).groups()
        config = RunConfig(model=ModelConfig(id=str(tmp_path)), data=DataConfig(path="x"), peft=PeftConfig(method=method))
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: yaml.safe_load(value)})})
        mended = load_tokenizer(config)
        documents = encoder_of(config, mended, Layout.messages).encode([Row({"messages": CHAT}, "rows", 1)])
        assert (documents.error, documents.bad) == (None, [])
        assert documents.tokens[documents.supervised == 1][-1] in stop_ids(mended)


@pytest.mark.parametrize(("name", "method", "remedy"), [
    ("chatml", PeftMethod.lora, "data.template=chatml"),
    ("zephyr", PeftMethod.lora, "data.template=plain"),
    ("zephyr", PeftMethod.none, "data.template=chatml \"model.add_tokens=['<|im_start|>','<|im_end|>']\" or data.template=plain"),
])  # fmt: skip
def test_a_template_is_advised_that_the_tokenizer_has_the_tokens_for(name, method, remedy):
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = None
    config = RunConfig(model=ModelConfig(id="x"), data=DataConfig(path="x"), peft=PeftConfig(method=method))
    error = encoder_of(config, tokenizer, Layout.messages).encode([Row({"messages": CHAT}, "rows", 1)]).error
    assert error[3].startswith(remedy)
    assert chat_remedy(tokenizer, method is PeftMethod.none) == remedy


@pytest.mark.parametrize("name", BUILT_IN)
def test_our_own_templates_end_in_one_token(name):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = BUILT_IN[name]
    turns = [{"role": "system", "content": "S"}, *CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rendered = render(template_of(tokenizer, name), turns, [{"name": "f", "description": "d", "parameters": {}}])
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Hello<|im_end|>", "!<|im_end|>"]


def test_a_template_that_begins_twice_is_refused():
    tokenizer = tokenizer_of("inst")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match=r"writes `<s>` twice"):
        encoded(tokenizer, {"messages": CHAT})


@pytest.mark.parametrize("prompt", ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "\n<|im_end|>"])
def test_a_prompt_that_was_rendered_before_is_a_bad_row(prompt):
    documents = encoded(tokenizer_of("chatml"), {"prompt": prompt, "completion": "Hello<|im_end|>"}, Layout.prompt_completion)
    assert re.match(r"rows:1: turn 1 begins with `<\|im_(start|end)\|>`: it was rendered before", documents.bad[0])
    assert encoded(tokenizer_of("chatml"), {"messages": CHAT}).bad == []


def changed(tmp_path, change):
    """A saved tokenizer whose tokenizer.json `change` has altered."""
    tokenizer_of("chatml").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(tmp_path)


def test_ids_that_collide_or_are_read_as_others_are_refused(tmp_path):
    require_ids(changed(tmp_path, lambda content: None), "x")
    with pytest.raises(ConfigError, match=r"two tokens have the id 7: "):
        require_ids(changed(tmp_path, lambda content: content["model"]["vocab"].update(zz=7)), "x")
    far = lambda content: content["added_tokens"].append(content["added_tokens"][-1] | {"content": "<x>", "id": 999})  # noqa: E731
    with pytest.raises(ConfigError, match=r"`<x>` the id 999, and it is read as 259"):
        require_ids(changed(tmp_path, far), "x")


def test_ids_that_leave_gaps_have_a_row_each(tmp_path):
    tokenizer = changed(tmp_path, lambda content: content["model"]["vocab"].update(zz=700))
    assert len(tokenizer) < num_ids(tokenizer) == 701
    model = ModelConfig(id=str(tmp_path))
    with pytest.raises(ConfigError, match=r"the model only 600(.|\n)*model.grow_vocabulary=true"):
        blueprint_of(model, 0, LlamaConfig(vocab_size=600), num_ids(tokenizer))
    model.grow_vocabulary = True
    assert blueprint_of(model, 0, LlamaConfig(vocab_size=600), num_ids(tokenizer)).config.vocab_size == 701


@pytest.mark.parametrize(("base", "config_end", "stops", "config_stop"), [
    ([257, 65], 257, [257, 258], 257),  # a word of this tokenizer, which the base's had another token for
    ([65, 66], 65, [258], 258),
    (999, None, [258], None),
    (258, 258, [258], 258),
])  # fmt: skip
def test_an_export_stops_at_the_trained_ends_and_at_no_word(base, config_end, stops, config_stop, tmp_path):
    tokenizer = tokenizer_of("chatml")
    assert stop_ids(tokenizer) == [258]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": base}))
    config = LlamaConfig(vocab_size=300, eos_token_id=config_end)
    blueprint = Blueprint(config=config, folder=tmp_path / "base", revision=None, seed=0, trust_remote_code=False)
    write_configs(config, blueprint, tokenizer, stop_ids(tokenizer), tmp_path / "out")
    read = {name: json.loads((tmp_path / "out" / name).read_text()) for name in ("generation_config.json", "config.json")}
    assert read["generation_config.json"]["eos_token_id"] == stops
    assert read["config.json"]["eos_token_id"] == config_stop


@pytest.mark.parametrize(("base", "stops"), [(None, [258]), ({"eos_token_id": 257, "top_k": 5}, [257, 258]), ({"eos_token_id": 258}, 258)])
def test_a_merged_model_stops_at_the_ends_of_its_adapters_template(base, stops, tmp_path):
    file = tmp_path / "generation_config.json"
    if base is not None:
        file.write_text(json.dumps(base))
    tokenizer_of("chatml").save_pretrained(tmp_path)
    add_stops(tmp_path)
    assert json.loads(file.read_text()) == (base or {}) | {"eos_token_id": stops}
