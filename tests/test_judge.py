"""A judge's scores carry no position bias, and whatever an endpoint does, nothing is made up and what was answered is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import free_port
from synthetic import change, make_run

from tools.evaluate.judge import Question, Verdict, ask, read_scores, tally
from trainers.generate.endpoint import DOWN_AFTER, check
from trainers.rewards.judged import CRITERIA, Judge, known_scores, mean_scores

pytestmark = pytest.mark.timeout(30)
KEY = "sk-a-secret"
Rule = Callable[[str, str], str]


class Endpoint:
    """A server of chat completions on this machine. `reply` gets the handler and the number of the request, from 0."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[Any, int], None] = lambda handler, number: handler.judge(fair)
        self.over = threading.Event()
        self.hanging = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # header and body are two writes

            def do_GET(self) -> None:
                self.body = {}
                endpoint.reply(self, -1)

            def do_POST(self) -> None:
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append({"path": self.path, "key": self.headers["Authorization"]} | self.body)
                endpoint.reply(self, number)

            def judge(self, rule: Rule) -> None:
                prompt = self.body["messages"][0]["content"]
                first, second = (re.search(rf"<answer_{n}>\n(.*?)\n</answer_{n}>", prompt, re.DOTALL)[1] for n in (1, 2))
                self.say(rule(first, second))

            def say(self, content: str | None) -> None:
                self.give(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))

            def give(self, status: int, text: str = "{}", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def hang(self) -> None:
                endpoint.hanging += 1
                endpoint.over.wait(20)
                endpoint.hanging -= 1
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: Any) -> None:  # clients leave
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def judge(self, **more: Any) -> Judge:
        return Judge(**({"url": self.url, "model": "some/judge", "timeout_s": 5.0, "backoff_s": 0.001} | more))

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FULLTUNE_JUDGE_KEY", KEY)
    served = Endpoint()
    yield served
    served.close()


def both(first: int, second: int, **more: Any) -> str:
    return json.dumps({"1": dict.fromkeys(CRITERIA, first), "2": dict.fromkeys(CRITERIA, second) | more})


def fair(first: str, second: str) -> str:
    """One point, and one more for each `good` in the answer."""
    return both(*(min(1 + answer.count("good"), 5) for answer in (first, second)))


def first_is_best(first: str, second: str) -> str:
    return both(5, 2)


def questions(count: int, answer: str = "good good", other: str = "good") -> list[Question]:
    return [Question(document=10 + n, prompt=f"question {n}", reference="", answer=answer, other=other) for n in range(count)]


def ask_all(asked: list[Question], judge: Judge, known: tuple[Verdict, ...] = ()) -> tuple[list[Verdict], list[Verdict]]:
    took: list[Verdict] = []
    return ask(asked, judge, known, took.append), took


def failures(verdicts: list[Verdict]) -> dict[str, int]:
    assert all((verdict.scores is None) == (verdict.other is None) == bool(verdict.failure) for verdict in verdicts)
    return tally(verdicts)["failures"]


def test_a_fair_judge_says_which_is_better_and_by_how_much(endpoint: Endpoint) -> None:
    asked = [*questions(3), Question(document=2, prompt="", reference="r", answer="good", other="good " * 3)]
    asked.append(Question(document=5, prompt="p", reference="r", answer="same", other="same"))
    verdicts, took = ask_all(asked, endpoint.judge())
    result = tally(verdicts)
    assert sorted(took, key=str) == sorted(verdicts, key=str)
    assert [(v.document, v.swapped) for v in verdicts] == [(q.document, swapped) for q in asked for swapped in (False, True)]
    assert result["documents"] == [2, 5, 10, 11, 12]
    for name in (*CRITERIA, "overall"):
        assert result["run"][name] == [2, 1, 3, 3, 3]
        assert result["base"][name] == [4, 1, 2, 2, 2]
    assert (result["wins"], result["ties"], result["losses"], result["position_bias"]) == (3, 1, 1, 0)
    assert (result["rows"], result["scored"], result["one_order"], result["none"]) == (5, 5, 0, 0)
    assert (result["failures"], result["retries"]) == ({}, 0)


