"""OpenAI's API through OpenAI's own client, plain and streamed; and what is refused, in OpenAI's shape."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import CALLS as WRITTEN
from served import FOLLOW_UPS, FRAGMENTS, serving

from conversation.answering import openai_api
from conversation.answering.decoding import CONSTRAINED
from conversation.answering.openai_requests import FUNCTIONS, parse_request
from conversation.answering.refusals import Refused
from conversation.format.calls import Utterance

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_text",
            "description": "Adds AI response text to current node.",
            "parameters": {"type": "object", "properties": {"content": {"type": "string"}}, "required": ["content"]},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add_choice",
            "description": "Adds one predicted user response choice.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "confidence": {"type": "number"},
                    "target": {"type": "string"},
                },
                "required": ["text", "confidence", "target"],
            },
        },
    },
]
CALLS = [("add_text", {"content": text}) for text in FRAGMENTS] + [
    ("add_choice", {"text": c.text, "confidence": c.probability, "target": c.target}) for c in FOLLOW_UPS
]
QUESTION = [{"role": "user", "content": "What's a monad?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("openai")) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(client, messages=QUESTION, **options):
    return client.chat.completions.create(model="fake-model", messages=messages, **options)


def read_calls(tool_calls):
    return [(call.function.name, json.loads(call.function.arguments)) for call in tool_calls]


def test_with_the_tools_an_answer_is_the_calls_that_were_trained(client):
    answer = create(client, tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert read_calls(choice.message.tool_calls) == CALLS
    assert len({call.id for call in choice.message.tool_calls}) == len(CALLS)
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens > 0


def test_streamed_each_call_comes_whole_in_a_chunk_of_its_own(client):
    chunks = list(create(client, tools=TOOLS, stream=True, stream_options={"include_usage": True}))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert read_calls(calls) == CALLS and [call.index for call in calls] == list(range(len(CALLS)))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == create(client, tools=TOOLS).usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_own_accumulation_of_a_stream_gives_the_whole_answer(client):
    """A client adds up deltas: names and arguments as texts, calls by their index."""
    with client.chat.completions.stream(model="fake-model", messages=QUESTION, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    assert read_calls(final.choices[0].message.tool_calls) == CALLS


def test_without_tools_an_answer_is_text_and_the_follow_ups_lie_beside_it(client):
    message = create(client).choices[0].message
    assert message.content == "\n".join(FRAGMENTS) and not message.tool_calls
    assert message.follow_ups == [arguments for name, arguments in CALLS if name == "add_choice"]
    chunks = list(create(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.follow_ups == message.follow_ups


def test_an_answer_fed_back_as_tool_calls_becomes_the_history(client, server):
    first = create(client, tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in first.tool_calls]
    messages = [*QUESTION, first.model_dump(exclude_none=True), *results, {"role": "user", "content": "Example?"}]
    create(client, messages, tools=TOOLS)
    prompt = server.engine.asked[-1]
    assert prompt.question == "Example?"
    assert prompt.history == (Utterance("User", "What's a monad?"), *(Utterance("AI", text) for text in FRAGMENTS))


def test_an_answer_fed_back_as_text_becomes_the_same_history(client, server):
    text = create(client).choices[0].message.content
    parts = [{"type": "text", "text": "Exam"}, {"type": "text", "text": "ple?"}]
    messages = [*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": parts}]
    create(client, messages)
    prompt = server.engine.asked[-1]
    assert prompt.question == "Exam ple?"
    assert prompt.history == (Utterance("User", "What's a monad?"), *(Utterance("AI", text) for text in FRAGMENTS))


def test_tool_choice_picks_text_or_one_function(client):
    assert create(client, tools=TOOLS, tool_choice="none").choices[0].message.content
    assert create(client, tools=TOOLS, tool_choice="required").choices[0].message.tool_calls
    one = create(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add_choice"}})
    assert read_calls(one.choices[0].message.tool_calls) == [call for call in CALLS if call[0] == "add_choice"]
    only = create(client, tools=TOOLS[:1])
    assert read_calls(only.choices[0].message.tool_calls) == CALLS[:2]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("rules", "A pattern for chaining.\nLike a box with "),
        (["zzz", "\n"], "A pattern for chaining."),
        ("A", ""),
        (["chaining", "pattern"], "A "),
        ("g.\nLike", "A pattern for chainin"),  # held back when it was the end of the first fragment
        ("g.\nlike", "A pattern for chaining.\nLike a box with rules."),
        (["s.x", "es."], "A pattern for chaining.\nLike a box with rul"),
        ("s.\nX", "A pattern for chaining.\nLike a box with rules."),
        ("Example?", "A pattern for chaining.\nLike a box with rules."),  # of a follow-up, which is no part of the text
    ],
)
def test_stop_ends_a_text_before_it_even_across_fragments(client, stop, text):
    whole = create(client, stop=stop).choices[0]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in create(client, stop=stop, stream=True))
    assert whole.finish_reason == "stop"
    assert whole.message.content == streamed
    assert whole.message.content == text


def test_stop_ends_calls_before_the_one_that_says_it(client):
    choice = create(client, tools=TOOLS, stop="Why").choices[0]
    assert choice.finish_reason == "stop" and read_calls(choice.message.tool_calls) == CALLS[:3]


def test_max_tokens_ends_an_answer_before_the_call_that_would_be_cut(client, server):
    whole = create(client, tools=TOOLS).usage.completion_tokens
    assert create(client, tools=TOOLS, max_tokens=whole).choices[0].finish_reason == "tool_calls"
    before = len(server.engine.asked)
    for name in ("max_tokens", "max_completion_tokens"):
        cut = create(client, tools=TOOLS, **{name: whole - 1})
        assert cut.choices[0].finish_reason == "length"
        assert read_calls(cut.choices[0].message.tool_calls) == CALLS[:-1]
        assert cut.usage.completion_tokens < whole
    assert len(server.engine.asked) == before + 2
    nothing = create(client, tools=TOOLS, max_tokens=1).choices[0]
    assert (nothing.finish_reason, nothing.message.tool_calls) == ("length", None)


def test_several_answers_are_the_likeliest_and_drawn_ones(client, server):
    answer = create(client, tools=TOOLS, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(read_calls(choice.message.tool_calls) == CALLS for choice in answer.choices)
    decodings = server.engine.decodings[-3:]
    assert decodings[0] == CONSTRAINED and [(d.method, d.seed) for d in decodings[1:]] == [("drawn", 6), ("drawn", 7)]
    create(client, temperature=1.5, top_p=0.5, seed=5)
    assert (server.engine.decodings[-1].temperature, server.engine.decodings[-1].top_p) == (1.5, 0.5)
    create(client, temperature=0)
    assert server.engine.decodings[-1] == CONSTRAINED
    chunks = list(create(client, n=2, stream=True))
    ended = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ended == [0, 1]


def test_the_model_is_listed_and_another_is_not_found(client):
    assert [model.id for model in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").object == "model"
    with pytest.raises(openai.NotFoundError, match="'fake-model' is"):
        client.models.retrieve("gpt/4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


ASSISTANT = {"role": "assistant", "tool_calls": [{"function": {"name": "add_text", "arguments": "{"}}]}


@pytest.mark.parametrize(
    ("changed", "parameter", "words"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "not a list"),
        ({"messages": [7]}, "messages[0]", "not an object"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "is empty"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "neither a text nor a list"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "messages[0].content", "control character"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "reads nothing else",
        ),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "a"}]}, "messages[1].role", "must be the question"),
        ({"messages": [{"role": "system", "content": "Be kind."}, *QUESTION]}, "messages[0].role", "role system"),
        ({"messages": [{"content": "a"}, *QUESTION]}, "messages[0].role", "without a role"),
        ({"messages": [ASSISTANT, *QUESTION]}, "messages[0].tool_calls[0].function.arguments", "cannot be read"),
        ({"tools": [{"type": "function", "function": {"name": "get_weather"}}]}, "tools[0]", "'get_weather' cannot"),
        ({"tools": "all"}, "tools", "not a list"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "add_text"}}}, "tool_choice", "none of"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "empty"),
        ({"max_tokens": 0}, "max_tokens", "whole number from 1"),
        ({"max_tokens": "9"}, "max_tokens", "whole number"),
        ({"n": 9}, "n", "from 1 to 8"),
        ({"n": True}, "n", "whole number"),
        ({"temperature": 2.1}, "temperature", "from 0 to 2"),
        ({"top_p": -0.1}, "top_p", "from 0 to 1"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"presence_penalty": 1}, "presence_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "several calls"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"modalities": ["audio"]}, "modalities", "only text"),
        ({"model": None}, "model", "GET /v1/models"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_parameter(server, changed, parameter, words):
    body = {"model": "fake-model", "messages": QUESTION, **changed}
    status, _, answer = server.call("POST", "/v1/chat/completions", body)
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", parameter)
    assert words in error["message"] and error["code"]


def test_what_does_not_change_an_answer_is_ignored(client):
    options = {"user": "u", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "service_tier": "auto"}
    assert create(client, **options, extra_body={"chat_id": "x"}).choices[0].message.content


def test_a_prompt_beyond_the_context_has_its_own_code_also_when_streamed(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, [{"role": "user", "content": "word " * 3000}], stream=stream)
        assert caught.value.code == "context_length_exceeded" and "2048" in caught.value.message


@given(
    lines=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=4),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
)
def test_a_text_ends_before_its_first_stop_text_however_it_is_cut_into_lines(lines, stops):
    text = "\n".join(lines)
    expected = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
    growing, sent = openai_api._Text(tuple(stops)), ""
    for line in lines:
        sent += growing.add(line)
        assert expected.startswith(sent)
        if growing.is_stopped:
            break
    assert sent + growing.end() == expected


def test_a_text_that_is_whole_ends_with_stop_and_without_the_follow_ups_that_do_not_fit(client):
    lengths = [len(each.ids) for each in WRITTEN]
    text = sum(lengths[: len(FRAGMENTS)])
    for most in range(lengths[0] - 1, sum(lengths) + 2):
        answer = create(client, max_tokens=most)
        choice = answer.choices[0]
        calls = sum(sum(lengths[: n + 1]) <= most for n in range(len(lengths)))
        assert answer.usage.completion_tokens == sum(lengths[:calls]) <= most
        assert choice.message.content == "\n".join(FRAGMENTS[:calls])
        assert len(choice.message.follow_ups) == max(0, calls - len(FRAGMENTS))
        assert choice.finish_reason == ("stop" if most >= text else "length")
    cut = list(create(client, max_tokens=lengths[0], stop=".\nNo", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in cut) == FRAGMENTS[0]


def test_the_tokens_are_those_that_the_model_wrote(client):
    wanted = {"type": "function", "function": {"name": "add_choice"}}
    for options, calls in (
        ({}, WRITTEN),
        ({"tools": TOOLS}, WRITTEN),
        ({"tool_choice": wanted, "tools": TOOLS}, WRITTEN[2:]),
    ):
        for n in (1, 2):
            usage = create(client, n=n, **options).usage
            assert usage.completion_tokens == n * sum(len(each.ids) for each in calls)


def test_the_tools_are_those_of_the_format():
    assert tuple(tool["function"]["name"] for tool in TOOLS) == FUNCTIONS
    with pytest.raises(Refused, match="a tool without a name cannot be called"):
        parse_request({"model": "m", "messages": QUESTION, "tools": [*TOOLS, {}]})


def test_an_unknown_tool_is_refused_wherever_it_stands():
    with pytest.raises(Refused, match="'get_weather' cannot be called") as caught:
        parse_request(
            {"model": "m", "messages": QUESTION, "tools": [*TOOLS * 100, {"function": {"name": "get_weather"}}]}
        )
    assert caught.value.parameter == "tools[200]"
