"""Convert conversation trees to training lines: `python -m scripts.examples expert examples.jsonl`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from conversation.data.examples import read_training_data, to_jsonl
from conversation.data.statistics import count_structure
from conversation.errors import CommandLine, run_main
from conversation.runs.files import write_atomically
from conversation_config import ANSWERS, DATA_SETS, REASONING, names_in


def main() -> int:
    parser = CommandLine(__doc__, prog="scripts.examples")
    parser.add_argument("training_data", help=f"what --training_data takes: {', '.join(DATA_SETS)}, a folder, a file")
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    parser.add_argument("--domains", default="", help="only these domains of the trees, separated by commas")
    parser.add_argument("--answers", choices=ANSWERS, default="all", help="as for train_conversation.py")
    parser.add_argument("--reasoning", choices=REASONING, default="none", help="as for train_conversation.py")
    args = parser.parse_args()
    paths = DATA_SETS.get(args.training_data, (Path(args.training_data),))
    examples = read_training_data(paths, names_in(args.domains), args.answers, args.reasoning == "restate")
    write_atomically(args.output, to_jsonl(examples))
    for name, value in dataclasses.asdict(count_structure(examples)).items():
        print(f"{name.replace('_', ' '):20} {value}")
    return 0


if __name__ == "__main__":
    run_main(main)
