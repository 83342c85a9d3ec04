"""Attempts, and how one of them becomes the published run: the bookkeeping of RETRAIN.sh."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversation.console import console_kept
from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main
from conversation.files import (
    cannot_write,
    differing_file,
    make_folder,
    read_json,
    remove_leftovers,
    shown,
    write_atomically,
    write_json,
)
from conversation.runs import ATTEMPT_NAME, ATTEMPTS, RunFolder, free_name, hold, lock_file, now
from conversation_config import TRAINING_RUNS

LATEST = "latest"
PUBLISHING = ".publishing"  # in attempts/, while a run gets its name and `latest` still points at the one before


def bytes_of_attempts(root: Path = TRAINING_RUNS) -> int:
    """What the next retrain will free: it cleans the attempts before it."""
    attempts = (root / ATTEMPTS).glob(ATTEMPT_NAME)
    return sum(path.lstat().st_size for attempt in attempts for path in attempt.rglob("*") if path.is_file())


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
    merged_from = (record.get("merge") or {}).get("adapter_files")
    if merged_from and merged_from != (record.get("training") or {}).get("adapter_files"):
        return f"{run.merged_model} was made with other adapters"
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


def keep_flags(attempt: RunFolder, given: Sequence[str]) -> None:
    """Keep flags that an attempt was resumed with, for the next time and for the command that repeats it."""
    kept = _flags(attempt)
    given = list(given)
    new = given[len(kept) :] if given[: len(kept)] == kept else given  # RETRAIN.sh gives those it kept, too
    if new:
        write_json(attempt.retrain_flags, {"flags": kept + new})


def main() -> int:
    """`python -m conversation.publishing lock|begin|newest|flags|publish`: the bookkeeping of RETRAIN.sh."""
    parser = CommandLine("the bookkeeping of RETRAIN.sh", prog="conversation.publishing")
    parser.add_argument("--root", type=Path, default=TRAINING_RUNS, help="folder of the runs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lock", help="lock the open file descriptor given").add_argument("descriptor", type=int)
    beginning = commands.add_parser("begin", help="clean the leftovers of attempts, print the folder of a new one")
    beginning.add_argument("flags", nargs="*", help="the flags of the retrain, after a --")
    commands.add_parser("newest", help="print the folder of the newest attempt, nothing when there is none")
    commands.add_parser("flags", help="print an attempt's flags, quoted for a shell").add_argument("attempt", type=Path)
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
        print(shlex.join(_flags(RunFolder(args.attempt))))
    else:
        from conversation import reporting

        published = publish(RunFolder(args.attempt.resolve()), args.root, args.command_line)
        print(f"\n{reporting.summary(RunFolder(published).read())}", file=sys.stderr)
        print(shown(published))
    return 0


if __name__ == "__main__":
    run_main(main)
