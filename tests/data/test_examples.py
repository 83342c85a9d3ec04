"""Training lines: bad ones are all named, trees stay whole when some are held out."""

import bz2
import gzip
import json
import lzma
import os
import pickle
from dataclasses import replace

import pytest
from conftest import INPUTS, TREES, easy_lines
from hypothesis import given
from hypothesis import strategies as st

from conversation.data.examples import (
    evenly_spread,
    parse_line,
    read_data,
    read_jsonl,
    read_training_data,
    root_question,
    split_by_tree,
    to_jsonl,
)
from conversation.data.statistics import LengthSummary, count_structure
from conversation.errors import UserError
from conversation.format.calls import Example, Prompt, Utterance
from conversation_config import DATA_SETS, path_from_anywhere


def test_written_lines_are_the_lines_read(tmp_path, own_examples):
    path = tmp_path / "data.jsonl"
    path.write_bytes(to_jsonl(own_examples))
    assert read_jsonl(path) == own_examples
    assert to_jsonl(read_jsonl(path)) == path.read_bytes()


def test_the_originals_lines_are_written_back_byte_for_byte(real_lines):
    for line in real_lines:
        assert to_jsonl([parse_line(line)]).decode() == line + "\n"


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path, real_lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(real_lines[:3]).encode() + b"\r\n")
    assert len(read_jsonl(path)) == 3


@pytest.mark.parametrize(("examples", "count"), [(199, 100), (899, 100), (100, 100), (7, 100), (0, 5), (5, 1)])
def test_some_examples_are_spread_evenly_over_all(examples, count):
    found = evenly_spread(range(examples), count)
    assert len(found) == min(examples, count)
    steps = {after - before for before, after in zip([*found, examples], [*found, examples][1:], strict=False)}
    assert not found or (found[0] == 0 and max(steps) - min(steps) <= 1 and min(steps) > 0)


BAD_LINES = {
    b"not json": "not JSON",
    b"": "empty",
    b"   ": "empty",
    b"[1]": "not a JSON object",
    b'{"txt": "x"}': "no `text`",
    b'{"text": 5}': "not a string",
    b'{"text": "hello"}': "not in the text format",
    b'{"text": "a", "text": "b"}': "occurs twice",
    b'{"text": NaN}': "NaN",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "a\\u0000b"}': "NUL",
    b'{"text": "\xff"}': "not UTF-8",
    b"[" * 200_000: "nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_bad_line_is_named_with_its_number_and_reason(tmp_path, real_lines, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(real_lines[0].encode() + b"\n" + line + b"\n" + real_lines[1].encode() + b"\n")
    with pytest.raises(UserError, match=r"1 of 3 lines") as caught:
        read_jsonl(path)
    assert f"{path}:2: " in str(caught.value) and BAD_LINES[line] in str(caught.value)


def test_all_bad_lines_are_listed_the_first_twenty_and_how_many_more(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("x\n" * 25)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert f"{path}:20: " in str(caught.value) and f"{path}:21: " not in str(caught.value)
    assert "and 5 more" in str(caught.value)


def as_array(lines, **options):
    return json.dumps([json.loads(line) for line in lines], **options).encode()


KINDS = {
    "UTF-16": lambda lines: "\n".join(lines).encode("utf-16"),
    "UTF-16 without a mark": lambda lines: "\n".join(lines).encode("utf-16-le"),
    "UTF-16, big end first": lambda lines: "\n".join(lines).encode("utf-16-be"),
    "UTF-32": lambda lines: "\n".join(lines).encode("utf-32"),
    "gzip": lambda lines: gzip.compress("\n".join(lines).encode()),
    "bzip2": lambda lines: bz2.compress("\n".join(lines).encode()),
    "xz": lambda lines: lzma.compress("\n".join(lines).encode()),
    "one JSON array of 3": as_array,
    "one JSON array of 3, indented": lambda lines: as_array(lines, indent=1),
    "one JSON array, and a broken one": lambda lines: as_array(lines, indent=1)[:-2],
    "one JSON object over several lines": lambda lines: json.dumps(json.loads(lines[0]), indent=1).encode(),
    "a conversation tree": lambda lines: next(TREES.glob("*/*.json")).read_bytes(),
    "a conversation tree, on one line": lambda lines: json.dumps({"nodes": {}}).encode(),
    "JSON over several lines": lambda lines: "\n".join(
        json.dumps(json.loads(line), indent=2) for line in lines
    ).encode(),
    "lzma": lambda lines: lzma.compress("\n".join(lines).encode(), format=lzma.FORMAT_ALONE),
    "a Python pickle": lambda lines: pickle.dumps(lines, protocol=4),
    "an Arrow file": lambda lines: b"ARROW1\0\0" + "\n".join(lines).encode(),
    "a web page": lambda lines: b"<!doctype html>\n<html>\n",
    "a Git LFS pointer": lambda lines: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_recognised_as_what_it_is(tmp_path, real_lines, kind):
    path = tmp_path / "data.jsonl"
    path.write_bytes(KINDS[kind](real_lines[:3]))
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    expected = kind.removesuffix(", indented").removesuffix(", on one line")
    expected = expected.removesuffix(" without a mark").removesuffix(", big end first")
    assert f"this is {expected}" in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "gb18030"])
