"""Who may use the server: hosts, origins, the key."""

from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import serving
from starlette.datastructures import Headers

from conversation.answering.guard import Access
from conversation.errors import UserError

KEY = "a-key-that-nobody-guesses"
QUESTION = {"question": "What's a monad?"}
HTML = {"Accept": "text/html,*/*"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("guard")) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    access = Access("0.0.0.0", KEY, ("chat.example.org",), ("https://friend.example",))
    with serving(tmp_path_factory.mktemp("locked"), access=access) as found:
        yield found


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.7", "x y"],
)
def test_a_name_that_was_made_to_point_here_gets_nothing(server, host):
    """DNS rebinding: the foreign page is of the same origin for the browser, but its Host is a foreign name."""
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    for method, path, value in (("GET", "/", None), ("GET", "/health", None), ("POST", "/api/answer", QUESTION)):
        status, _, answer = server.call(method, path, value, headers)
        assert status == 421 and "not known as" in answer["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"])
def test_the_names_of_this_machine_are_known(server, host):
    assert server.call("GET", "/health", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://127.0.0.1",
        "http://localhost:1",
        "http://127.0.0.1:1",
        "null",
        "",
        "file://",
        "chrome-extension://abc",
    ],
)
def test_a_page_of_another_origin_may_not_use_it(server, origin):
    before = len(server.engine.asked)
    for path in ("/api/answer", "/v1/chat/completions"):
        status, headers, answer = server.call("POST", path, QUESTION, {"Origin": origin})
        assert status == 403 and "another origin" in answer["error"]["message"]
        assert "access-control-allow-origin" not in headers
    assert server.call("OPTIONS", "/api/answer", headers={"Origin": origin})[0] == 403
    assert len(server.engine.asked) == before


def test_its_own_page_may_use_it(server):
    own = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert server.call("POST", "/api/answer", QUESTION, {**own, "Sec-Fetch-Site": "same-origin"})[0] == 200


