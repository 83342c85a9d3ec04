"""What a process finds when it starts: variables, working folder, streams. None of it is trusted.

What another program left behind is ignored, with a warning when it looks like a request. A value that makes no sense is
refused, and the error names the variable. Python itself reads PYTHONHOME, PYTHONHASHSEED and the name in
PYTHONIOENCODING before any line of ours: the shell scripts drop them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path

Variables = MutableMapping[str, str]

PROCESSES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by torchrun and accelerate launch, all six."""
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PATHS = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TMPDIR")
OFF = ("", "0", "n", "f", "no", "off", "false", "none")
ON = ("1", "y", "t", "yes", "on", "true")
SWITCHES = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")  # may be on


class Unusable(Exception):
    """A variable or folder that a process cannot work with; `hint` says what to do."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


def open_missing_streams() -> None:
    """Give closed standard streams the null device: the next file opened would get their number and their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False))


def restart_if_misled(variables: Variables = os.environ) -> None:
    """Start this program again, in its process, when a locale or a variable has changed what Python does.

    File names and libraries' files are UTF-8 here, whatever the terminal shows. PYTHONINSPECT makes every exit a
    traceback, PYTHONOPTIMIZE removes the help, PYTHONWARNINGS=error makes errors of libraries' warnings.
    """
    changed = dict(variables)
    if sys.getfilesystemencoding() != "utf-8" and variables.get("PYTHONUTF8") != "1":
        changed["PYTHONUTF8"] = "1"
        changed.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")  # the terminal's stays
    for name in ("PYTHONINSPECT", "PYTHONOPTIMIZE"):
        changed.pop(name, None)
    if "error" in variables.get("PYTHONWARNINGS", ""):
        del changed["PYTHONWARNINGS"]
    if changed != variables and sys.executable and "-c" not in sys.orig_argv:  # with -c, this is no script of its own
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)


def check(several_processes: bool, variables: Variables = os.environ) -> list[str]:
    """Raise Unusable for what cannot be worked with, and remove what means nothing; return warnings.

    `several_processes`: whether this program is made for more than one.
    """
    _check_paths(variables)
    _check_launcher(variables)
    _check_accelerate(variables)
    return _check_processes(several_processes, variables)


def _check_paths(variables: Variables) -> None:
    try:
        working_folder = os.getcwd()
    except OSError as error:
        raise Unusable(f"the working folder cannot be read: {error.strerror}", "change into another folder") from None
    places = {"an argument": "\n".join(sys.argv[1:]), "the path of the working folder": working_folder}
    places["the path of the project"] = __file__
    for name, text in {**places, **{name: variables.get(name, "") for name in PATHS}}.items():
        if any("\udc80" <= character <= "\udcff" for character in text):
            raise Unusable(f"{name} is not UTF-8", "rename the file or folder")


def _check_launcher(variables: Variables) -> None:
    """Refuse the one process that `accelerate launch` starts when it is asked for several but leaves them to MPI.

    On each machine it would train alone, and by other steps than were asked for.
    """
    launched, size = "ACCELERATE_MIXED_PRECISION" in variables, variables.get("WORLD_SIZE", "").strip()
    if launched and variables.get("MASTER_ADDR", "").strip() and not size:
        raise Unusable(
            "accelerate launch was asked for several processes, but has started this one alone",
            "without MPI it starts them by its flag --multi_gpu, or distributed_type: MULTI_GPU in its config file, "
            "on CPUs, too; for one process, unset MASTER_ADDR",
        )


def _check_accelerate(variables: Variables) -> None:
    """Only what `accelerate launch` sets for plain training in FP32 is let through."""
    for name in [name for name in variables if name.startswith("ACCELERATE_") or name == "FORK_LAUNCHED"]:
        value = variables[name].strip().lower()
        detail = name.startswith("ACCELERATE_DYNAMO_") and name != "ACCELERATE_DYNAMO_BACKEND"
        if value in OFF or detail:
            del variables[name]
        elif name == "ACCELERATE_MIXED_PRECISION":
            hint = "train in FP32, with the value no: Gemma 3's activations overflow to NaN in FP16"
            raise Unusable(f"{name}={variables[name]} is refused", hint)
        elif name not in SWITCHES or value not in ON:
            raise Unusable(f"{name}={variables[name]} is not supported here", f"unset {name}")


def _check_processes(several_processes: bool, variables: Variables) -> list[str]:
    for name in [name for name in (*PROCESSES, *MPI_SIZES) if not variables.get(name, "unset").strip()]:
        del variables[name]  # empty
    numbers = {name: _number(name, variables) for name in (*PROCESSES[:4], *MPI_SIZES) if name in variables}
    size = numbers.get("WORLD_SIZE", 1)
    for name in MPI_SIZES:
        if numbers.get(name, 1) > 1 and "WORLD_SIZE" not in numbers:
            hint = f"start several processes with accelerate launch or torchrun; for one process, unset {name}"
            raise Unusable(f"{name} is {numbers[name]}, but WORLD_SIZE is not set", hint)
    if size == 1:
        why = "WORLD_SIZE is 1" if "WORLD_SIZE" in numbers else "WORLD_SIZE is not set"
        other = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        ignored = [f"{name}={numbers[name]}" for name in other if numbers.get(name, other[name]) > other[name]]
        for name in PROCESSES:  # libraries would wait for others
            variables.pop(name, None)
        return [f"{' and '.join(ignored)} ignored: {why}, so this is one process"] if ignored else []
    hint = "start several processes with accelerate launch or torchrun; for one process, unset WORLD_SIZE"
    if size < 1:
        raise Unusable(f"WORLD_SIZE must be at least 1, not {size}", hint)
    if not several_processes:
        raise Unusable(f"WORLD_SIZE is {size}, but this is work for one process", "unset WORLD_SIZE")
    variables.setdefault("LOCAL_WORLD_SIZE", str(size))
    for name in PROCESSES:
        if name not in variables or numbers.get(name) == -1:
            raise Unusable(f"WORLD_SIZE is {size}, but {name} is not set", hint)
    for name, bound in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        limit = _number(bound, variables) + (name == "LOCAL_WORLD_SIZE")
        if not 0 <= _number(name, variables) < limit:
            raise Unusable(f"{name} is {variables[name]}, which does not go with {bound}={variables[bound]}", hint)
    if not 0 < _number("MASTER_PORT", variables) < 2**16:
        raise Unusable(f"MASTER_PORT must be a port, not {variables['MASTER_PORT']}", hint)
    try:
        socket.getaddrinfo(variables["MASTER_ADDR"], None)
    except (OSError, UnicodeError):
        raise Unusable(f"MASTER_ADDR={variables['MASTER_ADDR']} cannot be resolved", hint) from None
    return []


def _number(name: str, variables: Variables) -> int:
    text = variables[name].strip()
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10):
        raise Unusable(f"{name} must be a whole number, not {variables[name]!r}", f"unset {name}")
    return int(text)


def home_folder() -> Path | None:
    """The user's home, if there is one: absolute, and a folder."""
    try:
        home = Path(os.environ.get("HOME") or Path("~").expanduser())
    except RuntimeError:  # no HOME, and no entry for the user
        return None
    return home if home.is_absolute() and os.path.isdir(home) else None  # Path.is_dir raises where it may not look
