"""A curation finds what is planted, touches nothing else, gives the same bytes for any number of processes and after a kill."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster
from command import ROOT, wait_for
from curating import WORDS, contents, lines, run, sentence, write
from planted import REPLACED, SPOILT, plant, report, score

from tools.curate.__main__ import main
from tools.curate.rows import View, first_prompt, view
from tools.curate.shingles import bands, jaccard, shingles, signatures
from tools.curate.tidy import one_blank, read_again
from trainers.config.choices import Layout

DEFAULT = ROOT / "conf" / "curate" / "default.yaml"


def chats(count: int, seed: int = 0) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    turns = [
        (f"Question {number}: {sentence(rng, 12)}?", f"Déjà vu — 다리 “{sentence(rng, 36)}”.\n\nSo {number}.") for number in range(count)
    ]
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], "id": asked} for asked, said in turns
    ]


def test_planted_faults_are_found_and_nothing_else_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = write(tmp_path / "in" / "chats.jsonl", chats(400))
    planted = plant([clean], tmp_path / "planted", seed=1, per_kind=8)
    assert run(DEFAULT, tmp_path / "planted" / "chats.jsonl", out=tmp_path / "out") == 0
    scores, wrong = score(planted, tmp_path / "out")
    print(report(scores, wrong))
    assert wrong == []
    assert {kind: found.planted for kind, found in scores.items()} == dict.fromkeys(planted.steps, 8)
    assert {kind: found.found for kind, found in scores.items()} == dict.fromkeys(planted.steps, 8)
    assert lines(tmp_path / "out" / "rows" / "chats.jsonl") == [json.loads(line) for line in planted.clean["chats.jsonl"]]
    given, found = (set((tmp_path / name / "chats.jsonl").read_bytes().splitlines()) for name in ("planted", "out/rows"))
    assert len(given & found) >= 400 - 8 * (len(REPLACED) + len(SPOILT)) - 1


def test_the_number_of_processes_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.curate.pipeline.PART_BYTES", 20_000)
    rows = chats(200)
    files = [write(tmp_path / "a.jsonl", [*rows[:120], rows[3]]), write(tmp_path / "b.jsonl", [*rows[100:], {"messages": []}])]
    for processes in (1, 3):
        assert run(DEFAULT, *files, out=tmp_path / str(processes), processes=processes) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(lines(tmp_path / "1" / "removed.jsonl")) == 22


@pytest.mark.slow
@pytest.mark.for_real
def test_a_curation_that_is_killed_continues(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", chats(1000))
    line = [
        sys.executable,
        "-c",
        "from tools.curate import pipeline; pipeline.PART_BYTES = 50_000; from tools.curate.__main__ import main; main()",
    ]
    line += [str(DEFAULT), str(file), "--processes", "2", "--out"]
    child = subprocess.Popen([*line, str(tmp_path / "killed")], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list((tmp_path / "killed").glob(".curate/*/tidy/[0-9]*"))) >= 2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not alive(child.pid))
    assert not (tmp_path / "killed" / "report.json").exists()
    done = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "killed").glob(".curate/*/tidy/[0-9]*")}
    assert done
    for out in ("killed", "whole"):
        said = subprocess.run([*line, str(tmp_path / out)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stderr
    assert "tidy" in said
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.slurm
def test_tasks_of_slurm_arrays_make_the_same_bytes_after_a_kill_too(cluster: Cluster, tmp_path: Path) -> None:
    """The command is killed with an array in the queue, and typed again; rows are in sets, so that all stages run."""
    config = write(tmp_path / "config.yaml", [])
    config.write_text(f"{DEFAULT.read_text('utf-8')}\nsplit: {{validation: 0.2}}\n".replace("split: false", ""), "utf-8")
    rows = chats(300)
    files = [str(write(tmp_path / "in" / f"{number}.jsonl", rows[number * 50 : number * 50 + 60])) for number in range(6)]
    line = [sys.executable, "-m", "tools.curate", str(config), *files, "--quiet", "--out"]
    for processes in (1, 2):
        assert main([*line[3:], str(tmp_path / str(processes)), "--processes", str(processes)]) == 0
    asked = [*line, str(tmp_path / "slurm"), "--slurm", "2", "--sbatch", "time=10", "--sbatch", "partition=main"]
    child = subprocess.Popen(asked, cwd=ROOT, env=cluster.environment)
    wait_for(lambda: list((tmp_path / "slurm").glob(".curate/*/tidy/[0-9]*")), timeout_s=120)
    child.kill()
    child.wait()
    assert not (tmp_path / "slurm" / "report.json").exists()
    done = subprocess.run(asked, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "slurm")
    wait_for(lambda: cluster.run("squeue", "--noheader") == "")
    refused = subprocess.run(
        [*line, str(tmp_path / "no"), "--slurm", "1", "--sbatch", "partition=none"],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "invalid partition" in refused.stderr


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.for_real
def test_ctrl_c_says_how_to_continue(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", chats(1000))
    line = [sys.executable, "-m", "tools.curate", str(DEFAULT), str(file), "--processes", "2", "--out", str(tmp_path / "out")]
    child = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list((tmp_path / "out").glob(".curate/*/tidy")))
    os.killpg(child.pid, signal.SIGINT)
    said = child.communicate(timeout=30)[1]
    assert (child.returncode, said.splitlines()[-1]) == (130, "stopped: the same command continues")
    assert "Traceback" not in said


def test_near_duplicates_agree_with_plain_python(tmp_path: Path) -> None:
    """Every pair that reaches the threshold by sets of plain Python, and no other."""
    rng = np.random.default_rng(5)
    texts = [sentence(rng, 50) for _ in range(20)]
    for text in texts[:12]:
        words = text.split()
        for _ in range(3):
            for at in rng.integers(len(words), size=int(rng.integers(1, 9))):
                words[at] = str(rng.choice(WORDS))
            texts.append(" ".join(words))
    plain = [{text[at : at + 5] for at in range(len(text) - 4)} for text in texts]
    for one in range(0, len(texts), 20):
        for other in range(one):
            wanted = len(plain[one] & plain[other]) / len(plain[one] | plain[other])
            assert jaccard(shingles(texts[one], 5), shingles(texts[other], 5)) == pytest.approx(wanted, abs=1e-12)
    out = tmp_path / "out"
    assert run("near: {keep: first}", write(tmp_path / "texts.jsonl", [{"text": text} for text in texts]), out=out) == 0
    gone = {row["line"]: row for row in lines(out / "removed.jsonl")}
    stay = [number for number in range(len(texts)) if number + 1 not in gone]
    assert 8 < len(gone) < 36
    for line, row in gone.items():
        one, other = plain[line - 1], plain[row["like_line"] - 1]
        assert row["like_line"] not in gone
        assert len(one & other) / len(one | other) == pytest.approx(row["similarity"])
        assert row["similarity"] >= 0.8
    for place, one in enumerate(stay):
        assert all(len(plain[one] & plain[other]) / len(plain[one] | plain[other]) < 0.8 for other in stay[:place])


def test_bands_match_as_often_as_the_formula_says() -> None:
    rng = np.random.default_rng(2)
    matched, similarity = [], []
    for _ in range(400):
        one = np.unique(rng.integers(0, 1 << 32, 300, np.uint32))
        other = np.unique(np.concatenate([one[:225], rng.integers(0, 1 << 32, 75, np.uint32)]))
        matched.append(np.equal(*bands(signatures([one, other], 100), 20)).mean())
        similarity.append(jaccard(one, other))
    assert np.mean(matched) == pytest.approx(np.mean(np.power(similarity, 5)), abs=0.01)


@pytest.mark.parametrize(
    ("keep", "lines_gone"), [("keep: first", [2, 3]), ("keep: longest", [1, 3]), ("{keep: highest, field: score}", [1, 2])]
)
def test_the_best_row_of_a_cluster_stays(tmp_path: Path, keep: str, lines_gone: list[int]) -> None:
    text = sentence(np.random.default_rng(1), 60)
    rows = [{"text": text, "score": 1}, {"text": f"{text} and so", "score": 2}, {"text": text[:-2], "score": 3}]
    config = f"near: {keep}" if keep.startswith("{") else f"near: {{{keep}}}"
    assert run(config, write(tmp_path / "in.jsonl", rows), out=tmp_path / "out") == 0
    assert [row["line"] for row in lines(tmp_path / "out" / "removed.jsonl")] == lines_gone


def test_contradictions_are_listed_and_stay(tmp_path: Path) -> None:
    rows = [
        {"question": asked, "answer": said} for asked, said in (("Where?", "Here."), ("why", "So."), ("where? ", "There."), ("WHY", "so."))
    ]
    assert run("exact: true\ncontradictions: true", write(tmp_path / "in.jsonl", rows), out=tmp_path / "out") == 0
    [listed] = lines(tmp_path / "out" / "contradictions.jsonl")
    assert [(row["line"], row["answer"]) for row in listed["rows"]] == [(1, "Here."), (3, "There.")]
    assert len(lines(tmp_path / "out" / "rows" / "in.jsonl")) == 3


def test_pairs_and_conversations_do_not_replace_each_other(tmp_path: Path) -> None:
    text = sentence(np.random.default_rng(1), 60)
    pair = {"prompt": "Say it", "chosen": text, "rejected": "No."}
    files = [write(tmp_path / "a.jsonl", [{"prompt": "Say it", "completion": text}]), write(tmp_path / "b.jsonl", [pair])]
    assert run(DEFAULT, *files, out=tmp_path / "out") == 0
    assert lines(tmp_path / "out" / "removed.jsonl") == []


def test_rows_of_other_containers_and_layouts_come_out_in_their_layout(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}", "input": "", "output": str(number), "extra": number} for number in range(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\r\n" for row in rows).encode()))
    (tmp_path / "b.csv").write_text('question,answer\n"a, b",c\nd\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "one two"}]))
    assert run("schema: true", *(tmp_path / name for name in ("a.jsonl.gz", "b.csv", "c.json")), out=tmp_path / "out") == 0
    found = tmp_path / "out" / "rows"
    assert (lines(found / "a.jsonl"), lines(found / "b.jsonl")) == (rows, [{"question": "a, b", "answer": "c"}])
    assert [row["reason"] for row in lines(tmp_path / "out" / "removed.jsonl")] == ["has 1 field, and the header has 2"]


def test_text_that_was_read_wrongly_is_read_again_and_other_text_is_not() -> None:
    for text in ("naïve café – “quoted” €5", "안녕하세요, 반갑습니다", "Привет", "日本語 🙂"):
        wrong = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
        assert (read_again(wrong), read_again(text.encode().decode("latin-1"))) == (text, text)
    for text in ("„Straß“ und „Fuß”", "Ünï Çödé", "ÀÉÎ ÇA À “LÀ”", "Tiếng Việt", "Ελληνικά", "100 °C ± 2 µm", "안녕"):
        assert read_again(text) == text


def test_code_keeps_its_spaces() -> None:
    code = "def f(x):\n    if x:\n\treturn 1  # one\n\n\n    return 2"
    assert one_blank(code, ends=True) == code
    assert one_blank("a  \r\nb\u00a0c\n\n\n\n\nd \n", ends=True) == "a\nb c\n\n\nd"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("nera: true", "`nera` = True: "),
        ("near: {treshold: 0.5}", "did you mean threshold?"),
        ("near: {threshold: 1.5}", "is not between 0.3 and 1"),
        ("near: {threshold: high}", "is not of type float"),
        ("near: {keep: best}", "is not one of longest, first, highest"),
        ("near: {keep: highest}", "near: {keep: highest, field: score}"),
        ("exact: [1]", "is neither true, false nor settings"),
        ("exact: {a: 1}", "is not a setting of this step"),
        ("exact: false", "turns on no step"),
        ("- exact", "holds no names of steps"),
        ("a: b: c", "cannot be read"),
        ("personal: {kinds: [emial]}", "did you mean email?"),
        ("personal: {placeholder: '{who}'}", "has an unknown part"),
        ("provenance: true", "names no field"),
        ("provenance: {fields: {license: mit}}", "is not a list of values"),
        ("language: {keep: [en]}", "is not a script"),
        ("decontaminate: {files: [none.jsonl]}", "no such file"),
        ("balance: {caps: {source: many}}", "is not a number of rows"),
        ("split: {validation: 0.8, holdout: 0.5}", "leaves less than a tenth for training"),
        ("words: {file: none.txt}", "a path that is relative to the config"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, write(tmp_path / "in.jsonl", chats(1)), out=tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_and_outputs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, full = write(tmp_path / "in" / "in.jsonl", chats(1)), write(tmp_path / "full" / "mine.txt", []).parent
    (tmp_path / "in" / "x.bin").write_bytes(b"1")
    for inputs, out, words in (
        ([tmp_path / "none"], tmp_path / "out", "no such file or directory"),
        ([file, file], tmp_path / "out", "is named twice"),
        ([tmp_path / "in" / "x.bin"], tmp_path / "out", "is not a data file by its name"),
        ([file], full, "is not empty"),
        ([file], file, "is a file"),
        ([file], tmp_path / "in", "is not empty"),
    ):
        assert run(DEFAULT, *inputs, out=out) == 2
        assert words in capsys.readouterr().err
    assert run(DEFAULT, file, out=tmp_path / "out") == 0
    assert run(DEFAULT, file, out=tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("exact: true", file, out=tmp_path / "out") == 2
    assert "holds the result of other settings or inputs" in capsys.readouterr().err


def test_the_page_shows_rows_as_text_and_fetches_nothing(tmp_path: Path) -> None:
    text = f"<script>alert(1)</script> {sentence(np.random.default_rng(3), 60)}"
    rows = [{"text": text}, {"text": text[:-1]}, {"text": "a\u00a0b"}, {"text": ""}]
    assert run(DEFAULT, write(tmp_path / "in.jsonl", rows), out=tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not any(word in page for word in ("src=", "href=", "url(", "@import"))
    assert all(words in page for words in ("<h2>Near duplicates</h2>", "has an empty text", "prompt length"))
    assert (tmp_path / "out" / "removed.jsonl").stat().st_mode & 0o77 == 0


FILTERED = [
    ("provenance: {fields: {meta.license: [MIT]}}", {"meta": {"license": "mit"}}, {"meta": {"license": "gpl"}}, "has `meta.license` 'gpl'"),
    ("provenance: {fields: {license: [mit]}}", {"license": "MIT"}, {}, "has no `license`"),
    ("length: {prompt_least: 2}", {"question": "Why?"}, {"question": "?"}, "has a prompt of 1 characters"),
    ("length: {answer_most: 10}", {"answer": "x" * 10}, {"answer": "x" * 11}, "has an answer of 11 characters"),
    ("words: {file: listed.txt}", {"answer": "classic"}, {"answer": "An ASS."}, "holds 1 listed words, such as 'ASS'"),
    ("words: {file: listed.txt}", {"answer": "안녕"}, {"answer": "바보야"}, "holds 1 listed words, such as '바보'"),
    ("language: {keep: [latin, hangul], from_characters: 5}", {"answer": "안녕하세요"}, {"answer": "Привет, мир"}, "is cyrillic"),
    (
        "refusals: true",
        {"answer": "I'm sorry about that. Try it again."},
        {"answer": "죄송하지만 그 요청은 도와드릴 수 없습니다."},
        "refuses",
    ),
    ("truncated: true", {"answer": "```ls``` lists"}, {"answer": "So:\n```sh\nls"}, "ends in a block of code"),
    (
        "syntax: true",
        {"answer": "```python\n# So\n>>> 1 +\\\n... 1\n2 is\n```\n```python\n>>> f(\n    x)\n```"},
        {"answer": "```python\n>>> 1 +\n2\n```"},
        "has python",
    ),
    ("syntax: true", {"answer": "```python\n%matplotlib inline\nx = 1\n```"}, {"answer": "```python\n1 %\n```"}, "has python"),
    (
        "syntax: true",
        {"answer": 'See:\n```python\n"""Doc\n```\nx y\n```\n"""\n```\nSo.'},
        {"answer": 'See:\n```python\n"""Doc\n```\nSo.'},
        "has python",
    ),
    (
        "truncated: true",
        {"answer": f"{'Long. ' * 40}That is what I look up to"},
        {"answer": f"{'Long. ' * 40}That and the"},
        "ends with 'the'",
    ),
    ("personal: {action: drop}", {"answer": "8.8.4.4, (02, 01-02-2003 04"}, {"answer": "ping 8.8.4.4"}, "1 ip"),
    ("syntax: true", {"answer": "```json\n{}\n```"}, {"answer": "```json\n{\n```"}, "has json that is not valid"),
    (
        "personal: {action: drop}",
        {"answer": "번호 １２３４ ５６７８ ９０１２ ３４５６"},
        {"answer": "４１１１ １１１１ １１１１ １１１１"},
        "1 card",
    ),
    ("personal: {action: drop}", {"answer": "192.168.0.1"}, {"answer": "a@b.org"}, "1 email"),
    ('personal: {allow: ["@b.org"]}', {"answer": "a@b.org"}, None, ""),
]


def test_rows_of_every_layout_say_something() -> None:
    ranked = {"prompt": "Hi", "responses": [{"response": "no", "score": 1}, {"response": "yes", "score": 2}]}
    assert view(ranked, Layout.ranked) == View("Hi", ("yes", "no"))
    labelled = {"messages": [{"role": "user", "content": "nice"}], "label": "good"}
    assert view(labelled, Layout.messages) == View("nice", ())
    assert (first_prompt(ranked, Layout.ranked), first_prompt(labelled, Layout.messages)) == ("Hi", "nice")


@pytest.mark.parametrize(("config", "good", "bad", "reason"), FILTERED)
def test_filters(tmp_path: Path, config: str, good: dict[str, object], bad: dict[str, object] | None, reason: str) -> None:
    base = {"question": "So?", "answer": "Yes."}
    rows = [base | good] + ([base | bad] if bad is not None else [])
    (tmp_path / "listed.txt").write_text("# listed\nass\n바보\n", "utf-8")
    assert run(config, write(tmp_path / "in.jsonl", rows), out=tmp_path / "out") == 0
    assert lines(tmp_path / "out" / "rows" / "in.jsonl") == rows[:1]
    assert [(row["line"], row["reason"][: len(reason)]) for row in lines(tmp_path / "out" / "removed.jsonl")] == [(2, reason)] * (
        len(rows) - 1
    )


def test_placeholders_are_the_same_for_the_same_value_of_a_row(tmp_path: Path) -> None:
    turns = [
        ("user", "I am ann@b.org or bob@b.org"),
        ("assistant", "Ann is ANN@b.org, 010-1234-5678"),
        ("tool", '{"to": "bob@b.org"}'),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in [*turns, ("assistant", "Yes.")]], "author": "ann@b.org"}
    assert run("exact: true\npersonal: true", write(tmp_path / "in.jsonl", [row, row]), out=tmp_path / "out") == 0
    [found] = lines(tmp_path / "out" / "rows" / "in.jsonl")
    assert [turn["content"] for turn in found["messages"]] == [
        "I am [EMAIL_1] or [EMAIL_2]",
        "Ann is [EMAIL_1], [PHONE_1]",
        '{"to": "[EMAIL_2]"}',
        "Yes.",
    ]
    assert found["author"] == "[EMAIL_1]"
    report = "".join((tmp_path / "out" / f"report.{kind}").read_text("utf-8") for kind in ("txt", "html", "json"))
    assert "b.org" not in report


def test_rows_that_share_words_with_evaluation_rows_are_removed(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    evaluation = [{"question": sentence(rng, 30), "answer": sentence(rng, 5)} for _ in range(5)]
    short = {"question": "Which nine words are the whole of this row", "answer": "?"}
    asked = write(tmp_path / "test.jsonl", [*evaluation, short, {"other": {"text": sentence(rng, 20)}}, {"text": "too few words"}])
    held = [str(row["question"]).split() for row in evaluation]
    rows = [{"text": sentence(rng, 40)} for _ in range(30)]
    rows += [{"text": " ".join(["so", *words[at : at + size], "it", "is"])} for at, words in enumerate(held) for size in (11, 12, 13, 20)]
    rows += [{"text": "He asks: which nine words -- are THE whole of this row"}, {"text": "nine words are the whole"}]
    wanted = {}
    for line, row in enumerate(rows, 1):
        words = str(row["text"]).split()
        for other in held:
            runs = [
                size for size in range(13, 31) for at in range(len(words) - size + 1) if " ".join(words[at : at + size]) in " ".join(other)
            ]
            if runs:
                wanted[line] = max(runs)
    config = f"decontaminate: {{files: [{asked}]}}"
    assert run(config, write(tmp_path / "in.jsonl", rows), out=tmp_path / "out") == 0
    found = {row["line"]: row for row in lines(tmp_path / "out" / "removed.jsonl")}
    assert found.keys() == {*wanted, 51}
    assert {line: len(str(found[line]["overlap"]).split()) for line in wanted} == wanted
    assert found[51]["overlap"] == "which nine words are the whole of this row"
    assert (found[51]["like"], found[51]["like_line"]) == ("test.jsonl", 6)


def test_caps_leave_so_many_rows_of_each_value(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "meta": {"kind": "abc"[number % 3]}} for number in range(60)]
    for name, order in (("one", rows), ("other", rows[::-1])):
        file = write(tmp_path / name / "in.jsonl", order)
        assert run("balance: {caps: {meta.kind: 7, source: 15}}", file, out=tmp_path / name / "out") == 0
    one, other = (lines(tmp_path / name / "out" / "rows" / "in.jsonl") for name in ("one", "other"))
    assert one == other[::-1]
    assert len(one) == 15
    kinds = [row["meta"]["kind"] for row in one]
    assert all(0 < kinds.count(kind) <= 7 for kind in "abc")
    reasons = [row["reason"] for row in lines(tmp_path / "one" / "out" / "removed.jsonl")]
    assert (reasons.count("is beyond the first 15 rows with source 'in'"), len(reasons)) == (6, 45)


def test_sets_share_no_text_no_prompt_and_no_similar_text(tmp_path: Path) -> None:
    """By sets of plain Python, over the files that come out."""
    rows = chats(150)
    rng = np.random.default_rng(7)
    for number in range(0, 90, 3):
        asked, said = (turn["content"] for turn in rows[number]["messages"])
        words = said.split()
        for at in rng.integers(len(words), size=3):
            words[at] = "changed"
        rows.append({"messages": [{"role": "user", "content": f"Once more, {asked}"}, {"role": "assistant", "content": " ".join(words)}]})
        rows.append(
            {"messages": [*rows[number + 1]["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": said[::-1]}]}
        )
    for number, row in enumerate(rows):
        row["meta"] = {"document": f"d{number // 2}" if number < 40 else None}
    file = write(tmp_path / "in.jsonl", rows)
    config = "split: {validation: 0.2, holdout: 0.1, regression: 5, group: meta.document}"
    for processes in (1, 2):
        assert run(config, file, out=tmp_path / str(processes), processes=processes) == 0
    out = tmp_path / "1"
    assert contents(out) == contents(tmp_path / "2")
    sets = {name: lines(out / name / "in.jsonl") for name in ("train", "validation", "holdout", "regression")}
    sizes = {name: len(found) for name, found in sets.items()}
    assert sum(sizes.values()) == len(rows)
    assert (sizes["regression"], sizes["holdout"]) == (5, 21)
    assert 38 <= sizes["validation"] <= 42
    every = [(name, row) for name, found in sets.items() for row in found]
    text = ["\n".join(turn["content"].casefold() for turn in row["messages"]) for _, row in every]
    runs = [{" ".join(one.split())[at : at + 5] for at in range(len(one) - 4)} for one in text]
    for at, (name, row) in enumerate(every):
        for before, (other, earlier) in enumerate(every[:at]):
            if name != other:
                assert row["messages"][0] != earlier["messages"][0]
                assert row["meta"]["document"] is None or row["meta"]["document"] != earlier["meta"]["document"]
                assert len(runs[at] & runs[before]) < 0.7 * len(runs[at] | runs[before])
    report = json.loads((out / "report.json").read_text())["sets"]
    assert report["rows"] == sizes
    assert all(found["pairs"] > 0 for kind, found in report["proof"].items() if kind != "the same text")
    assert all(found["across"] == 0 for found in report["proof"].values())


@pytest.mark.slow
def test_the_benchmark_measures_a_curation() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "curate", "--rows", "300"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "rows a second; peak memory of all processes" in done.stdout
    assert "300 rows, " in done.stdout
