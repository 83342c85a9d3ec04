"""The document of a conversation: what the page shows, and the server keeps as a file.

One document is one tree of questions and answers with one root. It keeps what a training tree cannot hold: unfinished
nodes, several answers to one question, marks, and how often each choice was picked. So `parse_conversation` asks only
for its form; what a training tree asks for is checked in `own_trees`. Keys that it does not know are left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conversation.format.calls import NUM_FOLLOW_UPS

VERSION = 1
MAX_NODES = 5000
MAX_TEXTS = 20  # in one node: more than an answer has, as a document may hold what is yet to be corrected
MAX_CHARACTERS = 4000  # of any text
MAX_PROBLEMS = 20
IDENTIFIER = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
"""A document's id, a UUID in lower case: also the name of its file."""
_NODE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}", re.ASCII)


class ConversationError(ValueError):
    """A value that is not the document of a conversation; `problems` says what is wrong and where in it."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Choice:
    """A follow-up as the reader sees it, perhaps corrected. Nothing is checked but its types."""

    text: str
    confidence: float
    target: str


@dataclass(frozen=True)
class Node:
    """A question and its answer. `from_choice`: which choice of the parent it follows; None for an own question."""

    id: str
    parent: str | None
    question: str
    fragments: tuple[str, ...]
    choices: tuple[Choice, ...]
    from_choice: int | None
    state: str  # "whole" or "draft"
    mark: str | None  # "good" or "bad"
    favourite: bool
    corrected: bool
    picked: tuple[int, ...]
    created: str


@dataclass(frozen=True)
class Conversation:
    """A document. `nodes` by their ids, in the document's order; exactly one has no parent, and all hang from it."""

    id: str
    title: str
    created: str
    revision: int
    current: str
    nodes: dict[str, Node]

    @property
    def root(self) -> Node:
        return next(node for node in self.nodes.values() if node.parent is None)

    def children(self, node: Node) -> list[Node]:
        """In the order of their creation."""
        found = [each for each in self.nodes.values() if each.parent == node.id]
        return sorted(found, key=lambda each: each.created)


def parse_conversation(value: Any) -> Conversation:
    """Read a document from JSON. Raises ConversationError with the first 20 problems."""
    found = _Finder()
    document = found.fields(value, "the document", _DOCUMENT)
    nodes: dict[str, Node] = {}
    raw_nodes = document.get("nodes", {})
    if len(raw_nodes) > MAX_NODES:
        found.add("nodes", f"there are {len(raw_nodes)}, at most {MAX_NODES} are kept")
        raw_nodes = {}
    for name, raw in raw_nodes.items():
        node = _parse_node(found, name, raw)
        if node:
            nodes[name] = node
        if len(found.problems) >= MAX_PROBLEMS:
            break
    if not found.problems:
        for problem in _shape_problems(nodes, document["current"]):
            found.add(*problem)
    if found.problems:
        raise ConversationError(found.problems[:MAX_PROBLEMS])
    return Conversation(
        document["id"], document["title"], document["created"], document["revision"], document["current"], nodes
    )


def _parse_node(found: _Finder, name: str, raw: Any) -> Node | None:
    place = f"nodes.{name[:100]}"
    before = len(found.problems)
    if not _NODE_ID.fullmatch(name):
        found.add(place, "an id has 1 to 100 letters, digits, or _ . : -")
    node = found.fields(raw, place, _NODE)
    choices = []
    for number, choice in enumerate(node.get("choices", ())):
        fields = found.fields(choice, f"{place}.choices[{number}]", _CHOICE)
        if len(fields) == len(_CHOICE):
            choices.append(Choice(**fields))
    if len(found.problems) > before:
        return None
    if node["id"] != name:
        found.add(f"{place}.id", f"{node['id']!r} is not the key under which it stands")
    texts, picked = tuple(node["fragments"]), tuple(node["picked"] or (0,) * NUM_FOLLOW_UPS)
    return Node(**{**node, "fragments": texts, "choices": tuple(choices), "picked": picked})


