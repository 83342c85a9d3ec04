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
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.runs import (
    RunFolder,
    cannot_write,
    differing_file,
    file_hashes,
    read_json,
    write_atomically,
    write_json,
)
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
from conversation_config import LORA_TARGETS, TrainingConfig

KEPT_CHECKPOINTS = 3
CHECKPOINT_HASHES = "hashes.json"
HELD_OUT_TOKENS = 4096  # packed tokens per pass over held-out examples
EXPLOSION = 1.5
"""A window whose loss is more than this many times that of the first window stops the run: training has only ever
brought the loss down from where the base model starts, and adapters that are worse than none are not worth more time."""


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


def add_adapters(model: torch.nn.Module, config: TrainingConfig) -> PeftModel:
    """The model with fresh LoRA adapters on every projection; everything else is frozen."""
    return get_peft_model(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(LORA_TARGETS),
            task_type="CAUSAL_LM",
        ),
    )


def train(
    base: torch.nn.Module, data: TrainingSet, config: TrainingConfig, run: RunFolder, checkpoint: Path | None
) -> TrainingResult:
    """Train adapters on a base model and leave them in the run's `final_lora`.

    `checkpoint`: where to go on, from `newest_intact_checkpoint`; None starts anew.
    Raises Interrupted after a signal; UserError (status 1) when the loss or a gradient is not finite, when the loss
    explodes, or when the disk is full.
    """
    started = time.monotonic()
    set_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = add_adapters(base, config)
    progress = _Progress(run)
    trainer = ConversationTrainer(model, data, config, run, callbacks=[progress, _Checkpoints(), _Explosion()])
    progress.trainer = trainer
    with _signals_heeded(progress):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (OSError, RuntimeError) as error:
            raise _explained(error, run) from error
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
        seconds=time.monotonic() - started,
        peak_memory_gb=peak_memory_gb(),
        adapter_files=file_hashes(run.final_lora),
    )


def _save_final(model: PeftModel, run: RunFolder) -> None:
    """Save the adapters under their final name, all at once."""
    part = run.checkpoints / ".final_lora.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part, save_embedding_layers=False)
        shutil.rmtree(run.final_lora, ignore_errors=True)
        part.rename(run.final_lora)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise _explained(error, run) from error


def _explained(error: Exception, run: RunFolder) -> Exception:
    """A full disk or exhausted memory as a UserError; anything else is a defect of ours and stays as it is."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return UserError(
            f"the memory does not hold one example and its gradients: {text.splitlines()[0]}",
            "close other programs, or lower --max_length",
            TRIED_AND_FAILED,
        )
    if isinstance(error, OSError) or "No space left" in text or "file write failed" in text:
        cause = error if isinstance(error, OSError) else OSError(28, "No space left on device")
        return cannot_write(run.checkpoints, cause)
    return error


def peak_memory_gb() -> float:
    """The most memory this process has held so far: on the GPU where there is one, else resident memory."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- the trainer -------------------------------------------------------------------------------------------------------


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
        use_shared_prefix_attention(model)
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
            save_total_limit=KEPT_CHECKPOINTS,
            eval_strategy="epoch" if data.held_out else "no",
            seed=config.seed,
            bf16=False,
            fp16=False,
            tf32=False if torch.cuda.is_available() else None,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
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
        self.step_loss = math.nan

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
        if not math.isfinite(total) or not torch.isfinite(norm):
            self._stop_for_bad_numbers("loss" if not math.isfinite(total) else "gradient", [i for i, _ in inputs])
        self.step_loss = total
        return loss

    def _stop_for_bad_numbers(self, what: str, indices: list[int]) -> None:
        questions = ", ".join(repr(self._data.questions[i]) for i in indices)
        saved = newest_intact_checkpoint(Path(self.args.output_dir))[0]
        raise UserError(
            f"the {what} of step {self.state.global_step + 1} is not finite; the examples of this step ask: {questions}",
            (f"the last good checkpoint is {saved.name}; " if saved else "") + "a lower --learning_rate may help",
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
        groups = split_into_micro_batches(self.eval_dataset, min(self.budget.tokens, HELD_OUT_TOKENS))
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for group in groups[self.args.process_index :: self.args.world_size]:
            tree = build_prefix_tree(group)
            sums += torch.stack([shared_prefix_loss(self.model, tree).double(), sums.new_tensor(tree.num_labels)])
        self.model.train(was_training)
        loss_sum, labels = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"eval_loss": loss_sum / labels, "eval_seconds": round(time.monotonic() - started, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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


# --- callbacks ---------------------------------------------------------------------------------------------------------


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

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            seconds, steps = time.monotonic() - self.began[0], state.global_step - self.began[1]
            rate = steps * args.train_batch_size * args.world_size / seconds
            self.bar.set_postfix_str(f"loss {self.trainer.step_loss:.3f}, {rate:.2f} examples/s", refresh=False)
            self.bar.update()
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
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
    """Writes the hashes of a checkpoint's files when it is complete."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / CHECKPOINT_HASHES, file_hashes(folder))


class _Explosion(TrainerCallback):
    """Stops a run whose loss explodes: see EXPLOSION."""

    def on_log(self, args, state, control, logs, **kwargs):
        windows = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if "loss" in logs and windows and logs["loss"] > EXPLOSION * windows[0]:
            raise UserError(
                f"the loss explodes: {logs['loss']:.2f} in the window up to step {state.global_step}, more than "
                f"{EXPLOSION} times the first window's {windows[0]:.2f}",
                "lower --learning_rate; checkpoints from before are kept",
                TRIED_AND_FAILED,
            )


@contextlib.contextmanager
def _signals_heeded(progress: _Progress) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the training after the step under way."""

    def note(number: int, frame: Any) -> None:
        if progress.signal is None:
            tqdm.write(f"{signal.Signals(number).name}: saving after this step ...")
        progress.signal = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def newest_intact_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and why newer ones are not used."""
    problems = []
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            problem = differing_file(path, read_json(path / CHECKPOINT_HASHES))
        except UserError as error:
            problem = str(error)
        if problem is None:
            return path, problems
        problems.append(problem)
    return None, problems


def drop_newer_checkpoints(folder: Path, kept: Path | None) -> None:
    """Remove what was found broken, so that it is neither counted nor resumed from again."""
    newest = int(kept.name.removeprefix("checkpoint-")) if kept else -1
    for path in folder.glob("checkpoint-*"):
        name = path.name.removeprefix("checkpoint-")
        if name.isdigit() and int(name) > newest:
            shutil.rmtree(path)
