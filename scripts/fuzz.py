#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything that reads what comes from outside: answers, examples, JSONL lines, trees.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris jsonschema==4.26.0
    /tmp/fuzz/bin/python -m scripts.fuzz -runs=1000000 -max_len=6000 [CORPUS_FOLDER]

Stops with the input when a reader raises anything but its own error, or accepts what it does not render back to the
same bytes, or what a second, simpler reader refuses. Flags are libFuzzer's.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["conversation"]):
    from conversation.data.examples import parse_line, read_jsonl, to_jsonl
    from conversation.data.rows import OtherColumns
    from conversation.data.trees import TreeError, parse_tree, read_trees
    from conversation.errors import UnusableData, UserError
    from conversation.format import strict_json
    from conversation.format.chat_messages import FieldError
    from conversation.format.control_tokens import CONTROL_PATTERN
    from conversation.format.message_parser import from_row
    from conversation.format.messages import to_row
    from conversation.format.parser import FormatError, parse_answer, parse_example
    from conversation_config import PROJECT


CALL = r"<start_function_call>\ncall:%s\{%s\}\n<end_function_call>\n"
VALUE = r"<escape>((?:(?!<escape>)[\s\S])+)<escape>"
WHOLE = re.compile(
    f"(?:{CALL % ('add_text', f'content:{VALUE}')}){{1,4}}"
    f"(?:{CALL % ('add_choice', f'text:{VALUE},confidence:{VALUE},target:{VALUE}')}){{3}}<end_of_turn>"
)


def check_answer(text: str) -> None:
    answer = parse_answer(text)
    assert answer.text == text, "an accepted answer is not rendered back to the same text"
    assert WHOLE.fullmatch(text), "the simple reader refuses an accepted answer"
    values = [*answer.fragments, *(value for c in answer.follow_ups for value in (c.text, c.confidence, c.target))]
    assert all(value.strip() and not CONTROL_PATTERN.search(value) for value in values)
    assert all(0 <= choice.probability <= 1 for choice in answer.follow_ups)


def check_example(text: str) -> None:
    example = parse_example(text)
    assert example.text == text, "an accepted example is not rendered back to the same text"
    check_answer(example.answer.text)


def check_line(text: str) -> None:
    example = parse_line(text)
    assert "text" not in (row := json.loads(text)) or example.text == row["text"]
    assert from_row(json.loads(json.dumps(to_row(example)))) == example
    assert parse_line(to_jsonl([example]).decode()) == example


def check_file(data: bytes) -> None:
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / "conversation-fuzz.jsonl"
    path.write_bytes(data)
    examples = read_jsonl(path)
    path.write_bytes(to_jsonl(examples))
    assert read_jsonl(path) == examples


def check_tree(data: bytes) -> None:
    tree = parse_tree(data, "root", "domain")
    for example in tree.examples():
        assert parse_example(example.text) == example


def as_text(data: bytes) -> str:
    try:
        return data.decode("utf-8", errors="surrogatepass")  # lone surrogates are among the inputs
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace")


TEXT_TARGETS = (check_answer, check_example, check_line)
BYTES_TARGETS = (check_tree, check_file, lambda data: strict_json.loads(strict_json.decode_utf8(data)))
TARGETS = 3 * TEXT_TARGETS + BYTES_TARGETS  # an input's first byte chooses; the slower ones come less often
EXPECTED = (FormatError, FieldError, OtherColumns, TreeError, UnusableData, UserError, ValueError)


def one_input(data: bytes) -> None:
    if not data:
        return
    target = TARGETS[data[0] % len(TARGETS)]
    try:
        target(as_text(data[1:]) if target in TEXT_TARGETS else data[1:])
    except EXPECTED as error:
        if type(error) not in (*EXPECTED, strict_json.JsonError, strict_json.NotJson):
            raise
        str(error).encode(errors="backslashreplace")


def write_seeds(folder: Path) -> None:
    """Valid inputs to start from, one of each kind from several trees."""
    trees = read_trees(PROJECT / "data" / "conversation_trees")
    for i, tree in enumerate(trees[::12]):
        example = tree.examples()[-1]
        line = to_jsonl([example])
        path = PROJECT / "data" / "conversation_trees" / tree.domain / f"{tree.name}.json"
        small = json.loads(path.read_text())
        small["nodes"] = {"root": small["nodes"][tree.name]}
        small["root"] = "root"
        tree_file = json.dumps(small).encode()
        seeds = {0: example.answer.text.encode(), 1: example.text.encode(), 2: line, 9: tree_file, 10: line, 11: line}
        seeds[5] = json.dumps(to_row(example)).encode()  # as 2, a line
        for kind, seed in seeds.items():
            (folder / f"{kind}-{i}").write_bytes(bytes([kind]) + seed)


def main() -> None:
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    corpus = Path(folders[0] if folders else tempfile.mkdtemp(prefix="conversation-fuzz-"))
    corpus.mkdir(exist_ok=True)
    write_seeds(corpus)
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
