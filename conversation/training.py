"""LoRA training in FP32: transformers' Trainer around the shared-prefix step, with checkpoints that can be trusted.

What is ours, and why:
- the step: the examples of an optimizer step go through `shared_prefix` together, so the Trainer sees one batch per
  optimizer step and process; the loss is normalised by the label tokens of the whole effective batch;
- the order of the examples: the same for one process and for several, and after a resume;
- checkpoints: hashed when they are written, verified before they are used;
- stopping: a signal, a loss that is not finite, a loss that explodes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from conversation.adapters import add_adapters
from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.files import (
    cannot_write,
    differing_file,
    file_hashes,
    read_json,
    replace_folder,
    write_atomically,
    write_json,
)
from conversation.machine import peak_memory_bytes
from conversation.runs import RunFolder
from conversation.shared_prefix import (
    TokenBudget,
    TokenSequence,
    backward_in_micro_batches,
    build_prefix_tree,
    measure_token_budget,
    shared_prefix_loss,
    split_into_micro_batches,
    use_shared_prefix_attention,
)
from conversation.tokenizer import EncodedExample
from conversation_config import TrainingConfig

KEPT_CHECKPOINTS = 3
CHECKPOINT_HASHES = "hashes.json"
HELD_OUT_TOKENS = 4096  # packed tokens per pass over held-out examples
EXPLOSION = 1.5
"""A window whose loss is more than this many times the loss at the start stops the run: adapters that are so much worse
than none are not worth more time. The loss at the start is the held-out loss before the first step; without held-out
examples it is the first window's."""


class Interrupted(UserError):
    """A signal stopped the training; a checkpoint of the last step was saved."""


@dataclass(frozen=True)
class TrainingSet:
    """The encoded examples of a run, and the questions they ask, to name them when something goes wrong."""

    training: Sequence[TokenSequence]
    held_out: Sequence[TokenSequence]
    questions: Sequence[str]


@dataclass(frozen=True)
class TrainingResult:
    """The figures of a finished training. Losses in nats per label token."""

    steps: int
    first_window_loss: float
    last_window_loss: float
    held_out_loss_before: float | None
    held_out_loss: float | None
    seconds: float
    peak_memory_gb: float
    adapter_files: dict[str, str]


def token_sequence(encoded: EncodedExample, loss_on: str) -> TokenSequence:
    """The ids of an example, with the tokens marked that the loss counts: the answer's, or all but the first."""
    first_label = encoded.num_prompt_tokens if loss_on == "completion" else 1
    return TokenSequence(encoded.ids, tuple(i >= first_label for i in range(len(encoded.ids))))


def trainable(base: PreTrainedModel, config: TrainingConfig) -> PeftModel:
    """The model with adapters, ready for the shared-prefix step. Raises UserError when it does not allow that."""
    set_seed(config.seed)
    try:
        model = add_adapters(base, config)
        use_shared_prefix_attention(model)
    except ValueError as error:
        raise UserError(
            f"a {type(base).__name__} cannot be trained here: {error}",
            "Gemma, Llama and Qwen models can",
        ) from None
    return model


