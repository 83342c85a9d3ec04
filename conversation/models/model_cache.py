"""Model folders that are made once a machine: locked while they are made, whole when they have their name, verified."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.runs.files import (
    check_disk_space,
    file_hashes,
    find_damage,
    give_usual_modes,
    make_folder,
    read_json,
    write_json,
)

MANIFEST = "prepared.json"


def cached_model(
    folder: Path, what: str, origin: dict[str, str], needed_bytes: int, make: Callable[[Path], None]
) -> Path:
    """The model folder, made by `make` unless it is there, whole, and of the same origin.

    `what` names it in messages. The folder gets its name only when it is complete. Two processes do not collide. A
    broken folder is made again. A whole one needs no lock: the cache may be another user's, or on a read-only disk.
    Raises UserError when it cannot be made; then nothing stays.
    """
    from safetensors import SafetensorError

    if os.path.isdir(folder) and manifest_problem(folder, origin) is None:  # Path.is_dir raises where it may not look
        return folder
    cache = folder.parent
    make_folder(cache, "set XDG_CACHE_HOME to a folder that can be written")
    with _waiting_lock(cache / f"{folder.name}.lock", what):
        if folder.exists():
            problem = manifest_problem(folder, origin)
            if problem is None:
                return folder
            print(f"the cached {what} is made again: {problem}", file=sys.stderr)
            shutil.rmtree(folder)
        for leftover in cache.glob(f"{glob.escape(folder.name)}.*.part"):
            shutil.rmtree(leftover)
        check_disk_space(cache, needed_bytes, f"preparing the {what}")
        part = cache / f"{folder.name}.{os.getpid()}.part"
        try:
            make_folder(part)
            make(part)
            write_json(part / MANIFEST, {**origin, "files": file_hashes(part)})
            give_usual_modes(part)
            os.rename(part, folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot prepare the {what} in {cache}: {error}", "", TRIED_AND_FAILED) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def manifest_problem(folder: Path, origin: dict[str, str]) -> str | None:
    """What is wrong with a folder made here, as a sentence; None when it is whole and of this origin."""
    try:
        manifest = read_json(folder / MANIFEST)
        if any(manifest[name] != value for name, value in origin.items()):
            return f"{folder} was made from another archive"
        return find_damage(folder, manifest["files"])
    except UserError as error:
        return str(error)
    except (KeyError, AttributeError):
        return f"{folder / MANIFEST} is broken: it does not list the model's files"


@contextlib.contextmanager
def _waiting_lock(path: Path, what: str) -> Iterator[None]:
    """Wait for a lock and own it during the block. The second of two processes finds the work done."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process prepares the {what}: waiting for it ...", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
