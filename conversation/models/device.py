"""The device of training, merging and testing: decided once a process, and named with the reason.

A card that is there but that torch cannot use is never passed over in silence: the CPU would take hours for what the
card does in minutes. The sentence has the versions of both, and the command that installs a fitting torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conversation.environment import ON
from conversation.errors import UserError

HIDDEN = "CUDA_VISIBLE_DEVICES"
NO_CARD = ("", "-1", "none", "nodevfiles")  # values of that variable that ask for the CPU
WHEELS = "https://download.pytorch.org/whl"
OLDEST_OF_CUDA_13 = (7, 5)  # Turing. CUDA 12.6 builds for 5.0 to 9.0: pytorch's RELEASE.md, "CUDA support matrix"
NEWEST_OF_CUDA_12 = (9, 0)
ON_THE_CPU = "work on the CPU all the same: --device cpu"

_decided: Device | None = None


@dataclass(frozen=True)
class Device:
    """`kind`: cpu or cuda. `reason`: which card, or why none."""

    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.reason})"


@dataclass(frozen=True)
class Gpu:
    """What NVIDIA's driver says of a card. `capability` and `cuda` (the newest CUDA it supports): (major, minor)."""

    name: str
    driver: str
    cuda: tuple[int, int] | None
    capability: tuple[int, int] | None


def use_device(wanted: str | None) -> Device:
    """Decide for this process, and remember. `wanted`: --device; None takes a card if there is one.

    Raises UserError when the device that is wanted cannot be used, and when a card is there that torch cannot use.
    """
    global _decided
    _decided = choose_device(wanted)
    return _decided


def decided_device() -> Device:
    """The device that `use_device` has decided for; where nobody asked, the one that is there."""
    return _decided or use_device(None)


def training_device() -> str:
    """cpu or cuda. Other accelerators are not known to compute the same."""
    return decided_device().kind


def choose_device(wanted: str | None) -> Device:
    """The device and the reason for it. Raises UserError as `use_device` does."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").strip().lower() in ON:
        if wanted == "cuda":
            raise UserError("--device cuda, but ACCELERATE_USE_CPU asks for the CPU", "unset ACCELERATE_USE_CPU")
        return Device("cpu", "as ACCELERATE_USE_CPU says")
    if wanted == "cpu":
        return Device("cpu", "as --device says")
    if torch.cuda.is_available():
        return Device("cuda", _usable_card())
    cards = list(_cards())
    hidden = os.environ.get(HIDDEN)
    if cards and hidden is not None and torch.version.cuda and _hides_all(hidden, len(cards)):
        return _hidden_card(cards, hidden, wanted)
    if cards:
        problem, remedy = _why_not(cards[0])
        raise UserError(f"{_said(cards[0])} cannot be used: {problem}", f"{remedy}; or {ON_THE_CPU}")
    trace = _trace_of_a_card()
    if wanted == "cuda":
        raise UserError(f"--device cuda, but {trace or 'there is no card that CUDA can use'}", "leave --device out")
    return Device("cpu", trace or _no_card())


def _usable_card() -> str:
    """The name of this process's card. Raises UserError unless it computes."""
    import torch

    number, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= cards:
        processes = os.environ.get("LOCAL_WORLD_SIZE", str(number + 1))
        raise UserError(
            f"{processes} processes on this machine, but {cards} card{'s' if cards > 1 else ''} for them",
            f"start at most {cards} here, or {ON_THE_CPU}",
        )
    name = torch.cuda.get_device_name(number)
    try:
        (torch.zeros(1, device=f"cuda:{number}") + 1).item()
    except Exception as error:  # torch raises RuntimeErrors of several kinds
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "no kernel image" not in text:
            hint = f"see with nvidia-smi who uses it; or {ON_THE_CPU}"
            raise UserError(f"the card {name} cannot be used: {text}", hint) from None
        capability = torch.cuda.get_device_capability(number)
        raise UserError(
            f"the card {name} cannot be used: {_architecture_problem(capability)}",
            f"{_remedy(Gpu(name, '', _cuda_of_driver(), capability))}; or {ON_THE_CPU}",
        ) from None
    return f"{name}, {'card ' + str(number) + ' of ' + str(cards) + ', ' if cards > 1 else ''}torch {torch.__version__}"


