"""The connections by which the processes of one training know of each other's end.

A collective operation waits two hours for a host that is gone, and its limit cannot be made short: one process may
download, save or evaluate while others wait. So every other process keeps a TCP connection to the first, over which
nothing is sent but how it ends. The kernels ask each other over it whether the hosts are there (TCP keep-alive),
whatever the programs do meanwhile. The first passes on what it hears.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 10, 5, 4
"""Seconds before the kernel asks, seconds between questions, and how many: a host counts as gone after 30."""
PATIENCE = 10.0  # seconds in which the work may end by itself when a process is lost; a collective operation may not
DONE = ""  # what a process says that has finished
GREETING = 2.0  # seconds for the token, which is sent as soon as a process has connected
RANK_DIGITS = 8


class PeerMonitor:
    """This process's connections: the first's to all others, any other's to the first.

    `reason` is the sentence about the process that was lost before any other, or nothing. `temporary`: a folder that
    goes with this process when it is ended.
    """

    def __init__(self, connections: dict[str, socket.socket], end: Callable[[str], None]):
        """`connections`: by the name of the process at the other end.

        `end` ends this process, with a sentence if it still works PATIENCE after one was lost. A process that has
        closed its connections by then is ended without one after another PATIENCE: a library may wait for what is lost.
        """
        self.reason, self._end = "", end
        self.temporary: Path | None = None
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
        self._send(DONE if failure is None else failure)

    def _send(self, message: str | dict[str, str]) -> None:
        """Send each other process the only message it gets; a second one is not sent."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")
                connection.shutdown(socket.SHUT_WR)

    def _listen(self, name: str, connection: socket.socket) -> None:
        """Wait for the message of another process and, unless it has finished, for the end of this one."""
        message, gone = None, "its process has ended"
        try:
            with connection.makefile("rb") as stream:
                message = json.loads(stream.readline())
        except ConnectionResetError:
            pass
        except OSError as error:
            gone = f"its host no longer answers ({error.strerror or error})"
        except ValueError:  # no message
            pass
        if message == DONE or self._over.is_set():
            return
        if isinstance(message, dict):  # the first process passes on what it has heard
            sentence = str(message["reason"])
        else:
            sentence = f"{name} has failed: {message}" if message else f"{name} is lost: {gone}"
        self.reason = self.reason or sentence
        self._lost.set()
        self._send({"reason": self.reason})  # the others' collective operations fail now, too, and they ask why
        if not self._over.wait(PATIENCE):
            self._remove_temporary()
            self._end(self.reason)
        time.sleep(PATIENCE)  # by now this process has ended, unless a library waits for what is lost
        self._remove_temporary()
        self._end("")

    def _remove_temporary(self) -> None:
        if self.temporary:
            shutil.rmtree(self.temporary, ignore_errors=True)


def end_this_process(reason: str) -> None:
    """Print the error, if there is one, and end: the main thread waits in a collective operation that would not."""
    if reason:
        with contextlib.suppress(OSError, ValueError):
            print(f"\nerror: {reason}\nhint: {HINT}", file=sys.stderr, flush=True)
    os._exit(1)


HINT = "its own console says more; correct that, and start every machine again, with --resume if the run had begun"


def _ask_when_idle(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    values = ((idle, KEEPALIVE_IDLE), ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL), ("TCP_KEEPCNT", KEEPALIVE_PROBES))
    for name, value in values:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- how the connections are made -----------------------------------------------------------------------------------


def listen() -> tuple[socket.socket, int, str]:
    """The first process's socket, and what the others need to connect to it: its port, and a token to know them by."""
    try:
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # a system without IPv6
        server = socket.create_server(("", 0))
    return server, server.getsockname()[1], secrets.token_hex(16)


def accept(server: socket.socket, token: str, ranks: set[int], seconds: float) -> dict[int, socket.socket]:
    """The connections of other processes, by rank; those of them that came within so many seconds."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + seconds
    with server:
        while not ranks <= set(found) and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                rank = _greeting(connection, token.encode())
            except OSError:
                continue
            if rank in ranks:
                found[rank] = connection
            else:  # a program that scans ports
                connection.close()
    return found


def _greeting(connection: socket.socket, token: bytes) -> int:
    """The rank of who has connected; -1 for a stranger. Raises OSError when nothing is said within GREETING."""
    until, said = time.monotonic() + GREETING, b""
    while len(said) < len(token) + RANK_DIGITS and token.startswith(said[: len(token)]):
        connection.settimeout(max(0.001, until - time.monotonic()))
        part = connection.recv(len(token) + RANK_DIGITS - len(said))
        if not part:
            break
        said += part
    known, rank = said[: len(token)] == token, said[len(token) :]
    return int(rank) if known and len(rank) == RANK_DIGITS and rank.isdigit() else -1


def connect(address: str, port: int, token: str, rank: int, seconds: float) -> socket.socket:
    """This process's connection to the first. Raises OSError."""
    connection = socket.create_connection((address, port), timeout=seconds)
    connection.sendall(f"{token}{rank:0{RANK_DIGITS}}".encode())
    return connection
