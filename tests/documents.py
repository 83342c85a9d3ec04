"""Documents of conversations, for tests, and a change at any place of a JSON value."""

from __future__ import annotations

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
DELETE = object()
CHOICES = ((0.55, "example"), (0.21, "why"), (0.16, "limits"))


def node(name, question, parent=None, from_choice=None, **changed):
    value = {
        "id": name,
        "parent": parent,
        "question": question,
        "fragments": [f"{name} says this.", f"And {name} says that."],
        "choices": [
            {"text": f"{name} {word}?", "confidence": confidence, "target": f"{name}_{word}"}
            for confidence, word in CHOICES
        ],
        "from_choice": from_choice,
        "state": "whole",
        "mark": None,
        "favourite": False,
        "corrected": False,
        "picked": [0, 0, 0],
        "created": f"2026-11-26T10:00:{len(name):02}Z",
    }
    return {**value, **changed}


def document(*nodes, identifier=ID, **changed) -> dict:
    """A conversation; without nodes: a root, its first choice followed, and an own question after that."""
    nodes = nodes or (
        node("a", "What's a monad?"),
        node("ab", "a example?", "a", 0),
        node("abc", "Is it like a burrito?", "ab", created="2026-11-26T10:01:00Z"),
    )
    value = {
        "version": 1,
        "id": identifier,
        "title": "Monads",
        "created": "2026-11-26T10:00:00Z",
        "revision": 0,
        "current": nodes[0]["id"],
        "nodes": {each["id"]: each for each in nodes},
    }
    return {**value, **changed}


def put(value, path, new):
    """Set what stands at a path of keys; with DELETE, remove it."""
    *way, last = path
    for key in way:
        value = value[key]
    if new is DELETE:
        del value[last]
    else:
        value[last] = new
