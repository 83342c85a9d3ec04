"""LoRA training in FP32: transformers' Trainer around the shared-prefix step.

Our parts:
- the step: the examples of an optimizer step pass through `shared_prefix` together, so the Trainer sees one batch per
  optimizer step and process; the loss is normalised by the label tokens of the whole effective batch;
- the order of the examples (`batches`), checkpoints (`checkpoints`), progress, signals and bad numbers (`watch`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.adapters import add_adapters
from conversation.models.device import training_device
from conversation.models.tokenizer import EncodedExample
from conversation.runs.files import file_hashes, replace_folder, sha256_file
from conversation.runs.folder import RunFolder
from conversation.runs.machine import peak_memory_bytes
from conversation.runs.record import MemoryPlan, TrainingResult, now
from conversation.training.batches import EpochDataLoader, OptimizerStepBatches
from conversation.training.checkpoints import (
    CheckpointKeeper,
    finished_state,
    newest_intact_checkpoint,
    remove_unfinished_checkpoints,
    training_failure,
)
from conversation.training.memory import load_progress, memory_sentence, save_progress
from conversation.training.memory_plan import load_frozen, plan_memory
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
    measure_token_budget,
    split_into_micro_batches,
)
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import shared_prefix_loss, use_shared_prefix_attention
from conversation.training.watch import ExplosionGuard, Progress, heed_signals
from conversation_config import TrainingConfig

HELD_OUT_TOKENS = 4096  # packed tokens per pass over held-out examples


class Interrupted(UserError):
    """A signal stopped the training. A checkpoint of the last step is saved."""


@dataclass(frozen=True)
class TrainingSet:
    """The encoded examples of a run, and the training questions, which name them in errors."""

    training: Sequence[TokenSequence]
    held_out: Sequence[TokenSequence]
    questions: Sequence[str]


def token_sequence(encoded: EncodedExample, loss_on: str) -> TokenSequence:
    """The ids of an example, with the label tokens marked: the answer's, or all but the first."""
    first_label = encoded.num_prompt_tokens if loss_on == "completion" else 1
    return TokenSequence(encoded.ids, tuple(i >= first_label for i in range(len(encoded.ids))))


def build_trainable_model(base_folder: Path, config: TrainingConfig) -> PeftModel:
    """The base model with fresh adapters, ready for the shared-prefix step.

    Raises UserError when the base cannot be loaded, or its architecture does not support that step.
    """
    base = load_frozen(base_folder, config)
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


