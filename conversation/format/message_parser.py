"""Reads examples from rows of chat messages with tools, the form of TRL and of OpenAI's API.

A row has `messages` (ShareGPT's name: `conversations`) or `prompt` and `completion`, two lists of messages; and perhaps
`tools`, the declarations of the functions. What follows the last question is the answer, in one message or in several.
What a row says beyond the format is refused, not dropped: the prompt that is trained has one fixed instruction and two
fixed declarations. Of an earlier answer the history has the fragments alone, and what a function returned is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any

from conversation.format.calls import (
    INSTRUCTION,
    TIMESTAMP,
    Answer,
    Example,
    FollowUp,
    Prompt,
    Utterance,
    confidence_problem,
    target_problem,
    text_problem,
)
from conversation.format.chat_messages import (
    Call,
    FieldError,
    Message,
    as_object,
    checked,
    kind,
    parsed,
    read_messages,
    without_none,
)
from conversation.format.messages import PARAMETERS, REQUIRED, as_text

CHATS = ("messages", "conversations")
ROW_KEYS = (*CHATS, "prompt", "completion", "label", "system", "tools", "functions")
_INSTRUCTION = re.compile(re.escape(INSTRUCTION.strip()).replace(re.escape("{timestamp}"), r"([^\n]+)"))


def is_row(value: dict[str, Any]) -> bool:
    """Whether an object is meant to be read by `from_row`."""
    return any(key in value for key in (*CHATS, "prompt", "completion"))


def from_row(value: dict[str, Any]) -> Example:
    """The example of a row. Columns beside `ROW_KEYS` are left alone. Raises FieldError.

    A value of None is one that is not there: tables fill what a row lacks.
    """
    row = without_none({key: value[key] for key in ROW_KEYS if key in value})
    declared = {key: found for key in ("tools", "functions") if (found := _check_tools(key, row.get(key)))}
    if row.get("label") is False and "completion" in row:
        raise FieldError("label", "false: the completion is a bad answer, leave the row out")
    before, answer = _turns(row)
    question = before.pop()
    timestamp = _date(row.get("system"), before)
    history = tuple(_history(before))
    if question.content is None or not question.content.strip():
        raise FieldError(question.content_place, "the question is empty")
    right = _answer(answer)
    restates = right.restated is not None
    for key, names in declared.items():
        if restates and "restate" not in names:
            raise FieldError(key, "restate is called and not declared")
        if "restate" in names and not restates:
            raise FieldError(key, "restate is declared and not called")
    try:
        return Example(Prompt(question.content, history, timestamp, restates), right)
    except ValueError as error:
        raise FieldError(question.content_place, str(error)) from None


def earlier_answers(value: dict[str, Any]) -> int:
    """How many answers with follow-ups come before the last question of a row that `from_row` has read.

    They are history there: a row is one example, and its last answer is what is trained.
    """
    if value.get("text") is not None or not is_row(value):
        return 0
    before, _ = _turns(without_none({key: value[key] for key in ROW_KEYS if key in value}))
    return sum(any(call.name == "add_choice" for call in message.calls) for message in before)


def _turns(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The messages up to the last question, which is the last of them, and those after it."""
    chats = [key for key in CHATS if key in row]
    in_two = "prompt" in row or "completion" in row
    if len(chats) + in_two > 1:
        other = "`prompt` and `completion`" if in_two else f"`{chats[1]}`"
        raise FieldError(chats[0], f"beside {other}: a row has one or the other")
    if in_two:
        key, before, answer = "prompt", *(read_messages(key, row.get(key)) for key in ("prompt", "completion"))
    else:
        key = chats[0] if chats else "messages"
        found = read_messages(key, row.get(key))
        end = 1 + max((i for i, message in enumerate(found) if message.role == "user"), default=-1)
        before, answer = found[:end], found[end:]
    if not before or not any(message.role == "user" for message in before):
        raise FieldError(key, "no question of the user with an answer after it")
    if (last := before[-1]).role != "user":
        raise FieldError(last.role_place, f"{last.role!r}, but before the answer comes the question of the user")
    if not answer:
        place = "completion" if in_two else last.role_place
        raise FieldError(place, "nothing" if in_two else f"{last.role!r}, but the last message is the assistant's")
    return before, answer


def _check_tools(key: str, value: Any) -> list[str]:
    """The names of the declared functions. Raises FieldError unless these are ours, or none at all."""
    value = None if value == "" else parsed(key, value)
    if value is None or value == []:
        return []
    if not isinstance(value, list):
        raise FieldError(key, f"not a list but {kind(value)}")
    found: list[str] = []
    for i, tool in enumerate(value):
        place = f"{key}[{i}]"
        tool = as_object(place, tool)
        if "function" in tool:
            place += ".function"
            tool = as_object(place, tool["function"])
        name = tool.get("name")
        if not isinstance(name, str):
            raise FieldError(f"{place}.name", f"not a text but {kind(name)}")
        if name not in PARAMETERS:
            raise FieldError(f"{place}.name", f"{name!r} is none of {', '.join(PARAMETERS)}")
        if name in found:
            raise FieldError(f"{place}.name", f"{name} is declared twice")
        found.append(name)
        schema = as_object(f"{place}.parameters", tool.get("parameters", {}))
        names = list(as_object(f"{place}.parameters.properties", schema.get("properties", {})))
        if set(names) != set(PARAMETERS[name]):
            expected = ", ".join(PARAMETERS[name])
            raise FieldError(f"{place}.parameters", f"{', '.join(names) or 'none'}, expected {expected}")
    if missing := [name for name in REQUIRED if name not in found]:
        raise FieldError(key, f"{missing[0]} is not declared")
    return found