def train(
    model: PeftModel, data: TrainingSet, config: TrainingConfig, run: RunFolder, checkpoint: Path | None
) -> TrainingResult:
    """Train a model's adapters and leave them in the run's `final_lora`.

    `model` is what `trainable` made. `checkpoint`: where to go on, from `newest_intact_checkpoint`; None starts anew.
    Raises Interrupted after a signal; UserError (status 1) when the loss or a gradient is not finite, when the loss
    explodes, or when the disk is full.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    progress, saving, explosion = _Progress(run), _Checkpoints(), _Explosion()
    try:
        trainer = ConversationTrainer(model, data, config, run, callbacks=[progress, saving, explosion])
        progress.trainer = saving.trainer = explosion.trainer = trainer
        with _signals_heeded(progress), contextlib.suppress(_TrainedAlready):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        raise _explained(error, run, 3 * adapters) from error
    if progress.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped by {progress.signal.name} after step {trainer.state.global_step} of {trainer.state.max_steps}",
            "the step is saved; go on with the same command and --resume",
            128 + progress.signal,
        )
    if trainer.metric_at_end("eval_loss") is None:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        _save_final(model, run)
    trainer.accelerator.wait_for_everyone()
    windows = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return TrainingResult(
        steps=trainer.state.global_step,
        first_window_loss=windows[0],
        last_window_loss=windows[-1],
        held_out_loss_before=held_out[0] if held_out else None,
        held_out_loss=held_out[-1] if held_out else None,
        seconds=trainer.state.log_history[-1]["seconds"],
        peak_memory_gb=peak_memory_gb(),
        adapter_files=file_hashes(run.final_lora),
    )


def _save_final(model: PeftModel, run: RunFolder) -> None:
    """Save the adapters under their final name, all at once."""
    part = run.checkpoints / ".final_lora.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part, save_embedding_layers=False)
        replace_folder(part, run.final_lora)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise _explained(error, run, sum(4 * p.numel() for p in model.parameters() if p.requires_grad)) from error


def _explained(error: Exception, run: RunFolder, needed_bytes: int) -> Exception:
    """A full disk or exhausted memory as a UserError; anything else is a defect of ours and stays as it is.

    `needed_bytes` is the size of what may have been written; the half-written checkpoint is removed.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return UserError(
            f"the memory does not hold one example and its gradients: {text.splitlines()[0]}",
            "close other programs, or lower --max_length",
            TRIED_AND_FAILED,
        )
    number = re.search(r"os error (\d+)", text)  # safetensors; torch.save does not say the cause
    if isinstance(error, OSError) or number or "PytorchStreamWriter" in text or "unexpected pos" in text:
        full = shutil.disk_usage(run.path).free < needed_bytes
        code = int(number[1]) if number else errno.ENOSPC if full else errno.EIO
        cause = error if isinstance(error, OSError) else OSError(code, os.strerror(code))
        for path in run.checkpoints.glob("checkpoint-*"):
            if not (path / CHECKPOINT_HASHES).exists():
                shutil.rmtree(path, ignore_errors=True)
        return cannot_write(run.checkpoints, cause, needed_bytes)
    return error


