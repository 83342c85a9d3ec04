"""Training lines: read and check them, hold some out by tree, count what is in them.

Training data is a folder of conversation trees, or rows, each an example: a JSONL file with an object a line, a Parquet
file, a data set of the hub. `rows` says what a row may hold.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conversation.data.rows import (
    FORMS,
    DataSet,
    OtherColumns,
    is_data_set_folder,
    named_data_set,
    other_columns,
    parse_row,
    read_data_set,
    read_parquet,
    tell_of_earlier_answers,
)
from conversation.data.trees import Tree, question_in_full, read_listed_trees, read_trees
from conversation.errors import UnusableData, UserError, list_problems
from conversation.format import strict_json
from conversation.format.calls import Example
from conversation.format.message_parser import earlier_answers

RECODE = "convert the file to UTF-8: iconv -f ENCODING -t UTF-8, with the encoding that it has, as CP1252 or GB18030"


def parse_line(line: str) -> Example:
    """Read one line of a JSONL file. Raises ValueError that says what is wrong with it."""
    return parse_row(_object(line))


def _object(line: str) -> dict[str, Any]:
    value = strict_json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_jsonl(path: Path) -> list[Example]:
    """Read training lines. Raises UserError that lists every bad line, or says what the file is instead."""
    return [example for _, example in _read_lines(path)]


def _read_lines(path: Path) -> list[tuple[str, Example]]:
    """The places and examples of a JSONL file. Raises UserError as `read_jsonl` does, UnusableData for bad lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    table = "a table of texts: write it as JSONL or Parquet" if path.suffix.lower() in (".csv", ".tsv") else None
    if kind := strict_json.recognise(data) or (table and f"this is {table}") or _kind_of_text(data):
        raise UserError(f"{path}: {kind}", "training data is UTF-8 with one JSON object a line: data/README.md")
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    examples: list[tuple[str, Example]] = []
    problems = []
    others: list[OtherColumns] = []
    earlier = 0
    for number, line in enumerate(lines, 1):
        try:
            text = strict_json.decode_utf8(line) if number == 1 else line.decode("utf-8")
            if not text.strip():
                raise ValueError("the line is empty")
            examples.append((f"{path}:{number}", parse_row(row := _object(text))))
            earlier += earlier_answers(row)
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            others += [error] if isinstance(error, OtherColumns) else []
    if others and len(others) == len(lines):
        raise other_columns(str(path), {column for error in others for column in error.columns})
    if problems:
        message = f"{len(problems)} of {len(lines)} lines cannot be used:\n{list_problems(problems)}"
        hint = RECODE if all("not UTF-8" in problem for problem in problems) else FORMS
        raise UnusableData(message, hint, problems, examples)
    if not examples:
        raise UserError(f"{path} contains no training example")
    tell_of_earlier_answers(str(path), earlier)
    return examples


def _kind_of_text(data: bytes) -> str | None:
    """What a text is that is not lines of JSON objects, as "this is ..."; None for lines, good or bad."""
    if b"\r" in data and b"\n" not in data.strip():
        return "this has line ends of one carriage return: convert it with tr '\\r' '\\n'"
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start not in (b"[", b"{") or (b"\n" not in data.strip() and start == b"{"):
        return None
    try:
        value = strict_json.loads(strict_json.decode_utf8(data))
    except strict_json.JsonError as error:
        first = data.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")[0].strip()
        if first == b"{":
            return "this is JSON over several lines: write each object on one line, as jq -c . does"
        return f"this is one JSON array, and a broken one: {error}" if first == b"[" else None
    if isinstance(value, list):
        return f"this is one JSON array of {len(value)}: write each object on its own line, as jq -c '.[]' does"
    if isinstance(value, dict) and "nodes" in value:
        return "this is a conversation tree: give the folder that contains its domain's folder"
    return "this is one JSON object over several lines: write it on one line, as jq -c does"


@dataclass
class TrainingData:
    """What was read. `places[i]` says where `examples[i]` stands: the file, and its line, row or node.

    `trees`: those that the examples are of, where they are of trees. `same_root`: for each other wording of a root
    question, its first wording. `unusable`: what could not be read.
    """

    examples: list[Example] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    same_root: dict[str, str] = field(default_factory=dict)
    unusable: list[UnusableData] = field(default_factory=list)

    def check(self) -> TrainingData:
        """Raises UserError when something could not be used."""
        if len(self.unusable) == 1:
            raise self.unusable[0]
        if self.unusable:
            hints = dict.fromkeys(error.hint for error in self.unusable if error.hint)
            raise UserError("\n".join(map(str, self.unusable)), "; ".join(hints))
        return self


def read_training_data(
    paths: Path | Sequence[Path], domains: tuple[str, ...] = (), answers: str = "all", restates: bool = False
) -> list[Example]:
    """Examples from tree folders, lists of core trees, JSONL and Parquet files, data sets. Raises UserError."""
    return read_data(paths, domains, answers, restates).check().examples


