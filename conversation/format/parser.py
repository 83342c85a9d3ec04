"""A strict parser of the text format. Its errors give the position and the reason."""

from __future__ import annotations

import re

from conversation.format.calls import (
    END_OF_QUESTION,
    HISTORY_HEADING,
    INSTRUCTION,
    MAX_FRAGMENTS,
    NUM_FOLLOW_UPS,
    RESTATE_DECLARATION,
    Answer,
    Example,
    FollowUp,
    Prompt,
    Utterance,
    confidence_problem,
    declarations,
    target_problem,
    text_problem,
)
from conversation.format.control_tokens import (
    CONTROL_PATTERN,
    END_CALL,
    END_DECLARATION,
    END_OF_TURN,
    ESCAPE,
    START_CALL,
    START_DECLARATION,
    START_OF_TURN,
)


class FormatError(ValueError):
    """Text that is not in the format. `position`: the offset, in characters, of the first invalid one.

    `kind` groups the problems: "syntax", "control token", "empty value", "unclosed value", "confidence", "target",
    "number of calls", "order of calls".
    """

    def __init__(self, problem: str, text: str, position: int, kind: str = "syntax"):
        self.problem = problem
        self.position = position
        self.kind = kind
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        rest = text[position : position + 40]
        found = repr(rest) if rest else "the end of the text"
        super().__init__(f"{problem} at character {position} (line {line}, column {column}), found {found}")


class _Scanner:
    """A position in a text. It moves forward over expected text."""

    def __init__(self, text: str, control_tokens: re.Pattern[str] = CONTROL_PATTERN):
        self.text = text
        self.position = 0
        self.control_tokens = control_tokens

    def error(self, problem: str, position: int | None = None, kind: str = "syntax") -> FormatError:
        return FormatError(problem, self.text, self.position if position is None else position, kind)

    def at(self, literal: str) -> bool:
        return self.text.startswith(literal, self.position)

    def expect(self, literal: str) -> None:
        """Move over `literal`, or fail at the first character that differs from it."""
        if not self.at(literal):
            rest = self.text[self.position : self.position + len(literal)]
            same = next((i for i, (a, b) in enumerate(zip(rest, literal, strict=False)) if a != b), len(rest))
            raise self.error(f"expected {literal!r}", self.position + same)
        self.position += len(literal)

    def until(self, literal: str, what: str) -> str:
        """Move over everything up to and including `literal`; return the text before it."""
        end = self.text.find(literal, self.position)
        if end < 0:
            raise self.error(f"{what} is not closed by {literal!r}", len(self.text), "unclosed value")
        found = self.text[self.position : end]
        self.position = end + len(literal)
        return found

    def argument(self, name: str) -> tuple[str, int]:
        """Move over `name:<escape>value<escape>`; return the value and its position."""
        self.expect(f"{name}:{ESCAPE}")
        start = self.position
        value = self.until(ESCAPE, f"the value of {name}")
        if found := text_problem(value, f"the value of {name}", self.control_tokens):
            sentence, offset, kind = found
            raise self.error(sentence, start + offset, kind)
        return value, start


def _scan_answer(scan: _Scanner, restates: bool) -> Answer:
    fragments: list[str] = []
    follow_ups: list[FollowUp] = []
    restated = None
    if restates:
        scan.expect(f"{START_CALL}\ncall:restate{{")
        restated, _ = scan.argument("question")
        scan.expect(f"}}\n{END_CALL}\n")
    while not scan.at(END_OF_TURN):
        start = scan.position
        scan.expect(f"{START_CALL}\ncall:add_")
        if scan.at("text{"):
            if follow_ups:
                raise scan.error("add_text after add_choice", start, "order of calls")
            if len(fragments) == MAX_FRAGMENTS:
                raise scan.error(f"more than {MAX_FRAGMENTS} add_text calls", start, "number of calls")
            scan.expect("text{")
            fragments.append(scan.argument("content")[0])
        else:
            scan.expect("choice{")
            if not fragments:
                raise scan.error("add_choice before any add_text", start, "order of calls")
            if len(follow_ups) == NUM_FOLLOW_UPS:
                raise scan.error(f"more than {NUM_FOLLOW_UPS} add_choice calls", start, "number of calls")
            follow_ups.append(_scan_choice(scan))
        scan.expect(f"}}\n{END_CALL}\n")
    if not fragments:
        raise scan.error("no add_text call", kind="number of calls")
    if len(follow_ups) != NUM_FOLLOW_UPS:
        raise scan.error(f"{len(follow_ups)} add_choice calls, expected {NUM_FOLLOW_UPS}", kind="number of calls")
    scan.expect(END_OF_TURN)
    return Answer(tuple(fragments), tuple(follow_ups), restated)


