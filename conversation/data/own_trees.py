"""A conversation becomes a training tree: whole answers only, one node a choice, names by rule.

What a conversation has and a tree has not: a node that is unfinished or marked as bad is left out with all below it; of
several answers to one question the best marked, then the newest, is taken; an own question takes the place of the least
likely choice that was not followed. What cannot be put right by rule is a problem, and the reader is told which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conversation.data.conversations import Choice, Conversation, Node
from conversation.data.core import STOCK_FORMS
from conversation.data.figures import FUNCTION_WORDS
from conversation.data.quality import MAX_FOLLOW_UP, MAX_FRAGMENT, Found, Pair, assess, words
from conversation.data.trees import Tree, TreeError, format_tree, parse_tree
from conversation.format.calls import MAX_FRAGMENTS, NUM_FOLLOW_UPS, repeated, target_problem, text_problem
from conversation.format.grammar import MAX_CHARACTERS, Value

OWN_DOMAIN = "conversations"  # the folder of these trees in a data folder
MAX_ROOT_QUESTION = 60
_LONGEST_NAME = MAX_CHARACTERS[Value.TARGET]
_KIND_OF = {form.casefold(): kind for kind, forms in STOCK_FORMS.items() for form in forms}


@dataclass(frozen=True)
class OwnTree:
    """A training tree made from a conversation: its file's bytes, the tree that they hold, and what was decided."""

    tree: Tree
    data: bytes
    warnings: tuple[str, ...]


@dataclass
class _Place:
    """A node on its way into the tree: its choices, and the node that each leads to, if any."""

    node: Node
    choices: list[Choice]
    followed: list[_Place | None] = field(default_factory=list)


def training_tree(conversation: Conversation, leave_out: Collection[str] = ()) -> OwnTree:
    """Make the tree, without the nodes of these ids. Raises TreeError with every problem that only the reader can put
    right."""
    maker = _Maker(conversation, leave_out)
    root = maker.place(conversation.root)
    if maker.problems:
        raise TreeError(list(dict.fromkeys(maker.problems)))
    name = f"{_slug(conversation.root.question, 40)}_{conversation.id[:8]}"
    content = _content(root, name)
    data = format_tree(content).encode()
    return OwnTree(parse_tree(data, name, OWN_DOMAIN), data, tuple(maker.warnings))


