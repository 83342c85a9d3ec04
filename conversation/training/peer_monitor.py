"""The connections by which the processes of one training know of each other's end.

A collective operation waits half an hour for a host that is gone, and its limit cannot be made short: one process may
download, save or evaluate while others wait. So every other process keeps a TCP connection to the first, over which
nothing is sent. The kernels ask each other over it whether the hosts are there, whatever the programs do meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable

IDLE, BETWEEN, TRIES = 10, 5, 4
"""Seconds before the kernel asks, seconds between questions, and how many: a host counts as gone after 30."""
PATIENCE = 10.0  # seconds in which the work may end by itself when a process is lost; a collective operation may not
DONE = ""  # what a process says that has finished
RANK_DIGITS = 8


class Contact:
    """This process's connections: the first's to all others, any other's to the first.

    `reason` is the sentence about the first process that was lost, or nothing. `end` ends this process when it has not
    ended within PATIENCE after that.
    """

    def __init__(self, connections: dict[str, socket.socket], end: Callable[[str], None]):
        """`connections`: by the name of the process at the other end."""
        self.reason, self._end = "", end
        self._connections = connections
        self._lost, self._over = threading.Event(), threading.Event()
        for name, connection in connections.items():
            _ask_when_idle(connection)
            threading.Thread(target=self._listen, args=(name, connection), daemon=True).start()

    def wait_for_reason(self, seconds: float) -> str:
        """`reason`, as soon as there is one, within so many seconds."""
        self._lost.wait(seconds)
        return self.reason

    def close(self, failure: str | None = None) -> None:
        """Tell the others that this process has finished or, with a sentence, why it has not. It no longer waits."""
        self._over.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(DONE if failure is None else failure).encode() + b"\n")
                connection.shutdown(socket.SHUT_WR)

    def _listen(self, name: str, connection: socket.socket) -> None:
        """Wait for the last word of another process, and for the end of this one when there was none."""
        words, gone = None, "its process has ended"
        try:
            with connection.makefile("rb") as stream:
                words = json.loads(stream.readline())
        except ConnectionResetError:
            pass
        except OSError as error:
            gone = f"its host no longer answers ({error.strerror or error})"
        except ValueError:  # no word
            pass
        if words == DONE or self._over.is_set():
            return
        self.reason = self.reason or (f"{name} has failed: {words}" if words else f"{name} is lost: {gone}")
        self._lost.set()
        if not self._over.wait(PATIENCE):
            self.close(self.reason)
            self._end(self.reason)
        time.sleep(PATIENCE)  # by now this process has ended, unless a library waits for what is lost
        self._end("")


def end_this_process(reason: str) -> None:
    """Print the error, if there is one, and end: the main thread waits in a collective operation that would not."""
    if reason:
        with contextlib.suppress(OSError, ValueError):
            print(f"\nerror: {reason}\nhint: {HINT}", file=sys.stderr, flush=True)
    os._exit(1)


HINT = "its own console says more; when that is mended, start every machine again, with --resume if the run had begun"


def _ask_when_idle(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    for name, value in ((idle, IDLE), ("TCP_KEEPINTVL", BETWEEN), ("TCP_KEEPCNT", TRIES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- how the connections are made -----------------------------------------------------------------------------------


def listen() -> tuple[socket.socket, int, str]:
    """The first process's socket, and what the others need to connect to it: its port, and a word to know them by."""
    try:
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # a system without IPv6
        server = socket.create_server(("", 0))
    return server, server.getsockname()[1], secrets.token_hex(16)


def accept(server: socket.socket, word: str, ranks: set[int], seconds: float) -> dict[int, socket.socket]:
    """The connections of other processes, by rank; those of them that came within so many seconds."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + seconds
    with server:
        while not ranks <= set(found) and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(min(left, 5))
                said = connection.recv(len(word) + RANK_DIGITS).decode("ascii", "replace")
            except OSError:
                continue
            if said.startswith(word) and said[len(word) :].isdigit():  # not a program that scans ports
                found[int(said[len(word) :])] = connection
    return found


def connect(address: str, port: int, word: str, rank: int, seconds: float) -> socket.socket:
    """This process's connection to the first. Raises OSError."""
    connection = socket.create_connection((address, port), timeout=seconds)
    connection.sendall(f"{word}{rank:0{RANK_DIGITS}}".encode())
    return connection
