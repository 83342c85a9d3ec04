"""Whatever is sent to the server, it is answered or refused, and the answer is one that /openapi.json describes."""

import contextlib
import json

import pytest
import schemathesis
from documents import ID, document
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LINE = st.fixed_dictionaries({"speaker": st.sampled_from(["User", "AI"]) | JSON, "text": st.text() | JSON})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON},
    optional={"content": st.text() | JSON, "tool_calls": st.lists(st.fixed_dictionaries({"function": JSON})) | JSON},
)
BODIES = {
    "/api/answer": {"question": st.text() | JSON, "history": st.lists(LINE) | JSON, "prefetch": JSON, "seed": JSON},
    "/v1/chat/completions": {
        "model": st.just("fake-model") | JSON,
        "messages": st.lists(MESSAGE, max_size=4) | JSON,
        **{name: JSON for name in ("tools", "tool_choice", "stop", "max_tokens", "stream", "temperature", "n")},
    },
    f"/api/conversations/{ID}/picked": {"node": JSON, "choice": JSON},
    f"/api/conversations/{ID}/training_tree": {"leave_out": JSON},
}


@pytest.mark.parametrize("path", BODIES)
def test_whatever_is_sent_it_is_answered_or_refused(server, path):
    kept = server.call("PUT", f"/api/conversations/{ID}", document())
    assert kept[0] in (200, 409)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({}, optional=BODIES[path]) | JSON)
    def try_it(body):
        status, _, answer = server.call(
            "POST", path, body=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        assert status in (200, 400, 404, 422), answer

    try_it()


@pytest.mark.slow  # minutes: conversations are large
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_api_does_what_its_description_says_whatever_is_sent(tmp_path, mode):
    """schemathesis on /openapi.json: no defect (500), only statuses and forms of answers that are described."""
    with serving(tmp_path) as server:
        server.call("PUT", f"/api/conversations/{ID}", document())
        for operation in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
            @given(case=operation.ok().as_strategy(mode))
            def try_it(case):
                case.call_and_validate(checks=CHECKS, timeout=20)

            with contextlib.suppress(Unsatisfiable):  # nothing wrong can be sent where nothing is read
                try_it()
        assert server.call("GET", "/health")[0] == 200
