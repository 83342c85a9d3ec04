"""Reads examples from rows of chat messages with tools, the form of TRL and of OpenAI's API.

A row has `messages` (the last one is the answer, its calls as `tool_calls`) or `prompt` and `completion`, two lists of
messages; and perhaps `tools`, the declarations of the functions. What a row says beyond the format is refused, not
dropped: the prompt that is trained has one fixed instruction and two fixed declarations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
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
from conversation.format.messages import PARAMETERS, as_text

ROW_KEYS = ("messages", "prompt", "completion", "tools")
_INSTRUCTION = re.compile(re.escape(INSTRUCTION.strip()).replace(re.escape("{timestamp}"), r"([^\n]+)"))
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NAMES = {"user": "user", "human": "user", "assistant": "assistant", "model": "assistant"}


class FieldError(ValueError):
    """A value of a row that does not fit the format. The message begins with its place, as `messages[2].content`."""

    def __init__(self, place: str, problem: str):
        super().__init__(f"{place}: {problem}")


def is_row(value: dict[str, Any]) -> bool:
    """Whether an object is meant to be read by `from_row`."""
    return "messages" in value or "prompt" in value or "completion" in value


def from_row(value: dict[str, Any]) -> Example:
    """The example of a row. Columns beside `ROW_KEYS` are left alone. Raises FieldError.

    A value of None is one that is not there: tables fill what a row lacks.
    """
    row = _without_none({key: value[key] for key in ROW_KEYS if key in value})
    if "messages" in row and ("prompt" in row or "completion" in row):
        raise FieldError("messages", "beside `prompt` and `completion`: a row has one or the other")
    for key in ("messages",) if "messages" in row else ("prompt", "completion"):
        if not isinstance(row.get(key), list):
            raise FieldError(key, f"not a list of messages but {_kind(row.get(key))}")
    _check_tools(row.get("tools"))
    placed = [
        (f"{key}[{i}]", message)
        for key in ("messages", "prompt", "completion")
        for i, message in enumerate(row.get(key, []))
    ]
    if "completion" in row and len(row["completion"]) != 1:
        raise FieldError("completion", f"{len(row['completion'])} messages, expected one: the answer")
    timestamp = TIMESTAMP
    if placed and _role(*placed[0]) in ("system", "developer"):
        timestamp = _date_in(f"{placed[0][0]}.content", placed.pop(0)[1])
    if len(placed) < 2:
        raise FieldError("messages" if "messages" in row else "prompt", "no question with an answer after it")
    history = [utterance for place, message in placed[:-2] for utterance in _utterances(place, message)]
    question = _question(*placed[-2])
    answer = _answer(*placed[-1])
    try:
        return Example(Prompt(question, tuple(history), timestamp), answer)
    except ValueError as error:
        raise FieldError(f"{placed[-2][0]}.content", str(error)) from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _object(place: str, value: Any) -> dict[str, Any]:
    """An object, or the JSON text of one, as OpenAI's API writes arguments."""
    value = _parsed(place, value)
    if not isinstance(value, dict):
        raise FieldError(place, f"not an object but {_kind(value)}")
    return value


def _parsed(place: str, value: Any) -> Any:
    """The value of a JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return _without_none(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise FieldError(place, f"text that is not JSON: {error}") from None


def _check_tools(value: Any) -> None:
    """Raises FieldError unless the declarations, if there are any, are of our two functions."""
    value = _parsed("tools", value)
    if value is None or value == []:
        return
    if not isinstance(value, list):
        raise FieldError("tools", f"not a list but {_kind(value)}")
    found: list[str] = []
    for i, tool in enumerate(value):
        place = f"tools[{i}]"
        tool = _object(place, tool)
        function = _object(f"{place}.function", tool["function"]) if "function" in tool else tool
        name = function.get("name")
        if not isinstance(name, str):
            raise FieldError(f"{place}.function.name", f"not a text but {_kind(name)}")
        if name not in PARAMETERS:
            raise FieldError(f"{place}.function.name", f"{name!r} is neither add_text nor add_choice")
        if name in found:
            raise FieldError(f"{place}.function.name", f"{name} is declared twice")
        found.append(name)
        schema = _object(f"{place}.function.parameters", function.get("parameters", {}))
        names = list(_object(f"{place}.function.parameters.properties", schema.get("properties", {})))
        if set(names) != set(PARAMETERS[name]):
            expected = ", ".join(PARAMETERS[name])
            raise FieldError(f"{place}.function.parameters", f"{', '.join(names) or 'none'}, expected {expected}")
    if missing := [name for name in PARAMETERS if name not in found]:
        raise FieldError("tools", f"{missing[0]} is not declared")


def _role(place: str, message: Any) -> str:
    if not isinstance(message, dict):
        raise FieldError(place, f"not a message but {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise FieldError(f"{place}.role", f"not a text but {_kind(role)}")
    return _NAMES.get(role, role)


def _content(place: str, message: dict[str, Any]) -> str:
    """The text of a message; "" when it has none. Text parts, as OpenAI's API allows them, are joined."""
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise FieldError(f"{place}.content", "a part that is not text")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise FieldError(f"{place}.content", f"not a text but {_kind(content)}")
    return _checked(f"{place}.content", content)


