"""Exact numbers for `datasets`: it reads and writes JSON with pandas' fast functions, which make 0.57 of a JSONL file
or of a column of type Json 0.5700000000000001, and keep ten decimals (huggingface/datasets#8652).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exact_json() -> Iterator[None]:
    """Within it, Python's own JSON takes the place of pandas'."""
    from pandas.io import json as of_pandas

    before = of_pandas.ujson_loads, of_pandas.ujson_dumps
    of_pandas.ujson_loads, of_pandas.ujson_dumps = json.loads, json.dumps
    try:
        yield
    finally:
        of_pandas.ujson_loads, of_pandas.ujson_dumps = before
