"""The questions that a trained model is asked: the three structural tests, and files of held-out questions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conversation.errors import UserError, list_problems
from conversation.format import strict_json
from conversation.format.calls import NUM_FOLLOW_UPS, Answer, FollowUp, Prompt, Utterance

T = TypeVar("T")

QUESTION = '"question": ..., "history": [{"speaker": ..., "text": ...}]'
CHOICES = '[{"text": ..., "confidence": ..., "target": ...}, ...]'
CASE = f'"set": ..., "domain": ..., "topic": ..., {QUESTION}, "texts": [...], "choices": {CHOICES}, "followed": ...'


@dataclass(frozen=True)
class Case:
    """A question put to the model."""

    name: str
    prompt: Prompt


THREE_CASES = (
    Case("fresh topic", Prompt("What's a monad?")),
    Case(
        "follow-up",
        Prompt(
            "Example?",
            (
                Utterance("User", "What's a monad?"),
                Utterance("AI", "Pattern for chaining operations with context."),
                Utterance("AI", "Like a box with rules for combining boxes."),
            ),
        ),
    ),
    Case("another domain", Prompt("CAP theorem?")),
)


@dataclass(frozen=True)
class HeldOutCase:
    """A question of the evaluation, kept out of all training data, with an answer that a person would accept.

    `set_name`: "known" (a trained topic in unseen wording) or "unseen" (a topic that no training text treats).
    `followed`: the index of the follow-up with which the conversation goes on. Raises ValueError for any other number.
    """

    set_name: str
    domain: str
    topic: str
    prompt: Prompt
    answer: Answer
    followed: int

    def __post_init__(self) -> None:
        if type(self.followed) is not int or not 0 <= self.followed < NUM_FOLLOW_UPS:
            raise ValueError("followed must be 0, 1 or 2")

    @property
    def is_root(self) -> bool:
        return not self.prompt.history


def read_held_out(path: Path) -> list[HeldOutCase]:
    """The cases of an evaluation file, JSONL. Raises UserError that lists the lines which are none."""
    return _read_lines(path, _held_out_case, "cases of an evaluation", f"{{{CASE}}}")


def read_questions(path: Path) -> list[Case]:
    """Questions from a JSONL file: objects with `question` and, if it is a follow-up, `history` (speaker, text).

    Raises UserError with the lines.
    """

    def read(value: dict[str, Any], number: int) -> Case:
        return Case(f"question {number}", _prompt(value))

    return _read_lines(path, read, "questions", f"{{{QUESTION}}}")


def _prompt(value: dict[str, Any]) -> Prompt:
    history = [(line["speaker"], line["text"]) for line in value.get("history", ())]
    if not all(isinstance(text, str) for text in (value["question"], *itertools.chain(*history))):
        raise ValueError("question, speaker and text must be strings")
    return Prompt(value["question"], tuple(Utterance(*line) for line in history))


def _held_out_case(value: dict[str, Any], number: int) -> HeldOutCase:
    choices = tuple(FollowUp(each["text"], f"{each['confidence']:.2f}", each["target"]) for each in value["choices"])
    answer = Answer(tuple(value["texts"]), choices)
    return HeldOutCase(value["set"], value["domain"], value["topic"], _prompt(value), answer, value["followed"])


def _read_lines(path: Path, read: Callable[[dict[str, Any], int], T], what: str, wanted: str) -> list[T]:
    """What `read` makes of each line's object and number. `wanted`: an object as it should be, for the error."""
    try:
        content = strict_json.decode_utf8(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except strict_json.JsonError as error:
        raise UserError(f"{path}: {error}") from None
    found, problems = [], []
    for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
        try:
            found.append(read(strict_json.loads(line), number))
        except (KeyError, TypeError, AttributeError):
            problems.append(f"{path}:{number}: expected {wanted}")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise UserError(f"{len(problems)} lines are no {what}:\n{list_problems(problems)}")
    if not found:
        raise UserError(f"{path} contains no question")
    return found
