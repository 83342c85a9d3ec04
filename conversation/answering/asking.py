"""From what a client says to a prompt, and from a prompt to the parts of an answer.

A prompt always has the date of the training data (`calls.TIMESTAMP`), not today's: the model never saw another, and
was tested with this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from conversation.answering.decoding import CONSTRAINED, Decoding
from conversation.answering.refusals import Refused
from conversation.errors import UserError
from conversation.format.calls import FollowUp, Prompt, Utterance
from conversation_config import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from conversation.answering.engines import Engine

MAX_UTTERANCES = 2000
_NOT_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
TEMPERATURE = 0.7  # of an answer that is to differ


class TooLong(UserError):
    """No answer fits behind a prompt."""

    def __init__(self, tokens: int, context: int):
        super().__init__(
            f"the conversation is too long: {tokens} tokens, and {MAX_NEW_TOKENS} for an answer, of at most {context}",
            "begin a new conversation, or go on from an earlier question",
        )


def check_room(tokens: int, context: int) -> None:
    """Raises TooLong for a prompt of so many tokens behind which no answer fits."""
    if tokens + MAX_NEW_TOKENS > context:
        raise TooLong(tokens, context)


def decoding_of(temperature: float, top_p: float, seed: int) -> Decoding:
    """How an answer is chosen: the likeliest one (temperature 0), or a drawn one. Always within the grammar."""
    if temperature < 0.01 or top_p <= 0:
        return CONSTRAINED
    return Decoding("drawn", temperature=temperature, top_p=top_p, seed=seed)


def one_line(text: str, parameter: str) -> str:
    """A text as the format takes it: on one line. Raises Refused for control characters."""
    if found := _NOT_TEXT.search(text):
        raise Refused(400, f"{parameter} holds the control character U+{ord(found[0]):04X}", parameter=parameter)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def make_prompt(question: str, history: Sequence[Utterance], parameter: str) -> Prompt:
    """Raises Refused for an empty question and for a history that is longer than any model reads."""
    if not question.strip():
        raise Refused(400, "the question is empty", parameter=parameter)
    if len(history) > MAX_UTTERANCES:
        raise Refused(
            400, f"the history has {len(history)} lines, at most {MAX_UTTERANCES} are read", parameter=parameter
        )
    return Prompt(question, tuple(history))


def check_length(engine: Engine, prompt: Prompt) -> int:
    """The prompt's tokens. Raises TooLong when no answer fits behind it."""
    tokens = engine.count_tokens(prompt)
    check_room(tokens, engine.context)
    return tokens


def ask(prompt: Prompt, decoding: Decoding) -> Callable[[Engine, Callable[[], bool]], Generator[Any, None, None]]:
    """Work for the queue: an answer's fragments and follow-ups, each as soon as it is whole."""

    def work(engine: Engine, stopped: Callable[[], bool]) -> Generator[str | FollowUp, None, None]:
        check_length(engine, prompt)
        for written in engine.stream(prompt, stopped, decoding):
            yield written.content

    return work
