"""The text format: render a prompt and an answer, parse them back, judge what a model said.

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

Whatever `parse_example` accepts, `Example.text` gives back byte for byte.

Rendered text is a list of pieces: a `Control` piece is a control token, any other piece is literal text, in which a
`<end_of_turn>` that a user typed stays thirteen characters of data (see `tokenizer.encode`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
START_DECLARATION = "<start_function_declaration>"
END_DECLARATION = "<end_function_declaration>"
START_CALL = "<start_function_call>"
END_CALL = "<end_function_call>"
ESCAPE = "<escape>"

FORMAT_TOKENS = (START_OF_TURN, END_OF_TURN, START_DECLARATION, END_DECLARATION, START_CALL, END_CALL, ESCAPE)
"""The control tokens that the format is made of."""

CONTROL_TOKENS = FORMAT_TOKENS + (
    "<start_function_response>",
    "<end_function_response>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
)
"""Every token with a meaning of its own in FunctionGemma: none may stand in a fragment of an answer."""

CONTROL_PATTERN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))

TIMESTAMP = "2026-01-17T05:25:55"
"""The date that the training data gives as the current one. Fixed: the model never saw another."""

MAX_TEXTS = 4
NUM_CHOICES = 3

_INSTRUCTION = (
    "You are an expert function calling AI assistant. "
    "Current date and time given in YYYY-MM-DDTHH:MM:SS format: {timestamp}\n"
    "You have access to the following functions:\n\n"
)
_DECLARATIONS = (
    "add_text\nAdds AI response text to current node.\nParameters:\n  content (string): Response text (required)\n",
    "add_choice\n"
    "Adds one predicted user response choice.\n"
    "Parameters:\n"
    "  text (string): User's response text (required)\n"
    "  confidence (float): Confidence 0.0-1.0 (required)\n"
    "  target (string): Target node name (required)\n",
)
_HISTORY_HEADING = "Conversation history:\n"
_TARGET_PATTERN = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")
_NUMBER_PATTERN = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class Control(str):
    """A control token in rendered text."""

    __slots__ = ()


class FormatError(ValueError):
    """Text that is not in the format. `position` is the offset in characters at which it stops being valid."""

    def __init__(self, problem: str, text: str, position: int):
        self.problem = problem
        self.position = position
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        found = text[position : position + 40]
        found = repr(found) if found else "the end of the text"
        super().__init__(f"{problem} at character {position} (line {line}, column {column}), found {found}")


@dataclass(frozen=True)
class Utterance:
    """One line of the conversation so far. `speaker` is "User" or "AI"."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """What the model is asked: the question and the conversation that led to it.

    Raises ValueError for an empty question, and for history with a line break, which its one-line form cannot hold.
    """

    question: str
    history: tuple[Utterance, ...] = ()
    timestamp: str = TIMESTAMP

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        for utterance in self.history:
            if utterance.speaker not in ("User", "AI"):
                raise ValueError(f"unknown speaker in the history: {utterance.speaker!r}")
            if "\n" in utterance.text:
                raise ValueError(f"line break in the history: {utterance.text!r}")

    def pieces(self) -> list[str]:
        """The rendered prompt, up to where the model begins to answer."""
        pieces: list[str] = [Control(START_OF_TURN), "developer\n" + _INSTRUCTION.format(timestamp=self.timestamp)]
        for declaration in _DECLARATIONS:
            pieces += [Control(START_DECLARATION), declaration, Control(END_DECLARATION), "\n\n"]
        if self.history:
            lines = [f'  {utterance.speaker}: "{utterance.text}"\n' for utterance in self.history]
            pieces.append(_HISTORY_HEADING + "".join(lines) + "\n")
        pieces += [Control(END_OF_TURN), "\n", Control(START_OF_TURN), f"user\n{self.question}\n"]
        pieces += [Control(END_OF_TURN), "\n", Control(START_OF_TURN), "model\n"]
        return pieces

    @property
    def text(self) -> str:
        return "".join(self.pieces())


@dataclass(frozen=True)
class Choice:
    """A follow-up that the reader may pick. `confidence` is kept as it was written, so that 0.80 stays 0.80."""

    text: str
    confidence: str
    target: str

    @property
    def probability(self) -> float:
        return float(self.confidence)


@dataclass(frozen=True)
class Answer:
    """A valid model turn: 1 to 4 fragments of the answer, then exactly 3 follow-ups."""

    texts: tuple[str, ...]
    choices: tuple[Choice, ...]

    def pieces(self) -> list[str]:
        pieces: list[str] = []
        for text in self.texts:
            pieces += _call_pieces("add_text", content=text)
        for choice in self.choices:
            pieces += _call_pieces("add_choice", text=choice.text, confidence=choice.confidence, target=choice.target)
        return pieces + [Control(END_OF_TURN)]

    @property
    def text(self) -> str:
        return "".join(self.pieces())


@dataclass(frozen=True)
class Example:
    """One training line."""

    prompt: Prompt
    answer: Answer

    @property
    def text(self) -> str:
        return self.prompt.text + self.answer.text


def _call_pieces(function: str, **arguments: str) -> list[str]:
    pieces: list[str] = [Control(START_CALL), f"\ncall:{function}{{"]
    for i, (name, value) in enumerate(arguments.items()):
        pieces += [f"{',' if i else ''}{name}:", Control(ESCAPE), value, Control(ESCAPE)]
    return pieces + ["}\n", Control(END_CALL), "\n"]


class _Scanner:
    """A position in a text that moves forward over what is expected there."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def fail(self, problem: str, position: int | None = None) -> FormatError:
        return FormatError(problem, self.text, self.position if position is None else position)

    def at(self, literal: str) -> bool:
        return self.text.startswith(literal, self.position)

    def expect(self, literal: str) -> None:
        """Move over `literal`, or fail at the first character that differs from it."""
        if not self.at(literal):
            rest = self.text[self.position : self.position + len(literal)]
            same = next((i for i, (a, b) in enumerate(zip(rest, literal, strict=False)) if a != b), len(rest))
            raise self.fail(f"expected {literal!r}", self.position + same)
        self.position += len(literal)

    def until(self, literal: str, what: str) -> str:
        """Move over everything up to and including `literal`; return what stands before it."""
        end = self.text.find(literal, self.position)
        if end < 0:
            raise self.fail(f"{what} is not closed by {literal!r}", len(self.text))
        found = self.text[self.position : end]
        self.position = end + len(literal)
        return found

    def argument(self, name: str) -> str:
        """Move over `name:<escape>value<escape>`; return the value, which is not blank and holds no control token."""
        self.expect(f"{name}:{ESCAPE}")
        start = self.position
        value = self.until(ESCAPE, f"the value of {name}")
        if control := CONTROL_PATTERN.search(value):
            raise self.fail(f"control token {control[0]} inside the value of {name}", start + control.start())
        if not value.strip():
            raise self.fail(f"the value of {name} is empty", start)
        return value


