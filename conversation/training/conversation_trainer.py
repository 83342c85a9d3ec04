"""TRL's SFTTrainer with our step, our order of the examples and our checkpoints.

Two steps, which give the same adapters up to rounding:
- shared: the examples of an optimizer step pass through `shared_prefix` together, so the Trainer sees one batch per
  optimizer step and process;
- plain: TRL's own step and loss, in micro-batches that the Trainer accumulates, for bases that `shared_prefix` does not
  know.
In both, the loss is normalised by the label tokens of the whole effective batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.device import training_device
from conversation.runs.folder import RunFolder
from conversation.runs.memory_plan import MemoryPlan
from conversation.training.batches import EpochDataLoader, MicroBatches, OptimizerStepBatches
from conversation.training.checkpoints import newest_intact_checkpoint
from conversation.training.memory import load_progress, memory_sentence, save_progress
from conversation.training.memory_plan import plan_memory
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
    measure_token_budget,
    split_into_micro_batches,
)
from conversation.training.prefix_tree import build_prefix_tree
from conversation.training.shared_prefix import shared_prefix_loss, uses_shared_prefix_attention
from conversation.training.trackers import guard_trackers, write_into
from conversation.training.training_set import IGNORED, TrainingSet, sequence_of
from conversation_config import TrainingConfig

HELD_OUT_TOKENS = 4096  # packed tokens per pass over held-out examples
Rows = list[dict[str, Any]]  # of the prepared data set: input_ids, labels, question


def sft_config(config: TrainingConfig, run: RunFolder, shared: bool, held_out: bool) -> SFTConfig:
    """TRL's settings for a training. `shared`: the step; `held_out`: whether there are held-out examples."""
    micro_batch = config.per_device_train_batch_size
    arguments = SFTConfig(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=config.examples_per_step if shared else micro_batch,
        gradient_accumulation_steps=1 if shared else config.gradient_accumulation_steps,
        gradient_checkpointing=not shared,  # the shared step measures what fits into memory
        completion_only_loss=True,  # the column completion_mask says what the loss counts
        max_length=None,  # a longer example was refused: nothing is cut
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
        eval_strategy="epoch" if held_out else "no",
        seed=config.seed,
        bf16=False,
        fp16=False,
        tf32=False if training_device() == "cuda" else None,
        use_cpu=training_device() == "cpu",
        ddp_broadcast_buffers=False,  # a process that repeats its step must not wait for the others
        report_to=list(config.trackers),
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one card: DataParallel would bypass our step and double the batch
    return arguments


class ConversationTrainer(SFTTrainer):
    """The SFTTrainer of a run. `model`: from `build_trainable_model`, which decides between the two steps."""

    model: PeftModel
    train_dataset: Any  # datasets.Dataset, as TRL has prepared it; the library's annotations allow much more
    eval_dataset: Any  # the same, or None
    data_collator: Any

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        data: TrainingSet,
        config: TrainingConfig,
        run: RunFolder,
        callbacks: list[TrainerCallback],
    ):
        self.shared = uses_shared_prefix_attention(model)
        collator: Any = list if self.shared else None  # None: TRL's own, which pads
        if config.trackers:
            write_into(run)
        super().__init__(
            model=model,
            args=sft_config(config, run, self.shared, data.held_out is not None),
            data_collator=collator,
            train_dataset=data.training,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        guard_trackers(self)
        self.processing_class = None  # it would be copied into each checkpoint; the base model has it
        self.model_accepts_loss_kwargs = True  # TRL's loss takes the number of labels, whatever the model does
        self._checkpoints = run.checkpoints
        self._budget: TokenBudget | None = None
        self._made = time.monotonic()
        self._clock: float | None = None
        self._noted_step = -1
        self.step_loss = math.nan
        self.step_questions: list[str] = []
        self._window: list[float] = []  # the losses of the steps since the last logged one, those before a resume too

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's would describe a training of another kind, and lie among the checkpoints."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also set the rate of the next step by the schedule of this run: the checkpoint's may have been shorter."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.lr_scheduler is None or self.optimizer is None:
            return
        measured = self.budget if self.shared else None
        self._budget, self._window = load_progress(Path(checkpoint), self.args.process_index, measured)
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
            sequences = [sequence_of(row) for row in self.train_dataset]
            if sentence := memory_sentence(self._budget, [[sequences[i] for i in batch] for batch in batches]):
                print(sentence)
        return self._budget

    def memory_plan(self) -> MemoryPlan | None:
        """What the training will need, its largest pass taken from the first steps; None for the plain step.

        That step's passes are TRL's, with activation checkpointing.
        """
        if not self.shared:
            return None
        steps: Any = self.get_train_dataloader().batch_sampler
        return plan_memory(self.model, [sequence_of(row) for row in self.train_dataset], steps, self.budget)

    def save_progress(self, checkpoint: Path) -> None:
        """Write into a checkpoint what a resume needs beside the Trainer's state."""
        save_progress(checkpoint, self.args.process_index, self.budget if self.shared else None, self._window)

    def get_train_dataloader(self) -> DataLoader:
        steps = OptimizerStepBatches(
            len(self.train_dataset),
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )
        batches = steps if self.shared else MicroBatches(steps, self.args.train_batch_size)
        collate = self.data_collator if self.shared else self._padded
        return EpochDataLoader(self.train_dataset, batch_sampler=batches, collate_fn=collate)

    def _padded(self, rows: Rows) -> dict[str, Any]:
        """A micro-batch as TRL pads it, and its questions. An empty one is an example without labels."""
        if not rows:
            row = self.train_dataset[0]
            return self.data_collator([{**row, "labels": [IGNORED] * len(row["labels"])}]) | {"questions": []}
        return self.data_collator(rows) | {"questions": [row["question"] for row in rows]}

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradients of this process's part of one optimizer step, or of one micro-batch of the plain step.

        Returns this process's share of the loss (nats per label token of the whole effective batch) times the number of
        processes: the Trainer's mean over processes is the loss.
        """
        if self.shared:
            questions, loss = [row["question"] for row in inputs], self._shared_step(model, inputs)
        else:
            questions, loss = inputs.pop("questions"), super().training_step(model, inputs, num_items_in_batch)
        if self._noted_step != self.state.global_step:  # the first micro-batch
            self._noted_step, self.step_loss, self.step_questions = self.state.global_step, 0.0, []
        self.step_loss += self.accelerator.reduce(loss.clone(), "mean").item()
        self.step_questions += questions
        if self.accelerator.sync_gradients:  # the last
            self._window.append(self.step_loss)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            if not math.isfinite(self.step_loss) or not torch.isfinite(norm):
                what = "loss" if not math.isfinite(self.step_loss) else "gradient"
                raise self.bad_numbers(f"the {what} of step {self.state.global_step + 1} is not finite")
        return loss

    def _shared_step(self, model: torch.nn.Module, rows: Rows) -> torch.Tensor:
        model.train()
        sequences = [sequence_of(row) for row in rows]
        labels = torch.tensor(sum(sum(sequence.is_label) for sequence in sequences), device=self.args.device)
        scale = self.args.world_size / self.accelerator.reduce(labels, "sum").item()
        return backward_in_micro_batches(model, sequences, scale, self.budget) * scale

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
        """The held-out loss in nats per label token, computed with the loss of the step; logged as `eval_loss`."""
        if not self.eval_dataset:
            return {}
        started = time.monotonic()
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for loss, labels in self._shared_losses() if self.shared else self._plain_losses():
            sums += torch.stack([loss.double(), sums.new_tensor(labels)])
        self.model.train(was_training)
        loss_sum, labels = self.accelerator.reduce(sums, "sum").tolist()
        if not math.isfinite(loss_sum):
            raise self.bad_numbers(f"the held-out loss after step {self.state.global_step} is not finite")
        metrics = {"eval_loss": loss_sum / labels, "eval_seconds": round(time.monotonic() - started, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _shared_losses(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The summed loss and the labels of each of this process's groups of held-out tree neighbours."""
        tokens = torch.tensor(min(self.budget.tokens, HELD_OUT_TOKENS), device=self.args.device)
        tokens = self.accelerator.gather(tokens).min().item()  # all processes must form the same groups
        groups = split_into_micro_batches([sequence_of(row) for row in self.eval_dataset], tokens)
        for group in groups[self.args.process_index :: self.args.world_size]:
            tree = build_prefix_tree(group)
            yield shared_prefix_loss(self.model, tree), tree.num_labels

    def _plain_losses(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The same of micro-batches, by TRL's head. (Its own evaluation is a mean over batches, not over labels.)"""
        size = self.args.train_batch_size
        for start in range(self.args.process_index * size, len(self.eval_dataset), self.args.world_size * size):
            rows = [self.eval_dataset[i] for i in range(start, min(start + size, len(self.eval_dataset)))]
            inputs = self._prepare_inputs(self.data_collator(rows))
            outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
            yield -outputs.log_probs.sum(), int(outputs.label_mask.sum())

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