def test_overall_is_the_mean_of_the_five_criteria(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.say(both(4, 2, length=5, format=1))
    result = tally(ask_all(questions(1), endpoint.judge())[0])
    assert result["run"]["length"] == [4.5]
    assert result["base"]["format"] == [2.5]
    assert result["run"]["overall"] == result["base"]["overall"] == [(5 * 4 + 3 * 2 + 5 + 1) / 10]
    assert result["position_bias"] == pytest.approx(4 - 12 / 5)


def test_a_judge_that_likes_what_stands_first_likes_both_equally(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.judge(first_is_best)
    result = tally(ask_all(questions(6), endpoint.judge())[0])
    assert result["run"] == result["base"]
    assert (result["wins"], result["ties"], result["losses"]) == (0, 6, 0)
    assert result["position_bias"] == 3


def test_requests_name_the_model_ask_both_orders_and_carry_the_key(endpoint: Endpoint) -> None:
    odd = "{0} $first $$ {answer} ${second} \ud800 é"  # none of which may change the prompt around it
    verdicts, _ = ask_all([Question(document=1, prompt="what?", reference="that", answer=odd, other="the base's")], endpoint.judge())
    assert not failures(verdicts)
    orders = []
    for request in endpoint.requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["key"] == f"Bearer {KEY}"
        assert (request["model"], request["temperature"], request["seed"], request["max_tokens"]) == ("some/judge", 0, 0, 512)
        (message,) = request["messages"]
        assert message["role"] == "user"
        assert all(criterion in message["content"] for criterion in CRITERIA)
        assert message["content"].count(odd) == 1
        assert "<reference_answer>\nthat\n" in message["content"]
        orders.append(message["content"].index(odd) < message["content"].index("the base's"))
    assert sorted(orders) == [False, True]


@pytest.mark.parametrize(("judge_key", "openai_key", "sent"), [(None, "b", "Bearer b"), ("a", "b", "Bearer a"), ("", "b", None)])
def test_an_empty_key_of_ours_keeps_the_one_of_openai_at_home(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, judge_key: str | None, openai_key: str, sent: str | None
) -> None:
    monkeypatch.delenv("FULLTUNE_JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", openai_key)
    if judge_key is not None:
        monkeypatch.setenv("FULLTUNE_JUDGE_KEY", judge_key)
    ask_all(questions(1), endpoint.judge())
    assert {request["key"] for request in endpoint.requests} == {sent}


def test_scores_are_read_after_reasoning_and_from_a_fence() -> None:
    expected = (dict.fromkeys(CRITERIA, 4), dict.fromkeys(CRITERIA, 2))
    assert read_scores(both(4, 2)) == expected
    assert read_scores(f"```json\n{both(4, 2)}\n```") == expected
    assert read_scores(f'<think>{{"1": maybe}} or {both(1, 1)}? {{ no</think> So: {both(4, 2)} {{"that": "is all"}} }}') == expected
    assert read_scores(both(4, 2, comment="{")) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Answer 1 is better.",
        "{" * 3000,
        '{"1":' * 3000,
        both(4, 2)[:-1],
        both(0, 2),
        both(4, 6),
        both(4, 2, format=3.0),
        both(4, 2, format="3"),
        both(4, 2, format=True),
        both(4, 2, format=None),
        both(4, 2).replace("length", "size", 1),
        json.dumps({"1": dict.fromkeys(CRITERIA, 3)}),
        json.dumps({"1": 4, "2": 5}),
        f"[{json.dumps(dict.fromkeys(CRITERIA, 3))}]",
    ],
)
def test_all_else_is_garbage(reply: str) -> None:
    assert read_scores(reply) is None


