"""Texts of one meaning in several styles become rows in both directions, or one whose direction the texts decide."""

from dataclasses import replace

import pytest
from preparing import marked, prepared, trained, write

from trainers.config.checks import _validate_data
from trainers.config.choices import Layout, StyleRows
from trainers.config.errors import ConfigError
from trainers.config.mix import data_of
from trainers.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from trainers.data.formats import BadRow
from trainers.data.styles import to_rows

STYLES = ["business", "very_casual"]
ASKED = "Rewrite the text in a {style} style."
ROW = {"business": "We regret.", "very_casual": "Sorry, late!"}


def test_both_directions_are_a_row_each_and_the_instruction_names_the_style():
    assert to_rows(ROW | {"system": "S"}, STYLES, StyleRows.both, ASKED) == [
        {
            "system": "S",
            "instruction": "Rewrite the text in a very casual style.",
            "input": "We regret.",
            "output": "Sorry, late!",
        },
        {"system": "S", "instruction": "Rewrite the text in a business style.", "input": "Sorry, late!", "output": "We regret."},
    ]
    three = to_rows(ROW | {"plain": "It is late."}, [*STYLES, "plain"], StyleRows.both, "")
    assert len(three) == 6
    assert three[0] == {"instruction": "We regret.", "output": "Sorry, late!"}


def test_one_direction_is_decided_by_the_texts_alone_and_each_is_taken_about_as_often():
    rows = [{"business": f"We regret delay {n}.", "very_casual": f"Late {n}!"} for n in range(200)]
    found = [to_rows(row, STYLES, StyleRows.one, ASKED) for row in rows]
    assert all(one == to_rows({"id": 1} | row, STYLES, StyleRows.one, ASKED) for row, one in zip(rows, found, strict=True))
    assert all(len(one) == 1 and one[0] in to_rows(row, STYLES, StyleRows.both, ASKED) for row, one in zip(rows, found, strict=True))
    assert 70 < sum("casual" in one[0]["instruction"] for one in found) < 130


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"business": "a"}, "has 1 of the texts"),
        ({"business": "a", "very_casual": " "}, "`very_casual` that is not a text"),
        ({"business": "a", "very_casual": 4}, "`very_casual` that is not a text"),
        ({"business": "a", "very_casual": "a"}, "the same text"),
        (["a"], "not an object"),
    ],
)
def test_a_row_that_is_not_a_pair_is_a_bad_row(row, reason):
    with pytest.raises(BadRow, match=reason):
        to_rows(row, STYLES, StyleRows.both, ASKED)


def test_prepared_rows_train_the_text_that_is_asked_for(tmp_path):
    file = write(tmp_path / "rows.jsonl", [ROW])
    options = {"layout": Layout.styles, "styles": STYLES}
    assert trained(file, **options) == ["Sorry, late!<|im_end|>", "We regret.<|im_end|>"]
    assert "Rewrite the text in a business style.\nSorry, late!" in marked(prepared(file, **options).train)[1]
    assert len(trained(file, style_rows=StyleRows.one, **options)) == 1
    assert trained(file, template=False, style_instruction="", **options) == ["Sorry, late!<|im_end|>", "We regret.<|im_end|>"]
    assert prepared(file, **options).report["unread"] == []


def test_what_a_template_reads_goes_with_each_row():
    context = {"tools": [{"type": "function"}], "functions": [], "documents": [{"text": "a"}], "chat_template_kwargs": {"k": 1}}
    rows = to_rows(ROW | context | {"id": 7}, STYLES, StyleRows.both, ASKED)
    assert all(row.keys() == {*context, "instruction", "input", "output"} and row.items() >= context.items() for row in rows)
    assert "documents" not in to_rows({"documents": "a", "plain": "b"}, ["documents", "plain"], StyleRows.both, "")[0]


def test_styles_next_to_a_source_of_another_layout():
    """The other source has no styles; settings of styles that no source has the layout for are refused, of the mixture as a whole."""
    styles, other = SourceConfig(path=__file__, layout=Layout.styles), SourceConfig(path=__file__, layout=Layout.messages)
    data = DataConfig(mix={"tones": styles, "chats": other}, styles=STYLES, style_rows=StyleRows.one)
    assert (data_of(data, "tones").styles, data_of(data, "tones").style_rows) == (STYLES, StyleRows.one)
    assert (data_of(data, "chats").styles, data_of(data, "chats").style_rows) == ([], StyleRows.both)
    run = RunConfig(model=ModelConfig(id="a/model"), data=data)
    _validate_data(run)
    with pytest.raises(ConfigError) as caught:
        _validate_data(replace(run, data=replace(data, mix={"chats": other, "more": other})))
    assert caught.value.path == "data.styles"


def test_rows_of_one_meaning_are_on_one_side_of_the_split(tmp_path):
    rows = [{"business": f"We regret delay {n}.", "very_casual": f"Late {n}!"} for n in range(30)]
    found = prepared(write(tmp_path / "rows.jsonl", rows), layout=Layout.styles, styles=STYLES, eval_fraction=0.3)
    sides = [{n for n in range(30) for text in marked(table) if f"delay {n}." in text} for table in (found.train, found.eval)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 30


def test_a_row_without_two_texts_is_named(tmp_path):
    file = write(tmp_path / "rows.jsonl", [ROW, {"business": "a"}])
    with pytest.raises(ConfigError, match=r"rows.jsonl:2"):
        prepared(file, layout=Layout.styles, styles=STYLES)
