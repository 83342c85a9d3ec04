"""Write training data as chat messages with tools, for TRL, Unsloth, Axolotl and LLaMA-Factory:

    python -m scripts.messages expert messages.parquet
    python -m scripts.messages data/core_trees messages.jsonl
    python -m scripts.messages expert conversations.jsonl --form sharegpt

Each row has `messages`, the last one the answer with its `tool_calls`, and `tools`. The form `sharegpt` has
`conversations` of texts instead, as LLaMA-Factory reads them. --training_data reads all of them back to the same
examples.

For datasets.load_dataset of version 4.7 or later take Parquet. It reads the numbers of JSONL inexactly
(huggingface/datasets#8652), and older versions put the other function's parameters into each call, empty.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversation.data.examples import read_training_data
from conversation.errors import CommandLine, UserError, run_main
from conversation.format.calls import Example
from conversation.format.messages import to_row, to_sharegpt_row
from conversation.runs.files import write_atomically
from conversation_config import ANSWERS, DATA_SETS, REASONING, names_in, set_up_libraries

FORMS = {"messages": to_row, "sharegpt": to_sharegpt_row}


def main() -> int:
    parser = CommandLine(__doc__, prog="scripts.messages")
    parser.add_argument("training_data", help=f"what --training_data takes: {', '.join(DATA_SETS)}, a folder, a file")
    parser.add_argument("output", type=Path, help="the file to write, .jsonl or .parquet")
    parser.add_argument("--form", choices=FORMS, default="messages", help="of the rows (default: messages)")
    parser.add_argument("--domains", default="", help="only these domains of the trees, separated by commas")
    parser.add_argument("--answers", choices=ANSWERS, default="all", help="as for train_conversation.py")
    parser.add_argument("--reasoning", choices=REASONING, default="none", help="as for train_conversation.py")
    args = parser.parse_args()
    write = {".jsonl": as_jsonl, ".parquet": as_parquet}.get(args.output.suffix)
    if write is None:
        raise UserError(f"{args.output} ends in neither .jsonl nor .parquet", "name the file to write so")
    set_up_libraries()
    paths = DATA_SETS.get(args.training_data, (Path(args.training_data),))
    examples = read_training_data(paths, names_in(args.domains), args.answers, args.reasoning == "restate")
    write_atomically(args.output, write(examples, args.form))
    print(f"{len(examples)} rows in {args.output}")
    return 0


def as_jsonl(examples: Sequence[Example], form: str = "messages") -> bytes:
    return "".join(json.dumps(FORMS[form](example)) + "\n" for example in examples).encode("ascii")


def as_parquet(examples: Sequence[Example], form: str = "messages") -> bytes:
    """A Parquet file's bytes. Messages and tools are of type Json: no call gets the other function's arguments."""
    import datasets
    from datasets import Dataset, Features, Json, List

    datasets.disable_progress_bars()
    rows = [FORMS[form](example) for example in examples]
    features = None
    if form == "messages":
        features = Features({"messages": List(Json()), "tools": List(Json())})
        rows = [{key: list(map(_json_text, values)) for key, values in row.items()} for row in rows]
    buffer = io.BytesIO()
    Dataset.from_list(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


_CONFIDENCE = re.compile(r'(?<="confidence": )[\d.e-]+')  # inside a text the quotes have backslashes


def _json_text(value: Any) -> str:
    return _CONFIDENCE.sub(lambda found: _spelled(found[0]), json.dumps(value))


@functools.cache
def _spelled(number: str) -> str:
    """The number in a spelling that `datasets` reads exactly: it makes 0.57 0.5700000000000001, not so 0.570000.

    Its reader is pandas' fast one (huggingface/datasets#8652). A number without such a spelling stays as it is.
    """
    from pandas.io.json import ujson_loads

    spellings = [number, *(f"{float(number):.{digits}f}" for digits in range(2, 18))]
    exact = (text for text in spellings if float(text) == float(number) == ujson_loads(text))
    return next(exact, number)


if __name__ == "__main__":
    run_main(main)
