"""Promise: outside input is read strictly or refused with a reason; accepted input renders back.

The same readers went through coverage-guided fuzzing: scripts/fuzz.py.
"""

import contextlib
import dataclasses
import io
import json
import runpy
import signal
import sys

import pytest
from conftest import PROJECT, easy_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import conversation_config
from conversation.data.examples import parse_line, read_jsonl, to_jsonl
from conversation.data.trees import TreeError, parse_tree
from conversation.errors import STOPPING, UserError
from conversation.format import strict_json
from conversation.format.control_tokens import CONTROL_TOKENS
from conversation.format.parser import FormatError, parse_answer, parse_example

VALID = [example.text for example in easy_lines()[:3]]
TREE = {
    "root": "root",
    "question": "What's DNS?",
    "nodes": {
        "root": {
            "texts": ["A phone book."],
            "choices": [
                {"text": f"{word}?", "confidence": 0.5, "target": word.lower()} for word in ("Why", "Example", "Cost")
            ],
        }
    },
}
SCRAPS = (
    *CONTROL_TOKENS,
    "\n",
    "\0",
    "\r\n",
    "\ufeff",
    "{",
    "}",
    "<escape>",
    "call:add_text{",
    "add_choice",
    '"',
    "é",
    "😀",
)


@st.composite
def spoilt(draw, whole):
    """A valid text with parts deleted, doubled, or replaced by a scrap."""
    text = draw(st.sampled_from(whole))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 200)))
        scrap = draw(st.sampled_from(SCRAPS) | st.just(text[start:end] * 2) | st.just("") | st.text(max_size=5))
        text = text[:start] + scrap + text[end:]
    return text


@settings(max_examples=500, deadline=None)
@given(spoilt(VALID) | st.text())
def test_an_example_renders_back_to_its_bytes_or_is_refused_with_the_place(text):
    try:
        assert parse_example(text).text == text
    except FormatError as error:
        assert 0 <= error.position <= len(text) and len(str(error)) < 1000


@settings(max_examples=500, deadline=None)
@given(spoilt([example.answer.text for example in easy_lines()[:3]]) | st.text())
def test_an_answer_renders_back_to_its_bytes_or_is_refused_with_the_place(text):
    try:
        answer = parse_answer(text)
    except FormatError as error:
        assert 0 <= error.position <= len(text)
        return
    assert answer.text == text and 1 <= len(answer.fragments) <= 4 and len(answer.follow_ups) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=500, deadline=None)
@given(st.text() | JSON.map(json.dumps) | st.binary().map(lambda data: data.decode("latin1")))
def test_strict_json_gives_the_value_or_the_reason(text):
    try:
        value = strict_json.loads(text)
    except strict_json.JsonError as error:
        assert str(error)
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    assert value == json.loads(text)


STRANGE_LINES = {
    "a line of 30 MB": (b'{"text": "' + b"x" * 30_000_000 + b'"}', "not in the text format"),
    "deep nesting": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    "nesting within the parser's reach": (b'{"text": ' + b"[" * 400 + b"]" * 400 + b"}", "nested too deeply"),
    "a NUL byte": (b'{"text": "a\0b"}', "control character"),
    "an escaped NUL": (b'{"text": "a\\u0000b"}', "NUL"),
    "a lone surrogate": (b'{"text": "\\udc00"}', "unpaired surrogate U+DC00"),
    "a lone surrogate in a key": (b'{"text": "x", "\\ud800": 1}', "unpaired surrogate"),
    "a surrogate as bytes": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "a carriage return alone": (b'{"text": "x"}\r{"text": "y"}', "Extra data"),
    "a BOM in the middle": (b'\xef\xbb\xbf{"text": "x"}', "not JSON"),
    "a duplicate key": (b'{"text": "x", "text": "x"}', "occurs twice"),
    "NaN": (b'{"text": "x", "a": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"text": "x", "a": -Infinity}', "-Infinity is not JSON"),
    "a number too large": (b'{"text": "x", "a": 1e999}', "too large"),
    "an integer of 5000 digits": (b'{"text": "x", "a": ' + b"1" * 5000 + b"}", "digits"),
    "two objects": (b'{"text": "x"}{"text": "y"}', "Extra data"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("name", STRANGE_LINES)
def test_a_strange_line_is_refused_with_file_line_and_reason_and_the_others_are_not_lost(tmp_path, name):
    line, reason = STRANGE_LINES[name]
    good = to_jsonl(easy_lines()[:2]).splitlines()
    path = tmp_path / "data.jsonl"
    path.write_bytes(good[0] + b"\n" + line + b"\r\n" + good[1])
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert f"{path}:2: " in str(caught.value) and reason in str(caught.value) and len(str(caught.value)) < 2000
    path.write_bytes(b"\xef\xbb\xbf" + good[0] + b"\r\n" + good[1])  # a BOM, mixed line ends, no last newline
    assert read_jsonl(path) == easy_lines()[:2]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10_000))
