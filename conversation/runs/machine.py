"""The environment of a run: versions, machine, git commit, processes, memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from conversation.runs.record import Environment
from conversation_config import PROJECT


def environment() -> Environment:
    """Versions, machine and git commit, for run.json."""
    import psutil

    packages = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "safetensors")
    versions = {name: version for name in packages if (version := _version(name))}
    return Environment(
        versions={"python": platform.python_version(), **versions},
        machine={
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        git_commit=_git_commit(),
    )


def number_of_processes() -> int:
    """How many processes train together; set by accelerate launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process that writes into the run folder."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory_bytes() -> int:
    """The peak resident memory of this program. (ru_maxrss would include the program that started it.)"""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The project's commit, plus "+changes" when files differ from it; None outside a repository of its own."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != PROJECT.resolve():
            return None  # the project lies, without its history, inside another repository
        return _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    """What git says of the project's folder. GIT_DIR and the like would point it at another repository."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=plain).stdout.strip()
