"""The grammar of an answer: the calls it is made of, and what may be written into each value, character by character.

It is narrower than what the parser accepts. A value of text is one line and has a longest length, a confidence has two
decimals. So an answer that is written under it always ends, and is always valid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from conversation.format.calls import call_pieces, target_problem, text_problem
from conversation.format.control_tokens import CONTROL_PATTERN


class Value(Enum):
    """The kinds of values in an answer."""

    RESTATED = "restated question"
    FRAGMENT = "fragment"
    FOLLOW_UP = "follow-up"
    CONFIDENCE = "confidence"
    TARGET = "target"


MAX_CHARACTERS = {
    Value.RESTATED: 160,
    Value.FRAGMENT: 80,
    Value.FOLLOW_UP: 40,
    Value.CONFIDENCE: 4,
    Value.TARGET: 40,
}
"""The longest value of each kind. In the project's own data the longest have 121, 56, 40, 4 and 31 characters."""
CONFIDENCES = frozenset((*(f"0.{hundredths:02d}" for hundredths in range(100)), "1.00"))
"""0.00 to 1.00 as the training data writes them."""
_TARGET_SO_FAR = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*_?")


@dataclass(frozen=True)
class Call:
    """A function and the kinds of its arguments, in the order in which they are written."""

    function: str
    arguments: tuple[tuple[str, Value], ...]

    @property
    def values(self) -> list[Value]:
        return [kind for _, kind in self.arguments]

    def forced_pieces(self) -> list[list[str]]:
        """What surrounds the values: the rendered pieces before each of them, and those after the last."""
        runs: list[list[str]] = [[]]
        for piece in call_pieces(self.function, **dict.fromkeys(dict(self.arguments), "")):
            if piece:
                runs[-1].append(piece)
            else:
                runs.append([])
        return runs


RESTATE = Call("restate", (("question", Value.RESTATED),))
ADD_TEXT = Call("add_text", (("content", Value.FRAGMENT),))
ADD_CHOICE = Call("add_choice", (("text", Value.FOLLOW_UP), ("confidence", Value.CONFIDENCE), ("target", Value.TARGET)))


def is_one_line(text: str) -> bool:
    """Whether a text has no line break of any kind."""
    return len(f"{text}.".splitlines()) == 1


def may_go_on(kind: Value, text: str, control_tokens: re.Pattern[str] = CONTROL_PATTERN) -> bool:
    """Whether a value may read like this so far. It can then always be ended within its longest length."""
    if kind is Value.CONFIDENCE:
        return any(number.startswith(text) for number in CONFIDENCES)
    if kind is Value.TARGET:  # after an underscore another character must still fit
        return bool(_TARGET_SO_FAR.fullmatch(text)) and len(text) + text.endswith("_") <= MAX_CHARACTERS[kind]
    return len(text) <= MAX_CHARACTERS[kind] and is_one_line(text) and text_problem(text, "", control_tokens) is None


def may_end(kind: Value, text: str) -> bool:
    """Whether a text, one that `may_go_on`, is a whole value."""
    if kind is Value.CONFIDENCE:
        return text in CONFIDENCES
    if kind is Value.TARGET:
        return target_problem(text) is None
    return text_problem(text, "") is None
