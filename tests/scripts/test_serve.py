"""serve_conversation_model.py as a user starts it: what it says, which port it takes, how it ends."""

import contextlib
import errno
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest
from conftest import PROJECT, run_script
from documents import document, node
from served import parse_events

from conversation.answering.listening import listen, open_browser, url_of
from conversation.data.conversations import parse_conversation
from conversation.data.own_trees import training_tree
from conversation.data.trees import read_trees
from conversation.errors import UserError
from serve_conversation_model import name_of

SERVE = "serve_conversation_model.py"
FAKE = """
import pathlib, sys
sys.path[:0] = [{project!r}, {project!r} + "/tests"]
import conversation.answering as package, types
engines = types.ModuleType("conversation.answering.engines")
sys.modules["conversation.answering.engines"] = engines  # before a module imports the true one
from served import FakeEngine
def open_engine(source, device):
    engine = FakeEngine()
    engine.hold.is_set = pathlib.Path({go!r}).exists
    engine.warm_up = lambda: print("warm")
    return engine
engines.open_engine = open_engine
sys.argv[0] = "serve_conversation_model.py"
import serve_conversation_model
from conversation.answering import listening
from conversation.errors import run_main
listening.GRACE_SECONDS = {grace}
run_main(serve_conversation_model.main)
"""


