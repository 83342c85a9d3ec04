"""Files that are whole or absent: atomic writes, hashes, disk space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.format import strict_json
from conversation_config import PROJECT

T = TypeVar("T")
OLD = ".old.part"
LARGE = 2**26  # bytes; to read so large a file takes longer than a tick of the system's clock


def check_can_be_written(path: Path) -> None:
    """Raises UserError unless `write_atomically` could write this file now."""
    try:
        if not path.exists() or path.is_file():  # "." and the like are folders
            _part(path).touch()
            _part(path).unlink()
            return
        problem = "it is not a file"
    except OSError as error:
        problem = error.strerror or str(error)
    raise UserError(f"{path} cannot be written: {problem}", "name a file in a folder that exists and is writable")


def _part(path: Path) -> Path:
    """The file that becomes this one when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file. At every moment it has the old content or the whole new one. Raises UserError."""
    part = _part(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file and cannot be replaced", "name another")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise cannot_write(path, error, len(data)) from None


def cannot_write(path: Path, error: OSError, needed_bytes: int) -> UserError:
    """The UserError for a failed write of `needed_bytes`. Call it after the partial file or folder is removed."""
    folder = path if path.is_dir() else path.parent
    hint = ""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = f"make {folder} writable, or name another folder with --run_dir"
    else:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            hint = f"{size(free)} are free there"
            if free < needed_bytes:
                hint += f", {size(needed_bytes - free)} more are needed: free disk space, then go on with --resume"
    return UserError(f"cannot write {path}: {error.strerror or error}", hint, TRIED_AND_FAILED)


def size(count: int) -> str:
    """A number of bytes, for people."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= factor:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count} bytes"


def replace_folder(part: Path, final: Path) -> None:
    """Give a complete folder its final name. An older folder of that name is replaced; neither is ever seen in part."""
    give_usual_modes(part)
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = final.with_name(f".{final.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)  # after a kill here, `remove_leftovers` renames the old one back
    os.rename(part, final)
    shutil.rmtree(old, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Give a folder and all below it the modes that the umask gives new ones.

    Some libraries write through temporary files of mode 0600, and a copy has the mode of its original.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with contextlib.suppress(OSError):  # some file systems have no modes
                path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files of a killed process. A folder that it was replacing gets its name back."""
    for old in folder.glob(f".*{OLD}"):
        final = old.with_name(old.name[1 : -len(OLD)])
        if not final.exists():
            os.rename(old, final)
    for leftover in folder.glob(".*.part"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def make_folder(path: Path, hint: str = "name another with --run_dir") -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}", hint) from None


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours. Raises UserError that names the file."""
    try:
        value = strict_json.loads(strict_json.decode_utf8(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", "is this a run folder? train_conversation.py makes one") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except strict_json.JsonError as error:
        raise UserError(f"{path} is broken: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is broken: not a JSON object")
    return value


def read_value(path: Path, parse: Callable[[dict[str, Any]], T], hint: str) -> T:
    """What `parse` makes of the JSON object in a file of ours.

    Raises UserError that names the file, with this hint, when it is no such value: when `parse` raises ValueError.
    """
    value = read_json(path)
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}", hint) from None


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file. A large one is read once a process, while nothing changes it: see `_same_file`."""
    with open(path, "rb") as file:
        before = _same_file(file.fileno())
        if digest := _digests.get(before):
            return digest
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if before.size >= LARGE and before == _same_file(file.fileno()):
            _digests[before] = digest
    return digest


class _SameFile(NamedTuple):
    """What no change of a file leaves as it was. Its last change has the time of a tick of some milliseconds: a file
    that takes longer than that to be read cannot be changed within the same tick, before and after."""

    device: int
    number: int
    size: int
    modified: int
    changed: int


_digests: dict[_SameFile, str] = {}


def _same_file(descriptor: int) -> _SameFile:
    found = os.fstat(descriptor)
    return _SameFile(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def find_damage(folder: Path, recorded: dict[str, str]) -> str | None:
    """The first missing or changed file, as a sentence; None when all are as recorded."""
    for name, digest in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256_file(path) != digest:
            return f"{path} is broken: its SHA-256 is not the recorded one"
    return None


def check_disk_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError when the disk of `folder` has less free space than `needed_bytes`."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {folder} has {size(free)} free, {what} needs {size(needed_bytes)}",
            f"free {size(needed_bytes - free)} there",
        )


def real_path(path: Path) -> Path:
    """The absolute path behind all symbolic links; a link that leads to itself stays in it.

    For what a user names: `Path.resolve` raises a RuntimeError for such a link, up to Python 3.12.
    """
    return Path(os.path.realpath(path))


def shown(path: Path) -> str:
    """A path as a person would type it: relative below the current folder or the project."""
    for base in (Path.cwd(), PROJECT):
        with contextlib.suppress(ValueError):
            return str(real_path(path).relative_to(base))
    return str(path)
