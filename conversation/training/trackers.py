"""Trackers of experiments (TensorBoard, Weights & Biases, Trackio, ...), as transformers knows them by name.

A tracker informs. One that cannot begin stops the training before its first step; one that fails later is left out, and
the training goes on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from conversation.errors import UserError
from conversation.runs.folder import RunFolder

PLACES = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": "", "MLFLOW_TRACKING_URI": "mlruns"}
"""The variable that says where a tracker writes, and its place in the run folder; what the user has set stays."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a name that transformers does not know, and for a tracker that is not installed."""
    known = integration_utils.INTEGRATION_TO_CALLBACK
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--report_to: there is no tracker {', '.join(unknown)}", f"there are: none, {', '.join(known)}"
        )
    for name in names:
        try:
            known[name]()
        except Exception as error:  # a tracker raises whatever its imports and its login raise
            reason = str(error).strip().split("\n")[0]
            hint = "install its package with .venv/bin/pip install, or leave --report_to out"
            raise UserError(f"--report_to {name} cannot be used: {reason}", hint) from None


def write_into(run: RunFolder) -> None:
    """Let the trackers write their files into the run folder."""
    for variable, name in PLACES.items():
        os.environ.setdefault(variable, str(run.path / name))


def guard_trackers(trainer: Trainer) -> None:
    """Guard the trackers among a trainer's callbacks (see GuardedTracker)."""
    kinds: tuple[type[TrainerCallback], ...] = tuple(integration_utils.INTEGRATION_TO_CALLBACK.values())
    callbacks: list[Any] = trainer.callback_handler.callbacks
    callbacks[:] = [GuardedTracker(each) if isinstance(each, kinds) else each for each in callbacks]


class GuardedTracker(TrainerCallback):
    """A tracker whose failure does no harm.

    Raises UserError, before the first step, when the tracker cannot begin.
    """

    def __init__(self, tracker: TrainerCallback):
        self.tracker: TrainerCallback | None = tracker

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> Any:
        if self.tracker is None:
            return None
        name = type(self.tracker).__name__.removesuffix("Callback")
        try:
            return getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:  # a tracker raises whatever its network and its server raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if event == "on_train_begin":
                raise UserError(f"{name} cannot begin: {reason}", "correct that, or leave --report_to out") from None
            tqdm.write(f"warning: {name} failed, the training goes on without it: {reason}")
            self.tracker = None
            return None


def _passed_on(event: str) -> Any:
    def call(self: GuardedTracker, *args: Any, **kwargs: Any) -> Any:
        return self.pass_on(event, *args, **kwargs)

    return call


for _event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
    setattr(GuardedTracker, _event, _passed_on(_event))
