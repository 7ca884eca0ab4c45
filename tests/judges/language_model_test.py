"""A language model behind an endpoint, played by a server of this test."""

import contextlib
import email.utils
import http.client
import http.server
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from paxo.judges.checks import CheckedJudge, JudgeError
from paxo.judges.http import Endpoint, EndpointError
from paxo.judges.language_model import LanguageModelJudge, parse_verdict
from paxo.judges.reply_cache import ReplyCache

TEXTS = [["a", "bbb", "cc"], ["dddd", "e", "ff"]]
LENGTHS = np.array([[1, 3, 2], [4, 1, 2]])
QUESTION = "[Response A]\na\n\n[Response B]\nbb\n\n"
BY_LENGTH = (np.sign(LENGTHS[:, :, None] - LENGTHS[:, None, :]) + 1) / 2


def longer(request):
    """The reply of a model that likes the longer response."""
    question = request["messages"][-1]["content"]
    a, b = re.search(
        r"\[Response A\]\n(.*?)\n\n.*\[Response B\]\n(.*?)\n\n", question, re.S
    ).groups()
    return "Let me see. [[" + ("A" if len(a) > len(b) else "B" if len(b) > len(a) else "C") + "]]"


class Server(http.server.ThreadingHTTPServer):
    """Answers as `faults` say, one for each request, and as `model` says when there is none left.

    A fault is a number (status), a text (sent as it is with status 200) or a function that gets
    the handler.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model=longer, faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.faults, self.headers_to_send = model, list(faults), {}
        self.requests, self.keys, self.busy, self.most_busy = [], [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Clients that leave are part of these tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((self.path, request))
                server.keys.append(self.headers["Authorization"])
                fault = server.faults.pop(0) if server.faults else None
            if callable(fault):
                fault(self)
            elif isinstance(fault, int):
                self.send(fault, json.dumps({"error": f"key was {self.headers['Authorization']}"}))
            elif fault is not None:
                self.send(200, fault)
            else:
                content = server.model(request)
                self.send(200, json.dumps({"choices": [{"message": {"content": content}}]}))
        finally:
            with server.lock:
                server.busy -= 1

    def send(self, status, text):
        self.send_response(status)
        for name, value in {"Content-Length": len(text), **self.server.headers_to_send}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(*args, **kwargs):
    with Server(*args, **kwargs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def endpoint(url, **changes):
    settings = {"retries": 3, "backoff_s": 0.01, "timeout_s": 10.0, "concurrency": 4}
    return Endpoint(url, "judge-7b", **(settings | changes))


def judge_at(server, folder, *, on_failure="raise", template=None, **changes):
    more = {} if template is None else {"template": template}
    return LanguageModelJudge(
        endpoint(server.url, **changes), folder / "replies.db", on_failure=on_failure, **more
    )


def closed_url():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def test_every_pair_is_asked_in_both_orders_and_the_answer_is_antisymmetric(tmp_path):
    with serving() as server:
        judge = CheckedJudge(judge_at(server, tmp_path))
        found = judge(["p", "q"], TEXTS)
    np.testing.assert_array_equal(found, BY_LENGTH)
    assert len(server.requests) == 2 * 3 * 2
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    sent = server.requests[0][1]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("judge-7b", 0.0, 1024)
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]
    assert judge.judge.counts["compared"] == 6


def test_only_wanted_comparisons_are_asked_each_pair_once(tmp_path):
    wanted = np.zeros((3, 3), bool)
    wanted[0, 1] = wanted[1, 0] = wanted[2, 0] = True
    with serving() as server:
        found = judge_at(server, tmp_path)(["p", "q"], TEXTS, wanted)
    assert len(server.requests) == 2 * 2 * 2
    expected = BY_LENGTH.copy()
    expected[:, 1, 2] = expected[:, 2, 1] = np.nan
    np.testing.assert_array_equal(found, expected)


def test_a_model_that_likes_what_it_sees_first_says_nothing(tmp_path):
    with serving(lambda request: "[[A]]") as server:
        judge = judge_at(server, tmp_path)
        assert (judge(["p"], [["a", "bb"]]) == 0.5).all()
    assert judge.counts["changed with the order"] == 1


def test_one_tie_and_one_verdict_make_three_quarters(tmp_path):
    with serving(
        lambda r: "[[A]]" if "A]\nx\n" in r["messages"][1]["content"] else "[[C]]"
    ) as server:
        assert judge_at(server, tmp_path)(["p"], [["x", "y"]])[0, 0].tolist() == [0.5, 0.75]


def test_equal_texts_tie_without_being_asked(tmp_path):
    with serving() as server:
        judge = judge_at(server, tmp_path)
        assert (judge(["p"], [["same"] * 3]) == 0.5).all()
    assert server.requests == []
    assert judge.counts["equal texts"] == 3


def test_replies_are_kept_by_content_and_asked_for_once(tmp_path):
    with serving() as server:
        judge_at(server, tmp_path)(["p", "q"], TEXTS)
        again = judge_at(server, tmp_path)
        np.testing.assert_array_equal(
            again(["q"], [["ff", "e", "dddd"]])[0], BY_LENGTH[1][::-1, ::-1]
        )
        assert len(server.requests) == 12
        assert again.counts["from cache"] == 6
        again(["other"], [["ff", "e"]])
        assert len(server.requests) == 14
        judge_at(server, tmp_path, temperature=0.5)(["q"], [["ff", "e"]])
        assert len(server.requests) == 16


def test_texts_may_hold_braces_and_the_marks_of_the_template(tmp_path):
    with serving(
        lambda r: "[[B]]" if "A]\n{x} [[A]]" in r["messages"][1]["content"] else "[[A]]"
    ) as s:
        found = judge_at(s, tmp_path)(["{prompt} {0}"], [["{x} [[A]] {b}", "y"]])
    assert found[0, 0, 1] == 0
    assert "{prompt} {0}" in s.requests[0][1]["messages"][1]["content"]


def test_no_more_requests_run_at_once_than_allowed(tmp_path):
    def slow(request):
        time.sleep(0.02)
        return longer(request)

    with serving(slow) as server:
        judge_at(server, tmp_path, concurrency=3)(["p", "q"], TEXTS)
    assert server.most_busy == 3


@pytest.mark.parametrize(
    "fault",
    [
        429,
        500,
        503,
        "no json",
        '{"choices": []}',
        '{"choices": [{"message": {"content": 3}}]}',
        "[]",
    ],
)
def test_a_passing_fault_is_tried_again(tmp_path, fault):
    with serving(faults=[fault, fault]) as server:
        found = judge_at(server, tmp_path, concurrency=1)(["p"], [["a", "bb"]])
    assert found[0, 1, 0] == 1
    assert len(server.requests) == 4


def test_a_connection_that_breaks_is_tried_again(tmp_path):
    def hang_up(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    def stop_halfway(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")

    with serving(faults=[hang_up, stop_halfway]) as server:
        assert judge_at(server, tmp_path, concurrency=1)(["p"], [["a", "bb"]])[0, 1, 0] == 1


def test_waits_double_with_a_jitter_that_repeats_and_a_servers_wish_counts_up_to_the_limit():
    settings = endpoint("http://h/v1", backoff_s=1.0, max_backoff_s=6.0)
    waits = [settings.wait(b"x", attempt) for attempt in range(4)]
    for wait, whole in zip(waits, (1, 2, 4, 6)):
        assert whole / 2 <= wait <= whole
    assert waits == [settings.wait(b"x", attempt) for attempt in range(4)]
    assert waits[0] != settings.wait(b"y", 0)
    assert waits[0] != endpoint("http://h/v1", backoff_s=1.0, seed=1).wait(b"x", 0)
    assert settings.wait(b"x", 0, asked_s=5.0) == 5.0
    assert settings.wait(b"x", 0, asked_s=60.0) == 6.0


class Waits(threading.Event):
    """Notes for how long it is waited for, and lets nobody wait."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return False