def train_adapters(
    model: PeftModel, data: TrainingSet, config: TrainingConfig, run: RunFolder, checkpoint: Path | None
) -> TrainingResult:
    """Train a model's adapters and leave them in the run's `final_lora`.

    `model`: from `build_trainable_model`. `checkpoint`: from `choose_checkpoint`; None starts anew. Raises Interrupted
    after a signal; UserError (status 1) when the loss or a gradient is not finite, when the loss explodes, or when the
    disk is full.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    progress, saving, explosion = Progress(run), CheckpointKeeper(), ExplosionGuard()
    try:
        trainer = ConversationTrainer(model, data, config, run, callbacks=[progress, saving, explosion])
        plan = trainer.memory_plan()
        print(plan)
        progress.trainer = saving.trainer = explosion.trainer = trainer
        if checkpoint and (
            state := finished_state(checkpoint, config.steps(len(data.training), trainer.args.world_size))
        ):
            trainer._load_from_checkpoint(str(checkpoint))  # no step is left, but the work after the last one may be
            trainer.state = state
            progress.write_metrics(state)
        else:
            with heed_signals(progress):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        remove_unfinished_checkpoints(run.checkpoints)
        raise training_failure(error, run, 3 * adapters) from error
    if progress.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped by {progress.signal.name} after step {trainer.state.global_step} of {trainer.state.max_steps}",
            "the step is saved; go on with the same command and --resume",
            128 + progress.signal,
        )
    if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
        raise UserError(
            "the training changed nothing: every adapter is still at its start",
            "raise --learning_rate, or lower --warmup_steps",
            TRIED_AND_FAILED,
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
        files={path.name: sha256_file(path) for path in (run.metrics, run.training_data, run.held_out_data)},
        finished=now(),
        memory_plan=plan,
    )


def _save_final(model: PeftModel, run: RunFolder) -> None:
    """Save the adapters, whole, under their final name."""
    part = run.checkpoints / ".final_lora.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(str(part), save_embedding_layers=False)
        (part / "README.md").unlink()  # peft's template; `write_report` writes a card from the record
        replace_folder(part, run.final_lora)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise training_failure(error, run, sum(4 * p.numel() for p in model.parameters() if p.requires_grad)) from error


def peak_memory_gb() -> float:
    """The peak memory of this process: of the card if it trains there, else resident memory."""
    if training_device() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_memory_bytes() / 1e9


class ConversationTrainer(Trainer):
    """The Trainer with whole optimizer steps as batches: lists of (index, TokenSequence)."""

    model: PeftModel
    train_dataset: Any  # list[tuple[int, TokenSequence]]; torch's annotations want a Dataset
    eval_dataset: list[TokenSequence]

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
            gradient_accumulation_steps=1,  # `examples_per_step` includes the accumulation
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
            save_total_limit=None,  # `CheckpointKeeper` removes the oldest by step; the Trainer would go by the clock
            eval_strategy="epoch" if data.held_out else "no",
            seed=config.seed,
            bf16=False,
            fp16=False,
            tf32=False if training_device() == "cuda" else None,
            use_cpu=training_device() == "cpu",
            ddp_broadcast_buffers=False,  # a process that repeats its step must not wait for the others
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
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._data, self._checkpoints = data, run.checkpoints
        self._budget: TokenBudget | None = None
        self._made = time.monotonic()
        self._clock: float | None = None
        self.step_loss = math.nan
        self.step_questions: list[str] = []
        self._window: list[float] = []  # the losses of the steps since the last logged one, those before a resume too

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also set the rate of the next step by the schedule of this run: the checkpoint's may have been shorter."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.lr_scheduler is None or self.optimizer is None:
            return
        self._budget, self._window = load_progress(Path(checkpoint), self.args.process_index, self.budget)
        schedule: Any = self.lr_scheduler
        step = schedule.last_epoch
        rates = [peak * share(step) for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    @property
    def budget(self) -> TokenBudget:
        """The packed tokens that fit into memory, measured on first use."""
        if self._budget is None:
            with torch.enable_grad():
                self._budget = measure_token_budget(self.model)
            batches: Any = self.get_train_dataloader().batch_sampler
            steps = [[self.train_dataset[i][1] for i in batch] for batch in batches]
            if sentence := memory_sentence(self._budget, steps):
                print(sentence)
        return self._budget

    def memory_plan(self) -> MemoryPlan:
        """What the training will need, its largest pass taken from the first steps."""
        steps: Any = self.get_train_dataloader().batch_sampler
        return plan_memory(self.model, list(self._data.training), steps, self.budget)

    def save_progress(self, checkpoint: Path) -> None:
        """Write into a checkpoint what a resume needs beside the Trainer's state."""
        save_progress(checkpoint, self.args.process_index, self.budget, self._window)

    def get_train_dataloader(self) -> DataLoader:
        batches = OptimizerStepBatches(
            len(self.train_dataset),
            self.args.train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )
        return EpochDataLoader(self.train_dataset, batch_sampler=batches, collate_fn=list)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradients of this process's part of one optimizer step.

        Returns this process's share of the loss (nats per label token of the whole effective batch) times the number of
        processes: the Trainer's mean over processes is the loss.
        """
        model.train()
        sequences = [sequence for _, sequence in inputs]
        labels = torch.tensor(sum(sum(sequence.is_label) for sequence in sequences), device=self.args.device)
        labels = self.accelerator.reduce(labels, "sum").item()
        scale = self.args.world_size / labels
        loss = backward_in_micro_batches(model, sequences, scale, self.budget) * scale
        total = self.accelerator.reduce(loss.clone(), "mean").item()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self._window.append(total)
        self.step_loss, self.step_questions = total, [self._data.questions[i] for i, _ in inputs]
        if not math.isfinite(total) or not torch.isfinite(norm):
            what = "loss" if not math.isfinite(total) else "gradient"
            raise self.bad_numbers(f"the {what} of step {self.state.global_step + 1} is not finite")
        return loss

    def bad_numbers(self, problem: str) -> UserError:
        """The error for bad numbers at the current step, with its examples and the last good checkpoint."""
        questions = ", ".join(map(repr, self.step_questions))
        saved = newest_intact_checkpoint(self._checkpoints)[0]
        return UserError(
            f"{problem}; the examples of this step ask: {questions}" if questions else problem,
            (f"the last good checkpoint is {saved.name}; " if saved else "")
            + "a new run with a lower --learning_rate may help",
            TRIED_AND_FAILED,
        )

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss in nats per label token, computed in groups of tree neighbours; logged as `eval_loss`."""
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
        """Log with the seconds of training so far and the mean loss of the window, those before a resume included."""
        now = time.monotonic()
        if self._clock is None:
            before = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
            self._clock = self._made - (before[-1] if before else 0.0)
        if "loss" in logs:
            logs = {**logs, "loss": sum(self._window) / len(self._window)}
            self._window.clear()
        super().log({**logs, "seconds": round(now - self._clock, 1)}, *args, **kwargs)

    def metric_at_end(self, name: str) -> float | None:
        """A metric logged after the last step, or None."""
        logged = [e[name] for e in self.state.log_history if name in e and e["step"] == self.state.global_step]
        return logged[-1] if logged else None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate assumes padded batches