def read_data(
    paths: Path | Sequence[Path], domains: tuple[str, ...] = (), answers: str = "all", restates: bool = False
) -> TrainingData:
    """The examples with their places, and the bad lines and trees. Raises UserError for what is no data at all.

    `answers`, `restates`: the wordings of a tree's answers that are taken, and whether these begin with the question in
    full, see `Tree.examples_of_nodes`. A row that should begin so and does not gets the call, from the questions in its
    history; one that does although it should not is a bad one.
    """
    data = TrainingData()
    for path in [paths] if isinstance(paths, Path) else paths:
        data_set = None if path.exists() else named_data_set(str(path))
        if path.is_dir() and is_data_set_folder(path):
            data_set = DataSet(str(path))
        if not path.exists() and not data_set:
            problem = f"there is no training data at {path}"
            takes = "a tree folder, a JSONL or Parquet file, or a data set of the hub as owner/name:split"
            raise UserError(problem, f"--training_data takes {takes}")
        if path.exists() and not path.is_dir() and not path.is_file():
            raise UserError(
                f"{path} is a pipe or a device", "save the data in a file: a resumed training reads it again"
            )
        holds_trees = (path.is_dir() and not data_set) or path.suffix == ".txt"
        if domains and not holds_trees:
            raise UserError("--domains needs a folder of conversation trees", f"{path} is none")
        trees: list[Tree] = []
        rows: list[tuple[str, Example]] = []
        folder = path if path.is_dir() else path.with_name("core_trees")
        try:
            if holds_trees:
                trees = read_trees(path, domains) if path.is_dir() else read_listed_trees(path, domains)
            elif data_set:
                rows = read_data_set(data_set)
            else:
                rows = read_parquet(path) if path.suffix.lower() == ".parquet" else _read_lines(path)
        except UnusableData as error:
            data.unusable.append(error)
            trees, rows = (error.usable, []) if holds_trees else ([], error.usable)
        if restates:
            rows = [(place, restating(example)) for place, example in rows]
        elif restated := [place for place, example in rows if example.prompt.restates]:
            data.unusable.append(unusable := _restated(restated, rows))
            rows = unusable.usable
        data.trees += trees
        for tree in trees:
            file = folder / tree.domain / f"{tree.name}.json"
            rows += [(f"{file}, node {node}", example) for node, example in tree.examples_of_nodes(answers, restates)]
            data.same_root.update({question: tree.question for question in tree.also_asked})
        data.places += [place for place, _ in rows]
        data.examples += [example for _, example in rows]
    return data


def restating(example: Example) -> Example:
    """The example with an answer that begins with the question in full, from the questions that it holds."""
    if example.prompt.restates:
        return example
    asked = [line.text for line in example.prompt.history if line.speaker == "User"]
    in_full = question_in_full([" ".join(text.split()) for text in (*asked, example.prompt.question)])
    return Example(replace(example.prompt, restates=True), replace(example.answer, restated=in_full))


def _restated(places: Sequence[str], rows: Sequence[tuple[str, Example]]) -> UnusableData:
    """The error for rows whose answers begin with a call of restate where none is to be trained."""
    problems = [f"{place}: the answer begins with a call of restate" for place in places]
    message = f"{len(problems)} of {len(rows)} examples cannot be used:\n{list_problems(problems)}"
    usable = [row for row in rows if not row[1].prompt.restates]
    return UnusableData(message, "train with --reasoning restate", problems, usable)


def to_jsonl(examples: Sequence[Example]) -> bytes:
    """The examples as a JSONL file's bytes, in the form of the original data: ASCII, one `text` per line."""
    return "".join(json.dumps({"text": example.text}) + "\n" for example in examples).encode("ascii")


def evenly_spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of the examples, from the first on in steps that differ by one at most; all when they are fewer."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def root_question(example: Example) -> str:
    """The first question of the conversation, whoever spoke before: what the examples of one tree have in common."""
    asked = (utterance.text for utterance in example.prompt.history if utterance.speaker == "User")
    return next(asked, example.prompt.question)


def split_by_tree(
    examples: Sequence[Example], held_out_share: float, same_root: Mapping[str, str] | None = None
) -> tuple[list[Example], list[Example]]:
    """Split into (training, held-out): whole trees are held out until `held_out_share` of the examples is reached.

    `same_root`: for another wording of a root question, its first wording; without it every root question is a tree
    of its own.
    The order of the trees comes from a hash of their root question, so a tree stays on its side when others are added.
    Both parts keep the order of `examples`. With a share of 0, or a single tree, nothing is held out; else one tree at
    least is: the first that is not far larger than the share, or the smallest.
    """
    aliases = same_root or {}
    roots = [aliases.get(question, question) for question in map(root_question, examples)]
    sizes = Counter(roots)
    wanted = held_out_share * len(examples)
    held_out: set[str] = set()
    taken = 0
    for root in sorted(sizes, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if wanted == 0 or len(held_out) + 1 == len(sizes):
            break
        if taken + sizes[root] / 2 > wanted:
            if held_out:
                break
            continue
        held_out.add(root)
        taken += sizes[root]
    if not held_out and wanted > 0 and len(sizes) > 1:
        held_out.add(min(sizes, key=lambda root: (sizes[root], root)))
    training = [example for example, root in zip(examples, roots, strict=True) if root not in held_out]
    return training, [example for example, root in zip(examples, roots, strict=True) if root in held_out]