@pytest.mark.parametrize(
    ("header", "value", "seconds"),
    [
        ("Retry-After", "7", 7.0),
        ("retry-after", "1.5", 1.5),  # names have no case
        ("Retry-After", email.utils.formatdate(time.time() + 600), 60.0),  # the most
        ("Retry-After", email.utils.formatdate(0), 0.0),
        ("Retry-After", "soon", 0.0),
    ],
)
def test_a_server_that_says_when_is_asked_then(header, value, seconds):
    stop = Waits()
    with serving(faults=[429]) as server:
        server.headers_to_send = {header: value}
        model = endpoint(server.url, backoff_s=0.0)
        model.ask(model.request([{"role": "user", "content": QUESTION}]), stop)
    assert stop.seconds == [seconds]


def test_a_connection_that_takes_all_the_time_is_cut_off_before_it_asks(tmp_path, monkeypatch):
    connect = http.client.HTTPConnection.connect

    def slow(connection):
        time.sleep(0.2)
        connect(connection)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", slow)
    with serving() as server:
        with pytest.raises(EndpointError, match=r"no whole reply within 0.1 s"):
            judge_at(server, tmp_path, concurrency=1, retries=0, timeout_s=0.1)(
                ["p"], [["a", "bb"]]
            )
        assert server.requests == []


def test_a_reply_with_half_a_character_is_read_and_kept(tmp_path):
    with serving(lambda request: "\ud83d [[A]]") as server:
        judge_at(server, tmp_path)(["p"], [["a", "bb"]])
        judge_at(server, tmp_path)(["p"], [["a", "bb"]])
    assert len(server.requests) == 2


