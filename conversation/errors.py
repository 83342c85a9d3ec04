"""Errors for the person who can correct them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from conversation import environment

NOT_STARTED = 2  # bad flag, bad data, no model
TRIED_AND_FAILED = 1  # a test failed, the loss was not finite
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that stop a script, beside Ctrl-C. Batch systems announce the end of the time with the last three."""
GO_ON = "finished work is saved; go on with the same command and --resume"
_hint_when_stopped = ""  # of the script that runs


class UserError(Exception):
    """A mistake or mishap that a user can correct: printed as `error:` and `hint:`, without a traceback.

    `exit_status` is 2 when nothing was started and 1 when the work was tried and failed.
    """

    def __init__(self, message: str, hint: str = "", exit_status: int = NOT_STARTED):
        super().__init__(message)
        self.hint = hint
        self.exit_status = exit_status


class UnusableData(UserError):
    """Data of which some cannot be used. `problems`: a sentence each, with its place. `usable`: what is left of it."""

    def __init__(self, message: str, hint: str, problems: list[str], usable: list[Any]):
        super().__init__(message, hint)
        self.problems = problems
        self.usable = usable


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


def first_cause(error: BaseException) -> BaseException:
    """The error at the start of a chain of causes. A chain that leads back into itself ends there."""
    seen: set[int] = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return error


_WRONG_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}


def as_user_error(error: BaseException) -> UserError | None:
    """The error for what ended a script; None for a defect of ours, which keeps its traceback, and for a plain exit."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, environment.Unusable):
        return UserError(str(error), error.hint)
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return UserError(f"stopped by {signal.Signals(number).name}", _hint_when_stopped, 128 + number)
    if isinstance(error, OSError):
        status = NOT_STARTED if error.errno in _WRONG_PATH else TRIED_AND_FAILED
        name = f": {str(error.filename)[:200]}" if error.filename else ""
        return UserError(f"{error.strerror or error}{name}", "", status)
    error = first_cause(error)  # a library that loads its parts late wraps what they raise
    if isinstance(error, ModuleNotFoundError):
        return UserError(f"{error}", "use the project's environment: .venv/bin/python, which ./RETRAIN.sh makes")
    return out_of_memory(error) or _library_not_loaded(error)


WHERE_LIBRARIES_ARE = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
OURS = ("__main__", "conversation", "conversation_config", "benchmarks", "scripts")


def _library_not_loaded(error: BaseException) -> UserError | None:
    """The error for a library that fails while it is imported; None for any other. Libraries read variables then:
    numbers, switches, names."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    names = [str(frame.f_globals.get("__name__", "__main__")).partition(".")[0] for frame in frames]
    names = [name for name in names if name not in sys.stdlib_module_names]
    if not isinstance(error, Exception) or not names or names[-1] in OURS:
        return None
    library, text = names[-1], (str(error).strip() or type(error).__name__).splitlines()[0]
    problem = f"the library {library} cannot be loaded: {text}"
    variables = {name: value for name, value in sorted(os.environ.items()) if value}
    blamed = [
        name
        for name, value in variables.items()
        if library.upper() in name.upper() or re.search(f"['\"]{re.escape(value)}['\"]", text)
    ]
    if not (blamed := blamed or [name for name in WHERE_LIBRARIES_ARE if name in variables]):
        return UserError(problem, "remove .venv; ./RETRAIN.sh makes it again")
    secret = re.compile("TOKEN|KEY|PASSWORD|SECRET", re.IGNORECASE)
    shown = [f"{name}={'...' if secret.search(name) else variables[name][:100]}" for name in blamed]
    return UserError(f"{problem}; set here: {', '.join(shown)}", "correct or unset it")


_NO_MEMORY = re.compile(r"out of memory|CPUAllocator: can't allocate|STATUS_ALLOC_FAILED|os error 12\b")


def out_of_memory(error: BaseException) -> UserError | None:
    """The error for memory that ran out, of the machine or of its GPU; None for any other."""
    text = str(error).strip()
    of_torch = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"  # torch's own is the first
    if not isinstance(error, MemoryError) and not (of_torch and _NO_MEMORY.search(text)):
        return None
    reason = f": {text.splitlines()[0]}" if text else ""
    hint = "close other programs; where a GPU has too little, --device cpu"
    return UserError(f"there is too little memory{reason}", hint, TRIED_AND_FAILED)


def run_main(main: Callable[[], int], several_processes: bool = False, hint: str = "") -> None:
    """Run a script's `main` and exit with its status.

    `several_processes`: it may be started by torchrun. `hint`: what to do when it was stopped, as `GO_ON`.
    """
    global _hint_when_stopped
    _hint_when_stopped = hint
    environment.open_missing_streams()
    environment.restart_if_misled()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character the terminal lacks must not stop the work
    for number in STOPPING:
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP: leave that
            signal.signal(number, _interrupt)
    try:
        if not {"-h", "--help"} & set(sys.argv[1:]):
            for warning in environment.check(several_processes):
                print(f"warning: {warning}", file=sys.stderr)
        try:
            status = main()
        except SystemExit as end:  # --help
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        _flush_output()
        sys.exit(status)
    except BaseException as error:
        found = as_user_error(error)
        if found is None:
            raise  # a defect, or sys.exit
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(f"error: {found}", file=sys.stderr)
            if found.hint:
                print(f"hint: {found.hint}", file=sys.stderr)
        sys.exit(found.exit_status)


def _flush_output() -> None:
    """Write what is buffered. Raises UserError when standard output takes no more: a full disk, a closed pipe."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        raise UserError(f"standard output cannot be written: {error.strerror}", "", TRIED_AND_FAILED) from None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)
