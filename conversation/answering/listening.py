"""The server at an address: a free port, one event loop, an end in order."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from conversation.errors import STOPPING, UserError

if TYPE_CHECKING:
    from conversation.answering.answer_queue import AnswerQueue

TRIED_PORTS = 20
HEADER_SECONDS = 20.0  # for the head of a request; a body has its own limit
WRITE_SECONDS = 60.0  # for a client to take what it was sent
KEEP_ALIVE_SECONDS = 75  # longer than the pools of clients keep a connection, which would else fail at random
GRACE_SECONDS = 10  # for the answer at work, when the server is told to end
LAST_SECONDS = 5  # then, for its reader to be told; uvicorn breaks off what is left
MAX_CONNECTIONS = 500


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, at the next free port when this one is in use; 0 takes any.

    A name may have several addresses, such as ::1 and 127.0.0.1: it is the first one that this machine can listen at.
    Raises UserError when there is no such address, and when no port is free or permitted.
    """
    try:
        found = socket.getaddrinfo(host, port or None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"there is no address {host!r} here: {reason}", "127.0.0.1 is this machine alone") from None
    ports = range(port, min(port + TRIED_PORTS, 2**16)) if port else range(1)
    which = f"the ports {port} to {ports[-1]} are all" if len(ports) > 1 else f"the port {port} is"
    problem = in_use = UserError(f"{which} in use", "name another with --port")
    for family, kind, protocol, _, address in found:
        for tried in ports:
            try:
                return _listener(family, kind, protocol, (address[0], tried, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    hint = "name another with --port" if error.errno == errno.EACCES else "name another with --host"
                    problem = UserError(f"cannot listen at {host} port {tried}: {error.strerror or error}", hint)
                    break
        else:  # it is an address of this machine, where a browser would look first: do not take the next one
            problem = in_use
            break
    raise problem


def _listener(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """The address for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def run_server(
    app: Any, listener: socket.socket, queue: AnswerQueue, when_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until Ctrl-C or a signal of STOPPING, or until the queue's engine fails to open, whose error is raised.

    At the first signal no more requests are taken; the answer at work is finished, for at most GRACE_SECONDS, and what
    waits is told, as is who reads an answer that takes longer. At the second all ends at once. `when_ready` is called,
    in a thread of its own, when the engine is open.
    """
    asyncio.run(serve(make_server(app), listener, queue, when_ready, signals=True))
    if queue.failure:
        raise queue.failure


def make_server(app: Any) -> uvicorn.Server:
    """uvicorn with the limits above."""
    config = uvicorn.Config(
        app,
        http=_Patient,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS + LAST_SECONDS,
        limit_concurrency=MAX_CONNECTIONS,
    )
    return uvicorn.Server(config)


async def serve(
    server: uvicorn.Server,
    listener: socket.socket,
    queue: AnswerQueue,
    when_ready: Callable[[], None],
    signals: bool = False,
) -> None:
    """Serve until `server.should_exit`. `signals`: end as `run_server` says; only in the main thread."""

    def end() -> None:
        if server.should_exit:
            server.force_exit = True
            queue.stop(0)
        else:
            server.should_exit = True
            queue.end()

    for number in (signal.SIGINT, *STOPPING) if signals else ():
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP: leave that
            asyncio.get_running_loop().add_signal_handler(number, end)
    queue.start()
    watching = [
        asyncio.create_task(each) for each in (_watch(server, queue, when_ready), _give_up_in_time(server, queue))
    ]
    try:
        await server._serve([listener])  # `serve` would raise the signal again after its end
    finally:
        for task in watching:
            task.cancel()
        await asyncio.to_thread(queue.stop)


async def _watch(server: uvicorn.Server, queue: AnswerQueue, when_ready: Callable[[], None]) -> None:
    """Wait for the engine: then all is ready, or the server ends."""
    while not queue.engine and not queue.failure:
        await asyncio.sleep(0.05)
    if queue.failure:
        server.should_exit = True
    else:
        threading.Thread(target=when_ready, daemon=True).start()


async def _give_up_in_time(server: uvicorn.Server, queue: AnswerQueue) -> None:
    """Once the server is to end, wait for the answer at work, then tell who reads it that the server is ending."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    await asyncio.sleep(GRACE_SECONDS)
    queue.stop(0)


class _Patient(H11Protocol):
    """uvicorn's protocol with limits to its patience: a client that sends half a head, or that does not read, is
    dropped."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            _cancel(self._head_timer)
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer)
        _cancel(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._write_timer or self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._write_timer)
        self._write_timer = None
        super().resume_writing()

    def _expect_head(self) -> None:
        self._head_timer = self._head_timer or self.loop.call_later(HEADER_SECONDS, self._drop)

    def _drop(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()


# --- for the person at the console -----------------------------------------------------------------------------------


class LoadingLine:
    """A line on the console that says what is loaded and, on a terminal, for how long already."""

    def __init__(self, what: str):
        self._what, self._started = what, time.monotonic()
        self._ended = threading.Event()
        self._terminal = sys.stdout.isatty()
        print(what, end="" if self._terminal else "\n", flush=True)
        self._counting = threading.Thread(target=self._count, daemon=True)
        if self._terminal:
            self._counting.start()

    def end(self) -> None:
        """Count no more; what is said next has a line of its own. Does nothing after `done`."""
        if self._terminal and not self._ended.is_set():
            self._stop()
            print(flush=True)

    def done(self) -> None:
        self._stop()
        begin = "\r" if self._terminal else ""
        print(f"{begin}{self._what} done in {time.monotonic() - self._started:.1f} s", flush=True)

    def _stop(self) -> None:
        self._ended.set()
        if self._terminal:
            self._counting.join()

    def _count(self) -> None:
        while not self._ended.wait(0.5):
            print(f"\r{self._what} {time.monotonic() - self._started:.0f} s", end="", flush=True)


def open_browser(url: str) -> bool:
    """Open the page in a graphical browser; False when there is none. A text browser would take the terminal away."""
    import webbrowser

    has_display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not (has_display or os.environ.get("BROWSER")):
        return False
    try:
        return webbrowser.open(url)
    except (webbrowser.Error, OSError):
        return False
