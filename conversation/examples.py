"""Training lines: read and check them, hold some out by tree, count what is in them.

Training data is a folder of conversation trees, or a JSONL file with one object per line whose `text` is an example.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from conversation import strict_json
from conversation.errors import CommandLine, UserError, list_problems, run_main
from conversation.function_calls import Example, FormatError, parse_example
from conversation.trees import read_trees


def parse_line(line: str) -> Example:
    """Read one line of a JSONL file. Raises ValueError that says what is wrong with it."""
    value = strict_json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if "text" not in value:
        raise ValueError("the object has no `text`")
    text = value["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` is not a string but {type(text).__name__}")
    if (nul := text.find("\0")) >= 0:
        raise ValueError(f"`text` holds a NUL character at {nul}")
    return parse_example(text)


def read_jsonl(path: Path) -> list[Example]:
    """Read training lines. Raises UserError that lists every bad line with its number."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if lines[-1] == b"":
        lines.pop()
    examples, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            text = strict_json.decode_utf8(line) if number == 1 else line.decode("utf-8")
            if not text.strip():
                raise ValueError("the line is empty")
            examples.append(parse_line(text))
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}")
        except FormatError as error:
            problems.append(f"{path}:{number}: not in the text format: {error}")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise UserError(
            f"{len(problems)} of {len(lines)} lines cannot be used:\n{list_problems(problems)}",
            "the text format is described in data/README.md",
        )
    if not examples:
        raise UserError(f"{path} holds no training example")
    return examples


def read_training_data(path: Path, domains: tuple[str, ...] = ()) -> list[Example]:
    """Examples from a folder of conversation trees or from a JSONL file. Raises UserError."""
    if path.is_dir():
        return [example for tree in read_trees(path, domains) for example in tree.examples()]
    if not path.exists():
        raise UserError(f"there is no training data at {path}", "--training_data takes a JSONL file or a tree folder")
    if domains:
        raise UserError("--domains needs a folder of conversation trees", f"{path} is a file")
    return read_jsonl(path)


def to_jsonl(examples: Sequence[Example]) -> bytes:
    """The examples as a JSONL file's bytes, in the form of the original data: ASCII, one `text` per line."""
    return "".join(json.dumps({"text": example.text}) + "\n" for example in examples).encode("ascii")


def root_question(example: Example) -> str:
    """The first question of the conversation: what the examples of one tree have in common."""
    return example.prompt.history[0].text if example.prompt.history else example.prompt.question


def split_by_tree(examples: Sequence[Example], held_out_share: float) -> tuple[list[Example], list[Example]]:
    """Split into (training, held-out): whole trees are held out until `held_out_share` of the examples is reached.

    The order of the trees comes from a hash of their root question, so a tree stays on its side when others are added.
    Both parts keep the order of `examples`. With a share of 0, or a single tree, nothing is held out; else one tree at
    least is: the first that is not far larger than the share, or the smallest.
    """
    sizes = Counter(root_question(example) for example in examples)
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
    training = [example for example in examples if root_question(example) not in held_out]
    return training, [example for example in examples if root_question(example) in held_out]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    return random.Random(seed).sample(list(examples), len(examples))


def statistics_of(examples: Sequence[Example]) -> dict[str, object]:
    """Counts over the examples' structure, ready for JSON."""
    texts = [len(example.answer.texts) for example in examples]
    depth = [sum(u.speaker == "User" for u in example.prompt.history) + 1 for example in examples]
    repeated = Counter(example.text for example in examples)
    return {
        "examples": len(examples),
        "trees": len({root_question(example) for example in examples}),
        "add_text_calls": sum(texts),
        "add_choice_calls": sum(len(example.answer.choices) for example in examples),
        "texts_per_example": dict(sorted(Counter(texts).items())),
        "examples_by_turn": dict(sorted(Counter(depth).items())),
        "duplicates": sum(count - 1 for count in repeated.values()),
    }


def length_summary(lengths: Sequence[int]) -> dict[str, float]:
    """Minimum, median, mean, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(lengths)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "p95": ordered[max(0, -(-95 * len(ordered) // 100) - 1)],
        "max": ordered[-1],
    }


def main() -> int:
    """`python -m conversation.examples data/conversation_trees examples.jsonl`: build the JSONL, print counts."""
    from conversation.files import write_atomically

    parser = CommandLine(main.__doc__, prog="conversation.examples")
    parser.add_argument("training_data", type=Path, help="folder of conversation trees, or JSONL file")
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    parser.add_argument("--domains", default="", help="only these domains of the trees, separated by commas")
    args = parser.parse_args()
    examples = read_training_data(args.training_data, tuple(name for name in args.domains.split(",") if name))
    write_atomically(args.output, to_jsonl(examples))
    for name, value in statistics_of(examples).items():
        print(f"{name.replace('_', ' '):20} {value}")
    return 0


if __name__ == "__main__":
    run_main(main)
