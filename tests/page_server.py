"""A server for the tests of the page: the API that the page uses, with an engine that answers from the project's trees.

    python tests/page_server.py PORT FOLDER [--pause SECONDS]

It answers a question that stands in a tree as the tree does, and any other by a fixed pattern, a value every `pause`
seconds. Words in a question change that: "broken" breaks off after a fragment, "failing" is refused by the engine,
"busy" gets a 429 twice. `GET /test/log` tells which questions were asked, and which of them were given up;
`GET /test/let?NUMBER` lets so many more events out, of whatever answer, and `GET /test/let?all` all of them again.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
WEB = PROJECT / "conversation" / "answering" / "web"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
TREES = ("conversation_trees/systems/bgp_routing", "core_trees/systems/mutex")
CONFIDENCES = (0.57, 0.22, 0.13)


@cache
def known_answers() -> dict:
    """(question, number of lines of history) -> (fragments, choices), from a few of the project's trees."""
    answers = {}
    for name in TREES:
        tree = json.loads((PROJECT / "data" / f"{name}.json").read_text(encoding="utf-8"))
        todo = [(tree["question"], 0, tree["root"])]
        while todo:
            question, lines, node = todo.pop()
            texts, choices = tree["nodes"][node]["texts"], tree["nodes"][node]["choices"]
            answers[question, lines] = texts, [(c["text"], c["confidence"], c["target"]) for c in choices]
            below = [c for c in choices if c["target"] in tree["nodes"]]
            todo += [(c["text"], lines + 1 + len(texts), c["target"]) for c in below]
    return answers


def answer_to(question: str, history: list, seed: int | None = None) -> tuple:
    """(fragments, choices) for any question; a seed makes it another answer, unless it asks for the same."""
    if seed is not None and "same" not in question:
        fragments, choices = answer_to(question, history)
        return [*fragments[:3], f"Drawn with seed {seed}."], choices
    known = known_answers().get((question, len(history)))
    if known:
        return known
    depth = sum(line["speaker"] == "User" for line in history)
    word = (re.findall(r"[A-Za-z0-9]+", question) or ["that"])[-1].lower()
    fragments = [f"First, about {word} at depth {depth}.", f"Second, {word} after {len(history)} lines."]
    texts = (f"Example of {word[:20]}?", f"Why {word[:20]}?", f"Limits of {word[:20]}?")
    return fragments, [(t, c, f"{word}_{i}") for i, (t, c) in enumerate(zip(texts, CONFIDENCES, strict=True))]


class PageServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, port: int, folder: Path, pause: float):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.pause = folder, pause
        self.lock = threading.Lock()
        self.engine = threading.Lock()
        self.asked: list[dict] = []
        self.refused: dict[str, int] = {}
        self.let: int | None = None  # how many events may go out; None: all


class Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def json(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, message, hint="", **headers):
        self.json({"error": {"message": message, "hint": hint}}, status, **headers)

    def body(self):
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")

    def path_of(self, name: str) -> Path:
        return self.server.folder / f"{re.sub('[^a-z0-9-]', '', name)}.json"

    # --- reading ---

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/health":
            self.json({"status": "ok", "model": "answers-from-trees"})
        elif path == "/api/model":
            limits = {"question_root": 60, "question_follow_up": 40}
            self.json({"name": "answers-from-trees", "engine": "scripted", "context": 2048, "limits": limits})
        elif path == "/api/conversations":
            with self.server.lock:  # none is deleted between its listing and its reading
                documents = [json.loads(file.read_text()) for file in self.server.folder.glob("*.json")]
            kept = ("id", "title", "revision")
            self.json([{key: d[key] for key in kept} | {"nodes": len(d["nodes"]), "changed": ""} for d in documents])
        elif path.startswith("/api/conversations/"):
            with self.server.lock:
                file = self.path_of(path.split("/")[3])
                document = json.loads(file.read_text()) if file.exists() else None
            self.json(document) if document else self.error(404, "There is no such conversation.")
        elif path == "/test/log":
            with self.server.lock:
                self.json({"asked": self.server.asked})
        elif path == "/test/let":
            number = self.path.split("?")[1]
            with self.server.lock:
                self.server.let = None if number == "all" else int(number)
            self.json({})
        else:
            self.static("index.html" if path == "/" else path.removeprefix("/static/"))

    def static(self, name):
        file = WEB / name
        if file.parent != WEB or not file.is_file():
            return self.error(404, "There is no such file.")
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", TYPES[file.suffix])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # --- writing ---

    def do_PUT(self):
        document = self.body()
        file = self.path_of(document["id"])
        with self.server.lock:
            stored = json.loads(file.read_text()) if file.exists() else {"revision": 0}
            if file.exists() and stored["revision"] != document["revision"]:
                return self.json({**stored, "error": {"message": "saved by another tab meanwhile"}}, 409)
            for name, node in document["nodes"].items():
                kept = stored.get("nodes", {}).get(name, node)["picked"]
                node["picked"] = [max(pair) for pair in zip(node["picked"], kept, strict=True)]
            document["revision"] = stored["revision"] + 1
            self.write(file, document)
            self.json({"revision": document["revision"]})  # locked: once /test/log answers, this answer is out

    def do_DELETE(self):
        file = self.path_of(self.path.split("/")[3])
        with self.server.lock:  # as in do_PUT
            if not file.exists():
                return self.error(404, "There is no such conversation.")
            file.unlink()
            self.json({})

    def do_POST(self):
        body = self.body()
        if self.path == "/api/answer":
            self.answer(body)
        elif self.path.endswith("/training_tree"):
            document = json.loads(self.path_of(self.path.split("/")[3]).read_text())
            if "refused" in document["title"]:
                problems = ["nodes.a: too few texts"]
                return self.json(
                    {"error": {"message": "this cannot be trained yet", "hint": "put it right", "problems": problems}},
                    422,
                )
            self.json({"path": "training-runs/own_trees/own/tree.json", "warnings": ["One fragment occurs twice."]})

    @staticmethod
    def write(file, document):
        part = file.with_suffix(".part")
        part.write_text(json.dumps(document))
        part.replace(file)

    # --- answers ---

    def answer(self, body):
        question, prefetch = body["question"], bool(body.get("prefetch"))
        entry = {"question": question, "history": body["history"], "prefetch": prefetch, "ended": None}
        with self.server.lock:
            self.server.asked.append(entry)
            refused = self.server.refused.get(question, 0)
            self.server.refused[question] = refused + 1
        if "busy" in question and refused < 2:
            return self.error(429, "too many questions at once", "try again", Retry_After="1")
        if "failing" in question:
            return self.error(400, "the engine cannot answer this", "ask another question")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            with self.server.engine:
                self.stream(question, body["history"], body.get("seed"))
            entry["ended"] = "whole"
        except (BrokenPipeError, ConnectionResetError):
            entry["ended"] = "given up"

    def stream(self, question, history, seed):
        began = time.monotonic()
        fragments, choices = answer_to(question, history, seed)
        if "broken" in question:
            self.event("fragment", {"text": fragments[0]})
            return
        for text in fragments:
            self.event("fragment", {"text": text})
        for text, confidence, target in choices:
            self.event("choice", {"text": text, "confidence": confidence, "target": target})
        self.event("done", {"seconds": time.monotonic() - began})

    def event(self, name, data):
        deadline = time.monotonic() + self.server.pause * (4 if "slow" in json.dumps(data) else 1)
        while (left := deadline - time.monotonic()) > 0 or not self.may_go_out():
            time.sleep(min(left, 0.02) if left > 0 else 0.02)
            self.send(": waiting\n\n")  # notices a client that left
        self.send(f"event: {name}\ndata: {json.dumps(data)}\n\n")

    def may_go_out(self) -> bool:
        with self.server.lock:
            if self.server.let is None:
                return True
            may = self.server.let > 0
            self.server.let -= may
            return may

    def send(self, text):
        self.wfile.write(text.encode())
        self.wfile.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=float, default=0.02)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    known_answers()
    PageServer(options.port, options.folder, options.pause).serve_forever()
