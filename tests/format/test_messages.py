"""Chat messages with tools: written and read back, and every defect named with its place."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversation.format.calls import TIMESTAMP, Answer, Example, FollowUp, Prompt, Utterance
from conversation.format.message_parser import FieldError, from_row
from conversation.format.messages import TOOLS, to_row

CHOICES = (FollowUp("Why?", "0.60", "why"), FollowUp("How?", "0.25", "how"), FollowUp("Cost?", "0.125", "cost"))
EXAMPLE = Example(
    Prompt("Example?", (Utterance("User", "What's a lock?"), Utterance("AI", "A guard."), Utterance("AI", "Of data."))),
    Answer(("Two clerks, one till.", "One waits."), CHOICES),
)


def row():
    return json.loads(json.dumps(to_row(EXAMPLE)))


def test_messages_and_tools_are_what_apply_chat_template_takes():
    messages = to_row(EXAMPLE)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[2] == {"role": "user", "content": "Example?"}
    assert [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == [
        {"content": "A guard."},
        {"content": "Of data."},
    ]
    last = messages[3]["tool_calls"][-1]["function"]
    assert last == {"name": "add_choice", "arguments": {"text": "Cost?", "confidence": 0.125, "target": "cost"}}
    assert to_row(EXAMPLE)["tools"] is TOOLS and TOOLS[0]["function"]["parameters"]["required"] == ["content"]


def test_every_example_of_ours_is_read_back_as_it_was(own_examples):
    for example in own_examples[::5]:
        assert from_row(json.loads(json.dumps(to_row(example)))) == example


NUMBERS = st.sampled_from(["0.80", "0.8", ".5", "1", "0.123", "1e-3", "0.00", "+0.5"])
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<>"), min_size=1).filter(str.strip)
LINES = WORDS.map(lambda text: " ".join(text.split("\n")))


@given(
    st.lists(st.tuples(st.sampled_from(["User", "AI"]), LINES)),
    WORDS,
    WORDS,
    NUMBERS,
    st.sampled_from([TIMESTAMP, "now"]),
)
def test_any_example_is_read_back_as_it_was(history, question, text, number, date):
    answer = Answer((text,), (FollowUp(text, number, "a"), *CHOICES[:2]))
    example = Example(Prompt(question, tuple(Utterance(*each) for each in history), date), answer)
    assert from_row(json.loads(json.dumps(to_row(example)))) == example


def without_type_and_wrapping(value):
    for message in value["messages"]:
        message["tool_calls"] = [call["function"] for call in message.get("tool_calls", [])] or None


def as_openai(value):
    for message in value["messages"]:
        message.setdefault("tool_calls", None)
        for i, call in enumerate(message["tool_calls"] or []):
            call["id"] = f"call_{i}"
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            message["content"] = None
    value["messages"].insert(2, {"role": "tool", "tool_call_id": "call_0", "content": "ok"})


def as_prompt_and_completion(value):
    messages = value.pop("messages")
    value["prompt"], value["completion"] = messages[:-1], messages[-1:]


def as_a_table_fills_it(value):
    for message in value["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = {
                "content": None, "text": None, "confidence": None, "target": None, **call["function"]["arguments"]
            }  # fmt: skip
    value["prompt"] = value["completion"] = None


OTHER_FORMS = {
    "no tools": lambda value: value.pop("tools"),
    "tools as text": lambda value: value.update(tools=json.dumps(value["tools"])),
    "tools without wrapping": lambda value: value.update(tools=[tool["function"] for tool in value["tools"]]),
    "other descriptions": lambda value: value["tools"][0]["function"].update(description="Says it."),
    "another column": lambda value: value.update(source="mine", id=7),
    "calls without wrapping": without_type_and_wrapping,
    "as OpenAI writes it": as_openai,
    "prompt and completion": as_prompt_and_completion,
    "a table's empty fields": as_a_table_fills_it,
    "role model": lambda value: value["messages"][-1].update(role="model"),
    "an empty system message": lambda value: value["messages"].insert(0, {"role": "system", "content": " "}),
    "text parts": lambda value: value["messages"][2].update(content=[{"type": "text", "text": "Example?"}]),
    "confidence as text": lambda value: argument(value, 2).update(confidence="0.60"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_ways_to_write_the_same_are_read(name):
    value = row()
    OTHER_FORMS[name](value)
    assert from_row(value) == EXAMPLE


def argument(value, number):
    return value["messages"][3]["tool_calls"][number]["function"]["arguments"]


def calls(value):
    return value["messages"][3]["tool_calls"]


def put(number, **arguments):
    """A change of an argument of one of the answer's calls."""
    return lambda value: argument(value, number).update(arguments)


def call(number, **fields):
    return lambda value: calls(value)[number]["function"].update(fields)


def message(number, **fields):
    return lambda value: value["messages"][number].update(fields)


def insert(number, role, content="Be terse."):
    return lambda value: value["messages"].insert(number, {"role": role, "content": content})


def history_call(value):
    value["messages"][1]["tool_calls"][0]["function"]["arguments"]["content"] = "a\nb"


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
    f"{FIRST}: text that is not JSON": call(0, arguments="{content: x}"),
    f"{FIRST}.tone: add_text has no such": put(0, tone="x"),
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
    "messages[3].role: 'user', but the last": message(3, role="user"),
    "messages[2].role: 'assistant', but before the answer": message(2, role="assistant"),
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
    "completion: 4 messages": lambda v: v.update(prompt=[], completion=v.pop("messages")),
    "messages: beside `prompt`": lambda v: v.update(prompt=[]),
    "tools[0].function.name: 'say' is neither": lambda v: v["tools"][0]["function"].update(name="say"),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(JSON, st.data())
def test_whatever_a_row_holds_the_error_is_one_with_a_place(junk, data):
    """A value anywhere in a good row is replaced."""
    value = copy.deepcopy(row())
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = junk
    try:
        example = from_row(value)
    except FieldError as error:
        str(error).encode(errors="backslashreplace")
    else:
        assert from_row(json.loads(json.dumps(to_row(example)))) == example