def heed_signals():
    """As from a terminal: the tests may run under nohup or in the background, where the shell ignores two signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Served:
    """The script at work over an engine that answers at once, or as soon as the file `go` is there.

    `lines` are what it printed so far; `grace`: how many seconds it gives the answer at work when it is to end.
    """

    def __init__(self, tmp_path, *flags, go=PROJECT, grace=10, env=None):
        code = FAKE.format(project=str(PROJECT), go=str(go), grace=grace)
        command = [sys.executable, "-c", code, "--model", str(tmp_path), "--data_dir", str(tmp_path), *map(str, flags)]
        clean = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "BROWSER")}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, **(env or {})},
            preexec_fn=heed_signals,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Ready:"):
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", "".join(self.lines))
        self.port = int(found[1]) if found else None

    def ask(self, timeout=30):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        body = json.dumps({"question": "Q?"})
        connection.request("POST", "/api/answer", body, {"Content-Type": "application/json"})
        return connection

    def tell_to_end(self, number):
        """Send a signal, and wait until it is heeded: no more requests are taken."""
        self.process.send_signal(number)
        until = time.monotonic() + 60
        with contextlib.suppress(ConnectionRefusedError):
            while time.monotonic() < until:
                socket.create_connection(("127.0.0.1", self.port)).close()
                time.sleep(0.02)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, "".join(self.lines) + out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_order_and_the_answer_at_work_is_finished(tmp_path, number):
    go = tmp_path / "go"
    served = Served(tmp_path, "--port", 0, go=go)
    first, second = (served.ask() for _ in range(2))
    answers = [first.getresponse(), second.getresponse()]  # their heads: one is at work, the other waits
    served.tell_to_end(number)
    go.touch()
    out, err = served.process.communicate(timeout=60)
    status, out = served.process.returncode, "".join(served.lines) + out
    finished, told = (parse_events(answer.read().decode())[-1] for answer in answers)
    assert finished[0] == "done"
    assert told[0] == "error" and "ending" in told[1]["error"]["message"]
    assert (status, err) == (0, "") and out.endswith("Ended.\n")


def test_a_second_signal_ends_it_at_once(tmp_path):
    served = Served(tmp_path, "--port", 0, go=tmp_path / "never", grace=300)
    asked = served.ask()
    asked.getresponse()  # its head: the answer is at work
    started = time.monotonic()
    served.tell_to_end(signal.SIGINT)
    status, _, err = served.end(signal.SIGINT)
    assert time.monotonic() - started < 150 and status == 0 and "Traceback" not in err


def test_it_says_address_and_model_and_that_there_is_no_browser(tmp_path):
    served = Served(tmp_path, "--port", 0)
    served.lines.append(served.process.stdout.readline())
    _, out, _ = served.end()
    assert f"Loading {tmp_path}" in out and f"Ready: http://127.0.0.1:{served.port}/" in out
    assert "warm\n" in out and "Device: cpu (fake)\nReady: " in out  # warm before the first question
    assert "No browser was found here: open that address yourself." in out
    quiet = Served(tmp_path, "--port", 0, "--no_browser")
    assert "browser" not in quiet.end()[1].replace("no_browser", "")


def test_a_port_in_use_is_said_and_the_next_free_one_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = Served(tmp_path, "--port", port)
        _, out, _ = served.end()
        assert port < served.port <= port + 19
        assert f"Port {port} is in use; this server takes {served.port}." in out


def test_the_model_has_the_name_of_its_file_or_folder(tmp_path):
    file, folder = tmp_path / "conversation-2026.01.02-q8_0.gguf", tmp_path / "2026.01.02"
    file.write_bytes(b"GGUF")
    folder.mkdir()
    assert [name_of(each) for each in (file, folder)] == ["conversation-2026.01.02-q8_0", "2026.01.02"]


def test_a_key_from_the_variable_is_asked_for(tmp_path):
    served = Served(tmp_path, "--port", 0, env={"CONVERSATION_API_KEY": "a-key-that-nobody-guesses"})
    assert served.ask().getresponse().status == 401
    assert served.end()[0] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "an API key is needed"),
        (["--host", "no.such.host.invalid"], "there is no address"),
        (["--host", "203.0.113.7"], "cannot listen at 203.0.113.7"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--port", "x"], "invalid int value"),
        (["--allowed_origin", "*"], "'*' is no origin"),
        (["--model", "nowhere.gguf"], "there is no model at nowhere.gguf"),
        (["--run_dir", "nowhere"], "there is no model at nowhere"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(flags, words, tmp_path):
    model = [] if {"--model", "--run_dir"} & set(flags) else ["--model", tmp_path]
    done = run_script(SERVE, *model, "--no_browser", *flags, env={"CONVERSATION_API_KEY": ""}, timeout=60)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_folder_that_is_no_model_ends_it_with_its_sentence(tmp_path):
    done = run_script(SERVE, "--model", tmp_path, "--port", 0, "--no_browser", timeout=120)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert "Ready" not in done.stdout


def test_without_its_packages_one_sentence_says_how_to_get_them(tmp_path):
    missing = "raise ModuleNotFoundError('No module named starlette', name='starlette')"
    (tmp_path / "starlette.py").write_text(missing)
    done = run_script(SERVE, "--model", tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "needs the package starlette" in done.stderr and "-m pip install -r requirements-use.txt" in done.stderr


def test_help_answers_at_once_and_loads_no_server():
    code = (
        "import sys; sys.argv=['serve_conversation_model.py', '--help']\n"
        "import serve_conversation_model as script\n"
        "try: script.main()\nexcept SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'starlette', 'uvicorn', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--allowed_origin" in done.stdout


def test_ports_are_tried_in_turn_and_when_none_is_free_it_is_said():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port) as second:
            assert second.getsockname()[1] > port
            assert url_of(second) == f"http://127.0.0.1:{second.getsockname()[1]}/"
    with listen("127.0.0.1", 65535) as last:
        assert last.getsockname()[1] == 65535
        with pytest.raises(UserError, match=r"^the port 65535 is in use$"):
            listen("127.0.0.1", 65535)
    with taking_all_from(65530), pytest.raises(UserError, match=r"^the ports 65530 to 65535 are all in use$"):
        listen("127.0.0.1", 65530)


@contextlib.contextmanager
def taking_all_from(port):
    with contextlib.ExitStack() as stack:
        for each in range(port, 2**16):
            with contextlib.suppress(OSError):  # somebody else has it
                taken = stack.enter_context(socket.socket())
                taken.bind(("127.0.0.1", each))
                taken.listen()
        yield


def test_a_name_of_several_addresses_is_served_at_the_first_that_this_machine_has(monkeypatch):
    """As `localhost` where ::1 stands first and IPv6 is off."""
    found = [
        (socket.AF_INET6, ("::1", 0, 0, 0)),
        (socket.AF_INET, ("203.0.113.7", 0)),
        (socket.AF_INET, ("127.0.0.1", 0)),
    ]
    lines = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: lines)
    whole = socket.socket

    def without_ipv6(family=socket.AF_INET, *more, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return whole(family, *more, **options)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        port = listener.getsockname()[1]
        monkeypatch.setattr("conversation.answering.listening.TRIED_PORTS", 1)
        with pytest.raises(UserError, match=f"the port {port} is in use"):
            listen("localhost", port)
    del lines[2]
    with pytest.raises(UserError, match="cannot listen at localhost port 0: Cannot assign"):
        listen("localhost", 0)
    del lines[1]
    with pytest.raises(UserError, match="cannot listen at localhost port 0: Address family not supported"):
        listen("localhost", 0)


def test_a_text_browser_is_never_started(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    assert open_browser("http://127.0.0.1:1/") is False and opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert open_browser("http://127.0.0.1:1/") is True and opened


def test_a_model_is_served_from_its_merged_folder(untouched, tmp_path):
    """The real script, the tiny Gemma, an answer of which every part is valid."""
    process = subprocess.Popen(
        [sys.executable, SERVE, "--run_dir", untouched, "--port", "0", "--no_browser", "--data_dir", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ready = next(line for line in process.stdout if line.startswith("Ready:"))
    connection = http.client.HTTPConnection("127.0.0.1", int(re.search(r":(\d+)/", ready)[1]), timeout=120)
    connection.request("POST", "/api/answer", json.dumps({"question": "Q?"}), {"Content-Type": "application/json"})
    events = parse_events(connection.getresponse().read().decode())
    names = [name for name, _ in events]
    assert names[-4:] == ["choice", "choice", "choice", "done"] and 1 <= names.count("fragment") <= 4
    assert len({data["target"] for name, data in events if name == "choice"}) == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_observed_confidences_are_shown_and_on_demand_written(tmp_path):
    conversations, trees = tmp_path / "conversations", tmp_path / "trees"
    conversations.mkdir()
    made = training_tree(parse_conversation(document(node("a", "What's a lens?"))))
    (trees / "optics").mkdir(parents=True)
    path = trees / "optics" / f"{made.tree.name}.json"
    path.write_bytes(made.data)
    for number in range(6):
        each = document(node("a", "What's a lens?", picked=[0, 1, number % 2]), identifier=str(uuid.UUID(int=number)))
        (conversations / f"{each['id']}.json").write_text(json.dumps(each))
    flags = ["-m", "scripts.observed_confidences", trees, "--conversations", conversations]

    def call(*more):
        command = [sys.executable, *map(str, [*flags, *more])]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)

    shown = call()
    assert shown.returncode == 0 and "6 readers: a example? 0.55 -> 0.00; a why? 0.21 -> 0.75" in shown.stdout
    assert path.read_bytes() == made.data
    assert "0 nodes with at least 7" in call("--min_readers", "7").stdout
    assert call("--write").returncode == 0
    (tree,) = read_trees(trees)
    assert [c.confidence for c in tree.nodes[tree.name].follow_ups] == ["0.75", "0.25", "0.00"]
    assert '"readers": 6' in path.read_text()
    shutil.rmtree(conversations)
    none = call()
    assert none.returncode == 2 and "there is no conversation in" in none.stderr
