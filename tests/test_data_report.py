"""The report on rows: planted faults are counted and marked, the page opens offline, and a run's data add tokens and leakage."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from preparing import TOKENIZER, write

from tools.data_report.__main__ import main
from tools.data_report.say import findings
from tools.page import POLICY

LETTERS = random.Random(0)
WORDS = ["".join(LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2000)]


def chat(draw: random.Random, question: str = "", answer: str = "") -> dict[str, Any]:
    asked, said = (" ".join(draw.choices(WORDS, k=count)) for count in (8, 30))
    return {"messages": [{"role": "user", "content": question or asked}, {"role": "assistant", "content": answer or said}]}


def faulty(folder: Path) -> Path:
    draw = random.Random(1)
    rows: list[Any] = [chat(draw) for _ in range(100)]
    rows += [*rows[:4], {"messages": [rows[4]["messages"][0], {"role": "assistant", "content": "Another <b>answer</b>."}]}]
    words = rows[5]["messages"][1]["content"].split()
    rows += [chat(draw, rows[5]["messages"][0]["content"], " ".join([*words[:at], "zuzu", *words[at + 1 :]])) for at in (12, 15, 18)]
    rows += [chat(draw, answer=f"As an AI {number} {' '.join(draw.choices(WORDS, k=20))}") for number in range(60)]
    rows += [chat(draw, answer="```json\n{broken\n```"), {"messages": []}, {"other": 1}, chat(draw, answer="Write to ann@example.org.")]
    return write(folder / "rows.jsonl", rows)


def test_planted_faults_are_counted_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = faulty(tmp_path)
    assert main([str(file), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert (report["rows"], report["looked_at"], report["trainable"]) == (172, 172, 170)
    assert {key: report[key] for key in ("copies", "near_copies", "same_prompt")} == {"copies": 4, "near_copies": 3, "same_prompt": 8}
    assert report["contradictions"] == 1
    assert report["openings"][0] == {"text": "as an ai", "answers": 60}
    assert report["tallies"]["faults"] == {"boilerplate": 60, "syntax": 1, "format": 2, "personal": 1}
    off = [one.words for one in findings(report) if one.is_off]
    assert [words.split(",")[0].split(" of ")[0] for words in off] == ["1.2%", "35.3%", "35.3%"]
    assert "! 1.2% of 172 rows cannot be trained on" in said
    assert "ann@example.org" not in said + (tmp_path / "r.json").read_text() + (tmp_path / "r.html").read_text()
    assert "<b>answer</b>" not in (tmp_path / "r.html").read_text()
    assert main([str(file), "--rows", "50", "--sample", "0", "--json", str(tmp_path / "few.json")]) == 0
    assert json.loads((tmp_path / "few.json").read_text())["looked_at"] == 50


@pytest.mark.slow
def test_a_run_s_data_add_tokens_and_what_is_held_out_and_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    draw = random.Random(2)
    rows = [chat(draw) for _ in range(60)]
    words = rows[3]["messages"][1]["content"].split()
    held_out = [chat(draw) for _ in range(8)] + [chat(draw, rows[3]["messages"][0]["content"] + " zu", " ".join([*words[:-1], "zu"]))]
    files = [write(tmp_path / name, part) for name, part in (("train.jsonl", rows), ("eval.jsonl", held_out))]
    settings = [f"model.id={tmp_path / 'tokenizer'}", f"data.path={files[0]}", f"data.eval_path={files[1]}", "data.seq_len=512"]
    page = tmp_path / "r.html"
    assert main(["model=hf", "data=files", *settings, "--html", str(page), "--json", str(tmp_path / "r.json")]) == 0
    report, said = json.loads((tmp_path / "r.json").read_text())["prepared"], capsys.readouterr().out
    assert report["leakage"]["near"] == 1
    assert sum(report["token_bits"].values()) == 60
    assert words[4] in report["leaked"][0]["texts"][0]
    assert "! of 9 held-out documents 0 have the text of a trained one, 1 nearly" in said
    assert "Held out and trained" in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"), [(["nowhere.jsonl"], "no such file"), (["ROWS", "train.steps=1"], "data.path="), (["ROWS", "--rows", "0"], "--rows")]
)
def test_bad_input(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [chat(random.Random(3))])
    assert main([str(file) if word == "ROWS" else word for word in words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_opens_in_a_browser_without_a_network(tmp_path: Path, width: int) -> None:
    file = tmp_path / "page.html"
    assert main([str(faulty(tmp_path)), "--html", str(file)]) == 0
    text = file.read_text()
    assert POLICY in text
    assert not re.search(r'(?:src|href)="|url\(|@import|<script', text)
    probe = """<script>const inside = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, svg"));
    document.title = JSON.stringify({wide: inside.filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
      charts: document.querySelectorAll("figure svg").length, pairs: document.querySelectorAll(".pair").length});</script>"""
    file.write_text(text.replace(POLICY, "").replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900"]
    line = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{file}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=90, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert json.loads(title[1].replace("&quot;", '"')) == {"wide": 0, "charts": 4, "pairs": 3}
