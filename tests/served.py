"""A server at work for tests: the real one, on a free port, over an engine that answers at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from conversation.answering.answer_queue import AnswerQueue
from conversation.answering.constrained import Written
from conversation.answering.decoding import CONSTRAINED
from conversation.answering.guard import Access
from conversation.answering.listening import listen
from conversation.answering.server import Service, make_app
from conversation.format.calls import FollowUp, Prompt
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT
from conversation.runs.conversation_files import ConversationFiles

MODEL = "fake-model"
FRAGMENTS = ("A pattern for chaining.", "Like a box with rules.")
FOLLOW_UPS = (
    FollowUp("Example?", "0.55", "monad_example"),
    FollowUp("Why use it?", "0.21", "monad_why"),
    FollowUp("vs a functor?", "0.16", "monad_vs_functor"),
)


def written(part: str | FollowUp) -> Written:
    """A call as a model writes it, of some tokens more than it has words."""
    values = (part,) if isinstance(part, str) else (part.text, part.confidence, part.target)
    return Written(ADD_TEXT if isinstance(part, str) else ADD_CHOICE, values, [7] * (4 + len(values[0].split())))


CALLS = tuple(map(written, (*FRAGMENTS, *FOLLOW_UPS)))


class FakeEngine:
    """Answers every question alike, as fast as `pace` seconds a part; `asked` are the prompts that it got.

    `hold` is an event to wait for before each part, or each from number `held_from` on, to keep an answer at work.
    """

    name = "fake-model, q8_0"  # what is shown; the model's id is MODEL
    program = "fake"
    device = "cpu (fake)"
    context = 2048

    def __init__(self, pace: float = 0.0):
        self.pace = pace
        self.asked: list[Prompt] = []
        self.decodings: list = []
        self.stopped_after: list[int] = []  # parts, of each answer that ended early
        self.hold = threading.Event()
        self.hold.set()
        self.held_from = 0
        self.fails: BaseException | None = None

    def count_tokens(self, prompt: Prompt) -> int:
        return len(prompt.text.split())

    def warm_up(self) -> None:
        pass

    def stream(self, prompt, stopped=lambda: False, decoding=CONSTRAINED):
        self.asked.append(prompt)
        self.decodings.append(decoding)
        if self.fails:
            raise self.fails
        for number, written in enumerate(CALLS):
            ends = time.monotonic() + self.pace
            while time.monotonic() < ends or not (self.hold.is_set() or number < self.held_from):
                if stopped():
                    self.stopped_after.append(number)
                    return
                time.sleep(0.002)
            if stopped():
                self.stopped_after.append(number)
                return
            yield written


@contextlib.contextmanager
def serving(folder: Path, engine=None, access: Access | None = None, open_engine=None, web: Path | None = None):
    """A server in a thread; `port`, `engine`, `queue`, `call`, `url`."""
    engine = engine or FakeEngine()
    listener = listen("127.0.0.1", 0)
    queue = AnswerQueue(open_engine or (lambda: engine))
    web = web or _small_page(folder / "web")
    files = ConversationFiles(folder / "conversations", folder / "own_trees")
    app = make_app(Service(queue, files, MODEL, web), access or Access())
    port = listener.getsockname()[1]
    stopping: dict = {}
    thread = threading.Thread(target=_run, args=(app, listener, queue, stopping), daemon=True)
    thread.start()
    while not (queue.engine or queue.failure or open_engine):
        time.sleep(0.005)
    try:
        yield SimpleNamespace(
            port=port, engine=engine, queue=queue, folder=folder, url=f"http://127.0.0.1:{port}", call=Caller(port)
        )
    finally:
        engine.hold.set()
        stopping["loop"].call_soon_threadsafe(stopping["end"])
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


def _small_page(web: Path) -> Path:
    web.mkdir(exist_ok=True)
    (web / "index.html").write_text("<!doctype html><title>page</title>")
    (web / "app.js").write_text("export {};")
    return web


def _run(app, listener, queue, stopping):
    import asyncio

    from conversation.answering import listening

    async def serve():
        server = listening.make_server(app)
        stopping["loop"] = asyncio.get_running_loop()

        def end():
            queue.end()
            server.should_exit = True

        stopping["end"] = end
        await listening.serve(server, listener, queue, lambda: None)

    asyncio.run(serve())


class Caller:
    """A plain client: `status, headers, body = call("POST", path, value)`; a value is sent as JSON."""

    def __init__(self, port: int):
        self._port = port

    def __call__(self, method: str, path: str, value=None, headers=None, body: bytes | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        sent = dict(headers or {})
        if value is not None:
            body = json.dumps(value).encode()
            sent.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        kind = response.headers.get("content-type", "")
        found = json.loads(data) if kind.startswith("application/json") else data.decode("utf-8", "replace")
        return response.status, response.headers, found

    def events(self, value, **options):
        """The events of an answer, as (name, data) pairs."""
        status, _, text = self("POST", "/api/answer", value, **options)
        assert status == 200, text
        return parse_events(text)


def parse_events(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event", "message"), json.loads(lines["data"])))
    return found