def _scan_choice(scan: _Scanner) -> FollowUp:
    text, _ = scan.argument("text")
    scan.expect(",")
    confidence, start = scan.argument("confidence")
    if problem := confidence_problem(confidence):
        raise scan.error(problem, start, "confidence")
    scan.expect(",")
    target, start = scan.argument("target")
    if problem := target_problem(target):
        raise scan.error(problem, start, "target")
    return FollowUp(text, confidence, target)


def parse_answer(text: str, control_tokens: re.Pattern[str] = CONTROL_PATTERN, restates: bool = False) -> Answer:
    """Parse a whole model answer, up to and including its `<end_of_turn>`.

    `control_tokens` finds what no value may contain; `tokenizer.answer_pattern` gives that of a vocabulary. `restates`:
    the answer begins with the question in full; else no answer may. Nothing is repaired. Raises FormatError with the
    position of the first invalid character.
    """
    scan = _Scanner(text, control_tokens)
    answer = _scan_answer(scan, restates)
    if scan.position != len(text):
        raise scan.error(f"text after {END_OF_TURN}")
    return answer


def parse_restated(text: str) -> str | None:
    """The question in full with which an answer begins, whatever comes after it; None where there is none."""
    scan = _Scanner(text)
    try:
        scan.expect(f"{START_CALL}\ncall:restate{{")
        return scan.argument("question")[0]
    except FormatError:
        return None


def parse_example(text: str) -> Example:
    """Parse one training line. Raises FormatError with the position of the first invalid character."""
    scan = _Scanner(text)
    before, after = INSTRUCTION.split("{timestamp}")
    scan.expect(f"{START_OF_TURN}developer\n{before}")
    timestamp = scan.until("\n", "the date")
    scan.position -= 1
    scan.expect(after)
    restates = scan.at(f"{START_DECLARATION}{RESTATE_DECLARATION}")
    for declaration in declarations(restates):
        scan.expect(f"{START_DECLARATION}{declaration}{END_DECLARATION}\n\n")
    history: list[Utterance] = []
    if scan.at(HISTORY_HEADING):
        scan.expect(HISTORY_HEADING)
        while not scan.at("\n"):
            history.append(_scan_utterance(scan))
        if not history:
            raise scan.error("the conversation history is empty")
        scan.expect("\n")
    scan.expect(f"{END_OF_TURN}\n{START_OF_TURN}user\n")
    start = scan.position
    question = scan.until(END_OF_QUESTION, "the user turn")
    if not question.strip():
        raise scan.error("the question is empty", start)
    answer = _scan_answer(scan, restates)
    if scan.position != len(text):
        raise scan.error(f"text after {END_OF_TURN}")
    return Example(Prompt(question, tuple(history), timestamp, restates), answer)


def _scan_utterance(scan: _Scanner) -> Utterance:
    start = scan.position
    line = scan.until("\n", "a line of the conversation history")
    for speaker in ("User", "AI"):
        prefix = f'  {speaker}: "'
        if line.startswith(prefix) and line.endswith('"') and len(line) > len(prefix):
            return Utterance(speaker, line[len(prefix) : -1])
    raise scan.error('expected a line like   User: "..."  or   AI: "..."', start)