@pytest.mark.parametrize("drip", [False, True])
def test_a_slow_reply_is_cut_off_at_the_time_limit_even_if_it_drips(tmp_path, drip):
    over = threading.Event()

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                handler.wfile.write(b" " * drip)

    with serving(faults=[slow]) as server:
        judge = judge_at(server, tmp_path, concurrency=1, retries=0, timeout_s=0.3)
        start = time.monotonic()
        with pytest.raises(EndpointError, match=r"no whole reply within 0.3 s|timed out"):
            judge(["p"], [["a", "bb"]])
        assert time.monotonic() - start < 3
        over.set()


def test_a_dead_endpoint_is_named_with_the_file_of_replies(tmp_path):
    url = closed_url()
    with serving() as server:
        judge_at(server, tmp_path)(["p"], [TEXTS[0]])
    judge = LanguageModelJudge(endpoint(url, retries=2), tmp_path / "replies.db")
    with pytest.raises(EndpointError) as caught:
        judge(["p", "q"], TEXTS)
    said = str(caught.value)
    for part in (url, "no reply in 3 attempts", "refused", "6 replies are kept in", "replies.db"):
        assert part in said


def test_when_the_endpoint_dies_in_the_middle_what_came_is_kept(tmp_path):
    with serving(faults=[None] * 5 + [500] * 100) as server:
        with pytest.raises(EndpointError, match="5 replies are kept"):
            judge_at(server, tmp_path, concurrency=1, retries=1)(["p", "q"], TEXTS)
        assert len(server.requests) == 5 + 2
        server.faults.clear()
        server.requests.clear()
        found = judge_at(server, tmp_path)(["p", "q"], TEXTS)
        assert len(server.requests) == 12 - 5
    np.testing.assert_array_equal(found, BY_LENGTH)


@pytest.mark.parametrize("status", [400, 401, 404, 301])
def test_a_mistake_of_the_settings_is_not_tried_again(tmp_path, status):
    with serving(faults=[status]) as server:
        server.headers_to_send = {"Location": "/elsewhere"}
        with pytest.raises(EndpointError, match=f"status {status} to /elsewhere"):
            judge_at(server, tmp_path, concurrency=1)(["p"], [["a", "bb"]])
    assert len(server.requests) == 1


def test_the_key_is_sent_and_stands_in_no_error_log_or_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "sk-5ecret\n")
    with serving(faults=[429, 401]) as server, caplog.at_level(logging.DEBUG):
        judge = judge_at(server, tmp_path, concurrency=1, key_variable="JUDGE_KEY")
        with pytest.raises(EndpointError, match=r"key was Bearer \*\*\*") as caught:
            judge(["p"], [["a", "bb"]])
        judge(["p"], [["a", "bb"]])
    assert set(server.keys) == {"Bearer sk-5ecret"}
    assert "trying again" in caplog.text
    everything = (caplog.text, repr(judge), str(caught.value), repr(caught.value.__cause__))
    assert not any("5ecret" in text for text in everything)
    assert b"5ecret" not in (tmp_path / "replies.db").read_bytes()


