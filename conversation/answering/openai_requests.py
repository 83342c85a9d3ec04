"""A request of OpenAI's chat completions, read into what this model can do.

What would change the answer and cannot be done here is refused; what would not (user, metadata, store, ...) is ignored.
The last message is the question. Those before it become the history: a user's text and each text that the assistant
wrote, in its content or as calls of add_text, are a line each. What a tool answered has no place in the format.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from conversation.answering.asking import TEMPERATURE, decoding_of, make_prompt, one_line
from conversation.answering.decoding import Decoding
from conversation.answering.refusals import Refused
from conversation.format import strict_json
from conversation.format.calls import Prompt, Utterance
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT, RESTATE

FUNCTIONS = (ADD_TEXT.function, ADD_CHOICE.function)
MAX_ANSWERS = 8
MAX_STOPS = 4
MAX_TOKENS = 10**9  # that a client may name


@dataclass(frozen=True)
class ChatRequest:
    """`functions`: those whose calls are wanted; none for an answer as text. `decodings`: one for each answer."""

    model: str
    prompt: Prompt
    functions: tuple[str, ...]
    decodings: tuple[Decoding, ...]
    stops: tuple[str, ...]
    max_tokens: int | None
    stream: bool
    include_usage: bool


def parse_request(body: dict[str, Any]) -> ChatRequest:
    """Raises Refused with the parameter that cannot be."""
    _refuse_unknown_powers(body)
    limits = [_whole(body, name, 1, MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    options = _typed(body, "stream_options", dict, "an object") or {}
    stream = bool(_typed(body, "stream", bool, "true or false"))
    return ChatRequest(
        _model(body),
        _prompt(body),
        _functions(body),
        _decodings(body),
        _stops(body),
        min((limit for limit in limits if limit is not None), default=None),
        stream,
        stream and options.get("include_usage") is True,
    )


def _refuse_unknown_powers(body: dict[str, Any]) -> None:
    for name in ("functions", "function_call"):
        if body.get(name):
            raise _wrong(name, f"{name} is not supported, use tools")
    for name in ("logprobs", "top_logprobs", "logit_bias", "audio", "prediction", "web_search_options"):
        if body.get(name):
            raise _wrong(name, f"{name} is not supported", "unsupported_parameter")
    for name in ("presence_penalty", "frequency_penalty"):
        if _number(body, name, -2, 2):
            raise _wrong(name, f"{name} is not supported: no answer repeats itself here", "unsupported_parameter")
    kind = _typed(body, "response_format", dict, "an object") or {"type": "text"}
    if kind.get("type") != "text":
        raise _wrong("response_format", "only the response format text is supported", "unsupported_parameter")
    if body.get("modalities") not in (None, ["text"]):
        raise _wrong("modalities", "only text is supported", "unsupported_parameter")
    if body.get("parallel_tool_calls") is False:
        raise _wrong("parallel_tool_calls", "an answer is several calls: parallel_tool_calls cannot be false")


# --- messages --------------------------------------------------------------------------------------------------------


def _prompt(body: dict[str, Any]) -> Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "messages is not a list with at least one message")
    history: list[Utterance] = []
    question = ""
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _wrong(place, f"{place} is not an object")
        role, last = message.get("role"), number == len(messages) - 1
        if last and role != "user":
            raise _wrong(f"{place}.role", "the last message must be the question of the user")
        if role == "user":
            question = one_line("\n".join(_texts(message, place)), f"{place}.content")
            history += [Utterance("User", question)] if not last and question else []
        elif role == "assistant":
            history += [Utterance("AI", text) for text in _said(message, place)]
        elif role != "tool":
            shown = f"a message of role {role[:40]}" if isinstance(role, str) else "a message without a role"
            raise _wrong(f"{place}.role", f"{shown} has no place in the prompt that was trained: leave it out")
    return make_prompt(question, history, f"messages[{len(messages) - 1}].content")


def _said(message: dict[str, Any], place: str) -> list[str]:
    """The texts of an assistant's message: the lines of its content, and the contents of its calls of add_text."""
    texts = [line for text in _texts(message, place) for line in text.splitlines()]
    calls = _typed(message, "tool_calls", list, "a list", place) or []
    for number, call in enumerate(calls):
        at = f"{place}.tool_calls[{number}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(at, f"{at} is no function with a name")
        if function["name"] == ADD_TEXT.function:
            texts.append(_content_argument(function, f"{at}.arguments"))
    return [line for line in (one_line(text, place) for text in texts) if line]


