"""Examples as chat messages with tools, the form of TRL and of OpenAI's API: written. `message_parser` reads them."""

from __future__ import annotations

import json
import struct
from typing import Any

from conversation.format.calls import INSTRUCTION, TIMESTAMP, Example

PARAMETERS = {
    "restate": {"question": ("string", "The question in full")},
    "add_text": {"content": ("string", "Response text")},
    "add_choice": {
        "text": ("string", "User's response text"),
        "confidence": ("number", "Confidence 0.0-1.0"),
        "target": ("string", "Target node name"),
    },
}
"""The parameters of the functions: JSON type and description, as the declarations of the prompt have them."""
REQUIRED = ("add_text", "add_choice")
"""The functions that every prompt declares; restate only where the model is trained to call it."""
DESCRIPTIONS = {
    "restate": "Writes out the question in full: what is asked, of what.",
    "add_text": "Adds AI response text to current node.",
    "add_choice": "Adds one predicted user response choice.",
}
RESTATING_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": DESCRIPTIONS[name],
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()},
                "required": list(parameters),
            },
        },
    }
    for name, parameters in PARAMETERS.items()
]
TOOLS = RESTATING_TOOLS[1:]
"""The declarations as JSON schemas, for `apply_chat_template(..., tools=TOOLS)`."""


def to_row(example: Example) -> dict[str, Any]:
    """The example as `messages` and `tools`: `message_parser.from_row` gives it back.

    A system message, the instruction, stands only before a prompt with a date of its own.
    """
    messages: list[dict[str, Any]] = []
    if example.prompt.timestamp != TIMESTAMP:
        content = INSTRUCTION.format(timestamp=example.prompt.timestamp).strip()
        messages.append({"role": "system", "content": content})
    for utterance in example.prompt.history:
        if utterance.speaker == "User":
            messages.append({"role": "user", "content": utterance.text})
        elif messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"].append(_call("add_text", content=utterance.text))
        else:
            messages.append(_assistant([_call("add_text", content=utterance.text)]))
    restated = example.answer.restated
    calls = [] if restated is None else [_call("restate", question=restated)]
    calls += [_call("add_text", content=text) for text in example.answer.fragments]
    calls += [
        _call("add_choice", text=each.text, confidence=_as_number(each.confidence), target=each.target)
        for each in example.answer.follow_ups
    ]
    messages += [{"role": "user", "content": example.prompt.question}, _assistant(calls)]
    return {"messages": messages, "tools": _tools(example)}


def to_sharegpt_row(example: Example) -> dict[str, str | list[dict[str, str]]]:
    """The same in ShareGPT's form as LLaMA-Factory has it: the calls of a message are the JSON text of a list.

    It is of texts alone, so that any version of `datasets` reads it as it is.
    """
    system, turns = "", []
    for message in to_row(example)["messages"]:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            turns.append({"from": "human", "value": message["content"]})
        else:
            calls = [call["function"] for call in message["tool_calls"]]
            turns.append({"from": "function_call", "value": json.dumps(calls, ensure_ascii=False)})
    tools = json.dumps([tool["function"] for tool in _tools(example)])
    return {"conversations": turns, "system": system, "tools": tools}


def _tools(example: Example) -> list[dict[str, Any]]:
    return RESTATING_TOOLS if example.prompt.restates else TOOLS


def _assistant(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _as_number(confidence: str) -> float | str:
    """A number where reading it gives the text back, as 0.80 for two decimals; else the text."""
    number = float(confidence)
    return number if as_text(number) == confidence else confidence


def as_text(confidence: float) -> str:
    """A confidence as the training data writes it, with two decimals; with more if it has more.

    Of a number that 32 bits hold, as a table's column may have it, the shortest text that means it: 0.57, not
    0.5699999928474426.
    """
    if len(repr(confidence)) > 15 and _in_32_bits(confidence) == confidence:
        shorter = (float(f"{confidence:.{digits}g}") for digits in range(1, 10))  # nine digits tell any from any other
        confidence = next(number for number in shorter if _in_32_bits(number) == confidence)
    return f"{confidence:.2f}" if round(confidence, 2) == confidence else repr(confidence)


def _in_32_bits(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]
