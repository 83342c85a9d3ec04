"""The run folder: what a run leaves behind, and who is working in it.

    training-runs/conversation/
        2026-11-22/          a published run: trained, merged, tested, nothing of it half-written
        2026-11-22-2/        the second one of that day
        latest -> 2026-11-22-2
        attempts/            runs under way, and failed ones with their log, until the next retrain cleans them

`run.json` is rewritten as a whole after each stage and never in place, so a reader sees the old or the new one. It
holds its own SHA-256 and those of the files that later stages use: a changed bit is found before it does harm.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from conversation import strict_json
from conversation.errors import UserError
from conversation.files import differing_file, make_folder, read_json, remove_leftovers, shown, write_json
from conversation_config import TRAINING_RUNS

ATTEMPTS = "attempts"
ATTEMPT_NAME = "????-??-??_??-??-??*"
RUN_NAME = "????-??-??*"  # not example-...


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def training_data(self) -> Path:
        return self.path / "training_data.jsonl"

    @property
    def held_out_data(self) -> Path:
        return self.path / "held_out_data.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final_lora(self) -> Path:
        return self.checkpoints / "final_lora"

    @property
    def merged_model(self) -> Path:
        return self.path / "merged_model_fp32"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss_curve.png"

    @property
    def structural_tests(self) -> Path:
        return self.path / "structural_tests.json"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def console_log(self) -> Path:
        return self.path / "console.log"

    @property
    def retrain_flags(self) -> Path:
        return self.path / "retrain_flags.json"

    def read(self) -> dict[str, Any]:
        """run.json. Raises UserError when it is missing or broken."""
        record = read_json(self.run_json)
        recorded = record.pop("sha256", None)
        if recorded is not None and recorded != _record_hash(record):
            raise UserError(
                f"{self.run_json} is broken: its content is not what its SHA-256 was taken of",
                "bring it back from a backup, or start a new run",
            )
        return record

    def update(self, **sections: Any) -> None:
        """Replace sections of run.json."""
        record = {**(self.read() if self.run_json.exists() else {}), **sections}
        write_json(self.run_json, {**record, "sha256": _record_hash(record)})

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged metrics, one dictionary per line of metrics.jsonl. Raises UserError."""
        recorded = (self.read().get("training") or {}) if self.run_json.exists() else {}
        if problem := differing_file(self.path, recorded.get("files", {})):
            raise UserError(problem, "train_conversation.py --resume writes it again from the newest checkpoint")
        if not self.metrics.exists():
            return []
        records = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], 1):
            try:
                records.append(strict_json.loads(strict_json.decode_utf8(line)))
            except strict_json.JsonError as error:
                raise UserError(f"{self.metrics}:{number}: {error}") from None
        return records


def _record_hash(record: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(record))  # in which numbers that are keys have become strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


# --- which run -------------------------------------------------------------------------------------------------------


def today() -> str:
    return datetime.date.today().isoformat()


def free_name(folder: Path, name: str) -> Path:
    """`folder/name`, or with -2, -3, ... appended when that is taken."""
    candidate, number = folder / name, 1
    while candidate.exists():
        number += 1
        candidate = folder / f"{name}-{number}"
    return candidate


def new_run_folder(root: Path = TRAINING_RUNS) -> RunFolder:
    """The name of a new run of today; nothing is made yet."""
    return RunFolder(free_name(root, today()))


def newest_run(root: Path = TRAINING_RUNS) -> RunFolder:
    """The run whose run.json was written last, attempts included. Raises UserError when there is none."""
    found = [*root.glob(f"{RUN_NAME}/run.json"), *(root / ATTEMPTS).glob(f"{ATTEMPT_NAME}/run.json")]
    if not found:
        raise UserError(
            f"there is no run in {root}", "train one with train_conversation.py, or name one with --run_dir"
        )
    return RunFolder(max(found, key=lambda path: path.stat().st_mtime).parent.resolve())


def is_published(run: RunFolder, record: dict[str, Any]) -> bool:
    """Whether a run has its final name. An attempt that was stopped while it was published has not."""
    return bool(record.get("published")) and run.path.parent.name != ATTEMPTS


def refuse_published(run: RunFolder, record: dict[str, Any]) -> None:
    """Raises UserError: what is published is not changed any more."""
    if is_published(run, record):
        raise UserError(f"{shown(run.path)} is published: it is not changed any more", "name another with --run_dir")


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# --- who works in it -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep others out of a folder while working in it. The kernel drops the lock when its holder dies.

    Leftovers of a holder that died while it wrote are removed.

    Raises UserError that says who holds the folder, and since when.
    """
    make_folder(folder)
    try:
        file = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}", "name another with --run_dir") from None
    with file:
        lock_file(file, folder)
        remove_leftovers(folder)
        yield
        file.truncate(0)


def lock_file(file: TextIO, folder: Path, holder: int | None = None) -> None:
    """Take the lock on an open file and write into it who holds it. Raises UserError when it is held."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        said = file.read().strip() or "another process"
        working = [number for number in _processes_with(file) if f"process {number} " not in said]
        if working and said.startswith("process") and not Path(f"/proc/{said.split()[1]}").exists():
            said += f", itself ended; what it began is at work yet: process {', '.join(map(str, working))}"
        raise UserError(f"{shown(folder)} is in use by {said}", "wait until it has finished, or stop it") from None
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"process {holder or os.getpid()} since {now()}".encode(), 0)


def _processes_with(file: TextIO) -> list[int]:
    """The other processes that have a file open, as far as one may see them."""
    wanted, found = os.fstat(file.fileno()), set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(descriptor.stat(), wanted):
                found.add(int(descriptor.parts[2]))
    return sorted(found - {os.getpid(), os.getppid()})
