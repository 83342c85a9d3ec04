"""The questions that a trained model is asked: the three structural tests, and files of held-out questions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from conversation.data import strict_json
from conversation.errors import UserError, list_problems
from conversation.format.calls import Prompt, Utterance


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


def read_questions(path: Path) -> list[Case]:
    """Questions from a JSONL file: objects with `question` and, if it is a follow-up, `history` (speaker, text).

    Raises UserError with the lines.
    """
    cases = []
    try:
        content = strict_json.decode_utf8(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except strict_json.JsonError as error:
        raise UserError(f"{path}: {error}") from None
    problems = []
    for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
        try:
            value = strict_json.loads(line)
            history = [(u["speaker"], u["text"]) for u in value.get("history", ())]
            if not all(isinstance(text, str) for text in (value["question"], *itertools.chain(*history))):
                raise ValueError("question, speaker and text must be strings")
            prompt = Prompt(value["question"], tuple(Utterance(*said) for said in history))
            cases.append(Case(f"question {number}", prompt))
        except (KeyError, TypeError, AttributeError):
            wanted = '{"question": ..., "history": [{"speaker": ..., "text": ...}]}'
            problems.append(f"{path}:{number}: not a question: expected {wanted}")
        except ValueError as error:
            problems.append(f"{path}:{number}: not a question: {error}")
    if problems:
        raise UserError(f"{len(problems)} lines are no questions:\n{list_problems(problems)}")
    if not cases:
        raise UserError(f"{path} holds no question")
    return cases
