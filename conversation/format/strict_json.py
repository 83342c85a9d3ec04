"""JSON from outside, read strictly: UTF-8, no duplicate keys, no NaN, no unpaired surrogates, bounded nesting."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 100  # of nested lists and objects; deeper than any file of ours by far


class JsonError(ValueError):
    """Text that is not strict JSON; the message says why and where."""


class NotJson(JsonError):
    """Text that no reader takes for JSON."""


def loads(text: str) -> Any:
    """Parse one JSON value. Raises JsonError."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite_float)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise NotJson(f"not JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise JsonError("not readable: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise JsonError(f"not readable: {error}") from None
    _check(value)
    return value


_FOREIGN = {
    b"\x1f\x8b": "gzip: unpack it with gunzip",
    b"BZh": "bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it with unzstd",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x5d\0\0": "lzma: unpack it with unlzma",
    b"\x04\x22\x4d\x18": "lz4: unpack it with unlz4",
    b"\x1f\x9d": "compressed: unpack it with uncompress",
    b"ARROW1": "an Arrow file: save it as Parquet or JSONL",
    b"\xd0\xcf\x11\xe0": "an Office document: save it as JSONL",
    b"%PDF": "a PDF: take the text it was made from",
    b"\x80\x04\x95": "a Python pickle, which can contain programs: save it as JSONL",
    b"<?xml": "XML: save it as JSONL",
    b"PAR1": "Parquet: its name must end in .parquet",
    b"SQLite format 3": "an SQLite database: export it as JSONL",
    b"version https://git-lfs": "a Git LFS pointer, not the file: fetch it with git lfs pull",
    b"<!DOCTYPE": "a web page: fetch the file itself",
    b"<html": "a web page: fetch the file itself",
}
_UTF16 = "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"
_UTF32 = "UTF-32: convert it with iconv -f UTF-32 -t UTF-8"


def recognise(data: bytes) -> str | None:
    """What a file is that is not UTF-8 text, as "this is ...", with what to do; None when that is not known."""
    for start, kind in _FOREIGN.items():
        if data.startswith(start) or data[:9].upper() == start == b"<!DOCTYPE":
            return f"this is {kind}"
    if data[257:263] in (b"ustar\0", b"ustar "):
        return "this is a tar archive: unpack it"
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return f"this is {_UTF32}"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"this is {_UTF16}"
    start = data[:400]
    zeros = [start[place::4].count(0) * 4 / len(start) > 0.8 for place in range(4)] if len(start) >= 16 else []
    if zeros in ([False, True, True, True], [True, True, True, False]):
        return f"this is {_UTF32}"
    if zeros in ([False, True] * 2, [True, False] * 2):
        return f"this is {_UTF16}"
    return None


def decode_utf8(data: bytes, is_file: bool = True) -> str:
    """Decode bytes; a byte order mark at their start is dropped. Raises JsonError with the place, or with what kind of
    file it is."""
    if is_file and (foreign := recognise(data)):
        raise JsonError(foreign)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JsonError(f"the key {key[:40]!r} occurs twice in one object")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise JsonError(f"{name} is not JSON")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {digits[:40]} is too large")
    return value


def _check(value: Any) -> None:
    """Raises JsonError for an unpaired surrogate, and for nesting deeper than MAX_DEPTH."""
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if found := _SURROGATE.search(item):
                    raise JsonError(f"unpaired surrogate U+{ord(found[0]):04X} in {item[:40]!r}")
            elif isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
        if depth > MAX_DEPTH + 1:
            raise JsonError("not readable: nested too deeply")