def test_lines_in_another_encoding_are_said_to_need_another(tmp_path, real_lines, encoding):
    text = "\u5916" if encoding != "cp1252" else "\u00e9"
    lines = [json.dumps({**json.loads(line), "note": text}, ensure_ascii=False) for line in real_lines[:2]]
    plain = [line.encode("ascii", "replace").decode() for line in lines]
    (tmp_path / "data.jsonl").write_bytes("\n".join([*plain, *lines]).encode(encoding, "replace"))
    with pytest.raises(UserError, match=r"2 of 4 lines cannot be used:\n.*:3: not UTF-8: byte") as caught:
        read_jsonl(tmp_path / "data.jsonl")
    assert "convert the file to UTF-8: iconv" in caught.value.hint


def test_a_table_of_texts_is_recognised_by_its_name(tmp_path):
    (tmp_path / "data.csv").write_text('messages,tools\n"[]","[]"\n')
    with pytest.raises(UserError, match=r"data\.csv: this is a table of texts"):
        read_jsonl(tmp_path / "data.csv")


def test_line_ends_of_an_old_mac_are_recognised(tmp_path, real_lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes("\r".join(real_lines[:3]).encode())
    with pytest.raises(UserError, match="line ends of one carriage return"):
        read_jsonl(path)


def test_the_files_of_other_kinds_that_failed_once_are_recognised():
    kinds = {"utf16.jsonl": "this is UTF-16", "six.jsonl.gz": "this is gzip"}
    kinds["array.json"] = "this is one JSON array of 6"
    for name, words in kinds.items():
        with pytest.raises(UserError, match=words):
            read_training_data(INPUTS / name)


def test_missing_empty_and_unreadable_data(tmp_path):
    with pytest.raises(UserError, match="no training data"):
        read_training_data(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="no training example"):
        read_training_data(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="--domains needs"):
        read_training_data(tmp_path / "empty.jsonl", ("systems",))


def test_a_pipe_is_refused_before_anyone_waits_for_it(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe or a device") as caught:
        read_training_data(tmp_path / "pipe")
    assert "save the data in a file" in caught.value.hint
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing):
        assert path_from_anywhere(f"/dev/fd/{reading}") == f"/dev/fd/{reading}"  # as a shell's <(...)


def test_held_out_trees_are_whole_and_about_a_tenth(own_examples):
    training, held_out = split_by_tree(own_examples, 0.1)
    assert sorted(training + held_out, key=lambda e: e.text) == sorted(own_examples, key=lambda e: e.text)
    assert not {root_question(e) for e in training} & {root_question(e) for e in held_out}
    assert 0.08 < len(held_out) / len(own_examples) < 0.12


def test_one_large_tree_is_not_held_out_for_a_small_share(own_examples):
    by_root = {}
    for example in own_examples:
        by_root.setdefault(root_question(example), []).append(example)
    small = list(by_root.values())[:2]
    for question in ("CAP theorem?", "What's a monad?", "Why?"):  # whatever its place in the order
        large = [Example(Prompt(question), example.answer) for example in own_examples[:100]]
        training, held_out = split_by_tree([*large, *small[0], *small[1]], 0.1)
        assert held_out in small and len(training) > 100


def test_the_split_stays_when_trees_are_added(own_examples):
    half = own_examples[: len(own_examples) // 2]
    order = [root_question(e) for e in split_by_tree(half, 0.5)[1]]
    more = {root_question(e) for e in split_by_tree(own_examples, 0.5)[1]}
    assert len(set(order) & more) > 0.8 * len(set(order))


def test_chats_that_the_assistant_opens_alike_are_trees_of_their_own():
    greeted = (Utterance("AI", "Hello, how can I help?"),)
    examples = [Example(replace(e.prompt, history=greeted), e.answer) for e in easy_lines() if not e.prompt.history]
    assert root_question(examples[0]) == examples[0].prompt.question
    assert split_by_tree(examples, 0.1)[1] != []
    later = replace(examples[0].prompt, history=(*greeted, Utterance("User", "First?"), Utterance("AI", "Yes.")))
    assert root_question(Example(later, examples[0].answer)) == "First?"


def test_every_way_to_ask_a_root_question_is_on_the_same_side():
    data = read_data(DATA_SETS["starter"])
    examples, same_root = data.examples, data.same_root
    training, held_out = split_by_tree(examples, 0.1, same_root)
    assert len(held_out) % 15 == 0 and len(held_out) == pytest.approx(90, abs=15)
    roots = [{same_root.get(root_question(e), root_question(e)) for e in part} for part in (training, held_out)]
    assert not roots[0] & roots[1] and len(roots[1]) == len(held_out) // 15


def test_nothing_is_held_out_of_a_single_tree_or_for_a_share_of_zero(own_examples):
    first = [e for e in own_examples if root_question(e) == root_question(own_examples[0])]
    assert split_by_tree(first, 0.5) == (first, [])
    assert split_by_tree(own_examples, 0.0)[1] == []


def test_statistics(own_examples):
    counted = count_structure([*own_examples, own_examples[0]])
    assert counted.examples == len(own_examples) + 1
    assert counted.duplicates == 1
    assert counted.add_choice_calls == 3 * counted.examples
    assert sum(counted.examples_by_turn.values()) == counted.examples


def test_length_summary():
    assert LengthSummary.of([3, 1, 2]) == LengthSummary(min=1, median=2, mean=2.0, p95=3, max=3)
    assert LengthSummary.of(list(range(1, 101))).p95 == 95


@given(
    st.text() | st.dictionaries(st.text(), st.text()).map(json.dumps) | st.binary().map(lambda b: b.decode("latin1"))
)
def test_any_line_is_refused_with_a_reason_or_renders_back(line):
    try:
        parsed = parse_line(line)
    except ValueError as error:
        assert str(error)
    else:
        assert json.loads(line)["text"] == parsed.text