def test_a_file_of_lines_is_read_or_refused_and_never_half_believed(tmp_path_factory, scrap, position):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    whole = to_jsonl(easy_lines()[:4])
    position %= len(whole)
    path.write_bytes(whole[:position] + scrap + whole[position + len(scrap) // 2 :])
    try:
        examples = read_jsonl(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    path.write_bytes(to_jsonl(examples))
    assert read_jsonl(path) == examples


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_tree_is_read_whole_or_refused(data):
    value = json.loads(json.dumps(TREE))
    if data.draw(st.booleans()):
        path = data.draw(
            st.sampled_from([("root",), ("question",), ("nodes",), ("nodes", "root"), ("nodes", "root", "texts")])
        )
        place = value
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = data.draw(JSON)
    else:
        choice = value["nodes"]["root"]["choices"][data.draw(st.integers(0, 2))]
        choice[data.draw(st.sampled_from(list(choice)))] = data.draw(JSON | st.floats(0, 1) | st.sampled_from(SCRAPS))
    content = json.dumps(value).encode()
    if data.draw(st.integers(0, 3)) == 0:
        cut = data.draw(st.integers(0, len(content)))
        content = content[:cut] + data.draw(st.binary(max_size=5)) + content[cut:]
    try:
        tree = parse_tree(content, "root", "systems")
    except TreeError as error:
        assert error.problems
        return
    for example in tree.examples():
        assert parse_example(example.text) == example == parse_line(to_jsonl([example]).decode())


@pytest.mark.parametrize("depth", [50, 101, 900, 100_000])
def test_a_deeply_nested_tree_is_refused_without_a_crash(depth):
    for place in ("question", "nodes"):
        content = json.dumps({**TREE, place: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
        with pytest.raises(TreeError):
            parse_tree(content.encode(), "root", "systems")


# --- the command line ------------------------------------------------------------------------------------------------

NAMES = sorted(spec.name for spec in dataclasses.fields(conversation_config.TrainingConfig))
VALUES = st.sampled_from(
    ["", "-1", "0", "nan", "inf", "-inf", "1e400", "1e39", "٣", "1_0", "0x10", "9" * 30, "/", ".", "~nobody/x", "a\nb"]
    + ["x" * 300, "é" * 200, "--", "-", "None", "True", "a/b/c", "/dev/null", "/proc/self/mem", "\udcff", "[]", " 1 "]
) | st.text(st.characters(exclude_characters="\0"), max_size=20)


def output_of(script: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a script, run in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in STOPPING}
    sys.argv = [str(PROJECT / script), *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        out.flush()
        return end.code, out.buffer.getvalue().decode()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("the script came back")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*NAMES, "run_dir", "no_such_flag", "max", "fp16"]), VALUES), max_size=4))
def test_no_command_line_is_a_crash(tmp_path_factory, pairs):
    """Nothing is trained: the training data does not exist, so a command line that is right ends there."""
    nowhere = str(tmp_path_factory.getbasetemp() / "nowhere.jsonl")
    arguments = [word for name, value in pairs if name != "training_data" for word in (f"--{name}", value)]
    status, output = output_of("train_conversation.py", "--check_data", *arguments, "--training_data", nowhere)
    assert status == 2, (status, output)
    assert "error: " in output and "Traceback" not in output


@pytest.mark.parametrize(
    "script", ["train_conversation.py", "merge_conversation_model.py", "test_conversation_model.py"]
)
@pytest.mark.parametrize("value", ["\udcff", "x" * 5000, "~nobody/x", "/proc/1/mem/x", "", "/dev/null", "/dev/null/x"])
def test_a_strange_path_is_one_error_and_status_2(tmp_path, monkeypatch, script, value):
    monkeypatch.chdir(tmp_path)
    flags = ["--resume"] if script.startswith("train") else []
    status, output = output_of(script, "--run_dir", value, *flags)
    assert status == 2 and output.startswith("error: ") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--base_model", "--training_data"])
@pytest.mark.parametrize("value", ["x" * 5000, "~nobody/x", "/proc/1/mem/x", "", "/dev/null", "a//b", "a/b\n"])
def test_a_strange_base_or_data_path_is_one_error_and_status_2(tmp_path, flag, value):
    data = tmp_path / "data.jsonl"
    data.write_bytes(to_jsonl(easy_lines()[:2]))
    more = ["--training_data", str(data), "--base_model", "/nowhere", flag, value]
    status, output = output_of("train_conversation.py", "--check_data", *more)
    assert status == 2 and "error: " in output and "Traceback" not in output
