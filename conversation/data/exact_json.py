"""Strict JSON for `datasets`, which reads and writes it with pandas' fast functions: of 0.57 in a JSONL file or in a
column of type Json they make 0.5700000000000001, they keep ten decimals (huggingface/datasets#8652), and of a key that
occurs twice the last value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conversation.format import strict_json


class UnusableJson(Exception):
    """JSON that is not strict. No ValueError: `datasets` passes over one."""


@contextmanager
def exact_json() -> Iterator[None]:
    """Within it, our reader and Python's writer take the place of pandas'."""
    from pandas.io import json as of_pandas

    before = of_pandas.ujson_loads, of_pandas.ujson_dumps
    of_pandas.ujson_loads, of_pandas.ujson_dumps = _loads, json.dumps
    try:
        yield
    finally:
        of_pandas.ujson_loads, of_pandas.ujson_dumps = before


def _loads(text: str | bytes) -> Any:
    """Raises ValueError for a text that is no JSON at all: by that `datasets` sees that a file has no lines of JSON."""
    text = text.decode() if isinstance(text, bytes) else text
    try:
        return strict_json.loads(text)
    except strict_json.NotJson:
        raise
    except strict_json.JsonError as error:
        raise UnusableJson(str(error)) from None
