"""Rows of training data: lines of text, or chat messages with tools; from Parquet files and data sets of the hub.

`datasets` reads the tables. It keeps what it fetches in its own cache, so that a second run needs no network.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conversation.data.exact_json import UnusableJson, exact_json
from conversation.data.hub_client import cause, limit_waiting, what_is_set
from conversation.errors import UnusableData, UserError, first_cause, list_problems
from conversation.format.calls import Example
from conversation.format.message_parser import CHATS, earlier_answers, from_row, is_row
from conversation.format.parser import FormatError, parse_example
from conversation_config import cache_folder, folder_and_rest

_SPLIT = r"[\w.-]+(?:\[[^\[\]]*\])?"
_PARTS = re.compile(rf"(?:([\w.-]+):)?({_SPLIT}(?:\+{_SPLIT})*)")
_ON_THE_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::(.*))?")
_FILE = re.compile(r"\.(jsonl?|txt|csv|parquet|gz|zip)$", re.IGNORECASE)
_NO_CONFIG = re.compile("Config name is missing|BuilderConfig .* not found")
_NO_SPLIT = re.compile("(Unknown|Bad) split|Split name|Unrecognized instruction")
COLUMNS = {"text", "prompt", *CHATS}
FORMS = "rows have `text`, or `messages`, or `prompt` and `completion`: data/README.md"


class OtherColumns(ValueError):
    """A row with none of the columns that training data has. `columns`: those that it has."""

    def __init__(self, columns: Iterable[str]):
        super().__init__("the object has no `text`, and no `messages` or `prompt`")
        self.columns = frozenset(columns)


def parse_row(value: dict[str, Any]) -> Example:
    """Read one row. Raises ValueError that says what is wrong with it, and where."""
    if value.get("text") is None:
        if is_row(value):
            return from_row(value)
        if "nodes" in value:
            raise ValueError("this is a conversation tree, give the folder that contains its domain's folder")
        raise OtherColumns(value)
    if chat := next((key for key in (*CHATS, "prompt") if _are_messages(value.get(key))), None):
        raise ValueError(f"`text` beside `{chat}`: a row has one or the other")
    text = value["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` is not a string but {type(text).__name__}")
    if (nul := text.find("\0")) >= 0:
        raise ValueError(f"`text` contains a NUL character at {nul}")
    try:
        return parse_example(text)
    except FormatError as error:
        raise ValueError(f"not in the text format: {error}") from None


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and re.match(r"\s*\[\s*{", value) is not None)


class DataSet(NamedTuple):
    """What a name means: a data set of the hub or of a folder, which of its splits, configurations and revisions."""

    source: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None


def named_data_set(name: str) -> DataSet | None:
    """The data set of `owner/name@revision:configuration:split` or `folder:configuration:split`; None for a plain path.

    Only a folder needs more than its name. A split may be one that `datasets` makes of others, as `train[:10%]`.
    """
    if found := folder_and_rest(name):
        source, revision, rest = found[0], None, found[1]
    elif (on_the_hub := _ON_THE_HUB.fullmatch(name)) and not _FILE.search(on_the_hub[1]):
        source, revision, rest = on_the_hub.groups()
    else:
        return None
    parts = _PARTS.fullmatch("train" if rest is None else rest)
    return DataSet(source, parts[2], parts[1], revision) if parts else None


def is_data_set_folder(folder: Path) -> bool:
    """Whether a folder is the split `train` of a data set: it holds Parquet files and no JSON, of which trees are, or
    is what save_to_disk writes.
    """
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return True
    return not any(folder.rglob("*.json")) and any(folder.rglob("*.parquet"))


def read_parquet(path: Path) -> list[tuple[str, Example]]:
    """The places and examples of a Parquet file.

    Raises UnusableData that lists every bad row; UserError that says why it cannot be read.
    """
    return _read(str(path), "parquet", split="train", data_files=_as_pattern(path), streaming=True)


def _as_pattern(path: Path) -> str:
    """The path for `datasets`, which takes it for a pattern that several files may match."""
    return glob.escape(str(path)) if glob.has_magic(str(path)) else str(path)


def read_data_set(name: DataSet) -> list[tuple[str, Example]]:
    """The same of a split of a data set: of the hub, or of a folder with its files. Raises as `read_parquet` does."""
    limit_waiting()
    shown = ":".join(part for part in (name.source, name.config, name.split) if part)
    return _read(shown, name.source, name=name.config, split=name.split, revision=name.revision)


def _read(shown: str, source: str, **options: Any) -> list[tuple[str, Example]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, too
    if not any(os.environ.get(variable) for variable in ("HF_HOME", "HF_DATASETS_CACHE")):
        cache_folder()  # without a home, the cache would be a folder `~` in the working folder
    with exact_json():
        return _examples(shown, _rows(shown, source, options))


def _rows(shown: str, source: str, options: dict[str, Any]) -> Iterator[Any]:
    """The rows of a data set. Raises UserError for whatever the library raises; what reads the rows is not guarded."""
    from datasets import load_dataset

    try:
        rows = load_dataset(source, **options)
        if columns := rows.column_names:
            _check_columns(shown, columns)
        yield from rows
    except UserError:
        raise
    except Exception as error:  # its readers and the network raise any kind
        raise _cannot_read(shown, error, of_the_hub="data_files" not in options and not Path(source).exists()) from None


def _check_columns(shown: str, columns: list[str]) -> None:
    if COLUMNS.isdisjoint(columns):
        raise other_columns(shown, columns)


def other_columns(shown: str, columns: Iterable[str]) -> UserError:
    """The error for a file or data set of which no row can be meant to be training data."""
    return UserError(f"{shown} has other columns: {', '.join(sorted(columns)[:20])}", FORMS)


def _examples(shown: str, rows: Iterable[Any]) -> list[tuple[str, Example]]:
    examples: list[tuple[str, Example]] = []
    problems: list[str] = []
    earlier = 0
    for number, row in enumerate(rows, 1):
        try:
            examples.append((f"{shown}, row {number}", parse_row(row)))
            earlier += earlier_answers(row)
        except ValueError as error:
            problems.append(f"{shown}, row {number}: {error}")
    if problems:
        count = len(examples) + len(problems)
        message = f"{len(problems)} of {count} rows cannot be used:\n{list_problems(problems)}"
        raise UnusableData(message, FORMS, problems, examples)
    if not examples:
        raise UserError(f"{shown} contains no training example")
    tell_of_earlier_answers(shown, earlier)
    return examples


def tell_of_earlier_answers(shown: str, count: int) -> None:
    """Say that answers are not trained on which other trainers might train on, too."""
    if count:
        rule = "a row is one example, and only its last answer is trained on"
        print(f"{shown}: answers that are only history: {count}; {rule}", file=sys.stderr)


def _cannot_read(shown: str, error: Exception, of_the_hub: bool) -> UserError:
    """The sentence for whatever the library or the network raised."""
    if isinstance(first_cause(error), UnusableJson):
        return UserError(f"{shown} cannot be read: {cause(error)}", FORMS)
    if _NO_CONFIG.search(str(error)):
        return UserError(
            f"{shown} cannot be read: {' '.join(str(error).split('Example')[0].split())[:300]}",
            "a configuration comes before the split: owner/name:configuration:train",
        )
    if _NO_SPLIT.search(str(error)):
        return UserError(f"{shown} cannot be read: {cause(error)}", "a split comes after a colon: owner/name:train")
    if of_the_hub:
        return UserError(
            f"there is no file or folder {shown.split(':')[0]}, and no data set of that name can be read: "
            f"{cause(error)}{what_is_set()}",
            "check name, network and what is set; a private or gated one needs .venv/bin/hf auth login and its licence "
            "accepted",
        )
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.errno:
        return UserError(f"{shown} cannot be read: {error.strerror}")
    if "BatchSize must be greater than 0" in str(error):  # what the reader of Parquet says of a table without rows
        return UserError(f"{shown} contains no training example")
    if "save_to_disk" in str(error):
        return UserError(f"{shown} was written by save_to_disk", "write it with to_parquet, and give that file")
    return UserError(f"{shown} cannot be read: {cause(error)}", FORMS)
