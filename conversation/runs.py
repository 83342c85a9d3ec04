"""The run folder: what a run leaves behind, who is working in it, and how it is published.

    training-runs/conversation/
        2026-11-22/          a published run: trained, merged, tested, nothing of it half-written
        2026-11-22-2/        the second one of that day
        latest -> 2026-11-22-2
        attempts/            runs under way, and failed ones with their log, until the next retrain cleans them

`run.json` is rewritten as a whole after each stage and never in place, so a reader sees the old or the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from conversation import strict_json
from conversation.errors import TRIED_AND_FAILED, UserError, run_main
from conversation_config import PROJECT, TRAINING_RUNS

LATEST = "latest"
ATTEMPTS = "attempts"


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

    def read(self) -> dict[str, Any]:
        """run.json. Raises UserError when it is missing or broken."""
        return read_json(self.run_json)

    def update(self, **sections: Any) -> None:
        """Replace sections of run.json."""
        record = self.read() if self.run_json.exists() else {}
        write_json(self.run_json, {**record, **sections})

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged metrics, one dictionary per line of metrics.jsonl. Raises UserError."""
        if not self.metrics.exists():
            return []
        records = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], 1):
            try:
                records.append(strict_json.loads(strict_json.decode_utf8(line)))
            except strict_json.JsonError as error:
                raise UserError(f"{self.metrics}:{number}: {error}") from None
        return records


# --- files -------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at every moment its name stands for the old content or for the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    """The UserError for a file that could not be written."""
    folder = path if path.is_dir() else path.parent
    hint = ""
    with contextlib.suppress(OSError):
        hint = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
    return UserError(f"cannot write {path}: {error.strerror or error}", hint, TRIED_AND_FAILED)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours. Raises UserError that names the file."""
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


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def differing_file(folder: Path, recorded: dict[str, str]) -> str | None:
    """The first file that is missing or is not the one that was recorded, as a sentence; None when all are intact."""
    for name, digest in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256_file(path) != digest:
            return f"{path} is broken: its SHA-256 is not the recorded one"
    return None


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError when the disk of `folder` has less free room than is needed."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, {what} needs {needed_bytes / 1e9:.2f} GB",
            f"free {(needed_bytes - free) / 1e9:.2f} GB there",
        )


# --- run folders -------------------------------------------------------------------------------------------------------


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
    found = [*root.glob("*/run.json"), *(root / ATTEMPTS).glob("*/run.json")]
    if not found:
        raise UserError(
            f"there is no run in {root}", "train one with train_conversation.py, or name one with --run_dir"
        )
    return RunFolder(max(found, key=lambda path: path.stat().st_mtime).parent.resolve())


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep others out of a folder while working in it. The kernel drops the lock when its holder dies.

    Raises UserError that says who holds the folder, and since when.
    """
    make_folder(folder)
    try:
        file = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with file:
        lock_file(file, folder)
        yield
        file.truncate(0)


def lock_file(file: TextIO, folder: Path, holder: int | None = None) -> None:
    """Take the lock on an open file and write into it who holds it. Raises UserError when it is held."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        said = file.read().strip() or "another process"
        raise UserError(f"{shown(folder)} is in use by {said}", "wait until it has finished, or stop it") from None
    file.truncate(0)
    file.write(f"process {holder or os.getpid()} since {now()}")
    file.flush()


def shown(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the current folder or the project."""
    for base in (Path.cwd(), PROJECT):
        with contextlib.suppress(ValueError):
            return str(path.resolve().relative_to(base))
    return str(path)


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# --- the console -------------------------------------------------------------------------------------------------------


class _Tee:
    """A stream that also writes what passes through it to the log, each line with its time."""

    def __init__(self, stream: TextIO, log: TextIO):
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = line.rstrip("\r").rsplit("\r", 1)[-1]  # of a progress bar, its last state
            if shown.strip():
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shown}\n")
        if lines:
            self._log.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def console_kept(run: RunFolder) -> Iterator[None]:
    """Append everything that is printed meanwhile to the run's console.log, with times; errors too."""
    with open(run.console_log, "a", encoding="utf-8", errors="replace") as log:
        out, err = sys.stdout, sys.stderr
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} $ {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}\n")
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)
        try:
            yield
        except UserError as error:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {error}\n")
            if error.hint:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} hint: {error.hint}\n")
            raise
        finally:
            sys.stdout, sys.stderr = out, err