# --- the parts of an example -----------------------------------------------------------------------------------------


def _date(system: Any, before: list[Message]) -> str:
    """The date in the system message, which can only be the instruction of the format; the message is taken out.

    It comes first, or is in the column `system` of a row.
    """
    texts = [("system", system)] if system else []
    if before and before[0].role == "system":
        message = before.pop(0)
        texts.append((message.content_place, message.content))
    dates: list[str] = []
    for place, text in texts:
        if not isinstance(text, str | None):
            raise FieldError(place, f"not a text but {kind(text)}")
        if found := _INSTRUCTION.fullmatch((text or "").strip()):
            if dates and found[1] != dates[0]:
                raise FieldError(place, f"another date than in `{texts[0][0]}`")
            dates.append(checked(place, found[1]))
        elif text and text.strip():
            raise FieldError(
                place,
                "a system message has no place in the prompt that is trained, unless it is the instruction of the "
                "format: leave it out",
            )
    return dates[0] if dates else TIMESTAMP


def _history(messages: Sequence[Message]) -> Iterator[Utterance]:
    """The lines of the conversation history for the messages before the question."""
    said = (message for message in messages if message.role != "tool")  # what a function returned: nothing
    for role, group in groupby(said, key=lambda message: message.role):
        turn = list(group)
        if role == "system":
            raise FieldError(turn[0].role_place, "'system' has no place in the conversation history")
        texts = [text for message in turn for text in _texts(message)]
        if not texts:
            raise FieldError(turn[0].place, "neither content nor a call of add_text")
        for place, text in texts:
            if "\n" in text:
                problem = "a line break in the conversation history: give each line a message or a call of its own"
                raise FieldError(place, problem)
            yield Utterance("User" if role == "user" else "AI", text)


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """What a message says, with the places: its content, then its calls of add_text."""
    if message.role == "user" and message.content is None:
        raise FieldError(message.content_place, "no text")
    content = message.content or ""
    if message.role == "user" or content.strip():  # beside the calls of an answer, white space is nothing
        yield message.content_place, content
    for call in message.calls:
        if call.name == "add_text":
            yield f"{call.place}.arguments.content", _text(call, "content")


def _answer(messages: Sequence[Message]) -> Answer:
    for message in messages:
        if message.role in ("user", "system"):
            raise FieldError(message.role_place, f"{message.role!r} after the question: only the answer comes there")
        if message.role == "assistant":
            _check_only_calls(message)
    spoken = [message for message in messages if message.role == "assistant"]
    if not spoken:
        raise FieldError(messages[-1].role_place, f"{messages[-1].role!r}, but the last message is the assistant's")
    fragments: list[str] = []
    follow_ups: list[FollowUp] = []
    restated = None
    for call in (call for message in spoken for call in message.calls):
        if call.name == "add_choice":
            follow_ups.append(_follow_up(call))
        elif call.name == "restate":
            if fragments or follow_ups or restated is not None:
                raise FieldError(f"{call.place}.name", "restate stands once, at the beginning of an answer")
            restated = _argument(call, "question")
        elif follow_ups:
            raise FieldError(f"{call.place}.name", "add_text after add_choice")
        else:
            fragments.append(_argument(call, "content"))
    try:
        return Answer(tuple(fragments), tuple(follow_ups), restated)
    except ValueError as error:
        place = f"{spoken[0].place}.tool_calls" if len(spoken) == 1 else f"{spoken[0].place} to {spoken[-1].place}"
        raise FieldError(place, str(error)) from None


def _check_only_calls(message: Message) -> None:
    """Raises FieldError for a part of an answer that says more than its calls, or that is not to be trained on."""
    if message.content and message.content.strip():
        problem = (
            "text beside the function calls: an answer is nothing but calls"
            if message.calls
            else "text, but an answer is function calls: give them as `tool_calls`"
        )
        raise FieldError(message.content_place, problem)
    if message.other_text:
        raise FieldError(
            f"{message.place}.{message.other_text}", "text beside the function calls: an answer is nothing but calls"
        )
    if message.untrained:
        raise FieldError(
            f"{message.place}.{message.untrained}", "not 1, but every answer is trained on: leave the row out"
        )


def _follow_up(call: Call) -> FollowUp:
    text = _argument(call, "text")
    place = f"{call.place}.arguments.confidence"
    confidence = call.arguments.get("confidence")
    if isinstance(confidence, Decimal):  # of a table
        confidence = float(confidence)
    if isinstance(confidence, int | float) and not isinstance(confidence, bool):
        if not 0 <= confidence <= 1:
            raise FieldError(place, "not between 0 and 1")
        confidence = as_text(abs(float(confidence)))  # of -0.0
    if not isinstance(confidence, str):
        raise FieldError(place, f"not a number but {kind(confidence)}")
    if problem := confidence_problem(confidence):
        raise FieldError(place, problem)
    target = _text(call, "target")
    if problem := target_problem(target):
        raise FieldError(f"{call.place}.arguments.target", problem)
    return FollowUp(text, confidence, target)


def _text(call: Call, name: str) -> str:
    place = f"{call.place}.arguments.{name}"
    if not isinstance(value := call.arguments.get(name), str):
        raise FieldError(place, f"not a text but {kind(value)}")
    return checked(place, value)


def _argument(call: Call, name: str) -> str:
    text = _text(call, name)
    if found := text_problem(text, "the value"):
        raise FieldError(f"{call.place}.arguments.{name}", found[0])
    return text
