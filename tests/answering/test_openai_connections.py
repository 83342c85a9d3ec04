"""OpenAI's client while the model loads, is busy, fails, or is left alone."""

import json
import socket
import threading
import time

import openai
import pytest
from served import FRAGMENTS, FakeEngine, serving, written
from test_openai_api import CALLS, QUESTION, TOOLS, create


def test_a_stream_goes_on_while_the_model_writes(tmp_path):
    """Its parts come one by one; none is there yet when the stream begins."""
    with serving(tmp_path, FakeEngine(pace=0.1)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for options, parts in (({"tools": TOOLS}, len(CALLS)), ({}, len(FRAGMENTS))):
            chunks = [chunk.choices[0] for chunk in create(client, stream=True, **options)]
            assert sum(bool(choice.delta.tool_calls or choice.delta.content) for choice in chunks) == parts
            assert chunks[-1].finish_reason in ("tool_calls", "stop")
        assert server.engine.stopped_after == []


def test_the_id_that_is_listed_while_the_model_loads_stays_its_id(tmp_path):
    loaded, engine = threading.Event(), FakeEngine()
    engine.name = "shown otherwise, q8_0"

    def load():
        loaded.wait(120)
        return engine

    with serving(tmp_path, engine, open_engine=load) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        listed = client.models.list().data[0].id
        assert server.call("GET", "/health")[2]["status"] == "loading"
        loaded.set()
        for _ in range(2):  # one that may have waited while it loaded, and one after
            answer = client.chat.completions.create(model=listed, messages=QUESTION)
            assert (answer.model, answer.choices[0].message.content) == (listed, "\n".join(FRAGMENTS))
        assert [model.id for model in client.models.list()] == [listed]
        assert server.call("GET", "/health")[2]["model"] == listed
        assert server.call("GET", "/api/model")[2]["name"] == "shown otherwise, q8_0"


def test_a_full_queue_is_a_rate_limit_which_the_client_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr("conversation.answering.answer_queue.MAX_WAITING", 0)
    with serving(tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            create(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "rate_limit_exceeded"


def test_a_failure_within_a_stream_reaches_the_client_as_an_error(tmp_path):
    class Failing(FakeEngine):
        def stream(self, prompt, stopped=lambda: False, decoding=None):
            yield written("One.")
            raise RuntimeError("broken")

    with serving(tmp_path, Failing()) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="made a mistake"):
            create(client)
        with pytest.raises(openai.APIError, match="made a mistake"):
            list(create(client, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(tmp_path, stream):
    with serving(tmp_path) as server:
        server.engine.hold.clear()
        body = json.dumps({"model": "fake-model", "messages": QUESTION, "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not server.engine.asked:
            time.sleep(0.01)
        connection.close()
        ends = time.monotonic() + 60
        while server.engine.stopped_after != [0]:
            assert time.monotonic() < ends
            time.sleep(0.01)
