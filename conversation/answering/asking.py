"""From what a client says to a prompt, and from a prompt to the parts of an answer.

A prompt always has the date of the training data (`calls.TIMESTAMP`), not today's: the model never saw another, and
was tested with this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conversation.answering.refusals import Refused
from conversation.format.calls import FollowUp, Prompt, Utterance
from conversation_config import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from conversation.answering.engines import Engine

MAX_UTTERANCES = 2000
_NOT_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
TEMPERATURE = 0.7  # of an answer that is to differ


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen: the likeliest one (temperature 0), or a drawn one. Always within the grammar."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def stream(self, engine: Engine, prompt: Prompt, stopped: Callable[[], bool]) -> Iterator[str | FollowUp]:
        """The parts of an answer that is chosen so."""
        if self.temperature < 0.01 or self.top_p <= 0:
            return engine.stream(prompt, stopped)  # the likeliest is what every engine answers by itself
        from conversation.answering.decoding import Decoding

        drawn = Decoding("drawn", temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        return engine.stream(prompt, stopped, drawn)


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
    """The prompt's tokens. Raises Refused when no answer fits behind it."""
    tokens = engine.count_tokens(prompt)
    if tokens + MAX_NEW_TOKENS > engine.context:
        raise Refused(
            400,
            f"the conversation is too long: {tokens} tokens, and up to {MAX_NEW_TOKENS} for an answer, of at most "
            f"{engine.context}",
            "begin a new conversation, or go on from an earlier question",
            "messages",
            "context_length_exceeded",
        )
    return tokens


def ask(prompt: Prompt, sampling: Sampling) -> Callable[[Engine, Callable[[], bool]], Generator[Any, None, None]]:
    """Work for the queue: an answer's fragments and follow-ups, each as soon as it is whole."""

    def work(engine: Engine, stopped: Callable[[], bool]) -> Generator[str | FollowUp, None, None]:
        check_length(engine, prompt)
        yield from sampling.stream(engine, prompt, stopped)

    return work
