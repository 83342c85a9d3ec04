"""The page's files as the server gives them out."""

import json
import socket
import time

import pytest
from served import serving

QUESTION = {"question": "What's a monad?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def slow(tmp_path):
    """A server whose engine answers one part after each `hold.set()`, and else waits."""
    with serving(tmp_path) as found:
        found.engine.hold.clear()
        yield found


def wait_until(condition, seconds=10.0):
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


def test_the_page_and_its_files_are_there_with_headers_that_shut_others_out(server):
    for path, kind in (("/", "text/html"), ("/static/app.js", "javascript")):
        status, headers, _ = server.call("GET", path)
        assert status == 200 and kind in headers["content-type"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
        assert "access-control-allow-origin" not in headers and "server" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/../secret.txt",
        "/static/..%2fsecret.txt",
        "/static/%2e%2e/secret.txt",
        "/static/%2e%2e%2fsecret.txt",
        "/static/..%5csecret.txt",
        "/static//../secret.txt",
        "/static/./../secret.txt",
        "/static/%2fetc/passwd",
        "/static//etc/passwd",
        "/static/link.txt",
        "/static/app.js%00.txt",
        "/static/%00",
        "/static/" + "a" * 3000,
        "/static/" + "a/" * 1000,
        "/static/",
        "/static",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "//secret.txt",
    ],
)
def test_no_path_leads_out_of_the_folder_of_the_page(server, path):
    (server.folder / "secret.txt").write_text("secret")
    link = server.folder / "web" / "link.txt"
    if not link.is_symlink():
        link.symlink_to(server.folder / "secret.txt")
    status, _, answer = server.call("GET", path)
    assert status in (307, 404) and "secret" not in json.dumps(answer).replace("secret.txt", "")


def test_what_is_not_there_and_what_cannot_be_done_there(server):
    assert server.call("GET", "/nothing")[2]["error"]["message"] == "there is nothing at /nothing"
    status, headers, answer = server.call("GET", "/api/answer")
    assert status == 405 and headers["allow"] == "POST" and "GET is not possible" in answer["error"]["message"]
