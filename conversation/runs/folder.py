"""The run folder: its files, its record, and work in it.

    training-runs/conversation/
        2026-11-22/          a published run: trained, merged, tested, and complete
        2026-11-22-2/        the second one of that day
        latest -> 2026-11-22-2
        attempts/            unfinished and failed runs with their logs; the next retrain removes them

Each stage replaces `run.json` as a whole: a reader sees the old or the new one. It contains its own SHA-256 and those
of the files that later stages use. A changed bit is found before it does harm.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversation.errors import NOT_STARTED, UserError
from conversation.format import strict_json
from conversation.runs.console import logged_console
from conversation.runs.files import (
    find_damage,
    make_folder,
    read_value,
    real_path,
    sha256_file,
    shown,
    write_atomically,
    write_json,
)
from conversation.runs.lock import LOCK_FILE, locked_folder
from conversation.runs.record import AnswersReport, AnswersResult, RunRecord
from conversation_config import TRAINING_RUNS

ATTEMPTS = "attempts"
ATTEMPT_NAME = "????-??-??_??-??-??*"
RUN_NAME = "????-??-??*"  # not example-...

_made: set[Path] = set()  # the folders that this process has made


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
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_plot(self) -> Path:
        return self.path / "evaluation.png"

    @property
    def exported(self) -> Path:
        return self.path / "gguf"

    @property
    def export_json(self) -> Path:
        return self.exported / "export.json"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def console_log(self) -> Path:
        return self.path / "console.log"

    @property
    def is_attempt(self) -> bool:
        return self.path.parent.name == ATTEMPTS

    # --- its record ---

    def check_unused(self) -> None:
        """Raises UserError unless the folder is absent or empty."""
        if self.run_json.exists():
            raise UserError(
                f"{shown(self.path)} already contains a run", "go on with it: --resume; or name another --run_dir"
            )
        if self.path.is_symlink():  # `real_path` has followed every other
            raise UserError(f"{shown(self.path)} is a link to itself", "name a new folder with --run_dir")
        if self.path.exists():
            others = [path.name for path in self.path.iterdir() if path.name != LOCK_FILE]
            if others:
                raise UserError(
                    f"{shown(self.path)} is not empty: it contains {others[0]}", "name a new folder with --run_dir"
                )

    def create(self, record: RunRecord) -> None:
        """Make the folder and its record at once: after a kill at any moment, both exist or neither does.

        Raises UserError when the folder is in use for something else.
        """
        self.check_unused()
        if self.path.exists():
            write_atomically(self.run_json, record.to_json())
            return
        make_folder(self.path.parent)
        part = RunFolder(self.path.with_name(f".{self.path.name}.{os.getpid()}.part"))
        make_folder(part.path)
        write_atomically(part.run_json, record.to_json())
        try:
            os.rename(part.path, self.path)
        except OSError:
            shutil.rmtree(part.path)
            self.check_unused()  # another process was faster
            raise
        _made.add(self.path)

    def read(self) -> RunRecord:
        """run.json. Raises UserError when it is missing or broken."""
        if not self.run_json.exists():
            raise UserError(
                f"{shown(self.path)} is not a run folder: it has no run.json", "train_conversation.py makes one"
            )
        return read_value(self.run_json, RunRecord.from_json, "bring it back from a backup, or start a new run")

    def write(self, record: RunRecord) -> None:
        write_atomically(self.run_json, record.to_json())

    def read_unpublished(self) -> RunRecord:
        """run.json of a run that may still change. Raises UserError when it is published."""
        record = self.read()
        if self.is_published(record):
            raise UserError(f"{shown(self.path)} is published: it can no longer change", "name another with --run_dir")
        return record

    def is_published(self, record: RunRecord) -> bool:
        """Whether the run has its final name. An attempt stopped during its publication does not."""
        return record.published is not None and not self.is_attempt

    def check_merged(self, record: RunRecord) -> None:
        """Raises UserError unless the merged model is there, and is the one that the merge verified."""
        if not record.merge:
            raise UserError(f"there is no merged model in {shown(self.path)}", "merge it: merge_conversation_model.py")
        if damage := find_damage(self.merged_model, record.merge.files):
            raise UserError(f"the merged model is not the one that was verified: {damage}", "merge it again")

    # --- its other files ---

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged metrics: one dictionary per line of metrics.jsonl. Raises UserError when a file is damaged."""
        training = self.read().training
        if training and (problem := find_damage(self.path, training.files)):
            raise UserError(problem, "train_conversation.py --resume writes it again from the newest checkpoint")
        if not self.metrics.exists():
            return []
        entries = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], 1):
            try:
                entries.append(strict_json.loads(strict_json.decode_utf8(line)))
            except strict_json.JsonError as error:
                raise UserError(f"{self.metrics}:{number}: {error}") from None
        return entries

    def read_tests(self) -> AnswersReport:
        """structural_tests.json. Raises UserError when it is missing or broken."""
        return read_value(self.structural_tests, AnswersReport.from_json, "test the model again")

    def write_tests(self, report: AnswersReport) -> AnswersResult:
        """Write structural_tests.json; return its summary for run.json."""
        counts = report.counts()
        write_json(self.structural_tests, report.to_json(counts))
        return AnswersResult(**counts, files={self.structural_tests.name: sha256_file(self.structural_tests)})

    # --- working in it ---

    @contextlib.contextmanager
    def at_work(self, new: bool = False) -> Iterator[RunRecord]:
        """Lock the folder, log the console, and read the record. `new`: a refused run leaves no folder.

        Raises UserError when the folder is no run, when the run is published, and when another process works in it.
        """
        self.read_unpublished()  # before the lock file is made
        refused = False
        try:
            with locked_folder(self.path), logged_console(self.console_log):
                try:
                    yield self.read_unpublished()
                except UserError as error:
                    refused = new and error.exit_status == NOT_STARTED
                    raise
        finally:
            if refused:  # its files are closed now, as NFS needs it
                self._remove()

    def _remove(self) -> None:
        """Remove the folder; only what is in it, where it was there before `create`. What cannot be removed stays."""
        if self.path in _made:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


# --- which run ------------------------------------------------------------------------------------------------------


def free_name(folder: Path, name: str) -> Path:
    """`folder/name`, with -2, -3, ... appended when it is taken."""
    candidate, number = folder / name, 1
    while candidate.exists():
        number += 1
        candidate = folder / f"{name}-{number}"
    return candidate


def new_run_folder(root: Path = TRAINING_RUNS) -> RunFolder:
    """A free name for a run of today. Nothing is made yet."""
    return RunFolder(free_name(root, datetime.date.today().isoformat()))


def newest_run(root: Path = TRAINING_RUNS) -> RunFolder:
    """The run with the most recent run.json, attempts included. Raises UserError when there is none."""
    found = [*root.glob(f"{RUN_NAME}/run.json"), *(root / ATTEMPTS).glob(f"{ATTEMPT_NAME}/run.json")]
    if not found:
        raise UserError(
            f"there is no run in {root}", "train one with train_conversation.py, or name one with --run_dir"
        )
    return RunFolder(max(found, key=lambda path: path.stat().st_mtime).parent.resolve())


def chosen_run(run_dir: Path | None) -> RunFolder:
    """The run that `--run_dir` names; without the flag, the newest."""
    return RunFolder(real_path(run_dir)) if run_dir else newest_run()
