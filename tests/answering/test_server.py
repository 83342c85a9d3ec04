"""The server's own API: events, errors, leaving clients, limits. The engine answers at once."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time

import pytest
from served import FOLLOW_UPS, FRAGMENTS, FakeEngine, parse_events, serving

from conversation.answering import http_requests, listening
from conversation.answering.decoding import CONSTRAINED
from conversation.format.calls import TIMESTAMP, Utterance
from conversation.format.control_tokens import CONTROL_TOKENS, Control

QUESTION = {"question": "What's a monad?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def slow(tmp_path):
    """A server whose engine waits for `hold.set()`."""
    with serving(tmp_path) as found:
        found.engine.hold.clear()
        yield found


def wait_until(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def open_stream(server, path="/api/answer", value=QUESTION):
    """A request that is sent, and its connection; nothing is read yet."""
    body = json.dumps(value).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_an_answer_comes_as_events_a_fragment_or_choice_each(server):
    events = server.call.events(QUESTION)
    assert [text["text"] for name, text in events if name == "fragment"] == list(FRAGMENTS)
    choices = [data for name, data in events if name == "choice"]
    assert choices == [{"text": c.text, "confidence": c.probability, "target": c.target} for c in FOLLOW_UPS]
    assert [name for name, _ in events][-1] == "done" and events[-1][1]["seconds"] >= 0


def test_a_part_is_sent_as_soon_as_it_is_whole(slow):
    slow.engine.held_from = 1
    with open_stream(slow) as connection:
        received = b""
        while b"event: fragment" not in received:  # the others are not there yet, so it did not wait for them
            received += connection.recv(4096)
        assert b"event: choice" not in received


def test_the_prompt_has_the_history_and_the_date_of_the_training_data(server):
    history = [{"speaker": "User", "text": "What's\r\na monad? "}, {"speaker": "AI", "text": "A pattern."}]
    server.call.events({"question": " Why\nso? ", "history": history, "prefetch": False})
    prompt = server.engine.asked[-1]
    assert prompt.question == "Why so?"
    assert prompt.history == (Utterance("User", "What's a monad?"), Utterance("AI", "A pattern."))
    assert prompt.timestamp == TIMESTAMP


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_tokens_in_a_question_stay_text(server, token):
    history = [{"speaker": "AI", "text": f"so {token} it"}]
    server.call.events({"question": f"What is {token}?", "history": history})
    pieces = server.engine.asked[-1].pieces()
    literal = "".join(piece for piece in pieces if not isinstance(piece, Control))
    assert f"What is {token}?" in literal and f"so {token} it" in literal


def test_a_seed_draws_another_answer_within_the_grammar(server):
    server.call.events({**QUESTION, "seed": 7})
    assert (server.engine.decodings[-1].method, server.engine.decodings[-1].seed) == ("drawn", 7)
    server.call.events(QUESTION)
    assert server.engine.decodings[-1] == CONSTRAINED


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "question is missing"),
        ({"question": 7}, "question is not a text"),
        ({"question": " \n "}, "the question is empty"),
        ({"question": "a\0b"}, "control character U+0000"),
        ({"question": "a", "history": {}}, "history is not a list"),
        ({"question": "a", "history": ["b"]}, r"history[0] is no object"),
        ({"question": "a", "history": [{"speaker": "Bot", "text": "b"}]}, r"history[0] is no object"),
        ({"question": "a", "history": [{"speaker": "AI"}]}, "text is missing"),
        ({"question": "a", "history": [{"speaker": "AI", "text": "x"}] * 2001}, "2001 lines"),
        ({"question": "a", "prefetch": 1}, "prefetch is not true or false"),
        ({"question": "a", "seed": -1}, "seed must be at least 0"),
        ({"question": "a", "seed": True}, "seed is not a whole number"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_with_its_reason(server, body, words):
    status, _, answer = server.call("POST", "/api/answer", body)
    assert status == 400 and words in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b'"a"', 400), (b"\xff", 400), (b'{"a":1,"a":2}', 400), (b"[" * 100_000, 400)],
)
def test_a_body_that_is_no_json_object_is_refused(server, body, status):
    headers = {"Content-Type": "application/json"}
    assert server.call("POST", "/api/answer", body=body, headers=headers)[0] == status


def test_a_question_is_no_archive_whatever_words_stand_in_it(server):
    body = json.dumps({"question": "x" * (257 - len('{"question": "')) + "ustar  is what tar writes there"}).encode()
    assert body[257:263] == b"ustar "
    status, _, text = server.call("POST", "/api/answer", body=body, headers={"Content-Type": "application/json"})
    assert status == 200 and "event: done" in text


def test_a_body_of_another_type_is_refused_as_a_form_of_a_foreign_page_would_be(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        body = json.dumps(QUESTION).encode()
        assert server.call("POST", "/api/answer", body=body, headers={"Content-Type": kind})[0] == 415


def test_a_conversation_beyond_the_context_is_refused_and_says_by_how_much(server):
    events = server.call.events({"question": "word " * 3000})
    assert [name for name, _ in events] == ["error"]
    assert re.search(r"too long: 30\d\d tokens.*at most 2048", events[0][1]["error"]["message"])
    assert "earlier question" in events[0][1]["error"]["hint"]


def test_a_body_of_ten_megabytes_is_read_to_its_end_and_refused(server):
    status, _, answer = server.call("POST", "/api/answer", {"question": "x" * 10_000_000})
    assert status == 413 and "at most 1000000 bytes" in answer["error"]["message"]
    assert server.call("GET", "/health")[0] == 200


def test_a_body_without_a_declared_length_is_limited_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    parts = (b"x" * 100_000 for _ in range(20))
    connection.request("POST", "/api/answer", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_client_that_leaves_a_stream_stops_its_generation(slow):
    connection = open_stream(slow)
    wait_until(lambda: slow.engine.asked)
    connection.close()
    wait_until(lambda: slow.engine.stopped_after == [0])


def test_a_client_that_leaves_while_it_waits_is_never_asked_for(slow):
    first, second = open_stream(slow), open_stream(slow, value={"question": "second"})
    wait_until(lambda: slow.queue.waiting == 1 and slow.engine.asked)
    second.close()
    wait_until(lambda: slow.queue.waiting == 0)
    slow.engine.hold.set()
    first.close()
    assert server_answers(slow) and [prompt.question for prompt in slow.engine.asked[:2]] == ["What's a monad?"] * 2


def server_answers(server):
    return server.call.events(QUESTION)[-1][0] == "done"


def test_a_full_queue_is_told_so_and_when_to_come_back(slow, monkeypatch):
    monkeypatch.setattr("conversation.answering.answer_queue.MAX_WAITING", 2)
    waiting = [open_stream(slow)]
    wait_until(lambda: slow.engine.asked)  # the first is at work, two wait
    waiting += [open_stream(slow), open_stream(slow)]
    wait_until(lambda: slow.queue.waiting == 2)
    status, headers, answer = slow.call("POST", "/api/answer", QUESTION)
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert "too many requests" in answer["error"]["message"] and "try again in" in answer["error"]["hint"]
    slow.engine.hold.set()
    for connection in waiting:
        assert b"event: done" in read_all(connection)


def read_all(connection):
    """What a server sends until the end of its (chunked) response."""
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        part = connection.recv(65536)
        if not part:
            break
        received += part
    connection.close()
    return received


def test_a_prefetch_gives_way_to_a_question_and_is_finished_later(slow):
    """It has sent two parts when somebody asks. That answer is whole first, and no part is sent twice."""
    slow.engine.held_from = 2
    prefetch = open_stream(slow, value={"question": "prefetched", "prefetch": True})
    received = b""
    while received.count(b"event: fragment") < 2:
        received += prefetch.recv(4096)
    question = open_stream(slow)
    wait_until(lambda: len(slow.engine.asked) == 2)
    slow.engine.hold.set()
    assert b"event: done" in read_all(question)
    received += read_all(prefetch)
    assert [received.count(name) for name in (b"event: fragment", b"event: choice", b"event: done")] == [2, 3, 1]
    assert [prompt.question for prompt in slow.engine.asked] == ["prefetched", "What's a monad?", "prefetched"]


def test_an_engine_that_fails_costs_one_answer_and_no_detail_leaves_the_server(tmp_path, caplog):
    with serving(tmp_path) as server:
        server.engine.fails = RuntimeError("secret path /home/x")
        events = server.call.events(QUESTION)
        assert events == [
            ("error", {"error": {"message": "the server made a mistake", "hint": events[0][1]["error"]["hint"]}})
        ]
        assert "secret path" in caplog.text  # for the one who runs it
        server.engine.fails = None
        assert server_answers(server)


def test_requests_wait_while_the_model_loads_and_health_says_so(tmp_path):
    loaded, engine = threading.Event(), FakeEngine()

    def load():
        loaded.wait(120)
        return engine

    with serving(tmp_path, engine, open_engine=load) as server:
        assert server.call("GET", "/health")[2] == {"status": "loading", "model": "fake-model"}
        assert server.call("GET", "/api/model")[0] == 503
        waiting = open_stream(server)
        wait_until(lambda: server.queue.waiting == 1)
        loaded.set()
        assert b"event: done" in read_all(waiting)
        assert server.call("GET", "/health")[2]["status"] == "ok"
        model = server.call("GET", "/api/model")[2]
        assert model["context"] == 2048 and model["limits"]["question_follow_up"] == 40


def test_a_stream_that_waits_long_shows_signs_of_life(slow, monkeypatch):
    monkeypatch.setattr(http_requests, "PING_SECONDS", 0.05)
    with open_stream(slow) as connection:
        received = b""
        while b": waiting" not in received:
            received += connection.recv(4096)
        slow.engine.hold.set()
        received += read_all(connection)
    assert b"event: done" in received


# --- slow and broken clients -----------------------------------------------------------------------------------------


def test_a_client_that_sends_nothing_half_a_head_or_half_a_body_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "HEADER_SECONDS", 2)  # a busy machine may need one for a head
    monkeypatch.setattr(http_requests, "BODY_SECONDS", 0.3)
    with serving(tmp_path) as server:
        silent = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        half_head = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        half_head.sendall(b"GET /health HTT")
        half_body = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        half_body.sendall(
            b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        drip = socket.create_connection(("127.0.0.1", server.port), timeout=10)  # a byte now and then
        drip.sendall(b"GET /health HTTP/1.1\r\nX: ")
        assert server_answers(server)
        started, dropped = time.monotonic(), False
        while not dropped and time.monotonic() - started < 30:
            time.sleep(0.1)
            try:
                drip.sendall(b"x")
                drip.settimeout(0.01)
                dropped = drip.recv(10) == b""
            except TimeoutError:
                pass
            except OSError:
                dropped = True
        assert dropped
        assert half_head.recv(100) == silent.recv(100) == b""
        assert b" 408 " in half_body.recv(1000).split(b"\r\n")[0]


def test_a_connection_that_is_kept_serves_several_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for _ in range(3):
        connection.request("POST", "/api/answer", json.dumps(QUESTION), {"Content-Type": "application/json"})
        assert parse_events(connection.getresponse().read().decode())[-1][0] == "done"
    connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\0" * 1000,
    ],
)
def test_what_is_no_http_is_refused_and_the_server_goes_on(server, sent):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        received = b""
        with contextlib.suppress(OSError):  # it may be closed before all is sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(4096):
                received += part
    assert not received or re.match(rb"HTTP/1.1 4\d\d ", received)
    assert server.call("GET", "/health")[0] == 200


def test_who_reads_an_answer_that_takes_too_long_is_told_that_the_server_is_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "GRACE_SECONDS", 0.3)
    with serving(tmp_path, FakeEngine(pace=60)) as found:
        connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=20)
        connection.request("POST", "/api/answer", json.dumps(QUESTION), {"Content-Type": "application/json"})
        answer = connection.getresponse()
    name, data = parse_events(answer.read().decode())[-1]
    assert name == "error" and "ending" in data["error"]["message"]