def _shape_problems(nodes: dict[str, Node], current: str) -> Iterator[tuple[str, str]]:
    """Where the nodes are not one tree: (place, problem)."""
    roots = [name for name, node in nodes.items() if node.parent is None]
    if len(roots) != 1:
        yield "nodes", f"{len(roots)} have no parent, expected one: the root"
    for name, node in nodes.items():
        if node.parent is not None and node.parent not in nodes:
            yield f"nodes.{name}.parent", f"there is no node {node.parent!r}"
    if current not in nodes:
        yield "current", f"there is no node {current!r}"
    children: dict[str | None, list[str]] = {}
    for name, node in nodes.items():
        children.setdefault(node.parent, []).append(name)
    todo, reached = list(roots), set(roots)
    while todo:
        below = children.get(todo.pop(), [])
        todo += below
        reached.update(below)
    for name, node in nodes.items():
        if name not in reached and node.parent in nodes:
            yield f"nodes.{name}.parent", "leads in a circle, not to the root"


# --- the form of a field ---------------------------------------------------------------------------------------------


class _Finder:
    """Collects problems, and takes the fields out of an object."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.problems.append(f"{place}: {problem}")

    def fields(self, value: Any, place: str, form: dict[str, Any]) -> dict[str, Any]:
        """The fields of `form` in an object that have the right form; the others are reported."""
        if not isinstance(value, dict):
            self.add(place, "is not an object")
            return {}
        taken = {}
        for name, (check, expected, optional) in form.items():
            if name not in value and optional is not _NEEDED:
                taken[name] = optional
            elif name not in value:
                self.add(f"{place}.{name}", "is missing")
            elif check(value[name]):
                taken[name] = value[name]
            else:
                self.add(f"{place}.{name}", f"is not {expected}")
        return taken


_NEEDED = object()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_CHARACTERS


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53  # what a browser counts exactly


def _is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**53)


def _one_of(*values: Any) -> Any:
    return lambda value: any(value is each or (isinstance(each, str) and value == each) for each in values)


_text = (_is_text, f"a text of at most {MAX_CHARACTERS} characters", _NEEDED)
_switch = (lambda value: isinstance(value, bool), "true or false", False)
_DOCUMENT: dict[str, Any] = {
    "version": (lambda value: type(value) is int and value == VERSION, f"{VERSION}", _NEEDED),
    "id": (lambda value: isinstance(value, str) and bool(IDENTIFIER.fullmatch(value)), "a UUID", _NEEDED),
    "title": _text,
    "created": _text,
    "revision": (_is_count, "a whole number, 0 or more", _NEEDED),
    "current": _text,
    "nodes": (lambda value: isinstance(value, dict) and bool(value), "an object with at least one node", _NEEDED),
}
_NODE: dict[str, Any] = {
    "id": _text,
    "parent": (lambda value: value is None or _is_text(value), "the id of a node, or null", _NEEDED),
    "question": _text,
    "fragments": (
        lambda value: isinstance(value, list) and len(value) <= MAX_TEXTS and all(map(_is_text, value)),
        f"a list of at most {MAX_TEXTS} texts",
        _NEEDED,
    ),
    "choices": (
        lambda value: isinstance(value, list) and len(value) <= MAX_TEXTS,
        f"a list of at most {MAX_TEXTS} choices",
        _NEEDED,
    ),
    "from_choice": (
        lambda value: value is None or (type(value) is int and 0 <= value < NUM_FOLLOW_UPS),
        "0, 1, 2 or null",
        None,
    ),
    "state": (_one_of("whole", "draft"), 'one of "whole" and "draft"', _NEEDED),
    "mark": (_one_of("good", "bad", None), 'one of "good", "bad" and null', None),
    "favourite": _switch,
    "corrected": _switch,
    "picked": (
        lambda value: isinstance(value, list) and len(value) == NUM_FOLLOW_UPS and all(map(_is_count, value)),
        f"a list of {NUM_FOLLOW_UPS} whole numbers",
        (),
    ),
    "created": _text,
}
_CHOICE: dict[str, Any] = {
    "text": _text,
    "confidence": (_is_number, "a number", _NEEDED),
    "target": _text,
}
