"""Files of the page and conversations, as the server gives them out and keeps them."""

import contextlib
import json
import socket
import time

import psutil
import pytest
from documents import ID, document, node
from served import serving

from conversation.answering import listening
from conversation.data.trees import read_trees


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


def wait_until(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


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


# --- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_kept_as_a_file_and_the_second_tab_gets_the_newer_one(tmp_path):
    with serving(tmp_path) as server:
        path = f"/api/conversations/{ID}"
        assert server.call("GET", path)[0] == 404
        status, _, kept = server.call("PUT", path, document(title="first"))
        assert (status, kept["revision"]) == (200, 1)
        status, _, newer = server.call("PUT", path, document(title="second"))
        assert (status, newer["title"], newer["revision"]) == (409, "first", 1)
        assert "another tab" in newer["error"]["message"]
        assert server.call("GET", path)[2]["nodes"] == document()["nodes"]
        (line,) = server.call("GET", "/api/conversations")[2]
        assert (line["id"], line["title"], line["nodes"]) == (ID, "first", 3)
        assert server.call("POST", f"{path}/picked", {"node": "a", "choice": 1})[2] == {"picked": [0, 1, 0]}
        assert server.call("POST", f"{path}/picked", {"node": "zzz", "choice": 1})[0] == 404
        assert server.call("POST", f"{path}/picked", {"node": "a"})[0] == 400
        status, _, refused = server.call("PUT", path, {**document(), "current": "zzz"})
        assert status == 400 and refused["error"]["problems"] == ["current: there is no node 'zzz'"]
        assert server.call("DELETE", path)[0] == 204 and server.call("DELETE", path)[0] == 404


def test_a_conversation_is_saved_as_a_training_tree_or_its_problems_are_listed(tmp_path):
    with serving(tmp_path) as server:
        path = f"/api/conversations/{ID}"
        server.call("PUT", path, document())
        status, _, saved = server.call("POST", f"{path}/training_tree")
        assert status == 200 and saved["path"].endswith("own_trees/conversations/monad_0f8fad5b.json")
        (tree,) = read_trees(tmp_path / "own_trees")
        assert len(tree.nodes) == 3 and any("stands in the place" in warning for warning in saved["warnings"])
        assert server.call("POST", f"{path}/training_tree", {"leave_out": ["ab"]})[0] == 200
        assert len(read_trees(tmp_path / "own_trees")[0].nodes) == 1
        assert server.call("POST", f"{path}/training_tree", {"leave_out": [7]})[0] == 400
        server.call("PUT", path, document(node("a", "q" * 61), revision=1))
        status, _, refused = server.call("POST", f"{path}/training_tree")
        assert status == 422 and "61 characters" in refused["error"]["problems"][0]


@pytest.mark.parametrize("name", ["..%2f..%2fsecret", "%2e%2e", "..", ".lock", "a" * 300, "%00", f"{ID}%0a"])
def test_no_id_of_a_conversation_leads_out_of_its_folder(server, name):
    (server.folder / "secret.json").write_text(json.dumps(document()))
    for method, value in (("GET", None), ("DELETE", None), ("PUT", document())):
        assert server.call(method, f"/api/conversations/{name}", value)[0] in (400, 404, 405)
    assert (server.folder / "secret.json").exists()


def test_a_reader_who_does_not_take_what_was_sent_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "WRITE_SECONDS", 0.3)
    with serving(tmp_path) as server:
        (tmp_path / "web" / "large.js").write_bytes(b" " * 30_000_000)  # more than the kernel's buffers take
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /static/large.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: b"HTTP/1.1 200" in connection.recv(100, socket.MSG_PEEK))
        own = connection.getsockname()
        wait_until(lambda: own not in [each.raddr for each in psutil.Process().net_connections("tcp4")])  # dropped
        connection.settimeout(5)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += len(part)
        connection.close()
        assert received < 30_000_000
