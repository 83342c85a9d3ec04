"""The environment of a run: versions, machine, git commit, processes, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from conversation.runs.record import Environment
from conversation_config import PROJECT


def environment(device: str = "") -> Environment:
    """Versions, machine and git commit, for run.json. `device`: where the run computes, and why there."""
    return Environment(
        versions={"python": platform.python_version(), **versions()},
        machine={**machine(), **({"device": device} if device else {})},
        git_commit=_git_commit(),
    )


def versions() -> dict[str, str]:
    """The versions of the packages that carry the training."""
    packages = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "safetensors")
    return {name: version for name in packages if (version := _version(name))}


def code_sha256() -> str:
    """A hash over the project's own modules, to compare two checkouts by."""
    found = hashlib.sha256()
    for path in sorted([*PROJECT.glob("*.py"), *PROJECT.glob("conversation/**/*.py")]):
        found.update(f"{path.relative_to(PROJECT).as_posix()}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def machine() -> dict[str, str | int | float]:
    """System, processor, cores and memory, as far as this process may use them."""
    import psutil

    limits = [limit for limit, _ in _memory_limits()]
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gb": round(min([psutil.virtual_memory().total, *limits]) / 1e9, 1),
    }


def available_memory_bytes() -> int:
    """The memory that this process may still take: what is free on the machine and below every limit set for it."""
    import psutil

    left = [limit - used for limit, used in _memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *left]))


def _memory_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """Limits of this process's memory, as (limit, used of it): those of its control groups, and `ulimit -v`.

    A container's limit is its control group's. Cached files count as used there but give way, so they are left out.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controllers == "":
                place, names = root, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                place = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = place / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(place) and (own_limit := _limit_of_group(group, *names)):
                    found.append(own_limit)
    with contextlib.suppress(OSError, ValueError, IndexError):
        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            found.append((address_space, pages * resource.getpagesize()))
    return found


def _limit_of_group(group: Path, limit: str, used: str, cached: str) -> tuple[int, int] | None:
    """A control group's limit and what is used of it; None without a limit."""
    try:
        most, current = int((group / limit).read_text()), int((group / used).read_text())
        statistics = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        return most, current - int(statistics.get(cached, 0))
    except (OSError, ValueError):  # no such group, or "max"
        return None


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


def give_memory_back() -> None:
    """Give what was freed back to the system. glibc would keep some of it, more or less from run to run."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory_bytes() -> int:
    """The memory of this program now."""
    import psutil

    return psutil.Process().memory_info().rss


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
            return None  # the project is in another repository, without its own history
        return _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    """Git's answer about the project's folder. GIT_DIR and the like would point it at another repository."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=plain).stdout.strip()