class _Maker:
    def __init__(self, conversation: Conversation, leave_out: Collection[str]):
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._children: dict[str | None, list[Node]] = {}
        for node in sorted(conversation.nodes.values(), key=lambda each: each.created):
            if node.id in leave_out and node.parent is not None:
                continue
            self._children.setdefault(node.parent, []).append(node)
        root = conversation.root
        if root.state != "whole":
            self.problems.append(f"{_named(root)} has no whole answer yet")
        elif root.mark == "bad":
            self.problems.append(f"{_named(root)} is marked as bad, and nothing is left without it")
        self._check_text("the first question", root.question, MAX_ROOT_QUESTION)

    def place(self, root: Node) -> _Place:
        """The nodes that the tree gets, from the root down."""
        top = self._checked(root)
        todo = [top]
        while todo:
            place = todo.pop(0)
            self._sort_in(place)
            todo += [each for each in place.followed if each]
        return top

    def _sort_in(self, place: _Place) -> None:
        """Find out which child each choice leads to; an own question gets a choice."""
        offered = [tuple(words(choice.text)) for choice in place.choices]
        answers: dict[int, list[Node]] = {}
        own: dict[tuple[str, ...], list[Node]] = {}
        for child in self._usable(place.node):
            asked = tuple(words(child.question))
            if asked in offered:
                answers.setdefault(offered.index(asked), []).append(child)
            else:
                own.setdefault(asked, []).append(child)
        taken = {number: self._best(nodes) for number, nodes in answers.items()}
        for child in map(self._best, own.values()):
            free = [number for number in range(len(place.choices)) if number not in taken]
            if free:
                place_of = child.from_choice if child.from_choice in free else _least_likely(place.choices, free)
                taken[place_of] = child
                self._put_in(child, place, place_of)
            elif len(place.choices) == NUM_FOLLOW_UPS:
                self.problems.append(
                    f"your own question {_named(child)} has no place after {_named(place.node)}: its three choices are "
                    "all followed; mark one of the four as bad"
                )
        place.followed += [self._checked(taken[n]) if n in taken else None for n in range(len(place.choices))]

    def _put_in(self, child: Node, place: _Place, number: int) -> None:
        """An own question, or a choice that was reworded before it was asked, becomes the choice of this number."""
        old = place.choices[number]
        place.choices[number] = replace(old, text=_one_line(child.question), target="")
        self.warnings.append(f"{_named(child)} stands in the place of {_quoted(old.text)}")
        self._check_text(f"the question {_named(child)}", child.question, MAX_FOLLOW_UP)

    def _usable(self, parent: Node) -> list[Node]:
        children = self._children.get(parent.id, [])
        for child in children:
            if child.mark == "bad":
                self.warnings.append(f"left out, as it is marked as bad: {_named(child)}")
            elif child.state != "whole":
                self.warnings.append(f"left out, as its answer is not whole: {_named(child)}")
        return [child for child in children if child.mark != "bad" and child.state == "whole"]

    def _best(self, nodes: Sequence[Node]) -> Node:
        """Of several answers to one question: one marked as good, a favourite, a corrected one, the newest."""
        best = max(nodes, key=lambda node: (node.mark == "good", node.favourite, node.corrected, node.created))
        if len(nodes) > 1:
            self.warnings.append(f"{_named(best)} was answered {len(nodes)} times, one answer is taken")
        return best

    def _checked(self, node: Node) -> _Place:
        """Report what a tree cannot hold, and clean what only needs cleaning."""
        what = f"the answer to {_quoted(node.question)}"
        if not 1 <= len(node.fragments) <= MAX_FRAGMENTS:
            self.problems.append(f"{what} has {len(node.fragments)} fragments, expected 1 to {MAX_FRAGMENTS}")
        if len(node.choices) != NUM_FOLLOW_UPS:
            self.problems.append(f"{what} has {len(node.choices)} choices, expected {NUM_FOLLOW_UPS}")
        for number, fragment in enumerate(node.fragments, 1):
            self._check_text(f"fragment {number} of {what}", fragment, MAX_FRAGMENT)
        for number, choice in enumerate(node.choices, 1):
            self._check_text(f"choice {number} of {what}", choice.text, MAX_FOLLOW_UP)
            if not 0 <= choice.confidence <= 1:
                self.problems.append(f"choice {number} of {what} has confidence {choice.confidence}, expected 0 to 1")
        for text in repeated([*node.fragments, *(choice.text for choice in node.choices)]):
            self.warnings.append(f"{what} says {_quoted(text)} twice")
        return _Place(node, [replace(each, text=_one_line(each.text)) for each in node.choices])

    def _check_text(self, what: str, text: str, most: int) -> None:
        if found := text_problem(text, what):
            self.problems.append(found[0])
        elif len(_one_line(text)) > most:
            self.problems.append(f"{what} has {len(_one_line(text))} characters, at most {most} can be trained")


def _least_likely(choices: Sequence[Choice], among: Sequence[int]) -> int:
    """The number of the least likely choice, of two alike the later."""
    return min(among, key=lambda number: (choices[number].confidence, -number))


# --- what is written -------------------------------------------------------------------------------------------------


