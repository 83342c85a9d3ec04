"""Faults to inject into a process or a file: see `scripts_at_work.start`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def bad_numbers_at(call: int, what: str) -> None:
    """Make the loss or a gradient of a step infinite or NaN, at the given call."""
    from conversation.training import conversation_trainer as trainer

    plain, count = trainer.backward_in_micro_batches, 0

    def spoiled(model, *arguments):
        nonlocal count
        count += 1
        loss_sum = plain(model, *arguments)
        if count == call and what == "loss":
            return loss_sum * float("nan")
        if count == call:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        return loss_sum

    trainer.backward_in_micro_batches = spoiled


def process_of_several(rank: int, size: int, port: int) -> None:
    """Make of this process one of several, as a launcher does."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    variables = {"RANK": rank, "WORLD_SIZE": size, "ACCELERATE_USE_CPU": "true", **place}
    os.environ.update({name: str(value) for name, value in variables.items()})


def rendezvous_within(seconds: float) -> None:
    """Give the processes of a training only so long to meet."""
    from conversation.training import rendezvous

    rendezvous.RENDEZVOUS_SECONDS = seconds


def too_little_memory() -> None:
    """Let this process find no free memory for the base."""
    from conversation.training import memory_plan

    memory_plan.free_bytes = lambda device: 0


def code_that_differs() -> None:
    """Let this process take its code for another."""
    from conversation.training import rendezvous

    rendezvous.code_sha256 = lambda: "0" * 64


def a_signal_in_step(call: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal, SIGTERM if no other, while it takes the given step."""
    from conversation.training import conversation_trainer as trainer

    plain, count = trainer.backward_in_micro_batches, 0

    def signalled(model, *arguments):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), number)
        return plain(model, *arguments)

    trainer.backward_in_micro_batches = signalled


def losses_twice_as_large_from(call: int) -> None:
    """From the given step on, double the reported loss."""
    from conversation.training import conversation_trainer as trainer

    plain, count = trainer.backward_in_micro_batches, 0

    def larger(model, *arguments):
        nonlocal count
        count += 1
        return plain(model, *arguments) * (2 if count >= call else 1)

    trainer.backward_in_micro_batches = larger


def held_before(module: str, function: str, call: int, go: Path) -> None:
    """Wait before the given call of a function of the project until the file `go` is there."""
    plain, count = getattr(importlib.import_module(module), function), 0

    def holding(*arguments, **options):
        nonlocal count
        count += 1
        while count == call and not go.exists():
            time.sleep(0.01)
        return plain(*arguments, **options)

    setattr(importlib.import_module(module), function, holding)


def a_defect_in(module: str, function: str, kind: type[Exception] = AssertionError) -> None:
    """Make a function of the project raise an unexpected error, of the given kind."""

    def defect(*arguments, **options):
        raise kind("a defect")

    setattr(importlib.import_module(module), function, defect)


def without_the_right_to_write_anywhere() -> None:
    """Take from this process root's right to write everywhere."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)

        class Header(ctypes.Structure):
            _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

        data = (ctypes.c_uint32 * 6)()  # no capability, effective, permitted or inheritable
        assert libc.capset(ctypes.byref(Header(0x20080522, 0)), data) == 0, os.strerror(ctypes.get_errno())


def no_file_larger_than(size: int) -> None:
    """Let writes beyond the size fail, as on a disk that fills up in the middle of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_space_on_any_disk() -> None:
    """Let every disk report 1,000 free bytes."""
    shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 1000)


def die_at(number: int, *names: str) -> None:
    """SIGKILL just before the given call (counted over all of them) of functions of `os` and `shutil`."""
    count = 0

    def counting(plain):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        return call

    for name in names:
        module = shutil if name == "rmtree" else os
        setattr(module, name, counting(getattr(module, name)))


def flip_bit(path: Path, position: float = 0.5) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut the last third off a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


FILE_FAULTS = (flip_bit, truncate, Path.unlink)


class SmallDisk:
    """A small tmpfs, for a test to fill."""

    def __init__(self, folder: Path):
        self.folder = folder

    def leave(self, free: int) -> None:
        """Fill the disk until `free` bytes are left."""
        filler = self.folder / "filler"
        filler.unlink(missing_ok=True)
        excess = shutil.disk_usage(self.folder).free - free
        if excess > 0:
            with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
                os.posix_fallocate(file.fileno(), 0, excess)

    def empty(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk | None]:
    """Mount a tmpfs at a folder; None if this machine does not allow it."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