# --- what a run was made with ------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, for run.json."""
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The project's commit, with "+changes" when files differ from it; None outside a repository."""
    try:
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --- attempts and publishing: what RETRAIN.sh calls --------------------------------------------------------------------


def begin_attempt(root: Path) -> Path:
    """Clean the leftovers of earlier attempts, and nothing else; make the folder of a new one."""
    attempts = root / ATTEMPTS
    make_folder(attempts)
    for leftover in sorted(attempts.iterdir()):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
    path = attempts / time.strftime("%Y-%m-%d_%H-%M-%S")
    make_folder(path)
    return path


def newest_attempt(root: Path) -> Path | None:
    """The attempt to go on with; None when the last one was published."""
    found = sorted(path for path in (root / ATTEMPTS).glob("*") if path.is_dir())
    return found[-1] if found else None


def publish(attempt: RunFolder, root: Path, command: str) -> Path:
    """Give a finished attempt its final name and point `latest` at it. Raises UserError unless it passed its tests.

    A reader sees the run under its final name whole or not at all. Stopped between the two steps, `latest` still points
    at the run before; `mend_latest` puts that right.
    """
    record = attempt.read()
    if not (record.get("structural_tests") or {}).get("passed"):
        raise UserError(f"{shown(attempt.path)} has not passed its tests: not published", "", TRIED_AND_FAILED)
    attempt.update(published=now(), retrain_command=command)

    from conversation import reporting

    reporting.write_report(attempt)
    final = free_name(root, record["started"][:10])
    try:
        os.rename(attempt.path, final)
        _point_latest_at(final)
    except OSError as error:
        raise cannot_write(final, error) from None
    return final


def mend_latest(root: Path) -> None:
    """Point `latest` at the run that was published last."""
    found = []
    for path in root.glob("*/run.json"):
        with contextlib.suppress(UserError):
            if not path.parent.is_symlink() and (published := read_json(path).get("published")):
                found.append((published, path.parent))
    if found and (root / LATEST).resolve() != max(found)[1].resolve():
        _point_latest_at(max(found)[1])


def _point_latest_at(run: Path) -> None:
    """Replace the `latest` link beside a run in one step."""
    link = run.parent / f".{LATEST}.part"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name)
    os.replace(link, run.parent / LATEST)


def main() -> int:
    """`python -m conversation.runs lock|begin|newest|publish`: the bookkeeping of RETRAIN.sh."""
    parser = argparse.ArgumentParser(prog="conversation.runs", description="the bookkeeping of RETRAIN.sh")
    parser.add_argument("--root", type=Path, default=TRAINING_RUNS, help="folder of the runs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lock", help="lock the open file descriptor given").add_argument("descriptor", type=int)
    commands.add_parser("begin", help="clean the leftovers of attempts, print the folder of a new one")
    commands.add_parser("newest", help="print the folder of the newest attempt, nothing when it is published")
    publishing = commands.add_parser("publish", help="give an attempt its final name and print it")
    publishing.add_argument("attempt", type=Path)
    publishing.add_argument("command_line", help="the command that repeats the run, for its report")
    args = parser.parse_args()
    if args.command == "lock":
        # The lock belongs to the open file that RETRAIN.sh and its children share: it outlives this process.
        with open(args.descriptor, "a+", encoding="utf-8", closefd=False) as file:
            lock_file(file, args.root, os.getppid())
        mend_latest(args.root)
    elif args.command == "begin":
        print(shown(begin_attempt(args.root)))
    elif args.command == "newest":
        attempt = newest_attempt(args.root)
        print(shown(attempt) if attempt else "")
    else:
        print(shown(publish(RunFolder(args.attempt.resolve()), args.root, args.command_line)))
    return 0


if __name__ == "__main__":
    run_main(main)
