"""The files of a folder of conversation trees: each is read, or refused, or named as passed over."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_DATA = re.compile(r"\.jsonl?(\.(gz|bz2|xz|zst|zip|7z))?$", re.IGNORECASE)  # what one would take for training data


def find_tree_files(folder: Path, domains: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files `<domain>/<root>.json` of these domains, sorted, and a problem for each other file that may be data.

    Other files are named on the console.
    """
    found: list[Path] = []
    problems: list[str] = []
    passed: list[str] = []

    def note(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be read: {error.strerror}")

    def sort_out(path: Path) -> None:
        at = path.relative_to(folder)
        if path.name.startswith(".") or not _DATA.search(path.name):
            passed.append(str(at))
        elif reason := _why_not(at.parts):
            problems.append(f"{path}: {reason}")
        elif not path.is_file():
            problems.append(f"{path}: is not a file")
        else:
            found.append(path)

    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            sort_out(path)
        elif path.name.startswith("."):
            passed.append(f"{path.name}/")
    for domain in domains:
        for place, folders, files in os.walk(folder / domain, onerror=note):
            links = [Path(place, name) for name in folders if Path(place, name).is_symlink()]  # not followed
            passed += [f"{link.relative_to(folder)}/" for link in links]
            for name in files:
                sort_out(Path(place, name))
    if passed:
        more = f" and {len(passed) - 20} more" if len(passed) > 20 else ""
        _say_once(f"passed over in {folder}: {', '.join(sorted(passed)[:20])}{more}")
    return sorted(found), sorted(problems)


def _why_not(parts: tuple[str, ...]) -> str | None:
    """Why a file at this place below the folder is no tree that is read; None for one that is."""
    suffix = _DATA.search(parts[-1])
    ending = suffix[0] if suffix else ""
    if ending.lower() == ".jsonl":
        return "is no tree; a JSONL file is given by its own path"
    if ending.lower() != ".json":
        return "is compressed: unpack it"
    if ending != ".json":
        return f"ends in {ending}, rename it to .json"
    if len(parts) == 1:
        return "is not in a domain's folder"
    if len(parts) > 2:
        return "is too deep in its domain's folder"
    return None


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)
