"""Attempts, and the publication of a finished one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import os
import shutil
import sys
import time
from pathlib import Path

from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main
from conversation.runs import report
from conversation.runs.files import cannot_write, find_damage, make_folder, remove_leftovers, shown, write_atomically
from conversation.runs.folder import ATTEMPT_NAME, ATTEMPTS, RUN_NAME, RunFolder, free_name
from conversation.runs.lock import lock_file, locked_folder
from conversation.runs.record import RunRecord, now
from conversation_config import TRAINING_RUNS

LATEST = "latest"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say; the first is FAT's
PUBLISHING = ".publishing"  # in attempts/, while a run has its final name but `latest` still points at the previous run


def bytes_of_attempts(root: Path = TRAINING_RUNS) -> int:
    """The disk space that the next attempt will free by removing earlier ones."""
    attempts = (root / ATTEMPTS).glob(ATTEMPT_NAME)
    return sum(path.lstat().st_size for attempt in attempts for path in attempt.rglob("*") if path.is_file())


def begin_attempt(root: Path, record: RunRecord) -> RunFolder:
    """Remove earlier attempts, and nothing else. Make the folder of a new one, with its record.

    After a kill at any moment, every folder with an attempt's name is complete. Raises UserError when one is in use.
    """
    attempts = root / ATTEMPTS
    make_folder(attempts)
    remove_leftovers(attempts)
    for leftover in sorted(attempts.glob(ATTEMPT_NAME)):
        if leftover.is_dir() and not leftover.is_symlink():
            with locked_folder(leftover):
                doomed = leftover.rename(leftover.with_name(f".{leftover.name}.part"))
            shutil.rmtree(doomed)
    attempt = RunFolder(free_name(attempts, time.strftime("%Y-%m-%d_%H-%M-%S")))
    attempt.create(record)
    return attempt


def newest_attempt(root: Path = TRAINING_RUNS) -> RunFolder | None:
    """The newest attempt; None when there is none, as after a publication."""
    found = sorted(path for path in (root / ATTEMPTS).glob(ATTEMPT_NAME) if path.is_dir())
    return RunFolder(found[-1]) if found else None


def attempt_to_resume(root: Path = TRAINING_RUNS) -> RunFolder | None:
    """The newest attempt; None, and a line on the console, when the last one was published.

    Raises UserError when there has been none.
    """
    attempt = newest_attempt(root)
    if attempt is None:
        last = _last_published(root)
        if last is None:
            raise UserError("there is no attempt to resume", "begin one: ./RETRAIN.sh")
        print(f"Nothing to resume: no attempt is under way, the last published run is {shown(root)}/{last}")
    return attempt


def _last_published(root: Path) -> str | None:
    """The name of the run that was published last: `latest`, or where the file system has no links, the run's own."""
    if (root / LATEST).exists():
        return LATEST
    published: list[tuple[datetime.datetime, str]] = []
    for path in root.glob(f"{RUN_NAME}/run.json"):
        with contextlib.suppress(UserError):
            if time_of := RunFolder(path.parent).read().published:
                published.append((datetime.datetime.fromisoformat(time_of), path.parent.name))
    return max(published)[1] if published else None


def publish(attempt: RunFolder, root: Path) -> RunFolder:
    """Give a finished attempt its final name and point `latest` at it. Raises UserError unless it passed its tests.

    A reader sees the whole run under its final name, or nothing. After a kill between the two steps `latest` still
    points at the previous run; `finish_publishing` corrects that.
    """
    with attempt.at_work() as record:
        if not (record.structural_tests and record.structural_tests.passed):
            raise UserError(f"{shown(attempt.path)} has not passed its tests: not published", "", TRIED_AND_FAILED)
        if problem := find_damaged_result(attempt, record):
            raise UserError(f"not published: {problem}", "./RETRAIN.sh --resume repairs it", TRIED_AND_FAILED)
        attempt.write(dataclasses.replace(record, published=now()))
        report.write_report(attempt)
        final = free_name(root, record.started[:10])
        marker = root / ATTEMPTS / PUBLISHING
        write_atomically(marker, final.name.encode())
        try:
            os.rename(attempt.path, final)
            _point_latest_at(final)
            marker.unlink()
        except OSError as error:
            raise cannot_write(final, error, 0) from None
    return RunFolder(final)


def find_damaged_result(run: RunFolder, record: RunRecord) -> str | None:
    """The first damaged result of a run, as a sentence; None when all are as their stages left them."""
    training, merge, tests = record.training, record.merge, record.structural_tests
    if merge and training and merge.adapter_files != training.adapter_files:
        return f"{run.merged_model} was merged from other adapters"
    folders = (
        (run.final_lora, training.adapter_files if training else {}),
        (run.merged_model, merge.files if merge else {}),
        (run.path, training.files if training else {}),
        (run.path, tests.files if tests else {}),
    )
    return next((problem for folder, files in folders if (problem := find_damage(folder, files))), None)


def finish_publishing(root: Path) -> None:
    """Point `latest` at a run whose publication was stopped after it got its name."""
    marker = root / ATTEMPTS / PUBLISHING
    if marker.exists():
        final = root / marker.read_text(encoding="utf-8")
        if final.is_dir():
            _point_latest_at(final)
        marker.unlink()


def _point_latest_at(run: Path) -> None:
    """Replace the `latest` link beside a run, atomically. Where the file system has no links, only say so."""
    link = run.parent / f".{LATEST}.part"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(run.name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        print(f"warning: no link {LATEST}: the file system of {shown(run.parent)} has none", file=sys.stderr)
        return
    os.replace(link, run.parent / LATEST)


def main() -> int:
    """`python -m conversation.runs.publishing lock|newest|publish`: the bookkeeping of RETRAIN.sh."""
    parser = CommandLine("the bookkeeping of RETRAIN.sh", prog="conversation.runs.publishing")
    parser.add_argument("--root", type=Path, default=TRAINING_RUNS, help="folder of the runs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lock", help="lock the open file descriptor given").add_argument("descriptor", type=int)
    commands.add_parser("newest", help="print the folder of the newest attempt, or nothing")
    commands.add_parser("publish", help="give the newest attempt its final name")
    args = parser.parse_args()
    if args.command == "lock":
        # RETRAIN.sh and its children share the open file, and thereby the lock: it outlives this process.
        with open(args.descriptor, "a+", encoding="utf-8", closefd=False) as file:
            lock_file(file, args.root, os.getppid())
        finish_publishing(args.root)
        return 0
    attempt = newest_attempt(args.root)
    if args.command == "newest":
        sys.stdout.buffer.write(os.fsencode(attempt.path) + b"\n" if attempt else b"\n")  # whatever a terminal can show
        return 0
    if attempt is None:
        raise UserError("there is no attempt to publish", "begin one: ./RETRAIN.sh")
    published = publish(attempt, args.root)
    print(report.summary(published.read()), file=sys.stderr)
    linked = f" (and {shown(args.root)}/{LATEST})" if (args.root / LATEST).exists() else ""
    print(f"Published: {shown(published.path)}{linked}")
    print(f"Report:    {shown(published.report)}")
    return 0


if __name__ == "__main__":
    run_main(main)