def _hidden_card(cards: list[Gpu], hidden: str, wanted: str | None) -> Device:
    """The CPU, where the variable asks for it. Raises UserError where it names no card that is here."""
    if hidden.strip().lower() in NO_CARD and wanted is None:
        return Device("cpu", f"{HIDDEN}={hidden} hides {_said(cards[0])}")
    raise UserError(
        f"{_said(cards[0])} cannot be used: {HIDDEN}={hidden} hides it",
        f"unset {HIDDEN}; or {ON_THE_CPU}",
    )


def _hides_all(hidden: str, cards: int) -> bool:
    """Whether the variable leaves none of the cards: CUDA takes those before the first that it does not know."""
    first = hidden.split(",")[0].strip()
    return not (first.isdecimal() and int(first) < cards) and not first.lower().startswith(("gpu-", "mig-"))


def _why_not(card: Gpu) -> tuple[str, str]:
    """Why torch cannot use a card that the driver shows, and what to do."""
    import torch

    build = torch.version.cuda
    if build is None:
        return f"torch {torch.__version__} is built without CUDA", _remedy(card)
    if card.cuda and card.cuda[0] < int(build.split(".")[0]):
        problem = f"its driver {card.driver} supports CUDA {_dotted(card.cuda)}, torch {torch.__version__} needs"
        return f"{problem} CUDA {build}", _remedy(card)
    if card.capability and f"sm_{card.capability[0]}{card.capability[1]}" not in torch.cuda.get_arch_list():
        return _architecture_problem(card.capability), _remedy(card)
    return f"torch {torch.__version__} (CUDA {build}) gives no reason; {_said_by_torch()}", (
        f"unset {HIDDEN}, or restart the machine" if HIDDEN in os.environ else "restart the machine"
    )


def _said_by_torch() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return "torch.cuda.is_available() is False"


def _architecture_problem(capability: tuple[int, int]) -> str:
    import torch

    built = [name.removeprefix("sm_") for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    known = ", ".join(f"{name[:-1]}.{name[-1]}" for name in built) or "none"
    return (
        f"it has compute capability {_dotted(capability)}, torch {torch.__version__} (CUDA {torch.version.cuda}) "
        f"is built for {known}"
    )


def _remedy(card: Gpu) -> str:
    """The command that installs a torch for a card and its driver; the driver to install, where none fits."""
    import torch

    release = torch.__version__.split("+")[0]
    if card.cuda and card.cuda < (12, 0):
        return f"install a newer driver for the card: this one supports CUDA {_dotted(card.cuda)}, 12 is needed"
    old_card = card.capability is not None and card.capability < OLDEST_OF_CUDA_13
    build = "cu126" if old_card or (card.cuda and card.cuda < (13, 0)) else "cu130"
    if build == "cu126" and card.capability and card.capability > NEWEST_OF_CUDA_12:
        return "install a newer driver for the card, which supports CUDA 13"
    if torch.__version__ == f"{release}+{build}":
        return "no torch of this release is built for it"
    return f".venv/bin/pip install torch=={release}+{build} --index-url {WHEELS}/{build}"


# --- which cards there are, whatever torch says ---------------------------------------------------------------------


def _cards() -> Iterator[Gpu]:
    """NVIDIA's cards as their driver shows them."""
    query = _smi("--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    cuda = _cuda_of_driver() if query else None
    for line in query.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3:
            yield Gpu(fields[0], fields[1], cuda, _pair(fields[2]))


def _cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports."""
    found = re.search(r"CUDA (?:\w+ )?Version\s*: *([0-9.]+)", _smi())
    return _pair(found[1]) if found else None


def _smi(*flags: str) -> str:
    """What nvidia-smi prints; nothing when it is not there or fails."""
    program = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"  # in WSL it is not on the PATH
    try:
        done = subprocess.run([program, *flags], capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _trace_of_a_card(proc: Path = Path("/proc/driver/nvidia"), pci: Path = Path("/sys/bus/pci/devices")) -> str:
    """A sentence about an NVIDIA card whose driver is not there or does not answer; nothing without one."""
    if any(proc.glob("gpus/*")):
        return "there is an NVIDIA card, but nvidia-smi, of its driver, fails: run it to see why"
    for device in pci.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return f"there is an NVIDIA card at {device.name}, but no driver for it here"
    return ""


def _no_card() -> str:
    import torch

    if torch.backends.mps.is_available():
        return "Apple's GPU is not used: it is not known to compute the same"
    return "no card that CUDA can use"


def _said(card: Gpu) -> str:
    return f"the card {card.name}"


def _pair(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", text.strip())
    return (int(found[1]), int(found[2])) if found else None


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