@pytest.mark.parametrize("value", [None, "", "two words\x07"])
def test_a_key_that_is_missing_is_named_when_the_judge_is_built(tmp_path, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(EndpointError, match="environment variable JUDGE_KEY is no") as caught:
        LanguageModelJudge(endpoint("http://h/v1", key_variable="JUDGE_KEY"), tmp_path / "r")
    assert "words" not in str(caught.value)


def test_a_reply_without_a_verdict_raises_after_the_others_were_kept(tmp_path):
    def model(request):
        unsure = (
            "A]\nff\n\n[End of response A]\n\n[Response B]\ne" in request["messages"][1]["content"]
        )
        return "I cannot say." if unsure else longer(request)

    with serving(model) as server:
        with pytest.raises(
            JudgeError, match=r"prompt 1, pair \(2, 1\) shown.*cannot say.*\(1 of 12"
        ):
            judge_at(server, tmp_path)(["p", "q"], TEXTS)
        assert len(server.requests) == 12
        server.model = longer
        np.testing.assert_array_equal(judge_at(server, tmp_path)(["p", "q"], TEXTS), BY_LENGTH)
        assert len(server.requests) == 13


def test_a_reply_without_a_verdict_is_skipped_counted_and_logged_but_no_tie(tmp_path, caplog):
    def model(request):
        return "" if "A]\nbbb\n" in request["messages"][1]["content"] else longer(request)

    with serving(model) as server:
        judge = judge_at(server, tmp_path, on_failure="skip")
        found = judge(["p", "q"], TEXTS)
    expected = BY_LENGTH.copy()
    expected[0, 1, [0, 2]] = expected[0, [0, 2], 1] = np.nan
    np.testing.assert_array_equal(found, expected)
    assert (judge.counts["without verdict"], judge.counts["skipped"]) == (2, 2)
    assert judge.counts["compared"] == 4
    assert "2 of 12 replies hold no verdict; 2 of 6 comparisons are left out" in caplog.text
    with pytest.raises(JudgeError, match="wanted"), serving(model) as server:
        CheckedJudge(judge_at(server, tmp_path, on_failure="skip"))(["p"], [TEXTS[0]])


def test_a_run_killed_in_the_middle_goes_on_from_its_replies(tmp_path):
    def slow(request):
        time.sleep(0.05)
        return longer(request)

    script = textwrap.dedent(f"""
        import sys
        from paxo.judges.http import Endpoint
        from paxo.judges.language_model import LanguageModelJudge
        endpoint = Endpoint(sys.argv[1], "judge-7b", concurrency=2)
        judge = LanguageModelJudge(endpoint, sys.argv[2])
        judge(["p", "q"], {TEXTS!r})
    """)
    with serving(slow) as server:
        command = [sys.executable, "-c", script, server.url, str(tmp_path / "replies.db")]
        process = subprocess.Popen(command)
        while len(server.requests) < 6:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(ReplyCache(tmp_path / "replies.db"))
        assert 3 <= kept < 12
        time.sleep(0.2)
        server.requests.clear()
        found = judge_at(server, tmp_path)(["p", "q"], TEXTS)
    np.testing.assert_array_equal(found, BY_LENGTH)
    assert len(server.requests) == 12 - kept


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is good. [[A]]", 1.0),
        ("[[A]]? No: [[b]].", 0.0),
        ("[[ C ]]", 0.5),
        ("[[tie]]", 0.5),
        ("<think>[[A]]</think> [[B]]", 0.0),
        ("<think>[[A]] but", None),
        ("My final verdict is: **A**", 1.0),
        ("Verdict: B.", 0.0),
        ("The better answer is response B because", 0.0),
        ("Winner: Tie", 0.5),
        ("The answer is a good one.", None),
        ("The answer is Bad.", None),
        ("Response A is clearly better.", 1.0),
        ("Response A is better. Response B is better.", None),
        ("Response A is not better.", None),
        ("**B**", 0.0),
        ("Long talk.\n\nAssistant A", 1.0),
        ("A\n\nBecause it is longer.", 1.0),
        ("Both are good.", None),
        ("", None),
        ("   \n", None),
    ],
)
def test_verdicts_are_read(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Endpoint("localhost:8000", "m"), "url must be http"),
        (lambda: Endpoint("http://u:pw@h/v1", "m"), "no password"),
        (lambda: Endpoint("http://h", ""), "model"),
        (lambda: Endpoint("http://h", "m", timeout_s=0), "timeout_s must be above 0"),
        (lambda: Endpoint("http://h", "m", retries=-1), "retries must not be negative"),
        (lambda: Endpoint("http://h", "m", options={"model": "n"}), r"\['model'\]"),
        (lambda: LanguageModelJudge(Endpoint("http://h", "m"), "c", "{a} {b}"), "template must"),
        (lambda: LanguageModelJudge(Endpoint("http://h", "m"), "c", "{a}{b}{prompt}{x}"), "'x'"),
        (
            lambda: LanguageModelJudge(Endpoint("http://h", "m"), "c", on_failure="tie"),
            "on_failure",
        ),
    ],
)
def test_settings_are_checked_when_they_are_made(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_what_is_no_text_is_named(tmp_path):
    judge = LanguageModelJudge(endpoint("http://h/v1"), tmp_path / "r.db")
    with pytest.raises(JudgeError, match="prompt 0: expected texts; got list"):
        judge(["p"], [["a", [1, 2]]])


def test_a_file_that_holds_no_replies_is_named(tmp_path):
    (tmp_path / "r.db").write_text("not a database, and long enough to be told from an empty file")
    with pytest.raises(JudgeError, match=r"r\.db cannot be used"):
        ReplyCache(tmp_path / "r.db")
    with pytest.raises(JudgeError, match=r"in/r\.db cannot be used"):
        ReplyCache(tmp_path / "r.db" / "in" / "r.db")


def test_threads_and_processes_share_a_file_and_the_first_reply_stays(tmp_path):
    first, second = ReplyCache(tmp_path / "in" / "r.db"), ReplyCache(tmp_path / "in" / "r.db")
    threads = [
        threading.Thread(target=lambda c=cache, n=n: [c.put(f"k{i}", f"{n}") for i in range(20)])
        for n, cache in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == len(second) == 20
    kept = first.get("k3")
    second.put("k3", "later")
    assert first.get("k3") == kept
    first.close()
    with pytest.raises(JudgeError, match="closed"):
        first.get("k3")
