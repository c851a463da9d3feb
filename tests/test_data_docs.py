"""The running Python's documentation is a real corpus on every machine."""

from itertools import pairwise

import pytest

from trainers.config.choices import Layout
from trainers.data import python_docs
from trainers.data.formats import recognise, to_messages


def test_conversations_are_thousands_of_checked_rows():
    rows = list(python_docs.conversations())
    assert len(rows) > 3000
    assert all(recognise(row) is Layout.messages and len(to_messages(row, Layout.messages)) == 2 for row in rows[:500])
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions)
    assert "What does `textwrap.dedent` do?" in questions
    assert "What does `math.cos` do?" in questions
    assert max(len(row["messages"][1]["content"]) for row in rows) <= python_docs.LONGEST_ANSWER


@pytest.mark.slow
def test_documents_are_a_megabyte_of_text_and_always_the_same():
    texts = [row["text"] for row in python_docs.documents()]
    assert len(texts) > 300
    assert sum(map(len, texts)) > 1_000_000
    assert texts == [row["text"] for row in python_docs.documents()]
    assert any(text.startswith("module textwrap") for text in texts)


def test_no_private_or_test_module_is_read():
    names = [name for name, _ in python_docs._source_files()]
    assert not any(part.startswith("_") or part in python_docs.SKIPPED for name in names for part in name.split("."))
    assert all(one[1] <= other[1] for one, other in pairwise(python_docs._source_files()))


@pytest.mark.slow
def test_a_pair_is_an_answer_and_its_words_in_another_order() -> None:
    rows = list(python_docs.pairs())
    assert len(rows) > 1000
    assert rows == list(python_docs.pairs())
    for row in rows:
        assert sorted(row["chosen"].split()) == sorted(row["rejected"].split())
        assert row["chosen"] != row["rejected"]