def _content_argument(function: dict[str, Any], place: str) -> str:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments)
        except strict_json.JsonError as error:
            raise _wrong(place, f"{place} cannot be read: {error}") from None
    content = arguments.get("content") if isinstance(arguments, dict) else None
    if not isinstance(content, str):
        raise _wrong(place, f"{place} is no object with a text as its content")
    return content


def _texts(message: dict[str, Any], place: str) -> list[str]:
    """The texts of a message's content: one text, or a list of parts."""
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise _wrong(f"{place}.content", f"{place}.content is neither a text nor a list of parts")
    texts = []
    for number, part in enumerate(content):
        at = f"{place}.content[{number}]"
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong(at, f"{at} is not of type text: this model reads nothing else")
        texts.append(part["text"])
    return texts


# --- tools, sampling, limits -----------------------------------------------------------------------------------------


def _functions(body: dict[str, Any]) -> tuple[str, ...]:
    """The functions whose calls are wanted, by tools and tool_choice."""
    tools = _typed(body, "tools", list, "a list") or []
    names = []
    for number, tool in enumerate(tools):
        at = f"tools[{number}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name == RESTATE.function:
            continue  # a reader gets no such call
        if name not in FUNCTIONS:
            shown = repr(name[:60]) if isinstance(name, str) else "a tool without a name"
            raise _wrong(at, f"{shown} cannot be called: this model was trained on {' and '.join(FUNCTIONS)}")
        names.append(name)
    choice = body.get("tool_choice")
    if choice in (None, "auto", "required"):
        if choice == "required" and not names:
            raise _wrong("tool_choice", "tool_choice is required, but there are no tools")
        return tuple(name for name in FUNCTIONS if name in names)
    if choice == "none":
        return ()
    function = choice.get("function") if isinstance(choice, dict) else None
    wanted = function.get("name") if isinstance(function, dict) else None
    if wanted not in names:
        raise _wrong("tool_choice", 'tool_choice is none of "auto", "required", "none" and a function among the tools')
    return (str(wanted),)


def _decodings(body: dict[str, Any]) -> tuple[Decoding, ...]:
    """One for each answer. Without a temperature the first answer is the likeliest, and the others are drawn."""
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    given = _whole(body, "seed", -(2**63), 2**63 - 1)
    seed = random.getrandbits(62) if given is None else given % 2**62
    answers = []
    for number in range(_whole(body, "n", 1, MAX_ANSWERS) or 1):
        drawn = temperature if temperature is not None else TEMPERATURE if number else 0.0
        answers.append(decoding_of(drawn, 1.0 if top_p is None else top_p, seed + number))
    return tuple(answers)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", f"stop is not a text, or a list of up to {MAX_STOPS} texts, none of them empty")
    return tuple(stops)


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "model is missing: GET /v1/models lists it")
    return model


# --- the form of a field ---------------------------------------------------------------------------------------------


def _wrong(parameter: str, message: str, code: str | None = None) -> Refused:
    return Refused(400, message, parameter=parameter, code=code or "invalid_value")


def _typed(body: dict[str, Any], name: str, kind: type, expected: str, place: str = "") -> Any:
    value = body.get(name)
    if value is not None and type(value) is not kind:
        at = f"{place}.{name}" if place else name
        raise _wrong(at, f"{at} is not {expected}")
    return value


def _number(body: dict[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is not None and (type(value) not in (int, float) or not least <= value <= most):
        raise _wrong(name, f"{name} is not a number from {least} to {most}")
    return None if value is None else float(value)


def _whole(body: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise _wrong(name, f"{name} is not a whole number from {least} to {most}")
    return value
