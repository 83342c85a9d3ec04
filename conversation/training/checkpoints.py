"""Checkpoints: hashed when written, verified before use."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.runs.files import cannot_write, file_hashes, find_damage, give_usual_modes, read_json, write_json
from conversation.runs.folder import RunFolder
from conversation.runs.machine import is_first_process
from conversation.training.processes import broadcast_files, broadcast_from_first, gather_files
from conversation.training.watch import Watched
from conversation_config import KEPT_CHECKPOINTS

CHECKPOINT_HASHES = "hashes.json"


def training_failure(error: Exception, run: RunFolder, needed_bytes: int) -> UserError | None:
    """The error for a full disk or exhausted memory; None for any other, which is a defect of ours.

    `needed_bytes`: the size of the files that may have been in writing.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return UserError(
            f"one example and its gradients do not fit into memory: {text.splitlines()[0]}",
            "close other programs, or lower --max_length",
            TRIED_AND_FAILED,
        )
    number = re.search(r"os error (\d+)", text)  # safetensors; torch.save does not give the cause
    if isinstance(error, OSError) or number or "PytorchStreamWriter" in text or "unexpected pos" in text:
        full = shutil.disk_usage(run.path).free < needed_bytes
        code = int(number[1]) if number else errno.ENOSPC if full else errno.EIO
        cause = error if isinstance(error, OSError) else OSError(code, os.strerror(code))
        return cannot_write(run.checkpoints, cause, needed_bytes)
    return None


class CheckpointKeeper(TrainerCallback):
    """Writes the hashes of a complete checkpoint's files. Only then it removes older checkpoints."""

    trainer: Watched | None = None

    def on_save(self, args, state, control, model, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            self.trainer.save_progress(folder)
        except UserError:  # a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise
        gather_files(folder)  # each process has written its random states and its progress
        if state.is_world_process_zero:
            if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
                shutil.rmtree(folder)
                raise self.trainer.bad_numbers(f"the adapters after step {state.global_step} are not finite")
            try:
                give_usual_modes(folder)
                write_json(folder / CHECKPOINT_HASHES, file_hashes(folder))
            except UserError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            for older in checkpoints(folder.parent)[KEPT_CHECKPOINTS:]:
                shutil.rmtree(older)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def finished_state(checkpoint: Path, steps: int) -> TrainerState | None:
    """The Trainer's state in a checkpoint saved after at least `steps` steps; None for an earlier one."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state if state.global_step >= steps else None


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove incomplete checkpoints, those without hashes."""
    for path in folder.glob("checkpoint-*"):
        if not (path / CHECKPOINT_HASHES).exists():
            shutil.rmtree(path, ignore_errors=True)


def newest_intact_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint with no file changed, and why newer ones are not used."""
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            hashes = read_json(path / CHECKPOINT_HASHES)
            problem = find_damage(path, hashes) if hashes else f"{path / CHECKPOINT_HASHES} is empty"
        except UserError as error:
            problem = str(error)
        if problem is None:
            return path, problems
        problems.append(problem)
    return None, problems


def choose_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from, or None. Reports broken newer ones.

    Of several processes the first chooses. Every other has a `folder` of its own and gets a copy.
    """
    name = ""
    if is_first_process():
        found, problems = newest_intact_checkpoint(folder)
        for problem in problems:
            print(f"warning: a checkpoint is not used: {problem}", file=sys.stderr)
        name = found.name if found else ""
    name = broadcast_from_first(name)
    checkpoint = folder / name if name else None
    if checkpoint:
        broadcast_files(checkpoint)
    print(f"Resuming from {checkpoint.name}." if checkpoint else "No intact checkpoint: starting from the first step.")
    return checkpoint


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step after which a checkpoint was saved; 0 for None."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def drop_newer_checkpoints(folder: Path, chosen: Path | None) -> None:
    """Remove the broken checkpoints after the chosen one, so that none is counted or tried again.

    Every process does so in its own folder. That of all but the first has the chosen one alone.
    """
    found = checkpoints(folder)
    for path in found[: found.index(chosen) if chosen else None]:
        shutil.rmtree(path)
