"""The text format: the values in a training line, and their rendering.

A training line is a developer turn (instruction, two function declarations, the conversation so far), a user turn
with the question, and a model turn of function calls:

    <start_of_turn>model
    <start_function_call>
    call:add_text{content:<escape>TCP reliable, UDP fast.<escape>}
    <end_function_call>
    <start_function_call>
    call:add_choice{text:<escape>QUIC?<escape>,confidence:<escape>0.79<escape>,target:<escape>quic<escape>}
    <end_function_call>
    <end_of_turn>

A model may be trained to begin its answer with the question written out in full, by one call of `restate`: what is
asked, of what ("What's a mutex? Example?"). The prompt then declares this function first. In the field this is called
question rewriting (Elgohary et al. 2019, "Can You Unpack That?").

`Example.text` returns every text that `parser.parse_example` accepts byte for byte. The parser accepts the text of
every value of these classes.

Rendered text is a list of pieces. A `Control` piece is a control token. Any other piece is literal text: there an
`<end_of_turn>` typed by a user is thirteen characters of data (see `tokenizer.encode`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from conversation.format.control_tokens import (
    CONTROL_PATTERN,
    END_CALL,
    END_DECLARATION,
    END_OF_TURN,
    ESCAPE,
    START_CALL,
    START_DECLARATION,
    START_OF_TURN,
    Control,
)

TIMESTAMP = "2026-01-17T05:25:55"
"""The current date in the training data. It is fixed: the model never saw another."""

MAX_FRAGMENTS = 4
NUM_FOLLOW_UPS = 3

INSTRUCTION = (
    "You are an expert function calling AI assistant. "
    "Current date and time given in YYYY-MM-DDTHH:MM:SS format: {timestamp}\n"
    "You have access to the following functions:\n\n"
)
DECLARATIONS = (
    "add_text\nAdds AI response text to current node.\nParameters:\n  content (string): Response text (required)\n",
    "add_choice\n"
    "Adds one predicted user response choice.\n"
    "Parameters:\n"
    "  text (string): User's response text (required)\n"
    "  confidence (float): Confidence 0.0-1.0 (required)\n"
    "  target (string): Target node name (required)\n",
)
RESTATE_DECLARATION = (
    "restate\nWrites out the question in full: what is asked, of what.\nParameters:\n"
    "  question (string): The question in full (required)\n"
)
HISTORY_HEADING = "Conversation history:\n"
END_OF_QUESTION = f"\n{END_OF_TURN}\n{START_OF_TURN}model\n"
_TARGET = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


# --- valid values: the same rules for built and for parsed ones ------------------------------------------------------


def text_problem(
    text: str, what: str, control_tokens: re.Pattern[str] = CONTROL_PATTERN
) -> tuple[str, int, str] | None:
    """Why a value cannot be this text: a sentence on `what`, the character at which the problem is, and its kind."""
    if control := control_tokens.search(text):
        return f"control token {control[0]} inside {what}", control.start(), "control token"
    return None if text.strip() else (f"{what} is empty", 0, "empty value")


def confidence_problem(number: str) -> str | None:
    """Why this is no valid confidence; None if it is."""
    if not _NUMBER.fullmatch(number):
        return f"confidence {number!r} is not a number"
    return None if 0 <= float(number) <= 1 else f"confidence {number} is not between 0 and 1"


def target_problem(name: str) -> str | None:
    """Why this is no valid target name; None if it is."""
    return None if _TARGET.fullmatch(name) else f"target {name!r} is not a snake_case name"


# --- the prompt ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """One line of the conversation so far. `speaker` is "User" or "AI"."""

    speaker: str
    text: str


def declarations(restates: bool) -> tuple[str, ...]:
    """What a prompt declares, in order; restate first where the answer begins with it."""
    return (RESTATE_DECLARATION, *DECLARATIONS) if restates else DECLARATIONS


@dataclass(frozen=True)
class Prompt:
    """A question to the model, and the conversation before it. `restates`: the answer begins with a call of `restate`.

    Raises ValueError for an empty question, an unknown speaker, and a line break in an utterance or in the date.
    """

    question: str
    history: tuple[Utterance, ...] = ()
    timestamp: str = TIMESTAMP
    restates: bool = False

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if "\n" in self.timestamp:
            raise ValueError(f"line break in the date: {self.timestamp!r}")
        for utterance in self.history:
            if utterance.speaker not in ("User", "AI"):
                raise ValueError(f"unknown speaker in the history: {utterance.speaker!r}")
            if "\n" in utterance.text:
                raise ValueError(f"line break in the history: {utterance.text!r}")

    def pieces(self) -> list[str]:
        """The rendered prompt; the model continues after its last piece."""
        pieces: list[str] = [Control(START_OF_TURN), "developer\n" + INSTRUCTION.format(timestamp=self.timestamp)]
        for declaration in declarations(self.restates):
            pieces += [Control(START_DECLARATION), declaration, Control(END_DECLARATION), "\n\n"]
        if self.history:
            lines = [f'  {utterance.speaker}: "{utterance.text}"\n' for utterance in self.history]
            pieces.append(HISTORY_HEADING + "".join(lines) + "\n")
        pieces += [Control(END_OF_TURN), "\n", Control(START_OF_TURN), f"user\n{self.question}\n"]
        pieces += [Control(END_OF_TURN), "\n", Control(START_OF_TURN), "model\n"]
        return pieces

    @property
    def text(self) -> str:
        return "".join(self.pieces())


# --- the answer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FollowUp:
    """A follow-up question for the reader to pick. `confidence` is the text as written: 0.80 stays 0.80.

    Raises ValueError for an empty text, a control token, a confidence outside [0, 1], a target that is not snake_case.
    """

    text: str
    confidence: str
    target: str

    def __post_init__(self) -> None:
        if found := text_problem(self.text, "a follow-up"):
            raise ValueError(found[0])
        if problem := confidence_problem(self.confidence) or target_problem(self.target):
            raise ValueError(problem)

    @property
    def probability(self) -> float:
        return float(self.confidence)


@dataclass(frozen=True)
class Answer:
    """A valid model turn: 1 to 4 fragments, then exactly 3 follow-ups. `restated`: the question in full, before them.

    Raises ValueError for any other number of them, an empty text, and a control token in a text.
    """

    fragments: tuple[str, ...]
    follow_ups: tuple[FollowUp, ...]
    restated: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.fragments) <= MAX_FRAGMENTS:
            raise ValueError(f"{len(self.fragments)} fragments, expected 1 to {MAX_FRAGMENTS}")
        if len(self.follow_ups) != NUM_FOLLOW_UPS:
            raise ValueError(f"{len(self.follow_ups)} follow-ups, expected {NUM_FOLLOW_UPS}")
        for fragment in self.fragments:
            if found := text_problem(fragment, "a fragment"):
                raise ValueError(found[0])
        if self.restated is not None and (found := text_problem(self.restated, "the restated question")):
            raise ValueError(found[0])

    def pieces(self) -> list[str]:
        pieces: list[str] = []
        if self.restated is not None:
            pieces += call_pieces("restate", question=self.restated)
        for fragment in self.fragments:
            pieces += call_pieces("add_text", content=fragment)
        for each in self.follow_ups:
            pieces += call_pieces("add_choice", text=each.text, confidence=each.confidence, target=each.target)
        return pieces + [Control(END_OF_TURN)]

    @property
    def text(self) -> str:
        return "".join(self.pieces())


@dataclass(frozen=True)
class Example:
    """One training line.

    Raises ValueError for a question with the end of the user's turn in it, and for an answer that restates the question
    where the prompt does not declare it, or the other way round.
    """

    prompt: Prompt
    answer: Answer

    def __post_init__(self) -> None:
        # the end may also begin in the question and go on in what is written after it
        if (self.prompt.question + END_OF_QUESTION).index(END_OF_QUESTION) < len(self.prompt.question):
            raise ValueError(f"the question of a training line cannot contain {END_OF_QUESTION!r}")
        if self.prompt.restates != (self.answer.restated is not None):
            raise ValueError("the prompt declares restate, or the answer calls it, but not both")

    @property
    def text(self) -> str:
        return self.prompt.text + self.answer.text


def call_pieces(function: str, **arguments: str) -> list[str]:
    """One function call, with the line break after it."""
    pieces: list[str] = [Control(START_CALL), f"\ncall:{function}{{"]
    for i, (name, value) in enumerate(arguments.items()):
        pieces += [f"{',' if i else ''}{name}:", Control(ESCAPE), value, Control(ESCAPE)]
    return pieces + ["}\n", Control(END_CALL), "\n"]


def repeated(values: Iterable[str]) -> dict[str, int]:
    """The values that occur more than once, and how often. Letter case and outer white space do not count."""
    counts = Counter(value.strip().casefold() for value in values)
    return {value: count for value, count in sorted(counts.items()) if count > 1}