def _scan_answer(scan: _Scanner) -> Answer:
    texts: list[str] = []
    choices: list[Choice] = []
    while not scan.at(END_OF_TURN):
        start = scan.position
        scan.expect(f"{START_CALL}\ncall:add_")
        if scan.at("text{"):
            if choices:
                raise scan.fail("add_text after add_choice", start)
            if len(texts) == MAX_TEXTS:
                raise scan.fail(f"more than {MAX_TEXTS} add_text calls", start)
            scan.expect("text{")
            texts.append(scan.argument("content"))
        else:
            scan.expect("choice{")
            if not texts:
                raise scan.fail("add_choice before any add_text", start)
            if len(choices) == NUM_CHOICES:
                raise scan.fail(f"more than {NUM_CHOICES} add_choice calls", start)
            choices.append(_scan_choice(scan))
        scan.expect(f"}}\n{END_CALL}\n")
    if not texts:
        raise scan.fail("no add_text call")
    if len(choices) != NUM_CHOICES:
        raise scan.fail(f"{len(choices)} add_choice calls, expected {NUM_CHOICES}")
    scan.expect(END_OF_TURN)
    return Answer(tuple(texts), tuple(choices))


def _scan_choice(scan: _Scanner) -> Choice:
    text = scan.argument("text")
    scan.expect(",")
    start = scan.position + len(f"confidence:{ESCAPE}")
    confidence = scan.argument("confidence")
    if not _NUMBER_PATTERN.fullmatch(confidence):
        raise scan.fail(f"confidence {confidence!r} is not a number", start)
    if not 0 <= float(confidence) <= 1:
        raise scan.fail(f"confidence {confidence} is not between 0 and 1", start)
    scan.expect(",")
    start = scan.position + len(f"target:{ESCAPE}")
    target = scan.argument("target")
    if not _TARGET_PATTERN.fullmatch(target):
        raise scan.fail(f"target {target!r} is not a snake_case name", start)
    return Choice(text, confidence, target)


