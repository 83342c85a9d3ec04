"""How readers went on: the shares of the choices that they picked, beside the confidences that a tree gives.

A confidence is the estimated chance that a reader picks a follow-up next. Here it is measured. One conversation counts
as one reader. At a node of a tree each reader who went on there has one vote, divided by how often he picked each
choice or asked something else; who stopped reading there says nothing about it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from conversation.data.conversations import Conversation, Node
from conversation.data.quality import words
from conversation.data.trees import Tree
from conversation.format.calls import NUM_FOLLOW_UPS

Words = tuple[str, ...]
KNOWN_CHOICES = 2
"""A reader counts at a node when at least so many of the tree's three choices were offered or asked there: a model that
offers other follow-ups says nothing about these."""


@dataclass(frozen=True)
class Observed:
    """How readers went on at one node. `shares`: of the tree's choices, in its order; what is missing to 1 went
    elsewhere."""

    readers: int
    shares: tuple[float, ...]


def observe(tree: Tree, conversations: Iterable[Conversation]) -> dict[str, Observed]:
    """By the names of a tree's nodes: what the readers who asked its root question did there."""
    votes: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for conversation in conversations:
        if _key(conversation.root.question) in set(map(_key, tree.questions)):
            for name, nodes in _matched(tree, conversation).items():
                vote = _vote(tree, name, conversation, nodes)
                if vote:
                    votes[name].append(vote)
    return {
        name: Observed(len(found), tuple(sum(column) / len(found) for column in zip(*found, strict=True)))
        for name, found in votes.items()
    }


def with_shares(content: dict[str, Any], observed: dict[str, Observed], min_readers: int) -> dict[str, Any]:
    """A tree's JSON with measured confidences where at least so many readers went on, the likeliest choice first."""
    changed = copy.deepcopy(content)
    for name, found in observed.items():
        if found.readers < min_readers:
            continue
        node = changed["nodes"][name]
        for choice, share in zip(node["choices"], found.shares, strict=True):
            choice["confidence"] = round(share, 2)
        node["choices"].sort(key=lambda choice: -choice["confidence"])
        node["readers"] = found.readers
    return changed


def _matched(tree: Tree, conversation: Conversation) -> dict[str, list[Node]]:
    """The conversation's nodes at each node of the tree: the same questions were asked on the way to both."""
    found: dict[str, list[Node]] = defaultdict(list)
    todo = [(tree.name, conversation.root)]
    while todo:
        name, node = todo.pop()
        found[name].append(node)
        leads_to = {_key(each.text): each.target for each in tree.nodes[name].follow_ups if each.target in tree.nodes}
        for child in conversation.children(node):
            if target := leads_to.get(_key(child.question)):
                todo.append((target, child))
    return found


def _vote(tree: Tree, name: str, conversation: Conversation, nodes: list[Node]) -> tuple[float, ...] | None:
    """One reader's vote for each of a node's choices, at most 1 together; None for a reader who does not count."""
    wanted = [_key(each.text) for each in tree.nodes[name].follow_ups]
    went: dict[Words, int] = defaultdict(int)
    known: set[Words] = set()
    for node in nodes:
        known |= {_key(choice.text) for choice in node.choices}
        for question, times in _ways_on(conversation, node):
            went[question] += times
            known.add(question)
    total = sum(went.values())
    if not total or len(known & set(wanted)) < KNOWN_CHOICES:
        return None
    return tuple(went.get(question, 0) / total for question in wanted)


def _ways_on(conversation: Conversation, node: Node) -> Iterator[tuple[Words, int]]:
    """The questions with which a reader went on from a node, and how often: picked choices, then others."""
    followed: dict[Words, int] = defaultdict(int)
    for child in conversation.children(node):
        followed[_key(child.question)] += 1
    for choice, times in zip(node.choices[:NUM_FOLLOW_UPS], node.picked, strict=False):
        yield _key(choice.text), max(times, followed.pop(_key(choice.text), 0))
    yield from followed.items()


def _key(question: str) -> Words:
    return tuple(words(question))