def peak_memory_gb() -> float:
    """The most memory this process has held so far: on the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_memory_bytes() / 1e9


# --- the trainer -----------------------------------------------------------------------------------------------------


class ConversationTrainer(Trainer):
    """The Trainer, fed with whole optimizer steps: lists of (index, TokenSequence)."""

    def __init__(
        self,
        model: PeftModel,
        data: TrainingSet,
        config: TrainingConfig,
        run: RunFolder,
        callbacks: list[TrainerCallback],
    ):
        arguments = TrainingArguments(
            output_dir=str(run.checkpoints),
            per_device_train_batch_size=config.examples_per_step,
            gradient_accumulation_steps=1,  # `examples_per_step` holds the accumulation
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.save_steps,
            save_total_limit=None,  # `_Checkpoints` keeps the newest by step; the Trainer would go by the clock
            eval_strategy="epoch" if data.held_out else "no",
            seed=config.seed,
            bf16=False,
            fp16=False,
            tf32=False if torch.cuda.is_available() else None,
            use_cpu=not torch.cuda.is_available(),  # other accelerators are not known to compute the same
            ddp_broadcast_buffers=False,  # a process that starts its step again must not wait for the others
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process, one card: DataParallel would bypass our step and double the batch
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=list(enumerate(data.training)),
            eval_dataset=list(data.held_out),
            data_collator=list,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._data = data
        self._budget: TokenBudget | None = None
        self._made, self._clock = time.monotonic(), None
        self.step_loss = math.nan
        self.step_questions: list[str] = []

    @property
    def budget(self) -> TokenBudget:
        """The packed tokens that fit into memory, measured at the first step."""
        if self._budget is None:
            with torch.enable_grad():
                self._budget = measure_token_budget(self.model)
        return self._budget

    def get_train_dataloader(self) -> DataLoader:
        batches = OptimizerStepBatches(
            len(self.train_dataset),
            self.args.train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )
        return _EpochDataLoader(self.train_dataset, batch_sampler=batches, collate_fn=list)

    def training_step(self, model: torch.nn.Module, inputs: list, num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradients of this process's part of one optimizer step.

        Returns the loss in nats per label token of the whole effective batch, as this process's share times the number
        of processes, so that the Trainer's mean over processes is the loss.
        """
        model.train()
        sequences = [sequence for _, sequence in inputs]
        labels = torch.tensor(sum(sum(sequence.is_label) for sequence in sequences), device=self.args.device)
        labels = self.accelerator.reduce(labels, "sum").item()
        scale = self.args.world_size / labels
        result = backward_in_micro_batches(model, sequences, scale, self.budget)
        loss = result.loss_sum * scale
        total = self.accelerator.reduce(loss.clone(), "mean").item()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self.step_loss, self.step_questions = total, [self._data.questions[i] for i, _ in inputs]
        if not math.isfinite(total) or not torch.isfinite(norm):
            what = "loss" if not math.isfinite(total) else "gradient"
            raise self.bad_numbers(f"the {what} of step {self.state.global_step + 1} is not finite")
        return loss

    def bad_numbers(self, problem: str) -> UserError:
        """The error for a training that went wrong at the step under way, with its examples and what is left of it."""
        questions = ", ".join(map(repr, self.step_questions))
        saved = newest_intact_checkpoint(Path(self.args.output_dir))[0]
        return UserError(
            f"{problem}; the examples of this step ask: {questions}" if questions else problem,
            (f"the last good checkpoint is {saved.name}; " if saved else "")
            + "a new run with a lower --learning_rate may help",
            TRIED_AND_FAILED,
        )

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss in nats per label token, over neighbours in the prefix tree; logged as `eval_loss`."""
        if not self.eval_dataset:
            return {}
        started = time.monotonic()
        was_training = self.model.training
        self.model.eval()
        tokens = torch.tensor(min(self.budget.tokens, HELD_OUT_TOKENS), device=self.args.device)
        tokens = self.accelerator.gather(tokens).min().item()  # all processes must form the same groups
        groups = split_into_micro_batches(self.eval_dataset, tokens)
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for group in groups[self.args.process_index :: self.args.world_size]:
            tree = build_prefix_tree(group)
            sums += torch.stack([shared_prefix_loss(self.model, tree).double(), sums.new_tensor(tree.num_labels)])
        self.model.train(was_training)
        loss_sum, labels = self.accelerator.reduce(sums, "sum").tolist()
        if not math.isfinite(loss_sum):
            raise self.bad_numbers(f"the held-out loss after step {self.state.global_step} is not finite")
        metrics = {"eval_loss": loss_sum / labels, "eval_seconds": round(time.monotonic() - started, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the seconds that training has taken, those before a resume included."""
        now = time.monotonic()
        if self._clock is None:
            before = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
            self._clock = self._made - (before[-1] if before else 0.0)
        super().log({**logs, "seconds": round(now - self._clock, 1)}, *args, **kwargs)

    def metric_at_end(self, name: str) -> float | None:
        """A metric that was logged after the last step, or None."""
        logged = [e[name] for e in self.state.log_history if name in e and e["step"] == self.state.global_step]
        return logged[-1] if logged else None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate is for padded batches


class OptimizerStepBatches(Sampler[list[int]]):
    """The examples of each optimizer step, shuffled anew each epoch: this process's share of them.

    Step k of an epoch holds the same examples however many processes divide them, so that two processes with half the
    examples each train what one process trains. A process's share of an epoch's last step may be smaller, or empty.
    """

    def __init__(self, num_examples: int, per_process: int, seed: int, process: int = 0, processes: int = 1):
        self.num_examples, self.per_step = num_examples, per_process * processes
        self.seed, self.process, self.processes = seed, process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_examples // self.per_step)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        for start in range(0, self.num_examples, self.per_step):
            yield order[start : start + self.per_step][self.process :: self.processes]