def _content(root: _Place, name: str) -> dict[str, Any]:
    """The tree as JSON. Targets stay as they are where they can; a new one follows the rule of the core set."""
    topic = _slug(root.node.question, _LONGEST_NAME)
    used = {name}
    nodes: dict[str, Any] = {}
    todo = [(name, topic, root)]
    while todo:
        at, stem, place = todo.pop(0)
        order = sorted(range(NUM_FOLLOW_UPS), key=lambda number: -place.choices[number].confidence)
        choices = []
        for number in order:
            choice = place.choices[number]
            target = choice.target
            if target_problem(target) or len(target) > _LONGEST_NAME or target in used:
                target = _free_name(f"{stem}_{_kind(choice.text)}", _slug(choice.text, _LONGEST_NAME), used)
            used.add(target)
            choices.append({"text": choice.text, "confidence": _two_decimals(choice.confidence), "target": target})
            if child := place.followed[number]:
                todo.append((target, target, child))
        nodes[at] = {"texts": [_one_line(text) for text in place.node.fragments], "choices": choices}
    return {"question": _one_line(root.node.question), "root": name, "nodes": nodes}


def _kind(question: str) -> str:
    """What a target's name ends in: the kind of a stock form, `vs_x`, or the question's last word with content."""
    if kind := _KIND_OF.get(_one_line(question).casefold()):
        return kind
    if versus := re.match(r"vs\.? (?:an? |the )?(.+)", _one_line(question), re.IGNORECASE):
        return f"vs_{_slug(versus[1], 20)}"
    return _slug(question, 20).rsplit("_", 1)[-1]


def _slug(text: str, longest: int) -> str:
    """A snake_case name from the words of a text that carry content, or from all where none does."""
    found = re.findall(r"[a-z0-9]+", text.casefold().replace("'", "").replace("’", ""))
    chosen = [word for word in found if word not in FUNCTION_WORDS and word not in ("whats", "s")] or found or ["node"]
    name = chosen[0][:longest]
    for word in chosen[1:]:
        if len(name) + 1 + len(word) > longest:
            break
        name += f"_{word}"
    return name


def _free_name(wanted: str, shorter: str, used: set[str]) -> str:
    """`wanted` if it is free and short enough, else `shorter`, else that with a number."""
    for name in (wanted, shorter):
        if len(name) <= _LONGEST_NAME and name not in used:
            return name
    number = 2
    while (name := f"{shorter[: _LONGEST_NAME - 5].rstrip('_')}_{number}") in used:
        number += 1
    return name


def _two_decimals(confidence: float) -> float:
    return float(f"{confidence:.2f}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _named(node: Node) -> str:
    return _quoted(node.question)


def _quoted(text: str) -> str:
    line = _one_line(text)
    return json.dumps(line if len(line) <= 60 else f"{line[:57]}...", ensure_ascii=False)


# --- the checks of the data ------------------------------------------------------------------------------------------


def remarks(tree: Tree, others: Sequence[Tree]) -> list[str]:
    """What the checks of the data say of a tree among others: texts to look at, a sentence each."""
    quality = assess([tree, *(each for each in others if each.name != tree.name)])
    own = f"{tree.domain}/{tree.name}"
    found: list[str] = []

    def note(items: Sequence[Found], what: str) -> None:
        found.extend(f"{what}: {_quoted(item.text)}" for item in items if item.place.tree == own)

    def compare(pairs: Sequence[Pair], what: str) -> None:
        for pair in pairs:
            if own in (pair.first.place.tree, pair.second.place.tree):
                where = [item for item in (pair.first, pair.second) if item.place.tree != own]
                found.append(f"{what}: {_quoted(pair.first.text)} and {_quoted(pair.second.text)}")
                found[-1] += f", in {where[0].place.tree}" if where else ""

    note(quality.unordered_confidences, "confidences that do not fall")
    note(quality.boilerplate, "an empty phrase")
    note(quality.test_questions, "the structural tests ask about this, so it should not be trained")
    note(quality.repeated_follow_ups, "a follow-up that was offered or asked before")
    compare(quality.repeated_questions, "asked twice")
    compare(quality.repeated_fragments, "said twice")
    compare(quality.near_questions, "nearly the same question")
    compare(quality.near_fragments, "nearly the same text")
    return found
