"""Callbacks of a training: progress and metrics, signals, an exploding loss."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import TrainerCallback

from conversation.errors import STOPPING, UserError
from conversation.runs.files import write_atomically
from conversation.runs.folder import RunFolder

EXPLOSION = 1.5
"""A run stops when the loss of a window exceeds this many times the loss at the start: adapters so much worse than none
are not worth more time. The loss at the start is the held-out loss before the first step or, without held-out examples,
that of the first window."""


class Watched(Protocol):
    """What the callbacks of a training need of its trainer."""

    step_loss: float
    accelerator: Accelerator

    def evaluate(self) -> dict[str, float]: ...

    def metric_at_end(self, name: str) -> float | None: ...

    def save_progress(self, checkpoint: Path) -> None: ...

    def bad_numbers(self, problem: str) -> UserError: ...


class Progress(TrainerCallback):
    """The progress bar, metrics.jsonl, and the stop after a signal."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.bar: tqdm | None = None
        self.signal: signal.Signals | None = None
        self.trainer: Watched | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # The loss of the base model; or that at the end of an epoch, where a signal or a kill came before it.
        if state.global_step == 0 or (state.epoch % 1 == 0 and self.trainer.metric_at_end("eval_loss") is None):
            self.trainer.evaluate()
        if state.is_world_process_zero:
            self.write_metrics(state)
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="training", mininterval=1
            )
            self.began = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            seconds, steps = time.monotonic() - self.began[0], state.global_step - self.began[1]
            examples = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            rate = examples / seconds
            self.bar.set_postfix_str(f"loss {self.trainer.step_loss:.3f}, {rate:.2f} examples/s", refresh=False)
            self.bar.update()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last window, however short
        # All processes stop after the same step. Otherwise one would wait for the others forever.
        seen = torch.tensor(self.signal or 0, device=args.device)
        if number := self.trainer.accelerator.gather(seen).max().item():
            self.signal = signal.Signals(number)
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_evaluate = False  # a user who stops a training does not want to wait for that
        return control

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write_metrics(state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(f"held-out loss after step {state.global_step}: {metrics['eval_loss']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def write_metrics(self, state) -> None:
        """Write the Trainer's whole log. After a resume it contains only what led to the checkpoint."""
        lines = [json.dumps(entry) for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        write_atomically(self.run.metrics, "".join(line + "\n" for line in lines).encode())


class ExplosionGuard(TrainerCallback):
    """Stops a run whose loss explodes (see EXPLOSION)."""

    trainer: Watched | None = None

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs:
            return
        held_out = [e["eval_loss"] for e in state.log_history if "eval_loss" in e and e["step"] == 0]
        at_start = (held_out + [e["loss"] for e in state.log_history if "loss" in e])[0]
        if not logs["loss"] <= EXPLOSION * at_start:
            raise self.trainer.bad_numbers(
                f"the loss explodes: {logs['loss']:.2f} in the window up to step {state.global_step}, more than "
                f"{EXPLOSION} times the {at_start:.2f} at the start"
            )


@contextlib.contextmanager
def heed_signals(progress: Progress) -> Iterator[None]:
    """Let Ctrl-C and the signals of STOPPING end the training after the current step."""

    def note(number: int, frame: Any) -> None:
        if progress.signal is None:
            tqdm.write(f"{signal.Signals(number).name}: saving after this step ...")
        progress.signal = signal.Signals(number)

    numbers = (signal.SIGINT, *STOPPING)
    heeded = [each for each in numbers if signal.getsignal(each) != signal.SIG_IGN]  # `nohup` ignores SIGHUP
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
