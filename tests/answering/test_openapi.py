"""/openapi.json says what the server reads and what it answers."""

import pytest
from documents import ID, document
from served import serving

from conversation.answering import openai_requests
from conversation.answering.openapi import describe


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


class Listening(dict):
    """An object that knows which of its fields were asked for."""

    def __init__(self, value):
        super().__init__(value)
        self.asked = set()

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)


def test_every_field_of_a_chat_request_that_is_read_is_described(monkeypatch):
    monkeypatch.setattr(openai_requests, "_refuse_unknown_powers", lambda body: None)
    body = Listening({"model": "m", "messages": [{"role": "user", "content": "a"}]})
    openai_requests.parse_request(body)
    assert set(describe()["components"]["schemas"]["ChatRequest"]["properties"]) == body.asked


def test_every_field_of_an_answer_is_described(server):
    schemas = describe()["components"]["schemas"]
    server.call("PUT", f"/api/conversations/{ID}", document())
    chat = {"model": "fake-model", "messages": [{"role": "user", "content": "a"}]}
    for method, path, value, name in (
        ("GET", "/health", None, "Health"),
        ("GET", "/api/model", None, "Model"),
        ("GET", "/v1/models/fake-model", None, "OpenAIModel"),
        ("POST", "/v1/chat/completions", chat, "ChatCompletion"),
        ("POST", f"/api/conversations/{ID}/training_tree", {}, "TrainingTree"),
        ("PUT", f"/api/conversations/{ID}", {**document(), "revision": 1}, "Kept"),
    ):
        status, _, answer = server.call(method, path, value)
        assert status == 200 and set(answer) == set(schemas[name]["properties"]), path
    (line,) = server.call("GET", "/api/conversations")[2]
    assert set(line) == set(schemas["ConversationLine"]["properties"])


def test_the_key_is_asked_for_everywhere_but_at_health():
    found = describe()
    assert found["security"] == [{name: []} for name in found["components"]["securitySchemes"]] + [{}]
    opened = [
        path
        for path, operations in found["paths"].items()
        for operation in operations.values()
        if isinstance(operation, dict) and "security" in operation
    ]
    assert opened == ["/health"]
