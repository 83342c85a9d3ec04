"""Errors for the person who can correct them."""

from __future__ import annotations

import argparse
import errno
import io
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

NOT_STARTED = 2  # bad flag, bad data, no model
TRIED_AND_FAILED = 1  # a test failed, the loss was not finite


class UserError(Exception):
    """A mistake or mishap that a user can correct: printed as `error:` and `hint:`, without a traceback.

    `exit_status` is 2 when nothing was started and 1 when the work was tried and failed.
    """

    def __init__(self, message: str, hint: str = "", exit_status: int = NOT_STARTED):
        super().__init__(message)
        self.hint = hint
        self.exit_status = exit_status


class CommandLine(argparse.ArgumentParser):
    """A script's flags; its docstring is the help text. A wrong flag is a UserError, like any other mistake."""

    def __init__(self, description: str | None = None, **options: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help lists the flags")


def list_problems(problems: list[str], shown: int = 20) -> str:
    """The first `shown` problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)


_WRONG_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}


def as_user_error(error: BaseException) -> UserError | None:
    """The error for what ended a script; None for a defect of ours, which keeps its traceback, and for a plain exit."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        hint = "finished work is saved; go on with the same command and --resume"
        return UserError(f"stopped by {signal.Signals(number).name}", hint, 128 + number)
    if isinstance(error, OSError):
        status = NOT_STARTED if error.errno in _WRONG_PATH else TRIED_AND_FAILED
        name = f": {str(error.filename)[:200]}" if error.filename else ""
        return UserError(f"{error.strerror or error}{name}", "", status)
    if isinstance(error, ModuleNotFoundError):
        return UserError(f"{error}", "use the project's environment: .venv/bin/python, which ./RETRAIN.sh makes")
    return None


def run_main(main: Callable[[], int]) -> None:
    """Run a script's `main` and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character the terminal lacks must not stop the work
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP: leave that
            signal.signal(number, _interrupt)
    try:
        if any("\udc80" <= character <= "\udcff" for argument in sys.argv[1:] for character in argument):
            raise UserError("an argument is not UTF-8", "rename the file or folder")
        sys.exit(main())
    except BaseException as error:
        found = as_user_error(error)
        if found is None:
            raise  # a defect, or sys.exit
        print(f"error: {found}", file=sys.stderr)
        if found.hint:
            print(f"hint: {found.hint}", file=sys.stderr)
        sys.exit(found.exit_status)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)