@pytest.mark.parametrize("text", ["<html>", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}', "[" * 10**5, "3"])
def test_garbage_is_asked_again_and_never_becomes_a_score(endpoint: Endpoint, text: str) -> None:
    endpoint.reply = lambda handler, number: handler.give(200, text)
    verdicts, _ = ask_all(questions(6), endpoint.judge())
    assert failures(verdicts) == {"garbage": 12}  # all were asked: whoever says garbage is there
    assert len(endpoint.requests) == 36
    result = tally(verdicts)
    assert (result["documents"], result["scored"], result["none"], result["retries"]) == ([], 0, 6, 24)
    assert result["position_bias"] is None


def test_a_row_with_one_order_is_counted_and_not_scored(endpoint: Endpoint) -> None:
    def only_if_first_is_short(first: str, second: str) -> str:
        return fair(first, second) if len(first) < len(second) else "I would rather not say."

    endpoint.reply = lambda handler, number: handler.judge(only_if_first_is_short)
    asked = [*questions(4), Question(document=1, prompt="", reference="", answer="same", other="same")]
    result = tally(ask_all(asked, endpoint.judge(attempts=1))[0])
    assert (result["rows"], result["scored"], result["one_order"], result["none"]) == (5, 0, 4, 1)
    assert result["run"]["overall"] == result["base"]["overall"] == []
    assert result["failures"] == {"garbage": 6}


def test_half_garbage_costs_retries_alone(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.say("hm") if number % 2 else handler.judge(fair)
    result = tally(ask_all(questions(8), endpoint.judge(at_once=1, attempts=2))[0])
    assert (result["scored"], result["failures"], result["retries"]) == (8, {}, 15)


def test_errors_of_the_server_pass(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.give(500) if number < 3 else handler.judge(fair)
    verdicts, _ = ask_all(questions(2), endpoint.judge(at_once=4, attempts=4))
    result = tally(verdicts)
    assert (result["scored"], result["failures"], result["retries"]) == (2, {}, 3)
    assert sum(verdict.attempts for verdict in verdicts) == len(endpoint.requests) == 7


@pytest.mark.parametrize(("status", "wait"), [(429, "0.4"), (503, "0.4"), (429, "a date"), (429, "soon")])
def test_a_server_is_given_the_time_it_asks_for(endpoint: Endpoint, status: int, wait: str) -> None:
    at: list[float] = []

    def reply(handler: Any, number: int) -> None:
        at.append(time.monotonic())
        after = formatdate(time.time() + 2, usegmt=True) if wait == "a date" else wait
        if number == 0:
            handler.give(status, Retry_After=after)
        else:
            handler.judge(fair)

    endpoint.reply = reply
    result = tally(ask_all(questions(1), endpoint.judge(at_once=1))[0])
    assert (result["scored"], result["retries"]) == (1, 1)
    assert at[1] - at[0] >= {"soon": 0.0, "0.4": 0.39, "a date": 0.9}[wait]


def test_a_server_that_asks_for_an_hour_is_not_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.give(429, Retry_After="3600")
    assert failures(ask_all(questions(1), endpoint.judge())[0]) == {"HTTP 429": 2}
    assert len(endpoint.requests) == 2


def test_a_crowded_server_is_not_taken_for_a_dead_one(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.give(429) if number < 2 * DOWN_AFTER else handler.judge(fair)
    result = tally(ask_all(questions(10), endpoint.judge(at_once=20, attempts=9))[0])
    assert (result["scored"], result["failures"], result["retries"]) == (10, {}, 20)


def test_a_quota_that_is_used_up_ends_it(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.give(429)
    counts = failures(ask_all(questions(50), endpoint.judge(at_once=4))[0])
    assert counts["HTTP 429"] + counts["not asked"] == 100
    assert len(endpoint.requests) < 3 * (DOWN_AFTER + 4)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_would_be_refused_again_is_not_asked_again(endpoint: Endpoint, status: int) -> None:
    endpoint.reply = lambda handler, number: handler.give(status)
    verdicts, _ = ask_all(questions(3), endpoint.judge())
    assert failures(verdicts) == {f"HTTP {status}": 6}
    assert all(verdict.attempts == 1 for verdict in verdicts)


def test_an_endpoint_that_refuses_all_is_left_alone(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.give(401)
    verdicts, took = ask_all(questions(50), endpoint.judge(at_once=4))
    asked = len(endpoint.requests)
    assert DOWN_AFTER <= asked < DOWN_AFTER + 4
    assert failures(verdicts) == {"HTTP 401": asked, "not asked": 100 - asked}
    assert len(took) == asked
    assert tally(verdicts)["none"] == 50


def test_a_slow_endpoint_is_not_waited_for_row_by_row(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.hang()
    counts = failures(ask_all(questions(100), endpoint.judge(timeout_s=0.2))[0])
    assert set(counts) == {"timeout", "not asked"}
    assert counts["not asked"] >= 180


def test_an_answer_that_trickles_is_late_all_the_same(endpoint: Endpoint) -> None:
    def trickle(handler: Any, number: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "10000")
        handler.end_headers()
        while not endpoint.over.wait(0.05):
            handler.wfile.write(b" ")

    endpoint.reply = trickle
    assert failures(ask_all(questions(1), endpoint.judge(timeout_s=0.3, attempts=1))[0]) == {"timeout": 2}


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    judge = Judge(url=f"http://127.0.0.1:{free_port()}/v1", model="m", backoff_s=0.001)
    verdicts, took = ask_all(questions(100), judge)
    counts = failures(verdicts)
    assert set(counts) == {"unreachable", "not asked"}
    assert counts["unreachable"] == len(took) <= DOWN_AFTER
    assert "unreachable" in check(judge)


def test_a_connection_that_breaks_is_made_anew(endpoint: Endpoint) -> None:
    def reply(handler: Any, number: int) -> None:
        if number % 2:
            handler.judge(fair)
        else:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True

    endpoint.reply = reply
    result = tally(ask_all(questions(3), endpoint.judge(at_once=1))[0])
    assert (result["scored"], result["retries"]) == (3, 6)
    endpoint.requests.clear()
    assert failures(ask_all(questions(1), endpoint.judge(at_once=1, attempts=1))[0]) == {"unreachable": 1}


def test_what_is_known_is_not_asked_and_what_failed_is(endpoint: Endpoint) -> None:
    asked = questions(4)
    before, _ = ask_all(asked, endpoint.judge())
    lines = [json.dumps(verdict.as_row()) for verdict in before]
    assert [Verdict.from_row(json.loads(line)) for line in lines] == before
    endpoint.requests.clear()
    failed = Verdict(document=asked[2].document, swapped=True, failure="timeout", attempts=3)
    verdicts, took = ask_all(asked, endpoint.judge(), (*before[:5], failed, *before[6:]))
    assert verdicts == before
    assert took == [before[5]]
    assert len(endpoint.requests) == 1
    assert tally([before[5], failed, *before])["scored"] == 4  # a file may hold the failure behind or before
    assert ask_all(asked, endpoint.judge(), tuple(before)) == (before, [])


def test_ctrl_c_ends_at_once_and_keeps_what_was_answered(endpoint: Endpoint) -> None:
    def reply(handler: Any, number: int) -> None:
        if number < 6:
            handler.judge(fair)
        else:
            handler.hang()

    endpoint.reply = reply
    took: list[tuple[Verdict, int]] = []

    def press() -> None:
        while len(took) < 6 or len(endpoint.requests) < 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        ask(questions(40), endpoint.judge(at_once=4, timeout_s=20), [], lambda verdict: took.append((verdict, threading.get_ident())))
    assert endpoint.hanging > 0, "nobody has waited for those"
    assert len(took) == 6
    assert all(verdict.scores and thread == threading.get_ident() for verdict, thread in took)
    result = tally(verdict for verdict, _ in took)
    assert result["scored"] + result["one_order"] == result["rows"]


def test_an_error_of_the_callback_ends_it(endpoint: Endpoint) -> None:
    endpoint.reply = lambda handler, number: handler.hang() if number else handler.judge(fair)
    said: list[Verdict] = []

    def full(verdict: Verdict) -> None:
        said.append(verdict)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        ask(questions(40), endpoint.judge(), [], full)
    assert len(said) == 1


def test_check_says_early_what_is_wrong(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for status in (200, 404, 401, 502):
        endpoint.reply = lambda handler, number, status=status: handler.give(status)
        said[status] = check(endpoint.judge())
    assert said[200] == said[404] == ""
    assert "401" in said[401]
    assert "FULLTUNE_JUDGE_KEY" in said[401]
    assert "502" in said[502]
    endpoint.reply = lambda handler, number: handler.hang()
    assert "does not answer within 0.2 s" in check(endpoint.judge(timeout_s=0.2))
    assert "cannot be asked" in check(Judge(url="host:8000/v1", model="m"))
    assert "cannot be asked" in check(Judge(url="http://host:port/v1", model="m"))
    monkeypatch.setenv("FULLTUNE_JUDGE_KEY", f"{KEY}\nmore")
    assert "key" in check(endpoint.judge())
    assert not any(KEY in text for text in (*said.values(), check(endpoint.judge()), repr(endpoint.judge())))


@pytest.mark.for_real
def test_the_judge_needs_no_torch() -> None:
    line = "import sys, tools.evaluate.judge; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", line], check=True, timeout=20, cwd=Path(__file__).parents[1])


def judged(run: Path, judge: Judge) -> bool:
    from tools.evaluate.record import load
    from tools.evaluate.verdicts import collect_verdicts

    ours, theirs = (load(run / "evaluation", name) for name in ("run", "base"))
    assert ours is not None
    assert theirs is not None
    return collect_verdicts(run / "evaluation", ours, theirs, judge)


def test_a_judge_is_shown_no_reasoning() -> None:
    from tools.evaluate.verdicts import _questions

    row = {"document": 3, "prompt": "<think> is a tag. 2+2?", "reference": "<think>easy</think>4"}
    ours, theirs = (SimpleNamespace(answers=[row | {"answer": said}]) for said in ("<think>4?</think>5", "<think>4, so"))
    (question,) = _questions(ours, theirs)  # type: ignore[arg-type]
    assert (question.prompt, question.reference, question.answer, question.other) == (row["prompt"], "4", "5", "")


def note_of(run: Path) -> str:
    from tools.compare.methods import compare

    return "; ".join(compare([run], None).runs[0].notes)


def by_marks(first: str, second: str) -> str:
    """Five points for an answer that is a number, one for -1."""
    return both(*(1 if "-1" in answer else 5 for answer in (first, second)))


def test_the_report_says_what_the_judge_was_worth(endpoint: Endpoint, tmp_path: Path) -> None:
    """Half of the replies are garbage, then the endpoint is down, then it is whole: nothing is lost, and nothing asked twice."""
    run = make_run(tmp_path / "run", better=0.3)
    garbage = (lambda handler: handler.say("I like both."), lambda handler: handler.judge(by_marks))
    endpoint.reply = lambda handler, number: handler.give(404) if number < 0 else garbage[number % 2](handler)
    assert not judged(run, endpoint.judge(attempts=1, at_once=1))  # of each row the first order is garbage
    words = note_of(run)
    assert "judged 0 of 80 answers in both orders; 80 in one order only, which does not count" in words
    assert "80 x garbage" in words
    kept = (run / "evaluation" / "judge.jsonl").read_text()
    assert not judged(run, endpoint.judge(url=f"http://127.0.0.1:{free_port()}/v1"))
    assert "it cannot be asked" in note_of(run)
    assert (run / "evaluation" / "judge.jsonl").read_text() == kept
    endpoint.requests.clear()
    endpoint.reply = lambda handler, number: handler.give(404) if number < 0 else handler.judge(by_marks)
    assert judged(run, endpoint.judge())
    assert len(endpoint.requests) == 80
    assert "some/judge judged 80 of 80 answers in both orders" in note_of(run)
    from tools.compare.methods import compare

    figures = compare([run], None).methods[0].figures
    assert figures.verdict("judged_to_base") == "better"
    assert figures.judged_to_base is not None
    assert figures.score_to_base is not None
    assert figures.judged_to_base.value == pytest.approx(4 * figures.score_to_base.value)  # what the rule makes of right and wrong
    others = [make_run(tmp_path / name, "lora", better=0.3) for name in ("a", "b")]
    for other in others:
        assert judged(other, endpoint.judge(model="another/judge"))
    runs = {found.name: found for found in compare([run, *others], None).runs}
    assert runs["run"].judged is None
    assert "another judge, or other answers" in "; ".join(runs["run"].notes)
    assert runs["a"].judged is not None
    change(run / "evaluation" / "judge.json", answers="of others")
    assert compare([run], None).methods[0].figures.judged is None


def test_one_text_without_a_reply_has_no_score_and_a_judge_that_is_down_ends_all(endpoint: Endpoint, tmp_path: Path) -> None:
    """Of a run that learns from its own answers. Who chooses rows asks again instead."""

    def reply(handler: Any, number: int) -> None:
        if "a bad one" in handler.body["messages"][0]["content"]:
            handler.give(500)
        else:
            handler.say(json.dumps(dict.fromkeys(CRITERIA, 4)))

    endpoint.reply = reply
    texts = [("why?", text) for text in ("one", "a bad one", "other")]
    scores, reasons = known_scores(texts, endpoint.judge(), tmp_path / "a.jsonl")
    assert np.isnan(scores).tolist() == [False, True, False]
    assert scores[0] == scores[2] == 4
    assert reasons == ["", "the judge gave no score: HTTP 500", ""]
    with pytest.raises(OSError, match="gave no score for 1 rows: HTTP 500; the same command asks for them again"):
        mean_scores(texts, endpoint.judge(), tmp_path / "a.jsonl")
    endpoint.reply = lambda handler, number: handler.give(500)
    for count in (2, 3 * DOWN_AFTER):
        with pytest.raises(OSError, match=rf"is down: {count} of {count} texts got no reply \(HTTP 500\); after {DOWN_AFTER} requests"):
            known_scores([("why?", str(at)) for at in range(count)], endpoint.judge(), tmp_path / f"{count}.jsonl")


def test_a_stop_ends_a_judges_scoring_at_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda handler, number: handler.hang()

    def look() -> None:
        if endpoint.hanging:
            raise InterruptedError

    began = time.monotonic()
    with pytest.raises(InterruptedError):
        known_scores([("why?", "one")], endpoint.judge(timeout_s=20.0), tmp_path / "a.jsonl", look)
    assert time.monotonic() - began < 10
