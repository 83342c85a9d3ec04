"""The connections by which the processes of one training know of each other's end. No torch, no training."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import PROJECT

from conversation.training import peer_monitor
from conversation.training.peer_monitor import PeerMonitor, accept, connect, listen


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def pair(monkeypatch):
    """The monitors of a first process and of one other, and what has ended the two."""
    monkeypatch.setattr(peer_monitor, "PATIENCE", 0.3)
    ended = {"first": [], "other": []}
    server, port, token = listen()
    own = connect("127.0.0.1", port, token, 1, 5)
    (theirs,) = accept(server, token, {1}, 5).values()
    first = PeerMonitor({"process 1 of 2": theirs}, ended["first"].append)
    other = PeerMonitor({"process 0 of 2": own}, ended["other"].append)
    return first, other, own, ended


def test_a_process_that_has_finished_is_not_missed(pair):
    first, other, own, ended = pair
    other.close()
    assert first.wait_for_reason(0.5) == "" and ended == {"first": [], "other": []}
    first.close()
    own.close()
    assert first.wait_for_reason(0.5) == "" and other.reason == ""


def test_a_process_that_fails_says_why_to_those_that_wait_for_it(pair, monkeypatch):
    monkeypatch.setattr(peer_monitor, "PATIENCE", 3)
    first, other, _, ended = pair
    other.close("the loss of step 3 is not finite\nin two lines")
    reason = "process 1 of 2 has failed: the loss of step 3 is not finite\nin two lines"
    assert first.wait_for_reason(30) == reason
    first.close(reason)
    wait_until(lambda: ended["first"])
    assert ended == {"first": [""], "other": []}  # its work has ended by itself: later nothing is said of it


def test_the_first_process_passes_on_at_once_that_another_is_lost():
    """Another process's collective operation fails as soon, and it asks why."""
    server, port, token = listen()
    own = {rank: connect("127.0.0.1", port, token, rank, 5) for rank in (1, 2)}
    found = accept(server, token, {1, 2}, 5)
    ended = []
    first = PeerMonitor({f"process {rank} of 3": found[rank] for rank in (1, 2)}, ended.append)
    second = PeerMonitor({"process 0 of 3": own[1]}, ended.append)
    own[2].close()
    for monitor in (first, second):
        assert monitor.wait_for_reason(5) == "process 2 of 3 is lost: its process has ended"
        monitor.close("that")
    assert ended == []


def test_a_temporary_folder_goes_with_a_process_that_is_ended(pair, tmp_path):
    first, _, own, ended = pair
    first.temporary = tmp_path / "checkpoints"
    (first.temporary / "checkpoint-3").mkdir(parents=True)
    own.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: ended["first"])
    assert not first.temporary.exists()


def test_work_that_does_not_end_by_itself_when_a_process_is_lost_is_ended(pair):
    first, _, own, ended = pair
    own.shutdown(socket.SHUT_RDWR)
    assert first.wait_for_reason(30) == "process 1 of 2 is lost: its process has ended"
    wait_until(lambda: ended["first"])
    assert ended["first"][0] == first.reason


def test_a_host_that_no_longer_answers_is_one_that_the_kernel_asks(pair):
    """What the kernel does then is tested between two network namespaces: test_machines.py."""
    _, _, own, _ = pair
    assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and own.gettimeout() is None
    if hasattr(socket, "TCP_KEEPIDLE"):
        idle, between, tries = (
            own.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
            for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT")
        )
        assert idle + between * tries + 10 < 60  # and the patience


def test_the_error_of_a_connection_names_what_the_kernel_says(pair):
    class Broken:
        def makefile(self, mode):
            raise TimeoutError(110, "Connection timed out")

    first, *_ = pair
    threading.Thread(target=first._listen, args=("process 2 of 3", Broken()), daemon=True).start()
    assert first.wait_for_reason(30) == ("process 2 of 3 is lost: its host no longer answers (Connection timed out)")


def test_a_program_that_scans_ports_is_not_taken_for_a_process():
    server, port, token = listen()
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b"\xff" * 100)
    strangers[2].close()
    own = connect("127.0.0.1", port, token, 7, 5)
    assert set(accept(server, token, {7}, 5)) == {7}
    own.close()


def test_who_says_nothing_does_not_use_up_the_time(monkeypatch):
    monkeypatch.setattr(peer_monitor, "GREETING", 0.2, raising=False)
    server, port, token = listen()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    own = connect("127.0.0.1", port, token, 7, 5)
    assert set(accept(server, token, {7}, 5)) == {7}
    for connection in (*silent, own):
        connection.close()


def test_a_greeting_that_comes_in_parts_is_read_whole():
    server, port, token = listen()
    greeting = f"{token}{12:0{peer_monitor.RANK_DIGITS}}".encode()
    own = socket.create_connection(("127.0.0.1", port))

    def say():
        for part in (greeting[:10], greeting[10:-2], greeting[-2:]):
            own.sendall(part)
            time.sleep(0.1)

    speaking = threading.Thread(target=say)
    speaking.start()
    assert set(accept(server, token, {12}, 5)) == {12}
    speaking.join()
    own.close()


def test_a_rank_that_is_not_waited_for_is_no_process():
    server, port, token = listen()
    strangers = [connect("127.0.0.1", port, token, rank, 5) for rank in (3, 0)]
    assert accept(server, token, {1}, 0.5) == {}
    for connection in strangers:
        connection.close()


def test_who_does_not_come_is_not_waited_for_longer_than_that():
    server, *_ = listen()
    assert accept(server, "word", {1}, 0.2) == {}


def test_the_end_comes_with_error_hint_and_status_1_whatever_the_main_thread_waits_for():
    code = "import threading, time; from conversation.training.peer_monitor import end_this_process as end\n"
    code += "threading.Thread(target=end, args=('process 1 of 2 is lost',)).start(); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "error: process 1 of 2 is lost\nhint: " in done.stderr
