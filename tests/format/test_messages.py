"""Chat messages with tools: written and read back, in each of their forms. test_bad_messages.py has the defects."""

import copy
import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation.format.calls import INSTRUCTION, TIMESTAMP, Answer, Example, FollowUp, Prompt, Utterance
from conversation.format.chat_messages import FieldError
from conversation.format.message_parser import from_row
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


@settings(deadline=None)
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


def answer_of(value):
    """The functions that the answer calls; the answer is taken out."""
    return [call["function"] for call in value["messages"].pop()["tool_calls"]]


def one_call_at_a_time(value):
    """As OpenAI's API goes with parallel_tool_calls=false: each call is answered before the next."""
    for i, function in enumerate(answer_of(value)):
        call = {"id": f"call_{i}", "type": "function", "function": function}
        value["messages"].append({"role": "assistant", "content": None, "tool_calls": [call]})
        value["messages"].append({"role": "tool", "tool_call_id": f"call_{i}", "content": "ok"})


def as_functions_were_called_once(value):
    for function in answer_of(value):
        function["arguments"] = json.dumps(function["arguments"])
        value["messages"].append({"role": "assistant", "content": None, "function_call": function})
        value["messages"].append({"role": "function", "name": function["name"], "content": "ok"})
    value["functions"] = [tool["function"] for tool in value.pop("tools")]


def an_earlier_answer_in_two_parts(value):
    choices = [call for call in calls(value) if call["function"]["name"] == "add_choice"]
    value["messages"][2:2] = [{"role": "tool", "content": "ok"}, {"role": "assistant", "tool_calls": choices}]


def all_as_json_texts(value):
    for text in value["messages"]:
        if "tool_calls" in text:
            text["tool_calls"] = json.dumps(text["tool_calls"])
    value.update(messages=json.dumps(value["messages"]), tools=json.dumps([json.dumps(t) for t in value["tools"]]))


def the_same_keys_in_all_messages(value):
    for text in value["messages"]:
        text.update({"tool_calls": text.get("tool_calls", []), "function_call": {}, "name": "x", "weight": 1})


def as_llama_factory(value):
    functions = answer_of(value)
    past = [
        {"from": "function_call", "value": json.dumps(call["function"])} for call in value["messages"][1]["tool_calls"]
    ]
    texts = [{"from": "human", "value": value["messages"][i]["content"]} for i in (0, 2)]
    last = {"from": "function_call", "value": json.dumps(functions)}
    observed = {"from": "observation", "value": "ok"}
    value["conversations"] = [texts[0], *past, observed, texts[1], last]
    del value["messages"]
    value.update(tools=json.dumps(value["tools"]), system="")


def an_answer_in_two_parts(value):
    as_prompt_and_completion(value)
    value["completion"] = [{"role": "assistant", "tool_calls": part} for part in halves(value["completion"][0])]


def halves(answer):
    return answer["tool_calls"][:3], answer["tool_calls"][3:]


OTHER_FORMS = {
    "one call a message, with results": one_call_at_a_time,
    "functions of OpenAI's older form": as_functions_were_called_once,
    "an earlier answer in two messages": an_earlier_answer_in_two_parts,
    "an answer in two messages": an_answer_in_two_parts,
    "JSON texts all over": all_as_json_texts,
    "the same keys in all messages": the_same_keys_in_all_messages,
    "as LLaMA-Factory has it": as_llama_factory,
    "conversations of role and content": lambda value: value.update(conversations=value.pop("messages")),
    "tools of an empty text": lambda value: value.update(tools=""),
    "an earlier answer that is not trained on": lambda value: value["messages"][1].update(weight=0, thinking="Hm."),
    "a confidence of 32 bits": lambda value: argument(value, 2).update(confidence=0.6000000238418579),
    "a confidence of a decimal column": lambda value: argument(value, 2).update(confidence=Decimal("0.60")),
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
    "white space beside an earlier answer's calls": lambda value: value["messages"][1].update(content="\n\n"),
    "a function that returned an object": lambda value: value["messages"].insert(
        2, {"role": "tool", "content": {"ok": "\0"}}
    ),
    "the date twice": lambda value: (
        value.update(system=dated(TIMESTAMP)) or insert(0, "system", dated(TIMESTAMP))(value)
    ),
    "confidence as text": lambda value: argument(value, 2).update(confidence="0.60"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_ways_to_write_the_same_are_read(name):
    value = row()
    OTHER_FORMS[name](value)
    assert from_row(value) == EXAMPLE


def dated(date):
    """The instruction of the format with a date of its own."""
    return INSTRUCTION.format(timestamp=date).strip()


def argument(value, number):
    return value["messages"][3]["tool_calls"][number]["function"]["arguments"]


def calls(value):
    return value["messages"][3]["tool_calls"]


def message(number, **fields):
    return lambda value: value["messages"][number].update(fields)


def insert(number, role, content="Be terse."):
    return lambda value: value["messages"].insert(number, {"role": role, "content": content})


@pytest.mark.parametrize("confidence", [-0.0, Decimal("-0")])
def test_a_confidence_of_minus_zero_is_zero(confidence):
    value = row()
    argument(value, 2).update(confidence=confidence)
    assert from_row(value).answer.follow_ups[0].confidence == "0.00"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
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
