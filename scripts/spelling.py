"""Words in the conversation trees that are not in a word list, for a person to check. Gates nothing.

Needs requirements-data.txt (pyspellchecker has the list). Most of the output is names, code and technical terms. Words
that look like those (capitals, digits, parts of code) and words in three or more trees are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from conversation.data.trees import Tree, read_trees
from conversation.errors import CommandLine, UserError, run_main
from conversation_config import PROJECT

WORD = re.compile(r"(?<![\w.=/(\[{<$@#*_-])[a-z]+(?:['’][a-z]+)?(?![\w=/(\[{>*_]|\.\w)")  # a lower-case word, not code
MAX_TREES = 2


def main() -> int:
    parser = CommandLine(__doc__, prog="scripts.spelling")
    parser.add_argument("--training_data", type=Path, default=PROJECT / "data" / "conversation_trees")
    args = parser.parse_args()
    try:
        from spellchecker import SpellChecker
    except ImportError:
        raise UserError("pyspellchecker is missing", "pip install -r requirements-data.txt") from None

    known = SpellChecker()
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for tree in read_trees(args.training_data):
        for text in texts_of(tree):
            for word in WORD.findall(text):
                found[word.replace("’", "'")].setdefault(f"{tree.domain}/{tree.name}", text)
    unknown = sorted(known.unknown(word.removesuffix("'s") for word in found if len(word) > 2))
    for word in unknown:
        places = found[word] or found[f"{word}'s"]
        if len(places) <= MAX_TREES:
            place, text = next(iter(places.items()))
            print(f"{word:20} {place}: {text}")
    return 0


def texts_of(tree: Tree) -> list[str]:
    nodes = tree.nodes.values()
    return [
        tree.question,
        *(text for node in nodes for text in node.fragments),
        *(choice.text for node in nodes for choice in node.follow_ups),
    ]


if __name__ == "__main__":
    run_main(main)