def parse_answer(text: str) -> Answer:
    """Read what a model said, from its first character to the `<end_of_turn>` that ends it.

    Nothing is repaired. Raises FormatError with the position at which the text stops being a valid answer.
    """
    scan = _Scanner(text)
    answer = _scan_answer(scan)
    if scan.position != len(text):
        raise scan.fail(f"text after {END_OF_TURN}")
    return answer


def parse_example(text: str) -> Example:
    """Read the text of one training line. Raises FormatError with the position at which it stops being valid."""
    scan = _Scanner(text)
    before, after = _INSTRUCTION.split("{timestamp}")
    scan.expect(f"{START_OF_TURN}developer\n{before}")
    timestamp = scan.until("\n", "the date")
    scan.position -= 1
    scan.expect(after)
    for declaration in _DECLARATIONS:
        scan.expect(f"{START_DECLARATION}{declaration}{END_DECLARATION}\n\n")
    history: list[Utterance] = []
    if scan.at(_HISTORY_HEADING):
        scan.expect(_HISTORY_HEADING)
        while not scan.at("\n"):
            history.append(_scan_utterance(scan))
        if not history:
            raise scan.fail("the conversation history is empty")
        scan.expect("\n")
    scan.expect(f"{END_OF_TURN}\n{START_OF_TURN}user\n")
    start = scan.position
    question = scan.until(f"\n{END_OF_TURN}\n{START_OF_TURN}model\n", "the user turn")
    if not question.strip():
        raise scan.fail("the question is empty", start)
    answer = _scan_answer(scan)
    if scan.position != len(text):
        raise scan.fail(f"text after {END_OF_TURN}")
    return Example(Prompt(question, tuple(history), timestamp), answer)


def _scan_utterance(scan: _Scanner) -> Utterance:
    start = scan.position
    line = scan.until("\n", "a line of the conversation history")
    for speaker in ("User", "AI"):
        prefix = f'  {speaker}: "'
        if line.startswith(prefix) and line.endswith('"') and len(line) > len(prefix):
            return Utterance(speaker, line[len(prefix) : -1])
    raise scan.fail('expected a line like   User: "..."  or   AI: "..."', start)


def repetitions(answer: Answer) -> list[str]:
    """What a valid answer says more than once: one sentence per repetition, empty when there is none."""
    found = []
    for what, values in (
        ("fragment", answer.texts),
        ("follow-up", tuple(choice.text for choice in answer.choices)),
        ("target", tuple(choice.target for choice in answer.choices)),
    ):
        seen = [value.strip().casefold() for value in values]
        for value in sorted({value for value in seen if seen.count(value) > 1}):
            found.append(f"{what} {value!r} stands {seen.count(value)} times")
    return found
