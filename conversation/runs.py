"""The run folder: what a run leaves behind, who is working in it, and how it is published.

    training-runs/conversation/
        2026-11-22/          a published run: trained, merged, tested, nothing of it half-written
        2026-11-22-2/        the second one of that day
        latest -> 2026-11-22-2
        attempts/            runs under way, and failed ones with their log, until the next retrain cleans them

`run.json` is rewritten as a whole after each stage and never in place, so a reader sees the old or the new one. It
holds its own SHA-256 and those of the files that later stages use: a changed bit is found before it does harm.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from conversation import strict_json
from conversation.errors import TRIED_AND_FAILED, UserError, explained, run_main
from conversation_config import PROJECT, TRAINING_RUNS

LATEST = "latest"
OLD = ".old.part"
ATTEMPTS = "attempts"
PUBLISHING = ".publishing"  # in attempts/, while a run gets its name and `latest` still points at the one before
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


# --- files -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at every moment its name stands for the old content or for the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file that could be replaced", "name another")
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
    """The UserError for a file or folder of `needed_bytes` that could not be written, once its beginning is removed."""
    folder = path if path.is_dir() else path.parent
    hint = ""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = f"make {folder} writable, or name another folder with --run_dir"
    else:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            hint = f"{size(free)} are free there"
            if free < needed_bytes:
                hint += f", {size(needed_bytes - free)} more are needed: make room, then go on with --resume"
    return UserError(f"cannot write {path}: {error.strerror or error}", hint, TRIED_AND_FAILED)


def size(count: int) -> str:
    """A number of bytes as a person reads it."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= factor:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count} bytes"


def replace_folder(part: Path, final: Path) -> None:
    """Give a complete folder its final name, in place of an older one; no half of either stands under that name."""
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = final.with_name(f".{final.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)  # killed after this, `remove_leftovers` gives the old one its name back
    os.rename(part, final)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed had begun to write; a folder that it was replacing gets its name back."""
    for old in folder.glob(f".*{OLD}"):
        final = old.with_name(old.name[1 : -len(OLD)])
        if not final.exists():
            os.rename(old, final)
    for leftover in folder.glob(".*.part"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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
            f"the disk of {folder} has {size(free)} free, {what} needs {size(needed_bytes)}",
            f"free {size(needed_bytes - free)} there",
        )


# --- run folders -----------------------------------------------------------------------------------------------------


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


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}", "name another with --run_dir") from None


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


def shown(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the current folder or the project."""
    for base in (Path.cwd(), PROJECT):
        with contextlib.suppress(ValueError):
            return str(path.resolve().relative_to(base))
    return str(path)


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# --- the console -----------------------------------------------------------------------------------------------------


class _Log:
    """console.log, appended to line by line. A full disk costs lines of the log, and does not stop the work."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"{stamp} {text}\n".encode(errors="backslashreplace"))


class _Tee:
    """A stream that also writes what passes through it to the log, each line with its time.

    A terminal that is closed meanwhile is done without.
    """

    def __init__(self, stream: TextIO, log: _Log):
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = line.rstrip("\r").rsplit("\r", 1)[-1]  # of a progress bar, its last state
            if shown.strip():
                self._log.line(shown)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def console_kept(run: RunFolder) -> Iterator[None]:
    """Append everything that is printed meanwhile to the run's console.log, with times; errors too."""
    with open(run.console_log, "ab", buffering=0) as file:
        log = _Log(file)
        out, err = sys.stdout, sys.stderr
        log.line(f"$ {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)
        try:
            yield
        except BaseException as error:
            said = explained(error)
            for line in (f"error: {said}" if said else traceback.format_exc()).splitlines():
                log.line(line)
            if said and said.hint:
                log.line(f"hint: {said.hint}")
            raise
        finally:
            sys.stdout, sys.stderr = out, err


# --- what a run was made with ----------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, for run.json."""
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "safetensors")
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
        "git_commit": _git_commit(),
    }