def test_a_foreign_page_may_link_to_the_page_but_not_read_nor_embed_anything(server):
    foreign = {"Sec-Fetch-Site": "cross-site"}
    link = {**foreign, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.call("GET", "/", headers=link)[0] == 200
    assert server.call("GET", "/api/conversations", headers=link)[0] == 403
    assert server.call("GET", "/", headers={**link, "Sec-Fetch-Dest": "iframe"})[0] == 403
    assert server.call("GET", "/static/app.js", headers={**foreign, "Sec-Fetch-Mode": "no-cors"})[0] == 403
    assert server.call("GET", "/static/app.js", headers={"Sec-Fetch-Site": "same-site"})[0] == 403  # another port


def test_an_origin_that_was_allowed_by_name_may_use_it_with_the_key(locked):
    origin = {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}
    asked = "authorization,content-type,x-stainless-arch,x-stainless-os,x-stainless-retry-count"  # OpenAI's client
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    status, headers, _ = locked.call("OPTIONS", "/v1/chat/completions", headers=preflight)
    allowed = headers["access-control-allow-headers"].split(",")
    assert status == 204 and set(asked.split(",")) <= set(allowed)
    status, headers, _ = locked.call("GET", "/v1/models", headers={**origin, "Authorization": f"Bearer {KEY}"})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://friend.example")
    assert "retry-after" in headers["access-control-expose-headers"]
    assert locked.call("GET", "/v1/models", headers=origin)[0] == 401
    evil = {"Origin": "https://evil.example", "Authorization": f"Bearer {KEY}"}
    assert locked.call("GET", "/v1/models", headers=evil)[0] == 403


def test_without_the_key_nothing_but_health_is_to_be_had(locked):
    for method, path, value in (
        ("GET", "/", None),
        ("GET", "/static/app.js", None),
        ("GET", "/api/conversations", None),
        ("GET", "/openapi.json", None),
        ("POST", "/api/answer", QUESTION),
        ("GET", "/nothing", None),
    ):
        assert locked.call(method, path, value)[0] == 401
    assert locked.call("GET", "/health")[0] == 200


@pytest.mark.parametrize("given", ["Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer", "Bearer \xe4"])
def test_a_wrong_key_is_refused_in_the_shape_of_the_api(locked, given):
    status, headers, answer = locked.call("GET", "/v1/models", headers={"Authorization": given})
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert answer["error"]["code"] == "invalid_api_key"


def test_the_key_opens_the_api(locked):
    key = {"Authorization": f"Bearer {KEY}"}
    assert locked.call("GET", "/v1/models", headers=key)[0] == 200
    assert locked.call("POST", "/api/answer", QUESTION, key)[0] == 200
    for host in ("chat.example.org", "192.168.1.7:8765", "[fe80::1]"):  # an address was not made to point here
        assert locked.call("GET", "/v1/models", headers={**key, "Host": host})[0] == 200
    assert locked.call("GET", "/v1/models", headers={**key, "Host": "evil.example"})[0] == 421


def log_in(server, key):
    """As a browser sends the form: it names its origin, unless a policy of no-referrer makes that "null"."""
    assert server.call("GET", "/login")[1]["referrer-policy"] == "same-origin"
    own = f"127.0.0.1:{server.port}"
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Host": own, "Origin": f"http://{own}"}
    return server.call("POST", "/login", body=urlencode({"key": key}).encode(), headers=headers)


def test_a_reader_logs_in_once_and_the_page_works_by_its_cookie(locked):
    status, _, page = locked.call("GET", "/", headers=HTML)
    assert status == 401 and "<form" in page
    status, _, page = log_in(locked, "wrong")
    assert status == 401 and "not the key" in page
    status, headers, _ = log_in(locked, KEY)
    assert (status, headers["location"]) == (303, "/")
    attributes = headers["set-cookie"].lower()
    assert "httponly" in attributes and "samesite=strict" in attributes and KEY not in attributes
    cookie = {"Cookie": headers["set-cookie"].split(";")[0]}
    assert locked.call("GET", "/", headers={**HTML, **cookie})[0] == 200
    assert locked.call("POST", "/api/answer", QUESTION, cookie)[0] == 200
    assert locked.call("POST", "/api/answer", QUESTION, {"Cookie": "conversation_key=x"})[0] == 401


ODD_COOKIES = (
    'theme={"mode":"dark"}',
    "x=[1, 2]",
    "a",
    "=",
    "a b=c",
    "\xe4=\xe4",
    'q="',
    "k@(:)=1",
    "conversation_key_=x",
)


@given(others=st.lists(st.sampled_from(ODD_COOKIES) | st.text(st.characters(max_codepoint=255), max_size=8)))
def test_no_cookie_of_another_program_on_this_host_hides_the_logins(others):
    """Cookies know no ports: a browser sends those of every program at 127.0.0.1."""
    access = Access(key=KEY)
    others = [each.replace(";", "").replace("conversation_key=", "") for each in others]
    header = "; ".join([*others, f"conversation_key={access.cookie}"])
    assert access.accepts(Headers(raw=[(b"cookie", header.encode("latin-1"))]))
    assert not access.accepts(Headers(raw=[(b"cookie", "; ".join(others).encode("latin-1"))]))


def test_a_server_that_others_can_reach_needs_a_key_that_is_hard_to_guess():
    for host in ("0.0.0.0", "::", "192.168.1.7"):
        with pytest.raises(UserError, match="an API key is needed") as caught:
            Access(host)
        assert "secrets.token_urlsafe" in caught.value.hint
        assert not Access(host, KEY).is_loopback
    for key in ("short", "with space and more", "schlüssel-mit-umlaut-und-länge"):
        with pytest.raises(UserError, match="at least 16 printable"):
            Access("127.0.0.1", key)
    assert Access("::1").is_loopback and Access("127.0.0.2").is_loopback


@pytest.mark.parametrize(
    ("origin", "written"),
    [
        *(("*", ""), ("chat.example.org", ""), ("https://", ""), ("ftp://a.example", ""), ("https://a.example:x", "")),
        ("https://a.example/", "https://a.example"),
        ("https://A.example", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("https://me@a.example:8443/x", "https://a.example:8443"),
        ("http://[::1]:80", "http://[::1]"),
        ("https://b\xfccher.example", ""),
    ],
)
def test_an_allowed_origin_is_an_origin_as_browsers_write_it(origin, written):
    """Any other would be accepted and never match."""
    with pytest.raises(UserError, match="is no origin") as caught:
        Access(allowed_origins=(origin,))
    assert caught.value.hint == f"write {written or 'it like https://chat.example.org'}"
    for right in filter(None, (written, "http://a.example:443", "http://localhost:5173")):
        Access(allowed_origins=(right,))


@pytest.mark.parametrize("host", ["Chat.Example.org:8443", "chat.example.org", "CHAT.example.org"])
def test_an_allowed_host_is_known_however_it_is_written(host):
    assert Access(allowed_hosts=(host,)).knows_host("chat.example.org")
    assert Access(allowed_hosts=("[fe80::1]",)).knows_host("fe80::1")


@pytest.mark.parametrize("host", ["https://chat.example.org", "chat example", "", "*", "b\xfccher.example"])
def test_an_allowed_host_that_no_browser_sends_is_refused(host):
    with pytest.raises(UserError, match="is no name of a host"):
        Access(allowed_hosts=(host,))


@given(st.text(alphabet=st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=60))
def test_no_host_but_our_own_is_known(text):
    name = text.strip().lower()
    assert Access().knows_host(name) == (name in ("localhost", "127.0.0.1", "::1"))


def test_an_error_of_the_guard_has_the_shape_of_the_api_that_was_called(server):
    foreign = {"Origin": "http://evil.example"}
    assert server.call("GET", "/v1/models", headers=foreign)[2]["error"]["code"] == "foreign_origin"
    assert set(server.call("GET", "/api/model", headers=foreign)[2]["error"]) == {"message", "hint"}
