"""The messages of a row, each read once into a typed value. They have several forms in the wild: OpenAI's, TRL's,
LLaMA-Factory's and ShareGPT's (`from` and `value`), with lists and objects or with JSON texts of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conversation.format import strict_json
from conversation.format.messages import PARAMETERS

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "model", "gpt", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
_CALLS_AS_CONTENT = ("function_call", "tool_call")  # roles of LLaMA-Factory and ms-swift
_WEIGHTS = ("weight", "train", "training")  # of OpenAI's files, of Axolotl's
_OTHER_TEXTS = ("reasoning_content", "reasoning", "thinking", "refusal", "audio")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class FieldError(ValueError):
    """A value of a row that does not fit the format. The message begins with its place, as `messages[2].content`."""

    def __init__(self, place: str, problem: str):
        super().__init__(f"{place}: {problem}")


@dataclass(frozen=True)
class Call:
    """A call of restate, add_text or add_choice. `place`: of the function, as `messages[2].tool_calls[0].function`."""

    place: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One message. `role`: user, assistant, system, or tool for what a function returned.

    `content`: None when there is none, and of a tool. `untrained`: the field that says that this answer is not to be
    trained on, if one does. `other_text`: the field of what the assistant says beside content and calls.
    """

    place: str
    role_place: str
    role: str
    content_place: str
    content: str | None
    calls: tuple[Call, ...]
    untrained: str | None
    other_text: str | None


def read_messages(key: str, value: Any) -> list[Message]:
    """The messages under a key of a row. Raises FieldError."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(key, value)
    if not isinstance(value, list):
        raise FieldError(key, f"not a list of messages but {kind(value)}")
    return [_message(f"{key}[{i}]", message) for i, message in enumerate(value)]


def _message(place: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise FieldError(place, f"not a message but {kind(message)}")
    role_place = f"{place}.{'from' if 'from' in message and 'role' not in message else 'role'}"
    content_key = "value" if "value" in message and "content" not in message else "content"
    content_place = f"{place}.{content_key}"
    raw_role = message.get(role_place.rpartition(".")[2])
    if not isinstance(raw_role, str):
        raise FieldError(role_place, f"not a text but {kind(raw_role)}")
    if not (role := _ROLES.get(raw_role)):
        raise FieldError(role_place, f"{raw_role!r} is none of user, assistant, tool, system and developer")
    content = message.get(content_key)
    if raw_role in _CALLS_AS_CONTENT:
        calls, content = [*_calls_in(content_place, content), *_calls(place, message)], None
    else:
        calls = list(_calls(place, message))
    if calls and role != "assistant":
        raise FieldError(calls[0].place, f"a call in a message of the {raw_role}")
    return Message(
        place,
        role_place,
        role,
        content_place,
        None if content is None or role == "tool" else _text_of(content_place, content),
        tuple(calls),
        next((name for name in _WEIGHTS if message.get(name, 1) != 1), None),
        next((name for name in _OTHER_TEXTS if message.get(name)), None),
    )


def _text_of(place: str, content: Any) -> str:
    """The text of a message. Text parts, as OpenAI's API allows them, are joined."""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise FieldError(place, "a part that is not text")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise FieldError(place, f"not a text but {kind(content)}")
    return checked(place, content)


def _calls(place: str, message: dict[str, Any]) -> Iterator[Call]:
    """The calls of a message, also the single one of OpenAI's older form."""
    calls = message.get("tool_calls") or []
    place_of_calls = f"{place}.tool_calls"
    if not isinstance(calls := parsed(place_of_calls, calls), list):
        raise FieldError(place_of_calls, f"not a list but {kind(calls)}")
    for i, call in enumerate(calls):
        yield _call(f"{place_of_calls}[{i}]", call)
    if old := message.get("function_call"):
        yield _call(f"{place}.function_call", old)


def _calls_in(place: str, content: Any) -> Iterator[Call]:
    """The calls in the content of a message whose role says that it holds calls: one, or a list of them."""
    value = parsed(place, content)
    if isinstance(value, list):
        for i, call in enumerate(value):
            yield _call(f"{place}[{i}]", call)
    else:
        yield _call(place, value)


def _call(place: str, call: Any) -> Call:
    if not isinstance(call, dict):
        raise FieldError(place, f"not a call but {kind(call)}")
    place += ".function" if "function" in call else ""
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise FieldError(place, f"not an object but {kind(function)}")
    name = function.get("name")
    if not isinstance(name, str) or name not in PARAMETERS:
        raise FieldError(f"{place}.name", f"{name!r} is none of {', '.join(PARAMETERS)}")
    arguments = as_object(f"{place}.arguments", function.get("arguments"))
    if unknown := sorted(set(arguments) - set(PARAMETERS[name])):
        raise FieldError(f"{place}.arguments.{unknown[0]}", f"{name} has no such parameter")
    return Call(place, name, arguments)


# --- values ----------------------------------------------------------------------------------------------------------


def without_none(value: Any) -> Any:
    """A value of None is one that is not there: tables fill what a row lacks."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def as_object(place: str, value: Any) -> dict[str, Any]:
    """An object, or the JSON text of one, as OpenAI's API writes arguments."""
    value = parsed(place, value)
    if not isinstance(value, dict):
        raise FieldError(place, f"not an object but {kind(value)}")
    return value


def parsed(place: str, value: Any) -> Any:
    """The value of a JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return without_none(strict_json.loads(value))
    except strict_json.JsonError as error:
        raise FieldError(place, f"its JSON text cannot be read: {error}") from None


def checked(place: str, text: str) -> str:
    """The text. Raises FieldError for a character that no training line has."""
    if found := _NO_TEXT.search(text):
        what = "a NUL character" if found[0] == "\0" else f"an unpaired surrogate U+{ord(found[0]):04X}"
        raise FieldError(place, f"{what} at {found.start()}")
    return text
