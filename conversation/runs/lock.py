"""Folder locks. The kernel releases a lock when its owner dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from conversation.errors import UserError
from conversation.runs.files import make_folder, remove_leftovers, shown
from conversation.runs.record import now

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder during the block, and remove the partial files of dead processes.

    Raises UserError that names the process with the lock and the time it was taken.
    """
    make_folder(folder)
    try:
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}", "name another with --run_dir") from None
    with file:
        lock_file(file, folder)
        remove_leftovers(folder)
        yield
        file.truncate(0)


def lock_file(file: TextIO, folder: Path, owner: int | None = None) -> None:
    """Lock an open file and write the owner into it.

    Raises UserError when another process owns the lock, and when the file system of `folder` has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        user = file.read().strip() or "another process"
        working = [number for number in _processes_with(file) if f"process {number} " not in user]
        if working and user.startswith("process") and not Path(f"/proc/{user.split()[1]}").exists():
            user += f", which has ended; its child is still at work: process {', '.join(map(str, working))}"
        raise UserError(f"{shown(folder)} is in use by {user}", "wait until it has finished, or stop it") from None
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be locked: {error.strerror}",
            "its file system has no locks: put the run folder on a local disk, with --run_dir",
        ) from None
    with contextlib.suppress(OSError):  # on a full disk the lock works without a name in it
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"process {owner or os.getpid()} since {now()}".encode(), 0)


def _processes_with(file: TextIO) -> list[int]:
    """The other processes that have a file open, as far as /proc shows them."""
    wanted, found = os.fstat(file.fileno()), set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(descriptor.stat(), wanted):
                found.add(int(descriptor.parts[2]))
    return sorted(found - {os.getpid(), os.getppid()})
