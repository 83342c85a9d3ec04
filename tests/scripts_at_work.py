"""The scripts at work in processes, with faults, and RETRAIN.sh at work in a copy of the project.

`start` runs a script in a process forked from one with torch and transformers loaded: the same code as from a shell,
but seconds faster. The process first calls the functions of `faults.py` that `faults` names, to break something. A
pytest plug-in that `conftest.py` loads.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faults as kinds
import psutil
import pytest
from conftest import LEARNS, PROJECT, easy_lines, make_home

from conversation.data.examples import to_jsonl
from conversation.runs.files import sha256_file
from conversation.runs.folder import RunFolder
from conversation.runs.publishing import find_damaged_result

PRELOADED = ["torch", "peft", "accelerate", "transformers", "transformers.models.gemma3.modeling_gemma3"]
PRELOADED += ["conversation.training.preparation", "conversation.models.merging", "matplotlib.figure"]

TINY = "--max_steps 12 --save_steps 3 --logging_steps 2 --learning_rate 3e-3 --warmup_steps 2 --held_out_share 0.2"
"""A training of seconds, with dropout and several checkpoints. It learns too little to pass a structural test."""


class Running:
    """A running script, with its output in a file."""

    def __init__(self, process: multiprocessing.Process, output: Path):
        self._process, self._output = process, output

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def finish(self, seconds: float = 900) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill()
            raise TimeoutError(self.output[-2000:])
        return self._process.exitcode


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _script(script: str, flags: list[str], output: str, cwd: str, faults: list[tuple]) -> None:
    sys.stdout.flush()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.chdir(cwd)
    sys.path.insert(0, str(PROJECT))
    sys.argv = [str(PROJECT / script), *flags]
    for name, *arguments in faults:
        getattr(kinds, name)(*arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(script: str, *flags: object, output: Path, cwd: Path = PROJECT, faults: tuple[tuple, ...] = ()) -> Running:
    """Start a script of the project. Its output goes to the file `output`."""
    os.environ["OMP_NUM_THREADS"] = "1"  # so that two runs add in the same order
    arguments = (script, [str(flag) for flag in flags], str(output), str(cwd), list(faults))
    process = _context().Process(target=_script, args=arguments)
    process.start()
    return Running(process, output)


def finished(script: str, *flags: object, output: Path, **options) -> tuple[int, str]:
    """Run a script to its end; return exit status and output. Fails on a traceback."""
    running = start(script, *flags, output=output, **options)
    status = running.finish()
    assert "Traceback" not in running.output, running.output
    return status, running.output


def until(condition: Callable[[], object], running: Running | None = None, seconds: float = 120) -> bool:
    """Wait for a condition; return False when the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if running is not None and not running.alive:
            return False
        assert time.monotonic() < deadline, running.output[-2000:] if running else "waited in vain"
        time.sleep(0.0005)
    return True


def adapters(run: Path) -> str:
    """SHA-256 of a run's final adapters."""
    return sha256_file(RunFolder(run).final_lora / "adapter_model.safetensors")


def leftovers(folder: Path) -> list[Path]:
    """The partial files below a folder."""
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


# --- RETRAIN.sh ----------------------------------------------------------------------------------------------------


def home_with_base(folder: Path, base: Path, own_examples: list) -> Path:
    """A home for RETRAIN.sh, with a copy of the base model in its folder `base`."""
    home = make_home(folder, own_examples)
    shutil.copytree(base, home / "base")
    return home


class Retrain:
    """A running RETRAIN.sh in a home."""

    def __init__(self, home: Path, *flags: str):
        self._output = home / "retrain.out"
        with open(self._output, "wb") as file:
            self.process = psutil.Popen(
                ["./RETRAIN.sh", *flags],
                cwd=home,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def finish(self, seconds: float = 400) -> int:
        return self.process.wait(seconds)

    def reached(self, stage: int) -> bool:
        return f"\n[{stage}/6] " in self.output

    def kill(self) -> None:
        """Send SIGKILL to the shell and to all its descendants, as if the machine lost its power."""
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = [self.process, *self.process.children(recursive=True)]
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(everything, 10)
        self.process.wait()


def new_retrain(home: Path) -> Retrain:
    return Retrain(home, "--base_model", "base", "--training_data", "easy.jsonl", *LEARNS, "--save_steps", "20")


def resumed_retrain(home: Path) -> Retrain:
    return Retrain(home, "--resume")


def published(home: Path) -> list[Path]:
    """The published runs, after a check that each is complete and passed its tests."""
    found = sorted((home / "training-runs" / "conversation").glob("20*"))
    for path in found:
        run = RunFolder(path)
        record = run.read()
        assert record.published and record.structural_tests.passed and find_damaged_result(run, record) is None
        assert run.report.exists() and not leftovers(path)
    return found


# --- fixtures that several files use -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def easy_data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    path.write_bytes(to_jsonl(easy_lines()))
    return path


@pytest.fixture(scope="session")
def flags(tiny_folder, easy_data) -> list[object]:
    """The flags of the tiny training, without its run folder."""
    return ["--base_model", tiny_folder, "--training_data", easy_data, *TINY.split()]


@pytest.fixture(scope="session")
def untouched(tmp_path_factory, flags) -> Path:
    """The folder of an undisturbed tiny run, trained and merged."""
    folder = tmp_path_factory.mktemp("untouched")
    for script, more in (("train_conversation.py", flags), ("merge_conversation_model.py", [])):
        status, output = finished(script, "--run_dir", folder / "run", *more, output=folder / "out")
        assert status == 0, output
    return folder / "run"


@pytest.fixture
def trained(untouched, tmp_path) -> Path:
    """A copy of that run, for a test to break."""
    return shutil.copytree(untouched, tmp_path / "run")
