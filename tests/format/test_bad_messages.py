"""Chat messages with tools that are no example: every defect is refused with its place."""

import json

import pytest
from test_messages import (
    answer_of,
    argument,
    as_prompt_and_completion,
    calls,
    dated,
    halves,
    insert,
    message,
    row,
)

from conversation.format.chat_messages import FieldError
from conversation.format.message_parser import from_row


def put(number, **arguments):
    """A change of an argument of one of the answer's calls."""
    return lambda value: argument(value, number).update(arguments)


def call(number, **fields):
    return lambda value: calls(value)[number]["function"].update(fields)


def calls_in_content_and_beside_it(value):
    functions = json.dumps(answer_of(value))
    beside = [{"function": {"name": "add_text", "arguments": {"content": "And this?"}}}]
    value["messages"].append({"role": "function_call", "content": functions, "tool_calls": beside})


def history_call(value):
    value["messages"][1]["tool_calls"][0]["function"]["arguments"]["content"] = "a\nb"


def continued_completion(value):
    as_prompt_and_completion(value)
    first, second = halves(value["completion"][0])
    value["prompt"].append({"role": "assistant", "tool_calls": first})
    value["completion"] = [{"role": "assistant", "tool_calls": second}]


CALL, CALLS = "messages[3].tool_calls[{}].function", "messages[3].tool_calls"
FIRST, CHOICE = (f"{CALL.format(number)}.arguments" for number in (0, 2))
END_OF_QUESTION = "a\n<end_of_turn>\n<start_of_turn>model\n"
DEFECTS = {
    f"{CALLS}: 4 follow-ups": lambda v: calls(v).append(calls(v)[-1]),
    f"{CALLS}: 6 fragments": lambda v: calls(v).__setitem__(slice(0, 0), [calls(v)[0]] * 4),
    f"{CALLS}: 0 fragments": lambda v: v["messages"][3].pop("tool_calls"),
    f"{CALL.format(4)}.name: add_text after": lambda v: calls(v).append(calls(v).pop(0)),
    f"{CALL.format(0)}.name: 'search'": call(0, name="search"),
    f"{FIRST}: not an object but a list": call(0, arguments=["x"]),
    f"{FIRST}: its JSON text cannot be read: not JSON": call(0, arguments="{content: x}"),
    f"{FIRST}: its JSON text cannot be read: the key 'content' occurs twice": call(
        0, arguments='{"content": "a", "content": "b"}'
    ),
    f"{CALL.format(2)}.arguments: its JSON text cannot be read: NaN": call(2, arguments='{"confidence": NaN}'),
    f"{FIRST}.tone: add_text has no such": put(0, tone="x"),
    "messages[1].tool_calls[0].function.arguments.tone: add_text has no such": lambda v: v["messages"][1]["tool_calls"][
        0
    ]["function"]["arguments"].update(tone="x"),
    "messages[3].tool_calls[0].function.name: add_text after add_choice": calls_in_content_and_beside_it,
    "messages[0].content: another date than in `system`": lambda v: (
        v.update(system=dated("2020-01-01T00:00:00")),
        insert(0, "system", dated("2021-01-01T00:00:00"))(v),
    ),
    f"{FIRST}.content: the value is empty": put(0, content=" "),
    f"{FIRST}.content: control token <escape>": put(0, content="a <escape>"),
    f"{FIRST}.content: an unpaired surrogate U+D800": put(0, content="a \ud800"),
    f"{FIRST}.content: a NUL": put(0, content="a \0"),
    f"{CHOICE}.confidence: not between": put(2, confidence=10**400),
    f"{CHOICE}.confidence: confidence 'high'": put(2, confidence="high"),
    f"{CHOICE}.confidence: not a number but true": put(2, confidence=True),
    f"{CHOICE}.target: target 'No'": put(2, target="No"),
    f"{CHOICE}.text: not a text but nothing": lambda v: argument(v, 2).pop("text"),
    "messages[3].content: text beside the function calls": message(3, content="Sure!"),
    "messages[3].content: text, but an answer is function calls": message(3, content="Sure!", tool_calls=None),
    "messages[3].thinking: text beside the function calls": message(3, thinking="Hm."),
    "messages[3].weight: not 1, but every answer": message(3, weight=0),
    "messages[3].train: not 1, but every answer": message(3, train=False),
    "messages[3].role: 'user', but the last": message(3, role="user", tool_calls=None),
    "messages[3].role: 'tool', but the last": message(3, role="tool", tool_calls=None),
    "messages[3].role: 'robot' is none of user": message(3, role="robot"),
    "messages[3].tool_calls[0].function: a call in a message of the user": message(3, role="user"),
    "messages[2].content: text, but an answer is function calls": message(2, role="assistant"),
    "messages[2].tool_calls[0].function: a call in a message": lambda v: v["messages"][2].update(
        tool_calls=calls(v)[:1]
    ),
    "prompt[3].role: 'assistant', but before the answer": continued_completion,
    "completion[1].role: 'user' after the question": lambda v: (
        as_prompt_and_completion(v),
        v["completion"].append(v["prompt"][0]),
    ),
    "messages[4].tool_calls[0].function.name: add_text after": lambda v: v["messages"].append(v["messages"][3]),
    "messages[3] to messages[4]: 6 follow-ups": lambda v: v["messages"].append(
        {"role": "assistant", "tool_calls": calls(v)[2:]}
    ),
    "messages[0].content: no text": message(0, content=None),
    "messages[1]: neither content": message(1, tool_calls=[]),
    "messages[2].content: the question is empty": message(2, content=""),
    "messages[2].content: the question of a training line cannot": message(2, content=END_OF_QUESTION),
    "messages[0].content: a line break": message(0, content="a\nb"),
    "messages[1].tool_calls[0].function.arguments.content: a line break": history_call,
    "messages[0].content: a system message has no place": insert(0, "system"),
    "messages[1].role: 'system' has no place in the conversation": insert(1, "system"),
    "messages[0]: not a message but a text": lambda v: v["messages"].insert(0, "hello"),
    "messages[2].content: a part that is not text": message(2, content=[{"type": "image"}]),
    "messages: not a list of messages but a text": lambda v: v.update(messages="hello"),
    "messages: no question": lambda v: v.update(messages=v["messages"][-1:]),
    "prompt: not a list of messages but nothing": lambda v: v.update(completion=v.pop("messages")),
    "prompt: no question": lambda v: v.update(prompt=[], completion=v.pop("messages")),
    "completion: nothing": lambda v: v.update(prompt=v.pop("messages")[:3], completion=[]),
    "label: false": lambda v: (as_prompt_and_completion(v), v.update(label=False)),
    "messages: beside `prompt`": lambda v: v.update(prompt=[]),
    "messages: beside `conversations`": lambda v: v.update(conversations=v["messages"]),
    "messages: not a list of messages but nothing": lambda v: v.update(messages=None),
    "system: a system message has no place": lambda v: v.update(system="Be terse."),
    "conversations[0].from: 'robot' is none": lambda v: v.update(
        messages=None, conversations=[{"from": "robot", "value": "x"}]
    ),
    "conversations[0].value[0]: not a call but a text": lambda v: v.update(
        messages=None, conversations=[{"from": "function_call", "value": '["x"]'}]
    ),
    "tools[0].function.name: 'say' is none of": lambda v: v["tools"][0]["function"].update(name="say"),
    "tools[0].name: 'say' is none of": lambda v: v.update(tools=[{"name": "say", "parameters": {}}]),
    "tools[0].parameters: none, expected content": lambda v: v.update(tools=[{"name": "add_text", "parameters": {}}]),
    "tools: add_choice is not declared": lambda v: v["tools"].pop(),
    "tools[1].function.name: add_text is declared twice": lambda v: v["tools"].insert(1, v["tools"][0]),
    "tools[0].function.parameters: none, expected content": lambda v: v["tools"][0]["function"].update(parameters={}),
    "tools: not a list but an object": lambda v: v.update(tools={}),
}


@pytest.mark.parametrize("problem", DEFECTS)
def test_a_defect_is_refused_with_its_place(problem):
    value = row()
    DEFECTS[problem](value)
    with pytest.raises(FieldError) as caught:
        from_row(value)
    assert str(caught.value).startswith(problem)
