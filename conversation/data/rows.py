"""Rows of training data: lines of text, or chat messages with tools; from Parquet files and data sets of the hub.

`datasets` reads the tables. It keeps what it fetches in its own cache, so that a second run needs no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conversation.data.hub_client import cause, limit_waiting, what_is_set
from conversation.errors import UnusableData, UserError, list_problems
from conversation.format.calls import Example
from conversation.format.message_parser import from_row, is_row
from conversation.format.parser import FormatError, parse_example
from conversation_config import cache_folder

_DATA_SET = re.compile(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_FILE = re.compile(r"\.(jsonl?|txt|csv|parquet|gz|zip)$", re.IGNORECASE)
FORMS = "rows have `text`, or `messages`, or `prompt` and `completion`: data/README.md"


def parse_row(value: dict[str, Any]) -> Example:
    """Read one row. Raises ValueError that says what is wrong with it, and where."""
    if value.get("text") is None:
        if is_row(value):
            return from_row(value)
        if "nodes" in value:
            raise ValueError("this is a conversation tree, give the folder that contains its domain's folder")
        raise ValueError("the object has no `text`, and no `messages` or `prompt`")
    text = value["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` is not a string but {type(text).__name__}")
    if (nul := text.find("\0")) >= 0:
        raise ValueError(f"`text` contains a NUL character at {nul}")
    try:
        return parse_example(text)
    except FormatError as error:
        raise ValueError(f"not in the text format: {error}") from None


def named_data_set(name: str) -> tuple[str, str] | None:
    """The data set and the split that a name means, as `owner/name:split` or `folder:split`; None for a plain path.

    Without a split it is `train`.
    """
    folder, colon, split = name.rpartition(":")
    if colon and split and Path(folder).is_dir():
        return folder, split
    found = _DATA_SET.fullmatch(name)
    return (found[1], found[2] or "train") if found and not _FILE.search(found[1]) else None


def read_parquet(path: Path) -> list[tuple[str, Example]]:
    """The places and examples of a Parquet file.

    Raises UnusableData that lists every bad row; UserError that says why it cannot be read.
    """
    return _read(str(path), "parquet", "train", data_files=str(path), streaming=True)


def read_data_set(name: str, split: str) -> list[tuple[str, Example]]:
    """The same of a split of a data set: of the hub, or of a folder with its files. Raises as `read_parquet` does."""
    limit_waiting()
    return _read(f"{name}:{split}", name, split)


def _read(shown: str, source: str, split: str, **options: Any) -> list[tuple[str, Example]]:
    import datasets
    from datasets import load_dataset

    datasets.disable_progress_bars()
    if not any(os.environ.get(variable) for variable in ("HF_HOME", "HF_DATASETS_CACHE")):
        cache_folder()  # without a home, the cache would be a folder `~` in the working folder
    try:
        rows = load_dataset(source, split=split, **options)
        if columns := rows.column_names:
            _check_columns(shown, columns)
        return _examples(shown, rows)
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its readers and the network raise
        raise _cannot_read(shown, error, of_the_hub=not options and not Path(source).exists()) from None


def _check_columns(shown: str, columns: list[str]) -> None:
    found = set(columns)
    if not found & {"text", "messages", "prompt"}:
        raise UserError(f"{shown} has other columns: {', '.join(sorted(found)[:20])}", FORMS)


def _examples(shown: str, rows: Iterable[Any]) -> list[tuple[str, Example]]:
    examples: list[tuple[str, Example]] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            examples.append((f"{shown}, row {number}", parse_row(row)))
        except ValueError as error:
            problems.append(f"{shown}, row {number}: {error}")
    if problems:
        count = len(examples) + len(problems)
        message = f"{len(problems)} of {count} rows cannot be used:\n{list_problems(problems)}"
        raise UnusableData(message, FORMS, problems, examples)
    if not examples:
        raise UserError(f"{shown} contains no training example")
    return examples


def _cannot_read(shown: str, error: Exception, of_the_hub: bool) -> UserError:
    """The sentence for whatever the library or the network raised."""
    if "split" in str(error).lower():
        return UserError(f"{shown} cannot be read: {cause(error)}", "a split stands after a colon: owner/name:train")
    if of_the_hub:
        return UserError(
            f"there is no file or folder {shown.split(':')[0]}, and no data set of that name can be read: "
            f"{cause(error)}{what_is_set()}",
            "check name, network and what is set; a private or gated one needs .venv/bin/hf auth login and its licence "
            "accepted",
        )
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.errno:
        return UserError(f"{shown} cannot be read: {error.strerror}")
    return UserError(f"{shown} cannot be read: {cause(error)}", FORMS)
