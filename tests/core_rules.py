"""The rules of the core set: targets by rule, confidence by kind, few openers.

The core set is for a small model. What the model has to predict must follow from what it can see (data/README.md): the
target of a follow-up from the topic and the kind of the question, the confidences of an answer from the kinds of its
three follow-ups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from conversation.data.core import kind_of
from conversation.format.calls import Answer

_WEIGHT = {"example": 8, "how": 4.5, "why": 4, "own": 4, "vs": 3, "limit": 2.5, "use": 2.5, "origin": 1}
_PLACE = (1, 0.75, 0.6)
_TOTAL = 0.92  # what is left is for readers who ask something else


def confidences(kinds: Sequence[str]) -> tuple[str, ...]:
    """The confidences of three follow-ups of these kinds, falling, with two decimals, 0.92 in sum but for rounding.

    A reader most likely asks for an example where one is offered (0.54 to 0.63); three questions of one rank are near
    each other (0.4, 0.3, 0.2); where a thing comes from is asked seldom (0.05).
    """
    weights = [_WEIGHT[kind] * place for kind, place in zip(kinds, _PLACE, strict=True)]
    return tuple(f"{_TOTAL * weight / sum(weights):.2f}" for weight in weights)


def rule_problems(node: str, answer: Answer) -> list[str]:
    """Where an answer of the core set breaks the rules for targets and confidences; empty when nowhere."""
    problems = [
        f"target {each.target!r} does not begin with its node's name {node!r}"
        for each in answer.follow_ups
        if not each.target.startswith(f"{node}_")
    ]
    expected = confidences([kind_of(each.target, node) for each in answer.follow_ups])
    found = tuple(each.confidence for each in answer.follow_ups)
    if not problems and found != expected:
        problems.append(
            f"confidences {', '.join(found)}, expected {', '.join(expected)} by the kinds of the follow-ups"
        )
    return problems


def opener_perplexity(fragments: Iterable[str]) -> float:
    """exp of the entropy of the first words of some fragments: by how many words they might as well begin."""
    openers = Counter(fragment.split()[0].casefold() for fragment in fragments)
    total = openers.total()
    return math.exp(-sum(count / total * math.log(count / total) for count in openers.values()))