class _EpochDataLoader(DataLoader):
    """Tells its batches the epoch; the Trainer calls `set_epoch` where it exists."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


# --- callbacks -------------------------------------------------------------------------------------------------------


class _TrainedAlready(Exception):
    """The checkpoint that the training goes on from is that of its last step."""


class _Progress(TrainerCallback):
    """The progress bar, metrics.jsonl, and the orderly stop after a signal."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.bar: tqdm | None = None
        self.signal: signal.Signals | None = None
        self.trainer: ConversationTrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.evaluate()  # where the base model starts
        if state.is_world_process_zero:
            self._write_metrics(state)
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="training", mininterval=1
            )
            self.began = time.monotonic(), state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # the Trainer would take one more step, were the epoch not over
            self.on_train_end(args, state, control)
            raise _TrainedAlready

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            seconds, steps = time.monotonic() - self.began[0], state.global_step - self.began[1]
            rate = steps * args.train_batch_size * args.world_size / seconds
            self.bar.set_postfix_str(f"loss {self.trainer.step_loss:.3f}, {rate:.2f} examples/s", refresh=False)
            self.bar.update()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last window, however short
        # All processes stop after the same step, or one would wait for the others in vain.
        seen = torch.tensor(self.signal or 0, device=args.device)
        if number := self.trainer.accelerator.gather(seen).max().item():
            self.signal = signal.Signals(number)
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_evaluate = False  # who stops a training does not want to wait for the held-out examples
        return control

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._write_metrics(state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(f"held-out loss after step {state.global_step}: {metrics['eval_loss']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def _write_metrics(self, state) -> None:
        """The Trainer's own record, as a whole: after a resume it holds what led to the checkpoint, and no more."""
        lines = [json.dumps(entry) for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        write_atomically(self.run.metrics, "".join(line + "\n" for line in lines).encode())


class _Checkpoints(TrainerCallback):
    """Writes the hashes of a checkpoint's files when it is complete; only then are older ones dropped."""

    trainer: ConversationTrainer | None = None

    def on_save(self, args, state, control, model, **kwargs):
        self.trainer.accelerator.wait_for_everyone()  # each process writes its random states
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
                shutil.rmtree(folder)
                raise self.trainer.bad_numbers(f"the adapters after step {state.global_step} are not finite")
            try:
                write_json(folder / CHECKPOINT_HASHES, file_hashes(folder))
            except UserError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            for older in checkpoints(folder.parent)[KEPT_CHECKPOINTS:]:
                shutil.rmtree(older)


class _Explosion(TrainerCallback):
    """Stops a run whose loss explodes: see EXPLOSION."""

    trainer: ConversationTrainer | None = None

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
def _signals_heeded(progress: _Progress) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the training after the step under way."""

    def note(number: int, frame: Any) -> None:
        if progress.signal is None:
            tqdm.write(f"{signal.Signals(number).name}: saving after this step ...")
        progress.signal = signal.Signals(number)

    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the terminal was closed; `nohup` ignores that
        heeded.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def newest_intact_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and why newer ones are not used."""
    problems = []
    for path in checkpoints(folder):
        try:
            hashes = read_json(path / CHECKPOINT_HASHES)
            problem = differing_file(path, hashes) if hashes else f"{path / CHECKPOINT_HASHES} is empty"
        except UserError as error:
            problem = str(error)
        if problem is None:
            return path, problems
        problems.append(problem)
    return None, problems


def drop_newer_checkpoints(folder: Path, kept: Path | None) -> None:
    """Remove what was found broken, so that it is neither counted nor resumed from again."""
    found = checkpoints(folder)
    for path in found[: found.index(kept) if kept else None]:
        shutil.rmtree(path)