def _date_in(place: str, message: dict[str, Any]) -> str:
    """The date in a system message, which can only be the instruction of the format."""
    if not (content := _content(place.removesuffix(".content"), message).strip()):
        return TIMESTAMP
    if found := _INSTRUCTION.fullmatch(content):
        return found[1]
    raise FieldError(
        place, "a system message has no place in the prompt that is trained, unless it is the instruction of the format"
    )


def _utterances(place: str, message: Any) -> Iterator[Utterance]:
    """The lines of the conversation history for a message before the question."""
    role = _role(place, message)
    if role == "tool":
        return  # what a function returned: nothing
    if role not in ("user", "assistant"):
        raise FieldError(f"{place}.role", f"{role!r} has no place in the conversation history")
    speaker = "User" if role == "user" else "AI"
    texts = [(f"{place}.content", _content(place, message))] if role == "user" or message.get("content") else []
    if role == "assistant":
        for call_place, name, arguments in _calls(place, message):
            if name == "add_text":
                texts.append((f"{call_place}.arguments.content", _text(call_place, arguments, "content")))
    elif "tool_calls" in message:
        raise FieldError(f"{place}.tool_calls", "in a message of the user")
    if not texts:
        raise FieldError(place, "neither content nor a call of add_text")
    for text_place, text in texts:
        if "\n" in text:
            raise FieldError(text_place, "a line break in the conversation history")
        yield Utterance(speaker, text)


def _question(place: str, message: Any) -> str:
    if (role := _role(place, message)) != "user":
        raise FieldError(f"{place}.role", f"{role!r}, but before the answer stands the question of the user")
    if not (question := _content(place, message)).strip():
        raise FieldError(f"{place}.content", "the question is empty")
    return question


def _answer(place: str, message: Any) -> Answer:
    if (role := _role(place, message)) != "assistant":
        raise FieldError(f"{place}.role", f"{role!r}, but the last message is the answer of the assistant")
    if _content(place, message).strip():
        raise FieldError(f"{place}.content", "text beside the function calls: an answer is nothing but calls")
    fragments: list[str] = []
    follow_ups: list[FollowUp] = []
    for call_place, name, arguments in _calls(place, message):
        if unknown := sorted(set(arguments) - set(PARAMETERS[name])):
            raise FieldError(f"{call_place}.arguments.{unknown[0]}", f"{name} has no such parameter")
        if name == "add_text":
            if follow_ups:
                raise FieldError(f"{call_place}.name", "add_text after add_choice")
            fragments.append(_argument(call_place, arguments, "content"))
        else:
            follow_ups.append(_follow_up(call_place, arguments))
    try:
        return Answer(tuple(fragments), tuple(follow_ups))
    except ValueError as error:
        raise FieldError(f"{place}.tool_calls", str(error)) from None


def _follow_up(place: str, arguments: dict[str, Any]) -> FollowUp:
    text = _argument(place, arguments, "text")
    confidence = arguments.get("confidence")
    if isinstance(confidence, int | float) and not isinstance(confidence, bool):
        if not 0 <= confidence <= 1:
            raise FieldError(f"{place}.arguments.confidence", "not between 0 and 1")
        confidence = as_text(float(confidence))
    if not isinstance(confidence, str):
        raise FieldError(f"{place}.arguments.confidence", f"not a number but {_kind(confidence)}")
    if problem := confidence_problem(confidence):
        raise FieldError(f"{place}.arguments.confidence", problem)
    target = _text(place, arguments, "target")
    if problem := target_problem(target):
        raise FieldError(f"{place}.arguments.target", problem)
    return FollowUp(text, confidence, target)


def _calls(place: str, message: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each call of a message as (its place, the function's name, its arguments)."""
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise FieldError(f"{place}.tool_calls", f"not a list but {_kind(calls)}")
    for i, call in enumerate(calls):
        if not isinstance(call, dict):
            raise FieldError(f"{place}.tool_calls[{i}]", f"not a call but {_kind(call)}")
        call_place = f"{place}.tool_calls[{i}]" + (".function" if "function" in call else "")
        function = call.get("function", call)
        if not isinstance(function, dict):
            raise FieldError(call_place, f"not an object but {_kind(function)}")
        name = function.get("name")
        if not isinstance(name, str) or name not in PARAMETERS:
            raise FieldError(f"{call_place}.name", f"{name!r} is neither add_text nor add_choice")
        yield call_place, name, _object(f"{call_place}.arguments", function.get("arguments"))


def _text(place: str, arguments: dict[str, Any], name: str) -> str:
    if not isinstance(value := arguments.get(name), str):
        raise FieldError(f"{place}.arguments.{name}", f"not a text but {_kind(value)}")
    return _checked(f"{place}.arguments.{name}", value)


def _checked(place: str, text: str) -> str:
    """The text. Raises FieldError for a character that no training line has."""
    if found := _NO_TEXT.search(text):
        what = "a NUL character" if found[0] == "\0" else f"an unpaired surrogate U+{ord(found[0]):04X}"
        raise FieldError(place, f"{what} at {found.start()}")
    return text


def _argument(place: str, arguments: dict[str, Any], name: str) -> str:
    text = _text(place, arguments, name)
    if found := text_problem(text, "the value"):
        raise FieldError(f"{place}.arguments.{name}", found[0])
    return text
