"""What the tests of the page share: a server that can be killed, a page in Chromium, and what a reader does in it.

Needs Chromium (on Debian: apt-get install chromium); without it every test of the page is skipped.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from ports import port_for_later

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUESTION = "How does the internet find a route?"
FIRST, SECOND, THIRD = (
    "Which of several routes wins?",
    "Can I announce your addresses?",
    "Can a big site vanish altogether?",
)
PROTECTION, STOLEN = "Is there no protection?", "Has money been stolen that way?"
PATIENCE = 60_000  # milliseconds; the machine may be busy


class Server:
    """The scripted server as a process of its own, so that it can be killed and started again at its place."""

    def __init__(self, folder: Path, pause: float):
        self.port = port_for_later()
        self.folder, self.pause, self.process = folder, pause, None
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self):
        script = Path(__file__).with_name("page_server.py")
        command = [sys.executable, str(script), str(self.port), str(self.folder), "--pause", str(self.pause)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.get("health")
                return
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None, "the test server did not start"
                time.sleep(0.05)

    def kill(self):
        self.process.kill()
        self.process.wait()

    @contextmanager
    def held(self):
        """It says nothing meanwhile: what arrives, arrives later."""
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE / 1000) as answer:
            return json.load(answer)

    def let(self, events="all"):
        """Only so many more events of answers go out: fragments, choices and ends. What is held stays at work."""
        self.get(f"test/let?{events}")

    def asked(self):
        return self.get("test/log")["asked"]

    def documents(self):
        found = []
        for file in sorted(self.folder.glob("*.json")):
            with suppress(FileNotFoundError):  # deleted since it was listed
                found.append(json.loads(file.read_text()))
        return found

    def document(self, until=lambda document: True):
        """The only document, as soon as it is there, `until` is true of it, and the page has been told so."""
        deadline = time.monotonic() + PATIENCE / 1000
        while True:
            found = self.documents()
            if len(found) == 1 and until(found[0]):
                self.asked()
                return found[0]
            assert time.monotonic() < deadline, found
            time.sleep(0.05)


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of other tests
def browser():
    if CHROMIUM is None:
        pytest.skip("the page is tested in Chromium, and there is none on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(pause=0.0):
        servers.append(Server(tmp_path / f"documents-{len(servers)}", pause))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def server(serve):
    return serve()


@contextmanager
def a_page(browser, server, context=None, path="", expected=(), **options):
    """A page on the server. Any error in it, and any request to another host, fails the test."""
    own = context is None
    context = context or browser.new_context(
        **{"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce"} | options
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on("request", lambda request: request.url.startswith((server.url, "blob:")) or faults.append(request.url))
    try:
        page.goto(server.url + path)
        page.wait_for_selector(".status .light:not(.loading)")
        yield page
    finally:
        if own:
            context.close()  # also after a failure: a page that stays goes on working beside the next test
    ordinary = (
        "ERR_CONNECTION_REFUSED",
        "ERR_INCOMPLETE_CHUNKED",
        "ERR_EMPTY_RESPONSE",
        "ERR_CONNECTION_RESET",
        "ERR_CONTENT_LENGTH_MISMATCH",
        "ERR_SOCKET_NOT_CONNECTED",
        *expected,
    )
    unexpected = [fault for fault in faults if not any(word in fault for word in ordinary)]
    assert unexpected == []


@pytest.fixture
def page(browser, server):
    with a_page(browser, server) as page:
        yield page


@pytest.fixture(scope="module")
def modules(browser, tmp_path_factory):
    """Calls the page's own functions: modules("code that may await import('/static/x.js')", what it knows as given)."""
    server = Server(tmp_path_factory.mktemp("modules"), 0)
    with a_page(browser, server) as page:
        yield lambda code, given=None: page.evaluate(f"async (given) => {{ {code} }}", given)
    server.kill()


def node(name, parent="root", text="text", **more):
    """A node as the page keeps it."""
    fields = {"id": name, "parent": parent, "question": f"{name}?", "fragments": [text], "choices": []}
    marks = {"from_choice": None, "state": "whole", "mark": None, "favourite": False, "corrected": False}
    return {**fields, **marks, "picked": [0, 0, 0], "created": "2026", **more}


def tree(*nodes, current="root", title="t"):
    return {"id": "x", "title": title, "revision": 1, "current": current, "nodes": {each["id"]: each for each in nodes}}


ROOT = node("root", None)


def ask(page, question=QUESTION):
    page.fill("#own-question", question)
    page.keyboard.press("Enter")
    arrived(page, question)


def arrived(page, question):
    """Waits until this is the question that is read, with its whole answer."""
    page.locator("#question", has_text=re.compile(f"^{re.escape(question)}$")).wait_for()
    page.locator(".turn.now .choices li").nth(2).wait_for()
    page.locator(".turn.now .actions").wait_for()


def question(page):
    return page.inner_text("#question")


def fragments(page):
    return page.locator(".turn.now .fragment").all_inner_texts()


def nodes(page):
    return page.locator("[role=treeitem]").all_inner_texts()


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def counting_parts(page):
    """Counts what arrives of answers from now on: gives a function that waits for so many parts."""
    page.evaluate(
        """() => { const parse = JSON.parse; window.parts = 0;
        JSON.parse = (text) => { window.parts += 1; return parse(text); }; }"""
    )
    return lambda number: eventually(lambda: page.evaluate("parts"), number)


def eventually(what, *wanted):
    deadline = time.monotonic() + PATIENCE / 1000
    while what() not in wanted:
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def until(page, what):
    """Waits as `eventually` does, and lets the page's requests go on that the test handles itself."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not what():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def grow(page):
    """A tree: the root, two answers to its follow-ups, below the second one two more. Reads the last."""
    ask(page)
    for picked, asked in (
        ("1", FIRST),
        ("k", QUESTION),
        ("2", SECOND),
        ("1", PROTECTION),
        ("k", SECOND),
        ("2", STOLEN),
    ):
        press(page, picked)
        arrived(page, asked)


def kept(page):
    """What the browser keeps of all conversations, as it stands in its storage."""
    return page.evaluate(
        """() => new Promise((resolve) => { indexedDB.open('conversations').onsuccess = ({ target }) => {
            const records = target.result.transaction('conversations').objectStore('conversations').getAll();
            records.onsuccess = () => { target.result.close(); resolve(records.result); }; }; })"""
    )