def peak_memory_bytes() -> int:
    """The most resident memory since this program began (ru_maxrss would count what started it, too)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


# --- attempts and publishing: what RETRAIN.sh calls ------------------------------------------------------------------


def begin_attempt(root: Path, flags: Sequence[str] = ()) -> Path:
    """Clean the leftovers of earlier attempts, and nothing else; make the folder of a new one, which knows its flags.

    Stopped at any moment, what has an attempt's name is a whole attempt. Raises UserError when an attempt is in use.
    """
    attempts = root / ATTEMPTS
    make_folder(attempts)
    remove_leftovers(attempts)
    for leftover in sorted(attempts.glob(ATTEMPT_NAME)):
        if leftover.is_dir() and not leftover.is_symlink():
            with hold(leftover):
                doomed = leftover.rename(leftover.with_name(f".{leftover.name}.part"))
            shutil.rmtree(doomed)
    path = free_name(attempts, time.strftime("%Y-%m-%d_%H-%M-%S"))
    begun = RunFolder(path.with_name(f".{path.name}.part"))
    make_folder(begun.path)
    write_json(begun.retrain_flags, {"flags": list(flags)})
    return begun.path.rename(path)


def newest_attempt(root: Path) -> Path | None:
    """The attempt to go on with; None when there is none, or the last one was published."""
    found = sorted(path for path in (root / ATTEMPTS).glob(ATTEMPT_NAME) if path.is_dir())
    return found[-1] if found else None


def publish(attempt: RunFolder, root: Path, command: str) -> Path:
    """Give a finished attempt its final name and point `latest` at it. Raises UserError unless it passed its tests.

    A reader sees the run under its final name whole or not at all. Stopped between the two steps, `latest` still points
    at the run before; `finish_publishing` puts that right.
    """
    with hold(attempt.path), console_kept(attempt):
        record = attempt.read()
        if not (record.get("structural_tests") or {}).get("passed"):
            raise UserError(f"{shown(attempt.path)} has not passed its tests: not published", "", TRIED_AND_FAILED)
        if problem := broken_result(attempt, record):
            raise UserError(f"not published: {problem}", "./RETRAIN.sh --resume makes it again", TRIED_AND_FAILED)
        attempt.update(published=now(), retrain_command=command)

        from conversation import reporting

        reporting.write_report(attempt)
        final = free_name(root, record["started"][:10])
        marker = root / ATTEMPTS / PUBLISHING
        write_atomically(marker, final.name.encode())
        try:
            os.rename(attempt.path, final)
            _point_latest_at(final)
            marker.unlink()
        except OSError as error:
            raise cannot_write(final, error, 0) from None
    return final


def broken_result(run: RunFolder, record: dict[str, Any]) -> str | None:
    """The first of a run's results that is not as its stage left it, as a sentence."""
    folders = (
        (run.final_lora, (record.get("training") or {}).get("adapter_files", {})),
        (run.merged_model, (record.get("merge") or {}).get("files", {})),
        (run.path, (record.get("training") or {}).get("files", {})),
        (run.path, (record.get("structural_tests") or {}).get("files", {})),
    )
    return next((problem for folder, files in folders if (problem := differing_file(folder, files))), None)


def finish_publishing(root: Path) -> None:
    """Point `latest` at a run that got its name and not the pointer, because publishing it was stopped in between."""
    marker = root / ATTEMPTS / PUBLISHING
    if marker.exists():
        final = root / marker.read_text(encoding="utf-8")
        if final.is_dir():
            _point_latest_at(final)
        marker.unlink()


def _point_latest_at(run: Path) -> None:
    """Replace the `latest` link beside a run in one step."""
    link = run.parent / f".{LATEST}.part"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name)
    os.replace(link, run.parent / LATEST)


def _flags(attempt: RunFolder) -> list[str]:
    """The flags that RETRAIN.sh was begun with, and those it was resumed with. Raises UserError."""
    flags = read_json(attempt.retrain_flags).get("flags")
    if not isinstance(flags, list) or not all(isinstance(flag, str) and "\0" not in flag for flag in flags):
        raise UserError(f"{attempt.retrain_flags} is broken: it does not list flags", "begin anew: ./RETRAIN.sh")
    return flags


def refuse_published(run: RunFolder, record: dict[str, Any]) -> None:
    """Raises UserError: what is published is not changed any more."""
    if record.get("published"):
        raise UserError(f"{shown(run.path)} is published: it is not changed any more", "name another with --run_dir")


def main() -> int:
    """`python -m conversation.runs lock|begin|newest|flags|add-flags|publish`: the bookkeeping of RETRAIN.sh."""
    parser = argparse.ArgumentParser(prog="conversation.runs", description="the bookkeeping of RETRAIN.sh")
    parser.add_argument("--root", type=Path, default=TRAINING_RUNS, help="folder of the runs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lock", help="lock the open file descriptor given").add_argument("descriptor", type=int)
    beginning = commands.add_parser("begin", help="clean the leftovers of attempts, print the folder of a new one")
    beginning.add_argument("flags", nargs="*", help="the flags of the retrain, after a --")
    commands.add_parser("newest", help="print the folder of the newest attempt, nothing when there is none")
    commands.add_parser("flags", help="print an attempt's flags, a NUL after each").add_argument("attempt", type=Path)
    adding = commands.add_parser("add-flags", help="keep flags that an attempt is resumed with")
    adding.add_argument("attempt", type=Path)
    adding.add_argument("flags", nargs="*", help="after a --")
    publishing = commands.add_parser("publish", help="give an attempt its final name and print it")
    publishing.add_argument("attempt", type=Path)
    publishing.add_argument("command_line", help="the command that repeats the run, for its report")
    args = parser.parse_args()
    if args.command == "lock":
        # The lock belongs to the open file that RETRAIN.sh and its children share: it outlives this process.
        with open(args.descriptor, "a+", encoding="utf-8", closefd=False) as file:
            lock_file(file, args.root, os.getppid())
        finish_publishing(args.root)
    elif args.command == "begin":
        print(shown(begin_attempt(args.root, args.flags)))
    elif args.command == "newest":
        attempt = newest_attempt(args.root)
        print(shown(attempt) if attempt else "")
    elif args.command == "flags":
        print("".join(f"{flag}\0" for flag in _flags(RunFolder(args.attempt))), end="")
    elif args.command == "add-flags":
        attempt = RunFolder(args.attempt)
        write_json(attempt.retrain_flags, {"flags": [*_flags(attempt), *args.flags]})
    else:
        print(shown(publish(RunFolder(args.attempt.resolve()), args.root, args.command_line)))
    return 0


if __name__ == "__main__":
    run_main(main)
