"""Write training data as chat messages with tools, for TRL, Unsloth, Axolotl and LLaMA-Factory:

    python -m scripts.messages data/core_trees messages.jsonl
    python -m scripts.messages expert messages.parquet

Each row has `messages`, the last one the answer with its `tool_calls`, and `tools`. Both files are for
datasets.load_dataset (a Parquet file of calls with different arguments needs datasets 4.7 or later). --training_data
reads them back to the same examples.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from conversation.data.examples import read_training_data
from conversation.errors import CommandLine, UserError, run_main
from conversation.format.calls import Example
from conversation.format.messages import to_row
from conversation.runs.files import write_atomically
from conversation_config import DATA_SETS, names_in, set_up_libraries


def main() -> int:
    parser = CommandLine(__doc__, prog="scripts.messages")
    parser.add_argument("training_data", help=f"what --training_data takes: {', '.join(DATA_SETS)}, a folder, a file")
    parser.add_argument("output", type=Path, help="the file to write, .jsonl or .parquet")
    parser.add_argument("--domains", default="", help="only these domains of the trees, separated by commas")
    args = parser.parse_args()
    write = {".jsonl": as_jsonl, ".parquet": as_parquet}.get(args.output.suffix)
    if write is None:
        raise UserError(f"{args.output} ends in neither .jsonl nor .parquet", "name the file to write so")
    set_up_libraries()
    paths = DATA_SETS.get(args.training_data, (Path(args.training_data),))
    examples = read_training_data(paths, names_in(args.domains))
    write_atomically(args.output, write(examples))
    print(f"{len(examples)} rows in {args.output}")
    return 0


def as_jsonl(examples: Sequence[Example]) -> bytes:
    return "".join(json.dumps(to_row(example)) + "\n" for example in examples).encode("ascii")


def as_parquet(examples: Sequence[Example]) -> bytes:
    """A Parquet file's bytes. Messages and tools are of type Json: no call gets the other function's arguments."""
    import datasets
    from datasets import Dataset, Features, Json, List

    datasets.disable_progress_bars()
    features = Features({"messages": List(Json()), "tools": List(Json())})
    buffer = io.BytesIO()
    Dataset.from_list([to_row(example) for example in examples], features=features).to_parquet(buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    run_main(main)
